"""Synthetic noise: Gaussian, from a JAX key or a NumPy generator; photon counts of a transmission scan."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from .hounsfield import MU_WATER, check_positive


def gaussian(key_or_rng, x, sigma):
    """x + sigma ξ with ξ standard normal, independent for each element. Nothing is clipped.

    Args:
        key_or_rng: a JAX key, for a JAX array and a pure function; or a NumPy ``Generator``, which is advanced by one
            call ``standard_normal(x.shape)``, in float64 whatever the dtype of x, so that the same seed and shape
            give the same noise for all dtypes.
        x: array of a floating dtype.
        sigma: standard deviation in units of x: a number, or an array that broadcasts to x with all its axes, such
            as one of shape (n, 1, 1) for (n, height, width).

    Returns:
        An array of the shape and dtype of ``x``.

    Raises:
        ValueError: ``sigma`` is negative or not finite (not checked while traced), or does not fit x.
        TypeError: ``key_or_rng`` is neither of the two, or ``x`` is not floating.

    >>> x = np.zeros(2, np.float32)
    >>> y = gaussian(np.random.default_rng(0), x, 0.1)
    >>> print(y.dtype, bool(np.all(y == np.float32(0.1 * np.random.default_rng(0).standard_normal(2)))))
    float32 True
    """
    if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
        raise TypeError(f"`x` has dtype {jnp.result_type(x)}: convert it to floats first, such as x / 255.")
    _check_fits("sigma", sigma, np.shape(x))
    if not isinstance(sigma, jax.core.Tracer) and not (np.all(np.asarray(sigma) >= 0) and np.all(np.isfinite(sigma))):
        raise ValueError(f"`sigma` is {sigma}: a standard deviation is finite and not negative.")
    if isinstance(key_or_rng, np.random.Generator):
        x = np.asarray(x)
        return (x + np.asarray(sigma) * key_or_rng.standard_normal(x.shape)).astype(x.dtype)
    if not _is_key(key_or_rng):
        raise TypeError(
            f"`key_or_rng` is {type(key_or_rng).__name__}: give jax.random.key(seed) or numpy.random.default_rng(seed)."
        )
    x = jnp.asarray(x)
    return x + jnp.asarray(sigma, x.dtype) * jax.random.normal(key_or_rng, x.shape, x.dtype)


def poisson_transmission(
    rng: np.random.Generator,
    sinogram,
    photons,
    *,
    mu: float = MU_WATER,
    min_count: float = 0.5,
    return_counts: bool = False,
):
    """Line integrals as measured by counting photons: -log(max(N, min_count) / I0) / mu, N ~ Poisson(I0 exp(-mu p)).

    With x in densities relative to water and lengths in mm, p = A x is in mm of water and ``mu`` is the attenuation of
    water; for p of attenuations, a number without unit, give ``mu=1``. The result is in the unit of p: it fits the
    operator A as it is. A photon-free reading counts as ``min_count`` photons, so that its logarithm is finite; this
    caps readings at log(I0 / min_count) / mu and biases what is nearly opaque.

    Args:
        rng: NumPy generator, which is advanced by one draw per element.
        sinogram: p, floating, not negative. Rounding is forgiven: a millionth of the greatest value.
        photons: I0, the mean number of photons of an empty ray: a number, or an array that broadcasts to the sinogram
            with all its axes, such as one of shape (angles, 1).
        mu: attenuation of the unit density per unit of length.
        min_count: what replaces a count of zero, in (0, 1].
        return_counts: return ``(noisy, counts)`` with the counts as int64, zeros included.

    Returns:
        The noisy line integrals, of the shape and dtype of ``sinogram``; some are negative where the ray is empty.

    Raises:
        ValueError: the sinogram is negative, infinite or NaN; ``photons`` is not positive, above NumPy's Poisson
            limit or does not fit; ``mu`` or ``min_count`` is out of range.
        TypeError: ``rng`` is no NumPy generator, or ``sinogram`` is not floating.

    Reference:
        Leuschner, Schmidt, Otero Baguer, Maass, LoDoPaB-CT, a benchmark dataset for low-dose computed tomography
        reconstruction, Scientific Data 8, 2021 (there with min_count 0.1).

    >>> noisy, counts = poisson_transmission(
    ...     np.random.default_rng(0), np.full(10000, 200.0), 7e4, return_counts=True)
    >>> print(round(7e4 * np.exp(-0.02 * 200)), abs(counts.mean() - 1282) < 2, abs(noisy.mean() - 200) < 0.1)
    1282 True True
    """
    if not isinstance(rng, np.random.Generator):
        raise TypeError(f"`rng` is {type(rng).__name__}: give numpy.random.default_rng(seed).")
    sinogram = np.asarray(sinogram)
    if not np.issubdtype(sinogram.dtype, np.floating):
        raise TypeError(f"`sinogram` has dtype {sinogram.dtype}: give line integrals as floats.")
    if not np.all(np.isfinite(sinogram)):
        raise ValueError("`sinogram` has values that are NaN or infinite.")
    if sinogram.size and sinogram.min() < -1e-6 * sinogram.max(initial=0):
        raise ValueError(
            f"`sinogram` has negative line integrals, down to {sinogram.min()}: nothing emits photons here."
        )
    _check_fits("photons", photons, sinogram.shape, name="sinogram")
    photons = np.asarray(photons, np.float64)
    if not (np.all(photons > 0) and np.all(photons <= 1e18)):
        raise ValueError(f"`photons` is {photons}: give positive numbers up to 1e18.")
    if not 0 < min_count <= 1:
        raise ValueError(
            f"`min_count` is {min_count}: give a number in (0, 1], less than the least count that is seen."
        )
    mu = check_positive("mu", mu)
    counts = rng.poisson(photons * np.exp(-mu * np.maximum(sinogram, 0, dtype=np.float64)))
    noisy = (-np.log(np.maximum(counts, min_count) / photons) / mu).astype(sinogram.dtype)
    return (noisy, counts) if return_counts else noisy


def _check_fits(argument, value, shape, name="x"):
    own = np.shape(value)
    if own and (len(own) != len(shape) or any(m not in (1, n) for m, n in zip(own, shape, strict=True))):
        raise ValueError(
            f"`{argument}` has shape {own} and `{name}` {shape}: give a number, or axes of length 1 or of `{name}`."
        )


def _is_key(value):
    if not isinstance(value, (jax.Array, np.ndarray)):
        return False
    return jnp.issubdtype(value.dtype, jax.dtypes.prng_key) or (value.dtype == np.uint32 and value.ndim == 1)
