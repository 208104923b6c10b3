"""Hounsfield units, density relative to water, and attenuation per millimetre."""

from __future__ import annotations

import numpy as np

MU_WATER = 0.02  # 1/mm: water at about 70 keV, the mean energy of a diagnostic X-ray tube


def hu_to_density(hu) -> np.ndarray:
    """Density relative to water, max(0, 1 + HU / 1000): air 0, water 1, cortical bone about 2.

    Values under -1000 HU, with which scanners fill what lies outside their field of view, become 0.

    >>> hu_to_density([-2000, -1000, 0, 60])
    array([0.  , 0.  , 1.  , 1.06], dtype=float32)
    """
    return np.maximum(0, 1 + _floating(hu) / 1000)


def density_to_hu(density) -> np.ndarray:
    """Hounsfield units of a density relative to water, 1000 (density - 1).

    >>> density_to_hu([0.0, 1.0, 2.0])
    array([-1000.,     0.,  1000.])
    """
    return 1000 * (_floating(density) - 1)


def hu_to_attenuation(hu, mu_water: float = MU_WATER) -> np.ndarray:
    """Linear attenuation, ``mu_water`` times :func:`hu_to_density`, in the unit of ``mu_water`` (1/mm).

    Raises:
        ValueError: ``mu_water`` is not positive and finite.

    >>> hu_to_attenuation([-1000, 0])
    array([0.  , 0.02], dtype=float32)
    """
    return check_positive("mu_water", mu_water) * hu_to_density(hu)


def attenuation_to_hu(attenuation, mu_water: float = MU_WATER) -> np.ndarray:
    """Hounsfield units of a linear attenuation in the unit of ``mu_water`` (1/mm).

    Raises:
        ValueError: ``mu_water`` is not positive and finite.

    >>> attenuation_to_hu([0.0, 0.02])
    array([-1000.,     0.])
    """
    return density_to_hu(_floating(attenuation) / check_positive("mu_water", mu_water))


def check_positive(name: str, value: float) -> float:
    """``value`` as a float.

    Raises:
        ValueError: it is not positive and finite; the message calls it ``name``.
    """
    if not (np.ndim(value) == 0 and np.isfinite(value) and value > 0):
        raise ValueError(f"`{name}` is {value}: give one positive finite number.")
    return float(value)


def _floating(values):
    values = np.asarray(values)
    return values if np.issubdtype(values.dtype, np.floating) else values.astype(np.float32)
