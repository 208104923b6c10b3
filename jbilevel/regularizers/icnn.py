"""Input-convex neural networks of two convolutions as regularisers."""

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
from jbilevel.regularizers.saddle_blocks import SaddleBlocks


@dataclass(frozen=True)
class ICNN(Regularizer):
    """R(theta, x) = e^g sum psi_w(W z + b_2), z = psi_w(V x + b_1), with W >= 0: convex in x.

    Sums are over pixels and filters, psi_w(t) = 0 for t <= 0, t^2/(2w) for 0 < t < w, t - w/2 beyond (Amos, Xu & Kolter
    2017, amos_icnn_2017; Bogensperger et al. 2024, bogensperger_piggyback_maid_2024, equation (31) and section 4.2).
    psi_w is convex and nondecreasing, so W >= 0 makes the composition convex whatever V and the biases.

    params is a dict: ``log_weight`` g (), ``first`` V (hidden, size, size), ``second`` W (outputs, hidden, size, size),
    and with ``bias`` ``first_bias`` (hidden,), ``second_bias`` (outputs,). The defaults are the 400 + 1600
    weights and the gamma = e^g of Bogensperger et al., 2001 parameters.

    Args:
      hidden, outputs, size: filters of the first and the second layer, and their side length.
      width: w.
      potential: "psi", or "smoothstep", which is psi_w with a continuous second derivative.
      boundary: "symmetric" and "zero" extend the input of both layers; "valid" takes responses where a filter lies
        inside the image, so that pixels near the border are smoothed too little.
      bias: whether the layers have biases (those of Bogensperger et al. have none).
      zero_mean: whether `project` removes the mean of each first filter, so that the energy does not see brightness:
        without it steps of any optimiser that treats entries alike, such as Adam, soon penalise bright images.

    x has shape (H, W), any float dtype, with H, W >= size, or >= 2 size - 1 for "valid".

    Raises ValueError for params of another structure or shape, negative ``second`` (where it is concrete; under a trace
    `bounds` says by how much convexity may be lost), filters that are all zero, and images smaller than the filters.

    >>> import jax
    >>> theta = ICNN().init(jax.random.key(0))
    >>> sum(leaf.size for leaf in jax.tree.leaves(theta))
    2001
    >>> ICNN()(theta | {"second": -theta["second"]}, jax.numpy.eye(16))
    Traceback (most recent call last):
    ValueError: params['second'] of ICNN must be nonnegative ...
    """

    hidden: int = 16
    outputs: int = 4
    _: KW_ONLY
    size: int = 5
    width: float = 0.01
    potential: str = "psi"
    boundary: str = "symmetric"
    bias: bool = False
    zero_mean: bool = True

    def __post_init__(self):
        banks.require_bank("ICNN", self.boundary, hidden=self.hidden, outputs=self.outputs, size=self.size)
        potential_named(self.potential, among=("psi", "smoothstep"))
        if not self.width > 0:
            raise ValueError(f"`width` must be positive (the energy is not smooth at 0), got {self.width}.")

    @property
    def _shapes(self):
        kernel = (self.size, self.size)
        shapes = {
            "log_weight": (),
            "first": (self.hidden, *kernel),
            "second": (self.outputs, self.hidden, *kernel),
        }
        return shapes | ({"first_bias": (self.hidden,), "second_bias": (self.outputs,)} if self.bias else {})

    def init(self, key=None, *, weight: float = 0.1, dtype=None):
        """Pairs of opposite filters of mean 0 and norm 1, W close to reading each feature at its own pixel.

        psi_w(t) + psi_w(-t) is about |t|, so learning starts near an l1 norm of filter responses; a W that averages
        over pixels and features would start near a constant. For images in [0, 1] with noise of about 0.1.
        ``key=None`` stands for `jax.random.key(0)`.
        """
        dtype = dtype or jnp.result_type(float)
        key_first, key_second = jax.random.split(given_key(key))
        half = jax.random.normal(key_first, (-(-self.hidden // 2), self.size, self.size), dtype)
        half = banks.zero_mean(half)
        half = half / jnp.linalg.norm(half, axis=(1, 2), keepdims=True)
        second = jax.random.uniform(key_second, self._shapes["second"], dtype, 0.5, 1.5)
        centre = self.size // 2
        spread = jnp.full((self.size, self.size), 0.2 / self.size**2, dtype).at[centre, centre].add(0.8)
        params = {
            "log_weight": jnp.asarray(math.log(4 * weight / self.hidden), dtype),
            "first": jnp.concatenate([half, -half])[: self.hidden],
            "second": second * spread[None, None] / self.outputs,
        }
        return params | {key: jnp.zeros(self._shapes[key], dtype) for key in self._shapes if key not in params}

    def check(self, params) -> None:
        """ValueError where params cannot be those of this regulariser; values are checked where they are concrete."""
        banks.require_params("ICNN", params, self._shapes)
        banks.require_filters("ICNN", "first", params["first"])
        second = params["second"]
        if not isinstance(second, jax.core.Tracer) and np.any(np.asarray(second) < 0):
            raise ValueError(
                f"params['second'] of ICNN must be nonnegative for a convex energy, got a minimum of "
                f"{np.min(np.asarray(second)):.3g}; ICNN.project sets negative weights to 0."
            )
        banks.require_filters("ICNN", "second", second)

    def __call__(self, params, x):
        self.check(params)
        self._require(x.shape)
        z = self._layer(params["first"][:, None], params.get("first_bias"), x[None])
        return jnp.exp(params["log_weight"]) * jnp.sum(self._layer(params["second"], params.get("second_bias"), z))

    def _require(self, shape) -> None:
        require_image("ICNN", shape, least=2 * self.size - 1 if self.boundary == "valid" else self.size)

    def _layer(self, kernels, bias, z):
        responses = banks.correlate(kernels, banks.extend(z, self.size, self.boundary))
        if bias is not None:
            responses = responses + bias[:, None, None]
        return self.width * potential_named(self.potential).value(responses / self.width)

    def bounds(self, params, shape) -> Constants:
        """0 <= Hessian <= (c/w) e^g (||W||^2 ||V||^2 + sup_w sum_c m_c |V_c^(w)|^2), m_c = sum_{o, j} W[o, c, j].

        The Hessian is J' W' D_2 W J + V' D_1 V with J = psi_w'(.) V, 0 <= psi_w' <= 1, 0 <= D_2 <= c/w, and D_1 the
        product of psi_w'' <= c/w with the weights W' psi_w'(.) <= m. Kernels without sign change have their norm at
        frequency 0: ||W|| is that of the (outputs, hidden) matrix of sums. Where ``second`` has negative entries (under
        a trace, where no error can be raised) only D_1 can be negative: the lower bound is then the second term with
        the sums of their absolute values, negative. Symmetric extension multiplies each ||.||^2 by 4. Constants of
        third derivatives and of the mixed one: None.
        """
        banks.require_params("ICNN", params, self._shapes)
        self._require(shape)
        first, second = params["first"], params["second"]
        scale = potential_named(self.potential).curvature / self.width * jnp.exp(params["log_weight"])
        scale = scale * banks.copies(self.boundary) ** 2
        matrix = jnp.sum(jnp.abs(second), axis=(2, 3))
        gain, loss = jnp.sum(matrix, axis=0), jnp.sum(jnp.maximum(-second, 0), axis=(0, 2, 3))

        def bound(weights):
            return banks.spectral_bound(first * jnp.sqrt(weights)[:, None, None])

        composed = jnp.linalg.norm(matrix, 2) ** 2 * banks.spectral_bound(first)
        return Constants(strong_convexity=-scale * bound(loss), smoothness=scale * (composed + bound(gain)))

    def saddle(self, params) -> SaddleBlocks:
        """z with psi_w(V x + b_1) <= z, hence equal to it where W matters; q = ((q_1, q_2), q_3) for (V x, z) and W z.

        The conjugate of the epigraph's indicator, and that of e^g psi_w (Bogensperger et al. 2024, (32)-(33), whose
        printed signs of the data term are corrected in `variational`; Wong, Ehrhardt & Mukherjee 2024). Nothing is
        strongly convex in z. ValueError for "smoothstep", whose proxes have no closed form.
        """
        self.check(params)
        if self.potential != "psi":
            raise ValueError(f"the saddle form of ICNN needs `potential` 'psi', got {self.potential!r}.")
        first, second = banks.Bank(params["first"][:, None], self.boundary), banks.Bank(params["second"], self.boundary)
        biases = [params[key][:, None, None] if self.bias else 0.0 for key in ("first_bias", "second_bias")]
        weight = jnp.exp(params["log_weight"])

        def linear(x, z):
            self._require(x.shape)
            return (first.linear(x[None]), z), second.linear(z)

        def transpose(q):
            (q_1, q_2), q_3 = q
            return first.transpose(q_1)[0], q_2 + second.transpose(q_3)

        def prox_dual(v, step):
            (v_1, v_2), v_3 = v
            s = step[0][0]  # one for both: the projection is onto a set that couples them
            p, q = prox.smoothed_relu_epigraph(v_1 / s + biases[0], v_2 / s, self.width)
            q_3 = prox.smoothed_relu_conjugate(v_3 + step[1] * biases[1], step[1], weight, self.width)
            return (v_1 - s * (p - biases[0]), v_2 - s * q), q_3

        def start(x):
            self._require(x.shape)
            z = self._layer(params["first"][:, None], params.get("first_bias"), x[None])
            q = jax.eval_shape(linear, x, z)
            return z, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), q)

        def scaling():
            """t_x |V|^2 s_1 = 1 and t_z (s_1 + |W|^2 s_3) = 1."""
            s_1, s_3 = (1 / bank.norm_squared() for bank in (first, second))
            return (1.0, 1 / (s_1 + 1)), ((s_1, s_1), s_3)

        return SaddleBlocks(linear=linear, transpose=transpose, prox_dual=prox_dual, start=start, scaling=scaling)

    def project(self, params):
        """Nearest params with W >= 0 and, with ``zero_mean``, first filters of mean 0."""
        first = banks.zero_mean(params["first"]) if self.zero_mean else params["first"]
        return params | {"first": first, "second": jnp.maximum(params["second"], 0)}
