"""Flax and Equinox modules as ``f(params, *inputs)`` with a params pytree, the only form the library knows."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax


def from_flax(model, variables=None) -> tuple[Callable, Any]:
    """``(f, params)`` of a Flax module, with ``f(params, *inputs)`` its output.

    Args:
      model: an ``nnx.Module``, or a Linen module together with its ``variables`` from ``model.init``.
      variables: Linen only. Collections other than "params" (batch statistics) are kept as constants of f, as is all
        nnx state that is not an ``nnx.Param``: modules that update such state have to be in evaluation mode.

    Make f once: a new f is a new function to jit, and compiles again.

    Raises:
      ImportError: flax is not installed. TypeError: not a Flax module, or Linen without variables.
      ValueError: an nnx module would normalise with statistics of the batch, or drop out at random.

    >>> import jax.numpy as jnp, jbilevel as jb
    >>> from flax import nnx
    >>> f, params = jb.nets.from_flax(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    >>> f(params, jnp.ones(2)).shape
    (3,)
    >>> loss = lambda params, data: jnp.sum((f(params, data["y"]) - data["x"]) ** 2)
    >>> oracle = jb.explicit.Oracle(loss)  # what a method trains it by
    """
    try:
        from flax import linen, nnx
    except ImportError as error:
        raise ImportError("from_flax needs flax: pip install 'jbilevel[nets]'.") from error
    if isinstance(model, linen.Module):
        if variables is None or "params" not in variables:
            raise TypeError("a Linen module needs `variables`, the result of model.init(key, x).")
        fixed = {name: value for name, value in variables.items() if name != "params"}
        return partial(_apply_linen, model, fixed), variables["params"]
    if not isinstance(model, nnx.Module):
        raise TypeError(f"`model` must be a flax.nnx or flax.linen module, got {type(model).__name__}.")
    for path, module in nnx.iter_modules(model):
        if not (getattr(module, "use_running_average", True) and getattr(module, "deterministic", True)):
            name = "/".join(map(str, path))
            raise ValueError(
                f"{type(module).__name__} at {name!r} is in training mode, where the output depends on the rest of the "
                "batch or on chance; call model.eval() first."
            )
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    return partial(_apply_nnx, graph, rest), params


def _apply_linen(model, fixed, params, *inputs):
    return model.apply({"params": params, **fixed}, *inputs)


def _apply_nnx(graph, rest, params, *inputs):
    from flax import nnx

    return nnx.merge(graph, params, rest)(*inputs)


def from_equinox(model) -> tuple[Callable, Any]:
    """``(f, params)`` of an Equinox module: its inexact arrays are the params, everything else is a constant of f.

    Raises:
      ImportError: equinox is not installed. TypeError: the module is not callable.

    >>> import jax, jax.numpy as jnp, jbilevel as jb
    >>> import equinox
    >>> f, params = jb.nets.from_equinox(equinox.nn.Linear(2, 3, key=jax.random.key(0)))
    >>> f(params, jnp.ones(2)).shape, f(jax.tree.map(jnp.zeros_like, params), jnp.ones(2)).tolist()
    ((3,), [0.0, 0.0, 0.0])
    """
    try:
        import equinox
    except ImportError as error:
        raise ImportError("from_equinox needs equinox: pip install 'jbilevel[nets]'.") from error
    if not callable(model):
        raise TypeError(f"`model` must be a callable Equinox module, got {type(model).__name__}.")
    params, static = equinox.partition(model, equinox.is_inexact_array)
    if not jax.tree.leaves(params):
        raise TypeError("`model` has no inexact array to learn.")
    return partial(_apply_equinox, static), params


def _apply_equinox(static, params, *inputs):
    import equinox

    return equinox.combine(params, static)(*inputs)
