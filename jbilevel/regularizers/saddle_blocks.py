"""What a regulariser supplies for primal-dual methods, as data: `R.saddle(params)` of those that have a saddle form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class SaddleBlocks(NamedTuple):
    """R(x) = min_z max_q <L(x, z), q> + a(z) - b*(q) at fixed params; z and q are pytrees, z = () where there is none.

    `scaling` gives steps (t_x, t_z) and s with ||s^(1/2) L t^(1/2)||_2 <= 1, balanced for images in [0, 1].
    """

    linear: Callable  # (x, z) -> L(x, z)
    transpose: Callable  # q -> L' q = (x, z)
    prox_auxiliary: Callable  # (v, step) -> prox of step a
    prox_dual: Callable  # (v, step) -> prox of step b*
    start: Callable  # x -> (z0, q0)
    scaling: Callable  # () -> ((t_x, t_z), s), pytrees like (x, z) and q of numbers
    mu_auxiliary: Any = 0.0  # moduli of strong convexity of a and b*, 0 where there is none
    mu_dual: Any = 0.0
