"""Total variation, exact and smoothed, with learnable weight and smoothing."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from jbilevel import prox
from jbilevel._core.constants import Constants
from jbilevel.operators.differences import Gradient, forward_difference
from jbilevel.regularizers.base import Regularizer
from jbilevel.regularizers.saddle_blocks import SaddleBlocks

# sup_t |d^3/dt^3 sqrt(t^2 + 1)|, at t = 1/2; a symmetric trilinear form on a Hilbert space attains its norm on the
# diagonal (Banach 1938), so the constant of the scalar function also holds for sqrt(|v|^2 + 1).
_THIRD_DERIVATIVE = 1.5 / 1.25**2.5
# sup_t t / (t^2 + 1)^(3/2), at t = 1/sqrt(2): derivative of the flux with respect to log eps
_FLUX_IN_EPS = (1 / np.sqrt(2)) / 1.5**1.5


@dataclass(frozen=True)
class SmoothedTV(Regularizer):
    """R(theta, x) = lambda sum_pixels sqrt(|D x|^2 + eps^2), with lambda = exp(theta[0]) and eps = exp(theta[1]).

    D takes forward differences along the two image axes with Neumann boundary (papers 0 and 2; DESIGN's settled
    reading: isotropic, summed over pixels). As eps falls to 0 the energy tends to total variation (Rudin, Osher &
    Fatemi 1992). Two-parameter learning has no interior optimum in eps: fix it, or bound it with `project`.

    Args:
      kind: "isotropic" (one root per pixel) or "anisotropic" (one root per difference).
      eps: None learns it as theta[1]; a positive number fixes it, and then theta = [log lambda].
      channels: for x of shape (H, W, C): "coupled" takes one root over all channels of a pixel, "separate" one each.
      eps_min, eps_max: bounds that `project` enforces on a learned eps.

    x has shape (H, W) or (H, W, C), any float dtype.

    >>> import jax.numpy as jnp
    >>> R = SmoothedTV(eps=1e-3)
    >>> float(R(jnp.array([0.0]), jnp.array([[0.0, 1.0], [0.0, 1.0]]))) - 2.0 < 0.01
    True
    """

    kind: str = "isotropic"
    eps: float | None = None
    channels: str = "coupled"
    eps_min: float = 1e-3
    eps_max: float = 1.0

    def __post_init__(self):
        if self.kind not in ("isotropic", "anisotropic"):
            raise ValueError(f"`kind` must be 'isotropic' or 'anisotropic', got {self.kind!r}.")
        if self.channels not in ("coupled", "separate"):
            raise ValueError(f"`channels` must be 'coupled' or 'separate', got {self.channels!r}.")
        if self.eps is not None and not self.eps > 0:
            raise ValueError(f"`eps` must be positive (the energy is not smooth at 0), got {self.eps}.")
        if not 0 < self.eps_min <= self.eps_max:
            raise ValueError(f"need 0 < eps_min <= eps_max, got eps_min={self.eps_min}, eps_max={self.eps_max}.")

    def init(self, key=None, *, weight: float = 0.05, eps: float = 0.01, dtype=None):
        """theta at a reasonable start for images in [0, 1] with noise of about 0.1; deterministic (key is ignored)."""
        values = [weight] if self.eps is not None else [weight, eps]
        return jnp.log(jnp.asarray(values, dtype or jnp.result_type(float)))

    def scales(self, params):
        """(lambda, eps) at theta."""
        theta = jnp.asarray(params)
        expected = (1,) if self.eps is not None else (2,)
        if theta.shape != expected:
            raise ValueError(f"params of SmoothedTV must have shape {expected}, got {theta.shape}; see its init.")
        return jnp.exp(theta[0]), (jnp.exp(theta[1]) if self.eps is None else jnp.asarray(self.eps, theta.dtype))

    def __call__(self, params, x):
        if x.ndim not in (2, 3):
            raise ValueError(f"SmoothedTV takes one (H, W) or (H, W, C) image, got shape {x.shape}; batch with vmap.")
        weight, eps = self.scales(params)
        squares = [forward_difference(x, axis) ** 2 for axis in (0, 1)]
        if self.channels == "coupled" and x.ndim == 3:
            squares = [jnp.sum(s, axis=-1) for s in squares]
        if self.kind == "isotropic":
            return weight * jnp.sum(jnp.sqrt(squares[0] + squares[1] + eps**2))
        return weight * sum(jnp.sum(jnp.sqrt(s + eps**2)) for s in squares)

    def bounds(self, params, shape=None) -> Constants:
        """Curvature bounds: 0 <= Hessian <= 8 lambda/eps, and the Lipschitz constants that certificates need.

        ||D||^2 <= 8 and each pixel's difference has ||D_p||^2 <= 3, so the Hessian is Lipschitz with
        0.859 * 8 sqrt(3) lambda/eps^2. ``shape`` of x is needed for mixed_norm, which grows with the square root of the
        number of roots; without it mixed_norm is None.
        """
        weight, eps = self.scales(params)
        learned = self.eps is None
        pixel = 2.0 if self.kind == "anisotropic" else 3.0
        hessian_lipschitz = _THIRD_DERIVATIVE * 8 * np.sqrt(pixel) * weight / eps**2
        mixed_norm = None
        if shape is not None:
            roots = np.prod(shape[:2]) * (2 if self.kind == "anisotropic" else 1)
            if len(shape) == 3 and self.channels == "separate":
                roots = roots * shape[2]
            flux = np.sqrt(1 + _FLUX_IN_EPS**2) if learned else 1.0
            mixed_norm = weight * np.sqrt(8.0 * roots) * flux
        mixed_lipschitz = (np.sqrt(2.0) if learned else 1.0) * 8 * weight / eps
        return Constants(jnp.zeros_like(weight), 8 * weight / eps, hessian_lipschitz, mixed_lipschitz, mixed_norm)

    def saddle(self, params) -> SaddleBlocks:
        """max over q of <D x, q> + eps sum sqrt(lambda^2 - |q|^2): strongly concave with eps/lambda.

        q has the shape (2, H, W) or (2, H, W, C) of the differences.
        """
        weight, eps = self.scales(params)

        def linear(x, z):
            return Gradient(x.shape, axes=(0, 1))(x)

        def prox_dual(v, step):
            if self.kind == "anisotropic":
                return prox.root_conjugate(v, step, weight, eps)
            if v.ndim == 4 and self.channels == "coupled":
                both = jnp.moveaxis(v, 3, 1)
                flat = prox.root_conjugate(both.reshape(-1, *both.shape[2:]), step, weight, eps, axis=0)
                return jnp.moveaxis(flat.reshape(both.shape), 1, 3)
            return prox.root_conjugate(v, step, weight, eps, axis=0)

        return SaddleBlocks(
            linear, lambda q: (Gradient(q.shape[1:], axes=(0, 1)).T(q), ()), lambda v, step: v, prox_dual,
            lambda x: ((), jnp.zeros((2, *x.shape), x.dtype)), lambda: ((0.1, ()), 10 / 8), 0.0, eps / weight,
        )  # fmt: skip

    def project(self, params):
        """Nearest theta with eps_min <= eps <= eps_max (pass as ``projection=`` to a method)."""
        if self.eps is not None:
            return params
        return params.at[1].set(jnp.clip(params[1], np.log(self.eps_min), np.log(self.eps_max)))


@dataclass(frozen=True)
class TV(Regularizer):
    """R(theta, x) = lambda sum_pixels h(|D x|), lambda = exp(theta[0]): total variation itself, or Huber's of a width.

    h(t) = t for ``width=0`` (Rudin, Osher & Fatemi 1992), else t^2/(2 width) up to width and t - width/2 beyond. D
    takes forward differences with Neumann boundary and |.| is the 2-norm of both (isotropic), as in `SmoothedTV`. Not
    smooth: `jbilevel.variational` makes a `SaddleProblem` of it, whose dual is strongly convex with width/lambda.

    theta has shape (1,); x has shape (H, W), any float dtype; ValueError otherwise.

    >>> import jbilevel as jb, jax.numpy as jnp
    >>> problem = jb.variational(None, jb.regularizers.TV())  # two pixels: each moves towards the other by lambda
    >>> (x, y), info = jb.solve(problem, jnp.log(jnp.array([0.1])), jnp.array([[0.0, 1.0]]), tol=1e-6)
    >>> bool(jnp.allclose(x, jnp.array([[0.1, 0.9]]), atol=1e-4))
    True
    """

    width: float = 0.0

    form = "saddle"

    def __post_init__(self):
        if not self.width >= 0:
            raise ValueError(f"`width` of TV must be nonnegative, got {self.width}.")

    def init(self, key=None, *, weight: float = 0.075, dtype=None):
        """theta at a reasonable start for images in [0, 1] with noise of about 0.1; deterministic (key is ignored)."""
        return jnp.log(jnp.asarray([weight], dtype or jnp.result_type(float)))

    def check(self, params) -> None:
        if jnp.shape(params) != (1,):
            raise ValueError(f"params of TV must have shape (1,), got {jnp.shape(params)}; see its init.")

    def __call__(self, params, x):
        self.check(params)
        squared = sum(d * d for d in Gradient(x.shape)(x))
        short = squared <= self.width**2
        length = jnp.sqrt(jnp.where(short, 1.0, squared))
        inside = squared / (2 * self.width) if self.width else 0.0
        return jnp.exp(params[0]) * jnp.sum(jnp.where(short, inside, length - self.width / 2))

    def saddle(self, params) -> SaddleBlocks:
        """max over |q| <= lambda pixel by pixel of <D x, q> - width/(2 lambda) |q|^2."""
        self.check(params)
        weight = jnp.exp(params[0])

        def prox_dual(v, step):
            if self.width:
                return prox.huber_conjugate(v, step, weight, self.width, axis=0)
            return prox.ball(v, weight, axis=0)

        def linear(x, z):
            return Gradient(x.shape)(x)

        return SaddleBlocks(
            linear, lambda q: (Gradient(q.shape[1:]).T(q), ()), lambda v, step: v, prox_dual,
            lambda x: ((), jnp.zeros((2, *x.shape), x.dtype)), lambda: ((0.1, ()), 10 / 8), 0.0,
            self.width / weight if self.width else 0.0,
        )  # fmt: skip
