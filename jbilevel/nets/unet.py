"""U-Net: images or volumes to logits or images, as a task network or a post-processing of a reconstruction."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jbilevel.nets.convolutions import ConvNet, convolution, nnx
from jbilevel.nets.sketches import resized


class UNet(nnx.Module):
    """(inputs, *shape) -> (outputs, *shape) in two or three dimensions; without the first axis where it is 1.

    Level l has ``widths[l]`` channels: two convolutions with ReLU, then the maximum of 2 x 2 pixels leads to the next
    level. On the way back the coarser result is interpolated linearly, put beside the level's own features, and two
    convolutions lead to ``widths[l - 1]`` channels (``widths[0]`` on the finest level); a convolution of one pixel
    gives the outputs. No batch normalisation, which would couple the samples of a batch. Sides that are no multiple of
    2^(levels - 1) are filled up with copies of the last pixel, and cut off again.

    Args:
      inputs, outputs: channels of input and output, e.g. 1 and the number of classes.
      widths: channels of each level, the coarsest last.
      dims: 2 or 3. kernel: side of the kernels.
      residual: return x + output, to remove artefacts from an image; needs inputs = outputs.
      weights, dtype, param_dtype: see `ConvNet`. rngs: ``nnx.Rngs(seed)``.

    Raises:
      ValueError: fewer than two levels, ``residual`` with other outputs than inputs, an x of a wrong shape.
      ImportError: flax is not installed.

    Reference: Ronneberger, Fischer & Brox, U-Net, MICCAI 2015 (there with learned up-sampling and without padding).

    >>> import jax, jax.numpy as jnp, jbilevel as jb
    >>> from flax import nnx
    >>> net = UNet(1, 4, widths=(4, 8), rngs=nnx.Rngs(0))
    >>> f, params = jb.nets.from_flax(net)
    >>> sum(v.size for v in jax.tree.leaves(params)), jax.eval_shape(f, params, jnp.ones((20, 24))).shape
    (1672, (4, 20, 24))
    >>> trained, frozen = jb.partition(params, net.last(1))  # fine-tuning: the rest stays as it is
    >>> sum(v.size for v in jax.tree.leaves(trained))
    604
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        rngs: nnx.Rngs,
        widths: Sequence[int] = (32, 64, 128, 256),
        dims: int = 2,
        kernel: int = 3,
        residual: bool = False,
        weights: str = "torch",
        dtype=None,
        param_dtype=jnp.float32,
    ):
        if len(widths) < 2:
            raise ValueError(f"`widths` must have at least two levels, got {tuple(widths)}.")
        if residual and inputs != outputs:
            raise ValueError(f"`residual` needs as many outputs as inputs, got {outputs} and {inputs}.")
        self.inputs, self.dims, self.residual, self.levels = inputs, dims, residual, len(widths)
        settings = {"dims": dims, "weights": weights, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}

        def pair(before, after):
            return ConvNet(before, after, width=after, depth=2, kernel=kernel, activation=jax.nn.relu, **settings)

        self.downs = nnx.List([pair(a, b) for a, b in zip((inputs, *widths[:-1]), widths, strict=True)])
        finer = [widths[0], *widths[:-2]]
        channels = [(finer[n + 1] if n + 2 < self.levels else widths[-1]) + widths[n] for n in range(self.levels - 1)]
        self.ups = nnx.List([pair(a, b) for a, b in zip(channels, finer, strict=True)][::-1])
        self.output = convolution(widths[0], outputs, 1, **settings)

    def __call__(self, x):
        x = jnp.asarray(x)
        if x.ndim != self.dims + (self.inputs > 1) or (self.inputs > 1 and x.shape[0] != self.inputs):
            raise ValueError(
                f"`x` must have {self.dims} axes{'' if self.inputs == 1 else f' after {self.inputs} channels'}, got "
                f"shape {x.shape}; use jax.vmap for a batch."
            )
        v = x[..., None] if self.inputs == 1 else jnp.moveaxis(x, 0, -1)  # Flax's layout, inside
        shape, step = v.shape[:-1], 2 ** (self.levels - 1)
        start = v
        v = jnp.pad(v, [*((0, -side % step) for side in shape), (0, 0)], mode="edge")
        skips = []
        for down in self.downs:
            v = jax.nn.relu(down(v if down is self.downs[0] else _pooled(v, self.dims)))
            skips.append(v)
        for up, skip in zip(self.ups, skips[-2::-1], strict=True):
            v = jax.nn.relu(up(jnp.concatenate([resized(v, skip.shape[:-1]), skip], axis=-1)))
        v = self.output(v)[tuple(slice(side) for side in shape)].astype(x.dtype)
        v = start + v if self.residual else v
        return v[..., 0] if v.shape[-1] == 1 else jnp.moveaxis(v, -1, 0)

    def last(self, ups: int = 2) -> Callable:
        """What `jb.partition` takes to train the finest ``ups`` up-sampling blocks and the output only."""
        names = [f"ups/{n}/" for n in range(len(self.ups))][-ups:] if ups else []
        return lambda path, leaf: path.startswith((*names, "output/"))


def _pooled(v, dims: int):
    """The maximum of each 2 x 2 (x 2) block."""
    for axis in range(dims):
        v = jnp.max(v.reshape(*v.shape[:axis], v.shape[axis] // 2, 2, *v.shape[axis + 1 :]), axis=axis + 1)
    return v
