"""Total variation, exact and smoothed, with learnable weight and smoothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from jbilevel import prox
from jbilevel._core.constants import Constants
from jbilevel.operators.differences import Gradient, backward_difference, forward_difference
from jbilevel.regularizers.base import Regularizer, require_theta
from jbilevel.regularizers.images import require_image
from jbilevel.regularizers.potentials import POTENTIALS
from jbilevel.regularizers.ridge_sum import RidgeSum, RidgeTerm
from jbilevel.regularizers.saddle_blocks import SaddleBlocks

# sup_t t / (t^2 + 1)^(3/2), at t = 1/sqrt(2): derivative of the flux with respect to log eps
_FLUX_IN_EPS = (1 / np.sqrt(2)) / 1.5**1.5


@dataclass(frozen=True, kw_only=True)
class SmoothedTV(Regularizer):
    """R(theta, x) = lambda sum_pixels sqrt(|D x|^2 + eps^2), with lambda = exp(theta[0]) and eps = exp(theta[1]).

    D takes forward differences along the two image axes with Neumann boundary. As eps falls to 0 the energy tends to
    total variation (Rudin, Osher & Fatemi 1992, rudin_osher_fatemi_1992). Two-parameter learning has no interior
    optimum in eps: fix it, or bound it with `project`.

    Args:
      kind: "isotropic" (one root per pixel) or "anisotropic" (one root per difference).
      eps: None learns it as theta[1]; a positive number fixes it, and then theta = [log lambda].
      channels: the number C of channels of x of shape (C, H, W); None: x of shape (H, W).
      coupling: of channels, "joint" takes one root over all channels of a pixel, "separate" one each.
      eps_min, eps_max: bounds that `project` enforces on a learned eps.

    x has any float dtype.

    Raises:
      ValueError: an option out of its range; theta or x of another shape.

    >>> import jax.numpy as jnp
    >>> R = SmoothedTV(eps=1e-3)
    >>> float(R(jnp.array([0.0]), jnp.array([[0.0, 1.0], [0.0, 1.0]]))) - 2.0 < 0.01
    True
    >>> SmoothedTV(channels=3).bounds(R.init(), (8, 8))
    Traceback (most recent call last):
    ValueError: SmoothedTV with `channels=3` takes one image of shape (3, H, W), got (8, 8); batch with vmap.
    """

    kind: str = "isotropic"
    eps: float | None = None
    channels: int | None = None
    coupling: str = "joint"
    eps_min: float = 1e-3
    eps_max: float = 1.0

    def __post_init__(self):
        if self.kind not in ("isotropic", "anisotropic"):
            raise ValueError(f"`kind` must be 'isotropic' or 'anisotropic', got {self.kind!r}.")
        if self.channels is not None and not (isinstance(self.channels, int) and self.channels >= 1):
            raise ValueError(f"`channels` must be the number of image channels or None, got {self.channels!r}.")
        if self.coupling not in ("joint", "separate"):
            raise ValueError(f"`coupling` must be 'joint' or 'separate', got {self.coupling!r}.")
        if self.eps is not None and not self.eps > 0:
            raise ValueError(f"`eps` must be positive (the energy is not smooth at 0), got {self.eps}.")
        if not 0 < self.eps_min <= self.eps_max:
            raise ValueError(f"need 0 < eps_min <= eps_max, got eps_min={self.eps_min}, eps_max={self.eps_max}.")

    def init(self, key=None, *, weight: float = 0.05, eps: float = 0.01, dtype=None):
        """theta at a reasonable start for images in [0, 1] with noise of about 0.1; deterministic (key is ignored)."""
        values = [weight] if self.eps is not None else [weight, eps]
        return jnp.log(jnp.asarray(values, dtype or jnp.result_type(float)))

    def check(self, params) -> None:
        require_theta("SmoothedTV", params, (1,) if self.eps is not None else (2,))

    def scales(self, params):
        """(lambda, eps) at theta."""
        self.check(params)
        theta = jnp.asarray(params)
        return jnp.exp(theta[0]), (jnp.exp(theta[1]) if self.eps is None else jnp.asarray(self.eps, theta.dtype))

    def __call__(self, params, x):
        weight, eps = self.scales(params)
        require_image("SmoothedTV", x.shape, channels=self.channels)
        squares = [forward_difference(x, axis) ** 2 for axis in (-2, -1)]
        if self._joint:
            squares = [jnp.sum(s, axis=0) for s in squares]
        if self.kind == "isotropic":
            return weight * jnp.sum(jnp.sqrt(squares[0] + squares[1] + eps**2))
        return weight * sum(jnp.sum(jnp.sqrt(s + eps**2)) for s in squares)

    def linearize(self, params, x):
        """Of one root for two differences: D'(C D v) with three coefficients per pixel."""
        if self.kind != "isotropic" or self._joint:
            return None
        weight, eps = self.scales(params)
        require_image("SmoothedTV", x.shape, channels=self.channels)
        a, b = (forward_difference(x, axis) for axis in (-2, -1))
        root = jnp.sqrt(a**2 + b**2 + eps**2)
        unit = weight / root
        a, b = a / root, b / root
        rows, columns, mixed = unit * (1 - a**2), unit * (1 - b**2), -unit * a * b

        def product(v):
            first, second = (forward_difference(v, axis) for axis in (-2, -1))
            return backward_difference(rows * first + mixed * second, -2) + backward_difference(
                mixed * first + columns * second, -1
            )

        gradient = backward_difference(weight * a, -2) + backward_difference(weight * b, -1)
        return weight * jnp.sum(root), gradient, product

    @property
    def _joint(self) -> bool:
        return self.channels is not None and self.coupling == "joint"

    def bounds(self, params, shape) -> Constants:
        """Curvature bounds: 0 <= Hessian <= 8 lambda/eps, and the Lipschitz constants that certificates need.

        ||D||^2 <= 8 and each pixel's difference has ||D_p||^2 <= 3, so the Hessian is Lipschitz with
        0.859 * 8 sqrt(3) lambda/eps^2: 0.859 bounds the third derivative of the scalar root, and a symmetric trilinear
        form on a Hilbert space attains its norm on the diagonal (Banach 1938), so it also holds for sqrt(|v|^2 + 1).
        mixed_norm grows with the square root of the number of roots.
        """
        require_image("SmoothedTV", shape, channels=self.channels)
        weight, eps = self.scales(params)
        learned = self.eps is None
        pixel = 2.0 if self.kind == "anisotropic" else 3.0
        roots = np.prod(shape[-2:] if self._joint else shape) * (2 if self.kind == "anisotropic" else 1)
        flux = np.sqrt(1 + _FLUX_IN_EPS**2) if learned else 1.0
        return Constants(
            strong_convexity=jnp.zeros_like(weight),
            smoothness=8 * weight / eps,
            hessian_lipschitz=POTENTIALS["root"].third * 8 * np.sqrt(pixel) * weight / eps**2,
            mixed_lipschitz=(np.sqrt(2.0) if learned else 1.0) * 8 * weight / eps,
            mixed_norm=weight * np.sqrt(8.0 * roots) * flux,
        )

    def saddle(self, params) -> SaddleBlocks:
        """max over q of <D x, q> + eps sum sqrt(lambda^2 - |q|^2): strongly concave with eps/lambda.

        q has the shape (2, H, W) or (2, C, H, W) of the differences.
        """
        weight, eps = self.scales(params)

        def prox_dual(v, step):
            """Over the members of one root, brought together on the first axis."""
            if self.kind == "anisotropic":
                axis = 1 if self._joint else None
                return prox.root_conjugate(v, step, weight, eps, axis=axis)
            together = v.reshape(-1, *v.shape[2:]) if self._joint else v
            return prox.root_conjugate(together, step, weight, eps, axis=0).reshape(v.shape)

        return _difference_blocks("SmoothedTV", prox_dual, channels=self.channels, mu_dual=eps / weight)

    def ridges(self, params, shape) -> RidgeSum:
        require_image("SmoothedTV", shape, channels=self.channels)
        weight, eps = self.scales(params)
        axis = ((0, 1) if self._joint else (0,)) if self.kind == "isotropic" else ((1,) if self._joint else None)
        pools = (jnp.sum,)
        widths = pools if self.eps is None else ()
        term = RidgeTerm(
            potential=POTENTIALS["root"], weights=weight, widths=eps, axis=axis, weight_pools=pools, width_pools=widths
        )
        return _difference_ridges("SmoothedTV", term, pair=self.kind == "isotropic", channels=self.channels)

    def project(self, params):
        """Nearest theta with eps_min <= eps <= eps_max (pass as ``projection=`` to a method)."""
        if self.eps is not None:
            return params
        return params.at[1].set(jnp.clip(params[1], np.log(self.eps_min), np.log(self.eps_max)))


