"""The small convolutional network that every layer of a learned reconstruction holds, and how it starts."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

try:
    from flax import nnx
except ImportError as error:
    raise ImportError(
        "jb.nets.LPD, jb.nets.UNet and jb.nets.ResNet need flax: pip install 'jbilevel[nets]'."
    ) from error

WEIGHTS = ("xavier", "torch")


class ConvNet(nnx.Module):
    """(*shape, inputs) -> (*shape, outputs): ``depth`` convolutions with zero padding, an activation between them.

    Args:
      inputs, outputs: features, on the last axis as everywhere in Flax. (Images have their channels in front, and
        `UNet` and `ResNet` take them so.)
      dims: axes of ``shape``.
      width: features between the convolutions.
      kernel, last_kernel: sides of the kernels; ``last_kernel=None`` takes ``kernel`` for the last one too.
      activation: "prelu" (one learned slope for each, from 0.25), "prelu-channels" (one per channel, from 0), or a
        function of arrays.
      weights: "xavier" (Glorot's uniform, biases 0) or "torch" (PyTorch's default: weights and biases uniform in
        +-1/sqrt(fan in)).
      zero_last: start with the last convolution at 0, so that a residual layer starts as the identity.
      dtype: what the convolutions compute in, such as ``jnp.bfloat16``; None: that of parameters and input.

    >>> net = ConvNet(1, 2, dims=2, width=4, depth=2, rngs=nnx.Rngs(0))
    >>> jax.eval_shape(net, jnp.ones((6, 5, 1))).shape, len(net.convs), len(net.slopes)
    ((6, 5, 2), 2, 1)
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        dims: int,
        width: int = 32,
        depth: int = 3,
        kernel: int = 3,
        last_kernel: int | None = None,
        activation: str | Callable = "prelu",
        weights: str = "xavier",
        zero_last: bool = False,
        dtype=None,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        if depth < 1:
            raise ValueError(f"`depth` must be at least 1, got {depth}.")
        channels = [inputs, *[width] * (depth - 1), outputs]
        sides = [*[kernel] * (depth - 1), kernel if last_kernel is None else last_kernel]
        settings = {"dims": dims, "weights": weights, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.convs = nnx.List(
            convolution(channels[n], channels[n + 1], sides[n], zero=zero_last and n == depth - 1, **settings)
            for n in range(depth)
        )
        self.activation = activation
        self.slopes = nnx.List(
            [] if callable(activation) else [_slope(activation, width, param_dtype) for _ in range(depth - 1)]
        )

    def __call__(self, v, mask=None):
        """``mask``, if given, multiplies what every convolution reads: where it is 0, v counts as padding."""
        for n, conv in enumerate(self.convs):
            v = conv(v if mask is None else v * mask)
            if n + 1 < len(self.convs):
                v = self.activation(v) if callable(self.activation) else _prelu(v, self.slopes[n][...])
        return v


def convolution(inputs, outputs, side, *, dims, weights="xavier", zero=False, dtype, param_dtype, rngs) -> nnx.Conv:
    """A convolution over ``dims`` axes with zero padding and the start that ``weights`` names."""
    if weights not in WEIGHTS:
        raise ValueError(f"`weights` must be one of {WEIGHTS}, got {weights!r}.")
    kernel_init, bias_init = nnx.initializers.xavier_uniform(), nnx.initializers.zeros_init()
    if weights == "torch":
        kernel_init = bias_init = _uniform(1 / math.sqrt(inputs * side**dims))
    if zero:
        kernel_init = bias_init = nnx.initializers.zeros_init()
    return nnx.Conv(
        inputs,
        outputs,
        (side,) * dims,
        padding="SAME",
        kernel_init=kernel_init,
        bias_init=bias_init,
        dtype=dtype,
        param_dtype=param_dtype,
        rngs=rngs,
    )


def _uniform(bound: float) -> Callable:
    return lambda key, shape, dtype, *_: jax.random.uniform(key, shape, dtype, -bound, bound)


def _slope(activation: str, width: int, dtype) -> nnx.Param:
    if activation not in ("prelu", "prelu-channels"):
        raise ValueError(f"`activation` must be 'prelu', 'prelu-channels' or a function, got {activation!r}.")
    return nnx.Param(jnp.full((), 0.25, dtype) if activation == "prelu" else jnp.zeros((width,), dtype))


def _prelu(v, slope):
    slope = slope.astype(v.dtype).reshape((1,) * (v.ndim - 1) + (-1,))
    return jnp.where(v >= 0, v, slope * v)
