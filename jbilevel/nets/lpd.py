"""Learned primal-dual reconstruction, its stochastic and its sketched form: one module for the family."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from itertools import groupby

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jbilevel.nets.convolutions import ConvNet, nnx
from jbilevel.nets.sketches import coarsened, resized
from jbilevel.operators.base import LinearOperator

# What was published, as far as it differs from the defaults of `LPD`.
NAMED = {
    # Adler & Öktem 2018: reads the second memory channel, writes the first.
    "adler-oktem": {"layers": 10, "memory": (5, 5), "read": (1, 0), "weights": "xavier"},
    "thesis": {
        "layers": 12,
        "kernel": 5,
        "step": 0.01,
        "normalise": False,
        "initial": "fbp",
        "weights": "torch",
    },
    "thesis-mnist": {"layers": 5, "step": 0.01, "normalise": False, "initial": "fbp", "weights": "torch"},
    # The pseudo-inverse (here filtered backprojection) in place of the transpose.
    "pdnet": {
        "layers": 2,
        "memory": (5, 5),
        "read": (1, 0),
        "write": 1,
        "initial": "fbp",
        "back": "fbp",
        "weights": "torch",
    },
}
PRODUCTS = "products of the operator"  # their name for jax.checkpoint
CHOICES = {
    "initial": ("zeros", "fbp"),
    "back": ("transpose", "fbp"),
    "dual": ("shared", "per-subset"),
    "sketched": ("operator", "primal", "residual"),
    "remat": ("layers", "networks", "none"),
}


class Layer(nnx.Module):
    """The networks of one layer, and its step sizes if they are learned."""

    def __init__(self, memory: tuple[int, int], dims: tuple[int, int], step: float | None, param_dtype, network):
        self.primal = network(memory[0] + 1, memory[0], dims=dims[0])
        self.dual = network(memory[1] + 2, memory[1], dims=dims[1])
        self.learns_steps = step is not None
        if step is not None:
            self.tau, self.sigma = (nnx.Param(jnp.full((), step, param_dtype)) for _ in range(2))

    def steps(self, dtype) -> tuple:
        """(tau, sigma)"""
        return (self.tau[...].astype(dtype), self.sigma[...].astype(dtype)) if self.learns_steps else (1, 1)


class LPD(nnx.Module):
    """A reconstruction by K learned primal-dual layers around a linear operator A.

    From an image x with N_p channels of memory and a dual variable u with N_d, layer k = 0, ..., K - 1 does

        u <- u + D_k([u, sigma_k B_i x[r], z_i])        z = y/c, B = A/c
        x <- x + P_k([x, f tau_k B_i^T u[r']])

    and the reconstruction is x[w]. D_k and P_k are small convolutional networks (`ConvNet`). With ``normalise`` c is
    the norm of A, otherwise 1. **LPD** has one subset, B_i = B. **LSPD** has m of them, B_i with the angles
    i, i + m, ... (`A.subset`) and i = k mod m or any ``order``; short subsets end with a masked row, which no
    convolution sees. The factor f, by default m, makes f B_i^T B_i equal to B^T B on average. **Sketched** layers take
    the transform A_s of an s times coarser grid over the same square in place of A: with S (U) the bilinear resize to
    the coarse (fine) grid, B x becomes B_s S x, and

        "operator"   x <- x + P([x, tau U g])         g = f s^-d B_s^T u, d = 2 or 3
        "primal"     x <- U(S x + P([S x, tau g]))
        "residual"   x <- x + U P([S x, tau g])       keeps the fine details of x

    where s^-d is the pixels' share that S has in its own transpose. Step sizes are learned scalars from ``step``, or 1.

    Layers are stacked: each parameter has a leading axis of length K, and the layers run in one ``lax.scan`` for every
    run of equal ``sketch``, rematerialised in the backward pass.

    Args:
      operator: real, with ``subset(i, m)`` if ``subsets`` > 1 and ``fbp(y, filter)`` where "fbp" is asked for.
      layers: K. memory: (N_p, N_d).
      step: first value of the learned step sizes; None: no step sizes.
      read: the channel of x that A sees, and the one of u that A^T sees. write: the channel of x that is returned.
      initial: "zeros" or "fbp", put into all channels; an argument x0 of the call replaces it.
      back: "transpose", or "fbp" for filtered backprojection in its place. filter: of either use of "fbp".
      normalise: divide operator and measurement by the operator's norm; or a number to divide by.
      subsets: m. factor: f; None: m.
      dual: "shared" passes one u from subset to subset, "per-subset" keeps one for each.
      sketch: s for each layer, coarse to fine, such as ``[2] * 8 + [1] * 4``; None: 1 for all.
      sketched: "operator", "primal" or "residual".
      remat: "layers" keeps x and u between layers only and repeats all else in the backward pass; "networks" keeps the
        products with the operator too (for host callbacks); "none" keeps everything.
      unroll: run the layers one by one in place of a scan, without rematerialisation. None: on a CPU, where XLA's
        derivatives of convolutions are about twenty times slower inside a loop; False needs the least memory there too.
      param_dtype: of the parameters. rngs: ``nnx.Rngs(seed)``.
      network: width, depth, kernel, last_kernel, activation, weights and zero_last of `ConvNet`, and its dtype, e.g.
        ``jnp.bfloat16``, which is for the convolutions: memory, operator and parameters keep theirs.

    Raises:
      ValueError: an argument is out of its range, K < m, a side that s does not divide, or an operator that lacks what
        is asked of it.
      ImportError: flax is not installed.

    References: Adler & Öktem, Learned primal-dual reconstruction, IEEE Trans. Med. Imaging 37 (2018), adler_lpd_2018,
    algorithm 3; Tang, Mukherjee & Schönlieb, Stochastic primal-dual deep unrolling, arXiv:2110.10093 (LSPD) and
    arXiv:2208.14784 (sketched).

    >>> import jax, jax.numpy as jnp, jbilevel as jb
    >>> from flax import nnx
    >>> A = jb.operators.ParallelBeam((16, 16), [0.0, 0.8, 1.6, 2.4], 24)
    >>> net = LPD.named("adler-oktem", operator=A, rngs=nnx.Rngs(0), normalise=8.0)  # about its norm
    >>> f, params = jb.nets.from_flax(net)
    >>> sum(v.size for v in jax.tree.leaves(params)), jax.eval_shape(f, params, jnp.ones(A.out_shape)).shape
    (251980, (16, 16))
    """

    def __init__(
        self,
        operator,
        *,
        rngs: nnx.Rngs,
        layers: int = 10,
        memory: tuple[int, int] = (1, 1),
        read: tuple[int, int] = (0, 0),
        write: int = 0,
        step: float | None = None,
        initial: str = "zeros",
        back: str = "transpose",
        filter: str = "ram-lak",
        normalise: bool | float = True,
        subsets: int = 1,
        factor: float | None = None,
        dual: str = "shared",
        sketch: Sequence[int] | None = None,
        sketched: str = "primal",
        remat: str = "layers",
        unroll: bool | None = None,
        param_dtype=jnp.float32,
        **network,
    ):
        self.operator, self.memory, self.read, self.write = operator, tuple(memory), tuple(read), write
        self.initial, self.back, self.filter = initial, back, filter
        self.subsets, self.factor, self.dual = subsets, subsets if factor is None else factor, dual
        self.sketch, self.sketched, self.remat = (1,) * layers if sketch is None else tuple(sketch), sketched, remat
        self.unroll = unroll
        _check(self, layers)
        self.scale = float(operator.norm() if normalise is True else normalise or 1.0)
        dims = len(operator.in_shape), len(operator.out_shape)
        network = partial(ConvNet, param_dtype=param_dtype, rngs=rngs, **network)
        self.layers = _stacked([Layer(self.memory, dims, step, param_dtype, network) for _ in range(layers)])

    @classmethod
    def named(cls, name: str, *, operator, rngs: nnx.Rngs, **changes) -> LPD:
        """A published network, with ``changes`` of its settings.

        "adler-oktem": 10 layers of 3 x 3 convolutions, memory 5, normalised operator, from zero; 251,980 parameters in
        two dimensions (Adler & Öktem 2018, adler_lpd_2018). "thesis": 12 layers of 5 x 5, no memory, learned step sizes
        from 0.01, operator as it is, from FBP; 683,232 (Kadagala 2025, kadagala_thesis_2025). "thesis-mnist": the same
        with 5 layers of 3 x 3; 102,920. "pdnet": 2 layers as the first, with FBP for the transpose and for the start;
        50,396.

        Raises:
          ValueError: another name.
        """
        if name not in NAMED:
            raise ValueError(f"`name` must be one of {', '.join(NAMED)}, got {name!r}.")
        return cls(operator, rngs=rngs, **(NAMED[name] | changes))

    def __call__(self, y, x0=None, order=None):
        """The reconstruction, ``operator.in_shape``, from one measurement y of ``operator.out_shape``.

        Args:
          y: in the units of the operator. x0: first image in place of ``initial``.
          order: (K,) integers, traced or not: the subset that each layer uses, in place of k mod m.

        Raises:
          ValueError: a shape is wrong. Batches go through ``jax.vmap``.
        """
        y = _shaped("y", y, self.operator.out_shape)
        x, u = self._start(y, x0)
        order = self._order(order)
        graph, params = nnx.split(self.layers)
        done = 0
        for sketch, run in groupby(self.sketch):
            now = slice(done, done := done + len(list(run)))
            layer = self._rematerialised(partial(self._layer, graph, coarsened(self.operator, sketch), y / self.scale))
            of_run = jax.tree.map(lambda v: v[now], (params, order))  # noqa: B023
            step = lambda state, k: (layer(state, *k), None)  # noqa: B023, E731
            (x, u), _ = jax.lax.scan(step, (x, u), of_run, unroll=self._unrolled)
        return x[..., self.write]

    @property
    def _unrolled(self) -> bool:
        return jax.default_backend() == "cpu" if self.unroll is None else self.unroll

    def _start(self, y, x0):
        A, (primal, dual) = self.operator, self.memory
        if x0 is None:
            x0 = A.fbp(y, self.filter) if self.initial == "fbp" else jnp.zeros(A.in_shape, y.dtype)
        x0 = _shaped("x0", x0, A.in_shape).astype(y.dtype)
        shape = A.out_shape if self.subsets == 1 else A.subset(0, self.subsets).out_shape
        each = () if self.dual == "shared" else (self.subsets,)
        return jnp.repeat(x0[..., None], primal, axis=-1), jnp.zeros((*each, *shape, dual), y.dtype)

    def _order(self, order):
        layers = len(self.sketch)
        if order is None:
            return jnp.arange(layers) % self.subsets
        order = jnp.asarray(order)
        if order.shape != (layers,) or not jnp.issubdtype(order.dtype, jnp.integer):
            raise ValueError(f"`order` must be {layers} integers, got {order.dtype} of shape {order.shape}.")
        return order

    def _rematerialised(self, layer):
        if self.remat == "none" or self._unrolled:
            return layer
        names = [PRODUCTS] if self.remat == "networks" else []
        policy = jax.checkpoint_policies.save_only_these_names(*names)
        return jax.checkpoint(layer, policy=policy, prevent_cse=False)  # scan is a barrier already

    def _layer(self, graph, coarse, y, state, params, i):
        """One layer on the grid of ``coarse``, for the measurement y and the subset i."""
        (x, u), layer = state, nnx.merge(graph, params)
        tau, sigma = layer.steps(y.dtype)
        fine, grid = self.operator.in_shape, coarse.in_shape
        A, mask = coarse, None
        if self.subsets > 1:
            A = coarse.subset(i, self.subsets)
            y, mask = A.restrict(y), A.restrict(jnp.ones_like(y))[..., None]

        own = u if self.dual == "shared" else u[i]
        seen = resized(x[..., self.read[0], None], grid)[..., 0]
        forward = checkpoint_name(A(seen), PRODUCTS) / self.scale
        change = layer.dual(_channels(own, sigma * forward, y), mask).astype(u.dtype)
        own = own + (change if mask is None else mask * change)
        u = own if self.dual == "shared" else u.at[i].set(own)

        g = tau * self._back(A, own[..., self.read[1]])[..., None]
        if self.sketched == "operator":
            return x + layer.primal(_channels(x, resized(g, fine))).astype(x.dtype), u
        small = resized(x, grid)
        change = layer.primal(_channels(small, g)).astype(x.dtype)
        if self.sketched == "primal":
            return resized(small + change, fine), u
        return x + resized(change, fine), u

    def _back(self, A, u):
        if self.back == "fbp":
            return self.scale * checkpoint_name(A.fbp(u, self.filter), PRODUCTS)  # of A / scale
        share = math.prod(A.in_shape) / math.prod(self.operator.in_shape)
        return checkpoint_name(A.T(u), PRODUCTS) * (self.factor * share / self.scale)


def _channels(v, *others):
    return jnp.concatenate([v, *(w[..., None] if w.ndim < v.ndim else w for w in others)], axis=-1)


def _shaped(name, v, shape):
    v = jnp.asarray(v)
    if v.shape != tuple(shape):
        raise ValueError(f"`{name}` must have shape {tuple(shape)}, got {v.shape}; use jax.vmap for a batch.")
    return v


def _stacked(layers: list[Layer]) -> Layer:
    """One layer whose parameters are those of all, along a new first axis."""
    graphs, params = zip(*map(nnx.split, layers), strict=True)
    return nnx.merge(graphs[0], jax.tree.map(lambda *v: jnp.stack(v), *params))


def _check(net: LPD, layers: int) -> None:
    A, m = net.operator, net.subsets
    for name, allowed in CHOICES.items():
        if vars(net)[name] not in allowed:
            raise ValueError(f"`{name}` must be one of {allowed}, got {vars(net)[name]!r}.")
    if layers < 1 or min(net.memory) < 1:
        raise ValueError(f"`layers` and `memory` must be at least 1, got {layers} and {net.memory}.")
    channels = (*zip(net.read, net.memory, strict=True), (net.write, net.memory[0]))
    if not all(0 <= channel < count for channel, count in channels):
        raise ValueError(f"`read` {net.read} and `write` {net.write} must be channels of `memory` {net.memory}.")
    if (A.in_kind, A.out_kind) != ("real", "real"):
        raise ValueError("`operator` must be real: split complex data into real and imaginary part.")
    if "fbp" in (net.initial, net.back) and type(A).fbp is LinearOperator.fbp:
        raise ValueError(f"'fbp' needs an operator with `fbp`, {type(A).__name__} has none: give x0 to the call.")
    if not 1 <= m <= layers:
        raise ValueError(f"`subsets` must lie between 1 and `layers` = {layers}, got {m}: else some data go unseen.")
    if m > 1 and (type(A).subset is LinearOperator.subset or net.back == "fbp"):
        raise ValueError("`subsets` needs an operator with `subset(i, m)`, such as ParallelBeam, and back='transpose'.")
    if len(net.sketch) != layers or list(net.sketch) != sorted(net.sketch, reverse=True) or min(net.sketch) < 1:
        raise ValueError(f"`sketch` must give {layers} factors of at least 1, coarse to fine, got {net.sketch}.")
    for factor in set(net.sketch):
        coarsened(A, factor)
    if m > 1:
        A.subset(0, m)  # refuses more subsets than angles