@dataclass(frozen=True, kw_only=True)
class TV(Regularizer):
    """R(theta, x) = lambda sum_pixels h(|D x|), lambda = exp(theta[0]): total variation itself, or Huber's of a width.

    h(t) = t for ``width=0`` (Rudin, Osher & Fatemi 1992, rudin_osher_fatemi_1992), else t^2/(2 width) up to width and
    t - width/2 beyond. D takes forward differences with Neumann boundary and |.| is the 2-norm of both (isotropic), as
    in `SmoothedTV`. Not smooth: `jbilevel.variational` makes a `SaddleProblem` of it, whose dual is strongly convex
    with width/lambda.

    theta has shape (1,); x has shape (H, W), any float dtype; ValueError otherwise.

    >>> import jbilevel as jb, jax.numpy as jnp
    >>> problem = jb.variational(None, jb.regularizers.TV())  # two pixels: each moves towards the other by lambda
    >>> (x, y), info = jb.solve(problem, jnp.log(jnp.array([0.1])), jnp.array([[0.0, 1.0]]), tol=1e-6)
    >>> bool(jnp.allclose(x, jnp.array([[0.1, 0.9]]), atol=1e-4))
    True
    """

    width: float = 0.0

    form: ClassVar[str] = "saddle"

    def __post_init__(self):
        if not self.width >= 0:
            raise ValueError(f"`width` of TV must be nonnegative, got {self.width}.")

    def init(self, key=None, *, weight: float = 0.075, dtype=None):
        """theta at a reasonable start for images in [0, 1] with noise of about 0.1; deterministic (key is ignored)."""
        return jnp.log(jnp.asarray([weight], dtype or jnp.result_type(float)))

    def check(self, params) -> None:
        require_theta("TV", params, (1,))

    def __call__(self, params, x):
        self.check(params)
        require_image("TV", x.shape)
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

        return _difference_blocks("TV", prox_dual, mu_dual=self.width / weight if self.width else 0.0)

    def ridges(self, params, shape) -> RidgeSum | None:
        """None with ``width=0``: the energy is not differentiable."""
        self.check(params)
        require_image("TV", shape)
        if not self.width:
            return None
        weight = jnp.exp(params[0])
        width = jnp.asarray(self.width, weight.dtype)
        term = RidgeTerm(
            potential=POTENTIALS["huber"], weights=weight, widths=width, axis=(0,), weight_pools=(jnp.sum,)
        )
        return _difference_ridges("TV", term)


