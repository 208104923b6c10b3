"""JAX's settings that results must not depend on."""

from __future__ import annotations

from functools import wraps

import jax


def own_settings(function):
    """``function`` under the settings that the library is written for, whatever those of the caller are.

    Infinity is a number here, "not known", which `jax_debug_infs` would stop at; counts are multiplied with sizes,
    which strict promotion of dtypes forbids.
    """

    @wraps(function)
    def call(*args, **kwargs):
        with jax.numpy_dtype_promotion("standard"), jax.debug_infs(False):
            return function(*args, **kwargs)

    return call
