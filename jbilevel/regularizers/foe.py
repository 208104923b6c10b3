"""Fields of Experts: a sum of smoothed absolute values of filter responses."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jbilevel import prox
from jbilevel._core.constants import Constants
from jbilevel.regularizers import filters as banks
from jbilevel.regularizers.base import Regularizer, given_key
from jbilevel.regularizers.images import require_image
from jbilevel.regularizers.potentials import potential_named
from jbilevel.regularizers.ridge_sum import RidgeSum, RidgeTerm
from jbilevel.regularizers.saddle_blocks import SaddleBlocks

_CONJUGATES = {
    "root": prox.root_conjugate,
    "huber": prox.huber_conjugate,
    "psi": prox.smoothed_relu_conjugate,
}


@dataclass(frozen=True)
class FoE(Regularizer):
    """R(theta, x) = e^{theta_0} sum_i e^{w_i} sum_pixels nu_i h((c_i * x)/nu_i), with nu_i = e^{s_i}.

    Fields of Experts (Roth & Black 2005, roth_black_2005) as in Salehi et al. 2024 (salehi_maid_2024): with the "root"
    potential the inner term is sqrt((c_i * x)^2 + nu_i^2), a smoothed 1-norm. Convex in x. "psi" gives psi_nu of
    Bogensperger et al. 2024 (bogensperger_piggyback_maid_2024), equations (31), (34).

    params is a dict: ``log_weight`` theta_0 (), ``log_weights`` w (count,), ``log_smoothing`` s (count,), ``filters`` c
    (count, size, size). 48 filters of 7 x 7 make 1 + 48 + 48 + 2352 = 2449 parameters, the layout of the authors' code
    in this order (which has a factor 1/2 in front); the 2448 of Ehrhardt's slides (ehrhardt_slides_2025) are those with
    ``overall_weight=False``, which leaves out ``log_weight`` (the weights w can replace it).

    Args:
      count, size: number of filters and their side length.
      potential: "root", "huber", "spline", "psi" or "smoothstep", see `jbilevel.regularizers.potentials`.
      boundary: "symmetric" and "zero" extend the image so that there is a response at every pixel; "valid" takes those
        where a filter lies inside the image, so that pixels near the border are smoothed too little.
      overall_weight: whether params has ``log_weight``.
      smoothing_min: bound that `project` enforces on nu.
      zero_mean: whether `project` removes the mean of each filter.

    x has shape (H, W) with H, W >= size, any float dtype.

    Raises ValueError for params of another structure or shape, filters that are all zero (where they are concrete), and
    images smaller than a filter.

    >>> import jax
    >>> R = FoE(count=4, size=3)
    >>> theta = R.init(jax.random.key(0))
    >>> sum(leaf.size for leaf in jax.tree.leaves(theta))
    45
    >>> bool(R(theta, jax.numpy.eye(8)) > R(theta, jax.numpy.zeros((8, 8))))
    True
    """

    count: int = 48
    size: int = 7
    _: KW_ONLY
    potential: str = "root"
    boundary: str = "symmetric"
    overall_weight: bool = True
    smoothing_min: float = 1e-4
    zero_mean: bool = True

    def __post_init__(self):
        banks.require_bank("FoE", self.boundary, count=self.count, size=self.size)
        potential_named(self.potential)
        if not self.smoothing_min > 0:
            raise ValueError(f"`smoothing_min` must be positive, got {self.smoothing_min}.")

    def init(self, key=None, *, weight: float = 0.1, smoothing: float = 0.01, dtype=None):
        """Random filters of mean 0 and norm 1, with weight/count each, for images in [0, 1] with noise of about 0.1.

        ``key=None`` stands for `jax.random.key(0)`.
        """
        dtype = dtype or jnp.result_type(float)
        filters = banks.zero_mean(jax.random.normal(given_key(key), (self.count, self.size, self.size), dtype))
        params = {
            "log_weights": jnp.full((self.count,), np.log((1 if self.overall_weight else weight) / self.count), dtype),
            "log_smoothing": jnp.full((self.count,), np.log(smoothing), dtype),
            "filters": filters / jnp.linalg.norm(filters, axis=(1, 2), keepdims=True),
        }
        return params | ({"log_weight": jnp.asarray(np.log(weight), dtype)} if self.overall_weight else {})

    def check(self, params) -> None:
        """ValueError where params cannot be those of this regulariser; values are checked where they are concrete."""
        vector = (self.count,)
        shapes = {"log_weights": vector, "log_smoothing": vector, "filters": (self.count, self.size, self.size)}
        banks.require_params("FoE", params, shapes | ({"log_weight": ()} if self.overall_weight else {}))
        banks.require_filters("FoE", "filters", params["filters"])

    def weights(self, params):
        """(weights e^{theta_0 + w_i}, smoothing nu_i), both (count,)."""
        return jnp.exp(params.get("log_weight", 0.0) + params["log_weights"]), jnp.exp(params["log_smoothing"])

    def __call__(self, params, x):
        self.check(params)
        require_image("FoE", x.shape, least=self.size)
        weights, smoothing = self.weights(params)
        kernels = params["filters"] / smoothing[:, None, None]
        responses = banks.correlate(kernels[:, None], banks.extend(x[None], self.size, self.boundary))
        experts = jnp.sum(potential_named(self.potential).value(responses), axis=(1, 2))
        return jnp.sum(weights * smoothing * experts)

    def bounds(self, params, shape) -> Constants:
        """0 <= Hessian <= c sup_w sum_i (e^{theta_0 + w_i}/nu_i) |c_i^(w)|^2, and the Hessian's Lipschitz constant.

        With h'' <= c and |h'''| <= T: sum_pixels |c_i * v|^3 <= ||c_i||_2 ||v|| sum_pixels |c_i * v|^2, so the second
        is T sup_w sum_i (e^{theta_0 + w_i}/nu_i^2) ||c_i||_2 |c_i^(w)|^2, None for a potential whose h'' jumps. A
        symmetric extension multiplies ||x||^2 by up to 4. The mixed derivative d/dc_i grad_x R grows with x: its
        constants are None, and certificates use `ridges`.
        """
        self.check(params)
        require_image("FoE", shape, least=self.size)
        weights, smoothing = self.weights(params)
        filters, potential, grown = params["filters"], potential_named(self.potential), banks.copies(self.boundary)

        def bound(factors):
            return banks.spectral_bound(filters * jnp.sqrt(factors)[:, None, None])

        smoothness = potential.curvature * grown * bound(weights / smoothing)
        hessian_lipschitz = None
        if potential.third is not None:
            sizes = jnp.linalg.norm(filters, axis=(1, 2))
            hessian_lipschitz = potential.third * grown**1.5 * bound(weights * sizes / smoothing**2)
        return Constants(
            strong_convexity=jnp.zeros_like(smoothness), smoothness=smoothness, hessian_lipschitz=hessian_lipschitz
        )

    def saddle(self, params) -> SaddleBlocks:
        """One dual field (count, h, w) of responses; the dual is strongly convex with min_i nu_i/weight_i.

        The conjugates are nu_i/(2 weight_i) q^2 on [-weight_i, weight_i] for the "huber" potential, on [0, weight_i]
        for "psi" (Bogensperger et al. 2024, (35)), and -nu_i sqrt(weight_i^2 - q^2) for "root"; ValueError for the
        others.
        """
        self.check(params)
        if self.potential not in _CONJUGATES:
            raise ValueError(
                f"the saddle form of FoE needs `potential` to be one of {', '.join(_CONJUGATES)}, got "
                f"{self.potential!r}: the prox of its conjugate is not at hand."
            )
        conjugate, kernels = _CONJUGATES[self.potential], params["filters"][:, None]
        weights, widths = (v[:, None, None] for v in self.weights(params))

        bank = banks.Bank(kernels, self.boundary)

        def linear(x, z):
            require_image("FoE", x.shape, least=self.size)
            return bank.linear(x[None])

        def start(x):
            shape = jax.eval_shape(linear, x, ()).shape
            return (), jnp.zeros(shape, x.dtype)

        return SaddleBlocks(
            linear=linear,
            transpose=lambda q: (bank.transpose(q)[0], ()),
            prox_dual=lambda v, step: conjugate(v, step, weights, widths),
            start=start,
            scaling=lambda: ((1.0, ()), 1 / bank.norm_squared()),
            mu_dual=jnp.min(widths / weights),
        )

    def ridges(self, params, shape) -> RidgeSum:
        """Filters in L: ||c * z|| <= ||c||_1 ||z|| <= size ||c||_2 ||z|| bounds what a change of them does."""
        self.check(params)
        require_image("FoE", shape, least=self.size)
        weights, smoothing = (v[:, None, None] for v in self.weights(params))
        by_filter = (lambda groups: jnp.sum(groups, axis=(1, 2)),)
        term = RidgeTerm(
            potential=potential_named(self.potential),
            weights=weights,
            widths=smoothing,
            weight_pools=by_filter + ((jnp.sum,) if self.overall_weight else ()),
            width_pools=by_filter,
        )
        bank, grown = banks.Bank(params["filters"][:, None], self.boundary), math.sqrt(banks.copies(self.boundary))
        return RidgeSum(
            linear=lambda x: bank.linear(x[None]),
            terms=(term,),
            norm=jnp.sqrt(bank.norm_squared()),
            rows=grown * jnp.linalg.norm(params["filters"], axis=(1, 2))[:, None, None],
            mixed=grown * self.size,
        )

    def project(self, params):
        """Nearest params with nu_i >= smoothing_min and, with ``zero_mean``, filters of mean 0."""
        filters = banks.zero_mean(params["filters"]) if self.zero_mean else params["filters"]
        smoothing = jnp.maximum(params["log_smoothing"], np.log(self.smoothing_min))
        return params | {"filters": filters, "log_smoothing": smoothing}