def _difference_ridges(name: str, term: RidgeTerm, *, pair: bool = True, channels: int | None = None) -> RidgeSum:
    """Of the differences along the last two axes, both of a pixel (of norm sqrt(3)) or each (sqrt(2)) in a group."""
    rows = np.sqrt(3.0 if pair else 2.0).item()
    linear = _difference_blocks(name, None, mu_dual=0.0, channels=channels).linear
    return RidgeSum(linear=lambda x: linear(x, ()), terms=(term,), norm=np.sqrt(8.0).item(), rows=rows)


def _difference_blocks(name: str, prox_dual, *, mu_dual, channels: int | None = None) -> SaddleBlocks:
    """The blocks of a function of D x: L = D along the last two axes, of norm sqrt(8) at most."""

    def linear(x, z):
        require_image(name, x.shape, channels=channels)
        return Gradient(x.shape, axes=(-2, -1))(x)

    return SaddleBlocks(
        linear=linear,
        transpose=lambda q: (Gradient(q.shape[1:], axes=(-2, -1)).T(q), ()),
        prox_dual=prox_dual,
        start=lambda x: ((), jnp.zeros((2, *x.shape), x.dtype)),
        scaling=lambda: ((0.1, ()), 10 / 8),
        mu_dual=mu_dual,
    )
