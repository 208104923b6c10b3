"""Slices that make a volume: each exactly above the one before."""

from __future__ import annotations

import math

_TOLERANCE = 0.1  # of a pixel, over the whole stack


def leaning(moved: float, height: float, pixel: float) -> str:
    """What is wrong with a stack whose slices move within their plane, in words; "" where it is nothing.

    A volume of such slices, one put on the other, would be sheared. A tilted gantry makes them: its slices lean, and
    the table moves along the floor.

    Args:
        moved: the largest way of a slice within its plane, relative to the first, in mm.
        height: of the stack along its normal, in mm.
        pixel: the smaller side of a pixel in mm.

    >>> leaning(0.0, 150.0, 0.5)
    ''
    >>> leaning(54.6, 150.0, 0.5)
    'move by 54.6 mm within their plane over 150 mm, as under a gantry tilted by 20.0 degrees'
    """
    if moved <= _TOLERANCE * pixel:
        return ""
    tilt = f"{math.degrees(math.atan2(moved, height)):.1f} degrees"
    return f"move by {moved:.3g} mm within their plane over {height:.3g} mm, as under a gantry tilted by {tilt}"
