"""Operators and networks on tiny shapes, and programs that apply them: a part of `benchmarks.programs`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jbilevel as jb
from jbilevel import operators
from jbilevel.operators.cone import FDK
from jbilevel.operators.fbp import FBP

SHAPE = (16, 16)
ANGLES = np.pi * np.arange(6) / 6
TURN = 2 * np.pi * np.arange(6) / 6
BINS = 24


class Program(NamedTuple):
    """A function and what it is called with: arrays, or their shapes and dtypes where it is only compiled."""

    function: Callable
    arguments: tuple


def drawn(shape, dtype, seed: int = 0):
    """Standard normal numbers."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def cast(tree, dtype: str):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), tree)


# ---------------------------------------------------------------------------------------------------------- operators

SKEW = ((0.1, 0.7), (-0.4, 0.2), (0.3, -0.1))  # a kernel without any symmetry
MASK = np.arange(np.prod(SHAPE)).reshape(SHAPE) % 3 > 0
COILS = np.exp(0.1j * np.arange(2 * np.prod(SHAPE))).reshape(2, *SHAPE)


def fan():
    return operators.FanBeam(SHAPE, TURN, BINS, source_origin=40.0, origin_detector=20.0)


def cone():
    return operators.ConeBeam((4, 8, 8), TURN, (6, 12), source_origin=30.0, origin_detector=10.0)


def parallel():
    return operators.ParallelBeam(SHAPE, ANGLES, BINS)


def volume():
    return operators.ParallelBeam3D((4, 8, 8), ANGLES, (4, 12))


OPERATORS = {
    "parallel beam": parallel,
    "parallel beam, subset": lambda: parallel().subset(1, 2),
    "parallel beam, filtered backprojection": lambda: FBP(parallel(), "hann"),
    "fan beam": fan,
    "fan beam, subset": lambda: fan().subset(1, 2),
    "fan beam, filtered backprojection": lambda: FBP(fan()),
    "parallel beam 3D": volume,
    "cone beam": cone,
    "cone beam, subset": lambda: cone().subset(1, 2),
    "cone beam, FDK": lambda: FDK(cone()),
    "gradient": lambda: operators.Gradient(SHAPE),
    "gradient, periodic": lambda: operators.Gradient(SHAPE, "periodic"),
    **{f"blur, {name}": partial(operators.Blur, SHAPE, SKEW, name) for name in operators.blur.BOUNDARIES},
    "Gaussian blur": lambda: operators.gaussian_blur(SHAPE, 1.0),
    "mask": lambda: operators.Mask(MASK),
    "down-sampling, average": lambda: operators.DownSample(SHAPE, 2),
    "down-sampling, subsampling": lambda: operators.DownSample(SHAPE, 2, "subsampling"),
    "Fourier, real image": lambda: operators.UndersampledFourier(SHAPE, MASK),
    "Fourier, coils": lambda: operators.UndersampledFourier(SHAPE, MASK, coils=COILS, in_kind="complex"),
    "wavelet": lambda: operators.Wavelet(SHAPE, "db2", 2),
    "function": lambda: operators.from_functions(partial(jnp.cumsum, axis=0), None, SHAPE, SHAPE),
    "stack": lambda: operators.stack([parallel(), 2.0 * operators.Gradient(SHAPE)]),
}
BRIDGES = {
    "from_callbacks": lambda: operators.from_callbacks(np.cumsum, lambda y: np.cumsum(y[::-1])[::-1], (8,), (8,)),
    "ASTRA": lambda: operators.Astra(SHAPE, ANGLES, BINS, device="cpu"),
}


def squared_norm(tree):
    return sum(jnp.sum(jnp.real(leaf * jnp.conj(leaf))) for leaf in jax.tree.leaves(tree))


def products(make: Callable, dtype: str) -> Program:
    """A x, A^T y, and the gradient of 1/2 ||A x||^2."""
    A = make()
    kinds = {"real": dtype, "complex": jnp.result_type(dtype, jnp.complex64)}
    x = drawn(A.in_shape, kinds[A.in_kind])
    y = jax.tree.map(lambda out: drawn(out.shape, out.dtype, 1), jax.eval_shape(A, x))
    energy = lambda x: 0.5 * squared_norm(A(x))  # noqa: E731
    return Program(lambda x, y: (A(x), A.T(y), jax.grad(energy)(x)), (x, y))


def traced_subset(dtype: str) -> Program:
    """Of a number that only the running program knows."""
    A = parallel()

    def function(i, x, y):
        part = A.subset(i, 2)
        return part(x), part.T(part.restrict(y)), jax.grad(lambda x: squared_norm(part(x)))(x)

    return Program(function, (1, drawn(A.in_shape, dtype), drawn(A.out_shape, dtype, 1)))


# ----------------------------------------------------------------------------------------------------------- networks


def lpd(**options):
    from flax import nnx

    return jb.nets.LPD(parallel(), rngs=nnx.Rngs(0), unroll=False, **{"layers": 4, "width": 4} | options)


def named(name: str):
    from flax import nnx

    return jb.nets.LPD.named(name, operator=parallel(), rngs=nnx.Rngs(0), layers=2, width=4, unroll=False)


def unet():
    from flax import nnx

    return jb.nets.UNet(1, 2, widths=(4, 8), rngs=nnx.Rngs(0))


def resnet(depth: int):
    from flax import nnx

    return jb.nets.ResNet(depth, 3, width=4, channels=1, rngs=nnx.Rngs(0))


def convnet():
    from flax import nnx

    return jb.nets.ConvNet(1, 1, dims=2, width=4, rngs=nnx.Rngs(0))


NETWORKS = {
    "LPD": (lpd, parallel().out_shape),
    "LPD, pdnet": (partial(named, "pdnet"), parallel().out_shape),
    "LSPD": (partial(lpd, subsets=2), parallel().out_shape),
    "LSPD, a dual per subset": (partial(lpd, subsets=2, dual="per-subset"), parallel().out_shape),
    **{
        f"sketched LSPD, {form}": (partial(lpd, subsets=2, sketch=(2, 2, 1, 1), sketched=form), parallel().out_shape)
        for form in ("operator", "primal", "residual")
    },
    "U-Net": (unet, SHAPE),
    "ResNet, basic": (partial(resnet, 18), (32, 32)),
    "ResNet, bottlenecks": (partial(resnet, 50), (32, 32)),
    "ConvNet": (convnet, (*SHAPE, 1)),
}


def network(make: Callable, shape: tuple, dtype: str) -> Program:
    """The output of a network, and the gradient of half its squared norm in all parameters."""
    f, params = jb.nets.from_flax(make())

    def forward_and_gradient(params, x):
        def energy(params):
            out = f(params, x)
            return 0.5 * squared_norm(out), out

        return jax.grad(energy, has_aux=True)(params)

    return Program(forward_and_gradient, (cast(params, dtype), drawn(shape, dtype)))
