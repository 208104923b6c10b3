"""Joseph's projector for views of straight rays in the plane, its transpose, and how an operator calls them.

Joseph (1982) follows a ray from image line to image line and interpolates linearly between the two nearest pixels of
each. Rays that are steeper than the diagonal cross the rows of the image, the others its columns, which are the rows of
the transposed image; so there are two groups of views, and one kernel that sees rays crossing rows:

    (A x)[view, k] = weight[view, k] sum_i sum_j hat(c(i) - j) x[i, j],    c(i) = offset + slope i,  hat = (1 - |.|)+

with the ray's own offset and slope. The transpose gathers too: a pixel (i, j) is seen only by the few bins around its
own projection, with the same hats. Neither direction scatters or stores an index, so both need little memory, and each
is the exact transpose of the other but for rounding.

Rows i, columns j and bins k are counted from the centres of the image and of the detector.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# Rows (or views) taken per step of the scan. On a CPU fewer let XLA fuse the slices into the inner loop, which then is
# not vectorised (3 x slower); on a GPU every step costs a launch.
_BLOCK = {"cpu": 8, "other": 32}
PAD = 2  # zeros on both sides of a row: XLA clamps indices outside the row onto them


class Rays(Protocol):
    """A static, hashable fan of rays, with ``view`` a pytree of the numbers that place it in one view."""

    def ray(self, view, k) -> Any:
        """(offset, slope) of ray k."""
        ...

    def bin(self, view, i, j) -> Any:
        """The (fractional) bin that sees the point (i, j)."""
        ...

    def share(self, view, k, ahead, i, j) -> Any:
        """hat(c(i) - j) for ray k and the point (i, j), whose own bin is k - ahead."""
        ...


class Group(NamedTuple):
    """The views whose rays cross rows, or those whose rays cross columns; arrays with one entry per view.

    Views are rows of the measurement. To fill shapes that are common to all subsets, a group may end with views of
    weight 0.
    """

    view: NamedTuple
    weight: jax.Array | np.ndarray  # (views, bins or 1): length between two lines, 0 for a ray of the other group
    source: jax.Array | np.ndarray  # (views,): its row of the measurement
    place: jax.Array | np.ndarray  # (rows of the measurement,): its view in this group, or `views` where it has none


@dataclass(frozen=True)
class Joseph:
    """The pair of maps for `linear.apply`, with the two groups as operands."""

    rays: Rays
    shape: tuple[int, int]  # of the image
    bins: int
    taps: int  # how many bins may see one pixel

    def forward(self, x, *groups: Group):
        return with_trailing_batch(self._forward, x, groups)

    def transpose(self, y, *groups: Group):
        return with_trailing_batch(self._transpose, y, groups)

    def _forward(self, x, groups):
        total = 0.0
        for image, group in zip((x, jnp.swapaxes(x, 0, 1)), groups, strict=True):
            if len(group.source):
                group = cast(group, x.dtype)
                y = on_platform(partial(project, self.rays, self.bins), image, group.view, group.weight)
                nothing = jnp.zeros((1, *y.shape[1:]), y.dtype)
                total = total + lax.concatenate([y, nothing], 0)[group.place]
        return total

    def _transpose(self, y, groups):
        total = 0.0
        for swap, group in zip((False, True), groups, strict=True):
            if len(group.source):
                group = cast(group, y.dtype)
                shape = self.shape[::-1] if swap else self.shape
                lines = y[group.source]
                x = on_platform(partial(backproject, self.rays, shape, self.taps), lines, group.view, group.weight)
                total = total + (jnp.swapaxes(x, 0, 1) if swap else x)
        return total


def project(rays, bins: int, image, view, weight, *, block: int):
    """Line integrals of an image (rows, columns, ...) along all rays: (views, bins, ...)."""
    rows, columns, *batch = image.shape
    block = min(block, rows)
    offset, slope = rays.ray(as_columns(view), centred(bins, image.dtype)[None])
    offset = offset + ((columns - 1) / 2 + PAD)
    lines = pad(image, {0: (0, -rows % block), 1: (PAD, PAD)}).reshape(-1, block, columns + 2 * PAD, *batch)
    i = jnp.arange(lines.shape[0] * block, dtype=image.dtype).reshape(-1, block) - (rows - 1) / 2

    def step(total, some):
        for height, line in zip(*some, strict=True):
            crossing = offset + slope * height
            left = crossing.astype(jnp.int32)  # rounds towards 0, where the row is padded
            share = expand(crossing - left.astype(crossing.dtype), batch)
            first, second = take(line, left), take(line, left + 1)
            total = total + (first + share * (second - first))
        return total, None

    views = weight.shape[0]
    total, _ = lax.scan(step, jnp.zeros((views, bins, *batch), image.dtype), (i, lines))
    return total * expand(weight, batch)


def backproject(rays, shape, taps: int, y, view, weight, *, block: int):
    """The transpose of `project`: (views, bins, ...) to (rows, columns, ...)."""
    views, bins, *batch = y.shape
    block = min(max(1, 2 * block // taps), views)
    lines = pad(y * expand(weight, batch), {0: (0, -views % block), 1: (taps, taps)})
    lines = lines.reshape(-1, block, bins + 2 * taps, *batch)
    view = jax.tree.map(lambda v: repeat_last(v, -views % block).reshape(-1, block), view)
    i, j = (centred(n, y.dtype) for n in shape)
    i, j = i[:, None], j[None]
    middle = (bins - 1) / 2 + taps

    def step(total, some):
        for place, line in zip(unstack(some[0], block), some[1], strict=True):
            # the bins within taps/2 of the pixel's own: the window's start is positive wherever it meets the detector
            own = rays.bin(place, i, j)
            start = (own + (middle + 1 - taps / 2)).astype(jnp.int32)
            first = start.astype(y.dtype) - middle
            ahead = first - own
            for tap in range(taps):
                share = rays.share(place, first + tap, ahead + tap, i, j)
                total = total + expand(share, batch) * take(line, start + tap)
        return total, None

    total, _ = lax.scan(step, jnp.zeros((*shape, *batch), y.dtype), (view, lines))
    return total


def with_trailing_batch(function, v, groups):
    """function(v, groups) of the last two axes, with the batch as one trailing axis.

    Positions are then computed once for the whole batch, whose values lie next to each other in memory.
    """
    dtype = v.dtype
    v = v.astype(jnp.promote_types(dtype, jnp.float32))  # positions need more digits than half precision has
    lead = v.shape[:-2]
    if not lead:
        return function(v, groups).astype(dtype)
    out = function(jnp.moveaxis(v.reshape(-1, *v.shape[-2:]), 0, -1), groups)
    return jnp.moveaxis(out, -1, 0).reshape(*lead, *out.shape[:-1]).astype(dtype)


def on_platform(kernel, *arguments):
    return lax.platform_dependent(
        *arguments, cpu=partial(kernel, block=_BLOCK["cpu"]), default=partial(kernel, block=_BLOCK["other"])
    )


def take(line, index):
    """line[index], with indices outside clamped."""
    trailing = line.shape[1:]
    numbers = lax.GatherDimensionNumbers(
        offset_dims=tuple(range(index.ndim, index.ndim + len(trailing))),
        collapsed_slice_dims=(0,),
        start_index_map=(0,),
    )
    return lax.gather(line, index[..., None], numbers, (1, *trailing), mode=lax.GatherScatterMode.CLIP)


def pad(v, widths):
    return lax.pad(v, jnp.zeros((), v.dtype), [(*widths.get(axis, (0, 0)), 0) for axis in range(v.ndim)])


def repeat_last(v, times: int):
    return lax.concatenate([v, jnp.broadcast_to(v[-1:], (times,))], 0)


def unstack(view, n: int):
    return [jax.tree.map(lambda v, q=q: v[q], view) for q in range(n)]


def as_columns(view):
    return jax.tree.map(lambda v: v[:, None], view)


def centred(n: int, dtype):
    return jnp.arange(n, dtype=dtype) - (n - 1) / 2


def hat(distance):
    return jnp.maximum(0, 1 - jnp.abs(distance))


def expand(v, batch):
    return v.reshape(*v.shape, *[1] * len(batch))


def cast(group: Group, dtype) -> Group:
    cast = lambda v: jnp.asarray(v).astype(dtype)  # noqa: E731
    return group._replace(view=jax.tree.map(cast, group.view), weight=cast(group.weight))
