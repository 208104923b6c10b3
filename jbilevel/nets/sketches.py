"""Sketches of an imaging operator: the same rays through a coarser grid of the same size."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace

import jax


def coarsened(operator, factor: int):
    """The X-ray transform on a grid whose pixels are ``factor`` times larger, with the same rays.

    Raises:
      ValueError: a side of the image is not a multiple of ``factor``, or the operator has no ``pixel_size``.

    >>> import jbilevel as jb
    >>> A = coarsened(jb.operators.ParallelBeam((8, 8), [0.0, 1.5], 11), 2)
    >>> A.in_shape, A.pixel_size, A.out_shape
    ((4, 4), 2.0, (2, 11))
    """
    if factor == 1:
        return operator
    if not is_dataclass(operator) or "pixel_size" not in [field.name for field in fields(operator)]:
        raise ValueError(f"`sketch` needs an X-ray transform with a `pixel_size`, {type(operator).__name__} has none.")
    if any(side % factor for side in operator.in_shape):
        raise ValueError(
            f"`sketch` {factor} does not divide the image {operator.in_shape}: crop or pad it to multiples of {factor}."
        )
    shape = tuple(side // factor for side in operator.in_shape)
    return replace(operator, in_shape=shape, pixel_size=factor * operator.pixel_size)


def resized(v, shape):
    """v (*any shape, channels) on a grid of another shape over the same square, by (bi-, tri-) linear interpolation.

    Without a low-pass filter on the way down, as in the papers: halving takes the mean of 2 x 2 pixels.
    """
    shape = (*shape, v.shape[-1])
    return v if v.shape == shape else jax.image.resize(v, shape, "linear", antialias=False)
