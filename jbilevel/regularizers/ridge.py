"""Convex and weakly convex ridge regularisers: one learned potential on a multi-convolution of unit norm."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass

import jax
import jax.numpy as jnp

from jbilevel._core.constants import Constants
from jbilevel.regularizers import filters as banks
from jbilevel.regularizers.base import Regularizer, given_key
from jbilevel.regularizers.images import require_image
from jbilevel.regularizers.potentials import potential_named
from jbilevel.regularizers.ridge_sum import RidgeSum, RidgeTerm

_SYMMETRIC_POTENTIALS = ("spline", "huber", "root")


@dataclass(frozen=True)
class CRR(Regularizer):
    """R(theta, x) = e^{a - 2s} sum_i e^{-2 k_i} sum_pixels p(e^{s + k_i} (W x)_i),  p(t) = e^{-b} h(e^b t) - rho h(t).

    Convex (rho = 0) ridge regulariser: W = W_L ... W_1 is a stack of convolutions without biases, the first with
    filters of mean 0, divided by a proven bound on its norm, so ||W|| <= 1. One potential, of slope e^b at 0 and widths
    e^{-k_i}, is shared by all filters (Goujon et al. 2023, goujon_crr_2023; rho from Goujon, Neumayer & Unser 2024,
    goujon_wcrr_2024; this potential with k_i, b and the outer a, s, and the default sizes with their 13767 parameters,
    from Hertrich et al. 2025, hertrich_regularizers_2025).

    By its normalisation the Hessian lies between -rho e^a and e^a max(e^b, rho), whatever the filters and the image.
    The noise-level scaling s changes neither: for noise of t times the standard deviation take s - log t.

    params is a dict: ``kernels``, a tuple of (widths[l], widths[l-1], sizes[l], sizes[l]); ``log_scalings`` k
    (widths[-1],); ``log_slope`` b (), ``log_weight`` a () and ``log_scale`` s ().

    Args:
      widths, sizes: number of filters and kernel size of each convolution; the filters have 1 + sum(sizes - 1) pixels a
        side.
      potential: h, one of "spline" (twice continuously differentiable), "huber" (as in the reference) and "root".
      boundary: "zero" (as in the reference) and "symmetric" extend the image, "valid" takes responses only where a
        filter lies inside it, and then smooths pixels near the border too little. The proven bound on ||W|| for
        "symmetric" is twice as large, so filters are half as large for the same parameters.

    x has shape (H, W), with H and W at least that of a filter, any float dtype.

    Raises ValueError for params of another structure or shape, kernels that are all zero (where they are concrete;
    under a trace the energy is NaN), and images smaller than a filter.

    >>> import jax
    >>> R = CRR()
    >>> theta = jax.eval_shape(R.init, jax.random.key(0))
    >>> sum(leaf.size for leaf in jax.tree.leaves(theta)), R.filter_size
    (13767, 13)
    """

    widths: tuple[int, ...] = (4, 8, 64)
    sizes: tuple[int, ...] = (5, 5, 5)
    _: KW_ONLY
    potential: str = "spline"
    boundary: str = "zero"

    @property
    def weak_convexity(self) -> float:
        return 0.0

    @property
    def filter_size(self) -> int:
        return 1 + sum(size - 1 for size in self.sizes)

    def __post_init__(self):
        if not self.widths or len(self.widths) != len(self.sizes):
            raise ValueError(
                f"`widths` and `sizes` need one number per convolution, got {self.widths} and {self.sizes}."
            )
        for width, size in zip(self.widths, self.sizes, strict=True):
            banks.require_bank(type(self).__name__, self.boundary, widths=width, sizes=size)
        potential_named(self.potential, among=_SYMMETRIC_POTENTIALS)

    def init(self, key=None, *, noise: float = 0.1, slope: float = 4.0, dtype=None):
        """Random kernels, and a potential of width noise/2 that is e^slope-fold curved at 0, for images in [0, 1].

        ``key=None`` stands for `jax.random.key(0)`.
        """
        dtype = dtype or jnp.result_type(float)
        keys = jax.random.split(given_key(key), len(self.sizes))
        kernels = [
            jax.random.normal(k, shape, dtype) / math.sqrt(shape[1] * shape[2] ** 2)
            for k, shape in zip(keys, self._kernel_shapes, strict=True)
        ]
        return {
            "kernels": tuple(kernels),
            "log_scalings": jnp.full((self.widths[-1],), math.log(2 / noise), dtype),
            "log_slope": jnp.asarray(slope, dtype),
            "log_weight": jnp.zeros((), dtype),
            "log_scale": jnp.zeros((), dtype),
        }

    @property
    def _kernel_shapes(self):
        inputs = (1, *self.widths[:-1])
        return tuple((o, c, k, k) for o, c, k in zip(self.widths, inputs, self.sizes, strict=True))

    def check(self, params) -> None:
        """ValueError where params cannot be those of this regulariser; values are checked where they are concrete."""
        name, scalar = type(self).__name__, ("log_slope", "log_weight", "log_scale")
        shapes = {"kernels": self._kernel_shapes, "log_scalings": self.widths[-1:]}
        banks.require_params(name, params, shapes | dict.fromkeys(scalar, ()))
        for layer in params["kernels"]:
            banks.require_filters(name, "kernels", layer)

    def filters(self, params):
        """The rows of W as one bank (widths[-1], filter_size, filter_size), of norm <= 1 on the extended image."""
        first, *rest = params["kernels"]
        bank = banks.compose([banks.zero_mean(first), *rest])
        return bank / jnp.sqrt(banks.copies(self.boundary) * banks.spectral_bound(bank))

    def __call__(self, params, x):
        self.check(params)
        require_image(type(self).__name__, x.shape, least=self.filter_size)
        slope, scalings = jnp.exp(params["log_slope"]), params["log_scalings"]
        bank = self.filters(params) * jnp.exp(params["log_scale"] + scalings)[:, None, None]
        responses = banks.correlate(bank[:, None], banks.extend(x[None], self.filter_size, self.boundary))
        h = potential_named(self.potential).value
        ridges = h(slope * responses) / slope
        if self.weak_convexity:
            ridges = ridges - self.weak_convexity * h(responses)
        sums = jnp.sum(ridges, axis=(1, 2))
        return jnp.exp(params["log_weight"] - 2 * params["log_scale"]) * jnp.sum(jnp.exp(-2 * scalings) * sums)

    def bounds(self, params, shape) -> Constants:
        """-rho e^a <= Hessian <= e^a max(e^b, rho), and the Hessian's Lipschitz constant.

        The latter is e^{a + s} T (e^{2b} + rho) max_i e^{k_i} ||w_i||_2 with |h'''| <= T and w_i the filters (on the
        extended image): sum |W v|^3 <= max |W v| ||W v||^2. None for "huber", whose h'' jumps. The mixed derivative
        grows with x: its constants are None, and certificates use `ridges`.
        """
        self.check(params)
        require_image(type(self).__name__, shape, least=self.filter_size)
        weight, slope = jnp.exp(params["log_weight"]), jnp.exp(params["log_slope"])
        potential, rho = potential_named(self.potential), self.weak_convexity
        hessian_lipschitz = None
        if potential.third is not None:
            sizes = jnp.linalg.norm(self.filters(params), axis=(1, 2)) * math.sqrt(banks.copies(self.boundary))
            steepest = jnp.max(jnp.exp(params["log_scale"] + params["log_scalings"]) * sizes)
            hessian_lipschitz = potential.third * weight * (slope**2 + rho) * steepest
        return Constants(
            strong_convexity=-rho * weight,
            smoothness=weight * jnp.maximum(slope, rho),
            hessian_lipschitz=hessian_lipschitz,
        )

    def ridges(self, params, shape) -> RidgeSum:
        """The convex and the concave part are a term each: their changes add up.

        Through the normalisation W = C/n, n^2 = copies S with S the bound on the spectrum, ||dC/n|| and ||W|| |dn/n|
        are at most D/sqrt(S) and f D/sqrt(S), where D bounds sup_w ||dC^(w)|| and f^2 is what S exceeds its samples by.
        D is the sum over the layers of ||dK^(w)|| <= k ||dK|| times the norms of the other layers, k their side.
        """
        self.check(params)
        require_image(type(self).__name__, shape, least=self.filter_size)
        scalings = (params["log_scale"] + params["log_scalings"])[:, None, None]
        weights, slope = jnp.exp(params["log_weight"] - scalings), jnp.exp(params["log_slope"])
        potential, rho = potential_named(self.potential), self.weak_convexity
        by_filter = lambda groups: jnp.sum(groups, axis=(1, 2))  # noqa: E731
        # log W = a - s - k_i and log nu = -b - s - k_i, without b in the concave part; signs do not matter to norms
        pools = {"potential": potential, "weight_pools": (jnp.sum, jnp.sum, by_filter)}
        terms = [
            RidgeTerm(
                weights=weights, widths=jnp.exp(-scalings) / slope, width_pools=(jnp.sum, jnp.sum, by_filter), **pools
            )
        ]
        if rho:
            terms += [
                RidgeTerm(weights=rho * weights, widths=jnp.exp(-scalings), width_pools=(jnp.sum, by_filter), **pools)
            ]
        bank = banks.Bank(self.filters(params)[:, None], self.boundary)
        return RidgeSum(
            linear=lambda x: bank.linear(x[None]),
            terms=tuple(terms),
            norm=1.0,
            rows=math.sqrt(banks.copies(self.boundary))
            * jnp.linalg.norm(bank.kernels[:, 0], axis=(1, 2))[:, None, None],
            mixed=self._filter_sensitivity(params),
            convex=not rho,
        )

    def _filter_sensitivity(self, params):
        """Bound on ||(d_kernels W)[e]|| for ||e|| = 1."""
        first, *rest = params["kernels"]
        layers = [banks.zero_mean(first), *rest]
        norms = [jnp.linalg.norm(jnp.sum(jnp.abs(layer), axis=(2, 3)), 2) for layer in layers]
        others = [math.prod(norms[:n] + norms[n + 1 :], start=1.0) * size for n, size in enumerate(self.sizes)]
        spectrum = banks.spectral_bound(banks.compose(layers))
        excess = 1 / math.cos(math.pi / 16)  # `spectral_bound` samples 16 times per period at least
        return (1 + excess) * jnp.sqrt(sum(d**2 for d in others) / spectrum)


@dataclass(frozen=True, kw_only=True)
class WCRR(CRR):
    """Weakly convex ridge regulariser: `CRR` with 0 < rho < 1, so that strong edges cost little more than weak ones.

    R + rho e^a ||x||^2/2 is convex (Goujon, Neumayer & Unser 2024, goujon_wcrr_2024), hence denoising,
    1/2 ||x - y||^2 + R, is strongly convex with 1 - rho e^a. `project` keeps a <= 0, so with it 1 - rho is guaranteed.
    Where the data term has no such constant the energy need not be convex: use `jbilevel.solvers.NonmonotoneAPG` and
    ``linear_solver=MINRES()``.

    Args:
      weak_convexity: rho. For rho -> 1 the potential becomes constant far from 0, and denoising ill-conditioned.

    Also raises ValueError for rho outside [0, 1).

    >>> import jax
    >>> R = WCRR(widths=(4,), sizes=(3,), weak_convexity=0.75)
    >>> float(R.bounds(R.init(jax.random.key(0)), (8, 8)).strong_convexity)
    -0.75
    """

    weak_convexity: float = 0.9

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.weak_convexity < 1:
            raise ValueError(
                f"`weak_convexity` must lie in [0, 1), so that denoising stays convex, got {self.weak_convexity}."
            )

    def project(self, params):
        """Nearest params with log_weight <= 0: the modulus of weak convexity is then at most rho."""
        return params | {"log_weight": jnp.minimum(params["log_weight"], 0.0)}
