"""Total variation whose discretisation is learned: filters that interpolate the dual field between pixels."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jbilevel import prox
from jbilevel.operators.differences import Gradient
from jbilevel.regularizers import filters as banks
from jbilevel.regularizers.base import Regularizer, given_key
from jbilevel.regularizers.images import require_image
from jbilevel.regularizers.saddle_blocks import SaddleBlocks

# |K|^2 by the largest of so many samples of the spectra per axis, and what their maximum may miss
_GRID = 32


@dataclass(frozen=True)
class LearnedTV(Regularizer):
    """R(theta, x) = max_y <D x, y> with lambda-bounded interpolations of y: |(K y)_j(p)|_2 <= lambda at all p, j.

    (K y)_j = (k_1j * y_1, k_2j * y_2) interpolates both components of the dual field y to position j of each pixel p,
    by learned filters and with zeros outside the image; lambda = e^{log_weight} (Chambolle & Pock 2021,
    chambolle_pock_2021; Bogensperger et al. 2024, bogensperger_piggyback_maid_2024, equations (27)-(30)). With q the
    multipliers, R = min_q lambda sum |q_j(p)|_2 subject to D x = K' q. One filter per component that is 1 at its centre
    makes `TV`, three of Condat (2017) his discretisation, see `init`.

    params is a dict: ``filters`` k (2, count, size, size) and ``log_weight`` (). (k, lambda) and (c k, c lambda) are
    the same, so one of them is to be fixed: ``sums="equal"`` lets `project` set all sums of filters to 1, which is also
    what makes the limit of fine grids a total variation; "free" lets the filters have any.

    Args:
      count, size: positions per pixel, and the side of the filters.
      sums: "equal" or "free", what `project` enforces.
      dual_curvature: adds -dual_curvature/2 |y|^2 to the maximum; 1e-2 changes images in [0, 1] by no more than noise
        does in the third digit of their PSNR.
      auxiliary_curvature: adds auxiliary_curvature/2 |q|^2 to the minimum. With both positive the saddle problem is
        strongly convex-concave: linear convergence, and solves whose error is known.
      width: Huber's width of |q_j(p)|_2, 0 for none.

    x has shape (H, W), any float dtype.

    >>> import jax, jbilevel as jb
    >>> R = jb.regularizers.LearnedTV()
    >>> sum(leaf.size for leaf in jax.tree.leaves(R.init(jax.random.key(0))["filters"]))
    400
    >>> problem = jb.variational(None, R)  # a SaddleProblem
    """

    count: int = 8
    size: int = 5
    _: KW_ONLY
    sums: str = "equal"
    dual_curvature: float = 0.0
    auxiliary_curvature: float = 0.0
    width: float = 0.0

    form: ClassVar[str] = "saddle"

    def __post_init__(self):
        banks.require_bank("LearnedTV", "zero", count=self.count, size=self.size)
        if self.size % 2 == 0:
            raise ValueError(f"`size` of LearnedTV must be odd, got {self.size}.")
        if self.sums not in ("equal", "free"):
            raise ValueError(f"`sums` of LearnedTV must be 'equal' or 'free', got {self.sums!r}.")
        for name in ("dual_curvature", "auxiliary_curvature", "width"):
            if not vars(self)[name] >= 0:
                raise ValueError(f"`{name}` of LearnedTV must be nonnegative, got {vars(self)[name]}.")

    def init(self, key=None, *, weight: float = 0.075, noise: float = 0.02, dtype=None):
        """Condat's filters for the two edges and the centre of a pixel in turn, with noise that tells copies apart.

        ``noise=0`` with ``count=3`` is Condat's total variation. ``key`` is for the noise; None: `jax.random.key(0)`.
        """
        filters = jnp.asarray(np.stack([_condat(j % 3, self.size) for j in range(self.count)], 1))
        filters = filters.astype(dtype or jnp.result_type(float))
        if noise:
            filters = filters + noise * jax.random.normal(given_key(key), filters.shape, filters.dtype)
        return self.project({"filters": filters, "log_weight": jnp.asarray(math.log(weight), filters.dtype)})

    def __call__(self, params, x):
        raise TypeError("LearnedTV is itself a minimum over other unknowns: `variational` solves for them with x.")

    def check(self, params) -> None:
        """ValueError where params cannot be those of this regulariser; values are checked where they are concrete."""
        shape = (2, self.count, self.size, self.size)
        banks.require_params("LearnedTV", params, {"filters": shape, "log_weight": ()})
        banks.require_filters("LearnedTV", "filters", params["filters"])

    def project(self, params):
        """Nearest params whose filters all have sum 1, for ``sums="equal"``."""
        if self.sums == "free":
            return params
        filters = params["filters"]
        excess = jnp.mean(filters, axis=(2, 3), keepdims=True) - 1 / self.size**2
        return params | {"filters": filters - excess}

    def saddle(self, params) -> SaddleBlocks:
        """z = q of shape (2, count, H, W), and the maximum over y, (2, H, W), with L(x, q) = D x - K' q."""
        self.check(params)
        kernels, weight = params["filters"], jnp.exp(params["log_weight"])

        def linear(x, q):
            require_image("LearnedTV", x.shape)
            return Gradient(x.shape)(x) - correlate_transposed(kernels, q)

        def transpose(y):
            return Gradient(y.shape[1:]).T(y), -correlate(kernels, y)

        def prox_auxiliary(v, step):
            # of weight h(|q|) + curvature/2 |q|^2
            factor = 1 / (1 + step * self.auxiliary_curvature)
            if self.width:
                return prox.huber(factor * v, factor * step, weight, self.width, axis=0)
            return prox.group(factor * v, factor * step, weight, axis=0)

        def prox_dual(v, step):
            return v / (1 + step * self.dual_curvature)

        def start(x):
            return jnp.zeros((2, self.count, *x.shape), x.dtype), jnp.zeros((2, *x.shape), x.dtype)

        def scaling():
            return (0.25, 1.0), 1 / (8 * 0.25 + _norm_squared(kernels))

        return SaddleBlocks(
            linear=linear,
            transpose=transpose,
            prox_auxiliary=prox_auxiliary,
            prox_dual=prox_dual,
            start=start,
            scaling=scaling,
            mu_auxiliary=self.auxiliary_curvature,
            mu_dual=self.dual_curvature,
        )


def _norm_squared(kernels):
    """||K||^2 <= max_c max_w sum_j |k_cj^(w)|^2, sampled, with room for what lies between the samples.

    As in `filters.spectral_bound`, of which this is a faster version for use in every solve.
    """
    degree = kernels.shape[-1] - 1
    grid = max(_GRID, 4 * degree)
    spectra = jnp.sum(banks.power(kernels, grid), axis=1)
    return jnp.max(spectra) / math.cos(math.pi * degree / grid) ** 2


def _condat(position: int, size: int) -> np.ndarray:
    """(2, size, size): both components at the edge below a pixel, at the edge to its right, or at its centre.

    y_1 lives below pixels and y_2 to their right, where the forward differences are.
    """
    filters = np.zeros((2, size, size))
    c = size // 2
    if position < 2:
        filters[0, c, c] = 1.0
        filters[1, c : c + 2, c - 1 : c + 1] = 0.25
        return filters if position == 0 else filters.transpose(0, 2, 1)[::-1]
    filters[0, c - 1 : c + 1, c] = 0.5
    filters[1, c, c - 1 : c + 1] = 0.5
    return filters


def correlate(kernels, y):
    """K y, (2, count, H, W): the correlations of each component of y, as sums of shifts (fastest on a CPU)."""
    side, (height, width) = kernels.shape[-1], y.shape[-2:]
    padded = jnp.pad(y, [(0, 0)] + [(side // 2, side // 2)] * 2)[:, None]
    shifts = [(i, j) for i in range(side) for j in range(side)]
    return sum(kernels[..., i, j, None, None] * padded[..., i : i + height, j : j + width] for i, j in shifts)


def correlate_transposed(kernels, q):
    """K' q, (2, H, W): one small matrix product for all shifts, which are then added."""
    components, count, side, _ = kernels.shape
    height, width = q.shape[-2:]
    flat = kernels[..., ::-1, ::-1].reshape(components, count, side * side)
    products = jnp.einsum("cnk,cnp->ckp", flat, q.reshape(components, count, height * width), precision="highest")
    around = [(0, 0)] * 3 + [(side // 2, side // 2)] * 2
    products = jnp.pad(products.reshape(components, side, side, height, width), around)
    return sum(products[:, i, j, i : i + height, j : j + width] for i in range(side) for j in range(side))
