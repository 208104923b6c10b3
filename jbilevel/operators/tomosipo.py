"""tomosipo's operators (3D parallel, cone and vector geometries on a GPU) through batched host callbacks.

tomosipo is GPL-3.0 software and no part of this library: an operator of it is handed in, nothing of it is imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from jbilevel.operators.astra import import_astra
from jbilevel.operators.base import LinearOperator, shape_of
from jbilevel.operators.functions import from_callbacks


def from_tomosipo(op, *, exact_adjoint: bool = False) -> LinearOperator:
    """A tomosipo operator (``tomosipo.operator(volume, projection)``) as an operator of this library.

    It maps volumes (z, y, x) to projections (detector rows, angles, detector columns) in float32, in tomosipo's units;
    an image is a volume of one slice. Arrays travel to the host and, inside tomosipo, to the GPU and back.

    Args:
      op: callable on numpy arrays, with ``.T`` (callable too), ``.domain_shape`` and ``.range_shape``; whatever offers
        these four works.
      exact_adjoint: True only for an ``op`` whose ``.T`` is the exact transpose. That of ASTRA's GPU code is not;
        `adjoint_mismatch` measures it on a small geometry.

    Two operators made of the same ``op`` are equal.

    Raises:
      TypeError: ``op`` lacks one of the four.
      RuntimeError: a real tomosipo operator on a machine without a GPU, where calling it would end the process.

    >>> import numpy as np
    >>> class Double:  # what looks like one
    ...     domain_shape = range_shape = (1, 2, 2)
    ...     T = staticmethod(lambda y: 2 * y)
    ...     def __call__(self, x):
    ...         return 2 * x
    >>> from_tomosipo(Double(), exact_adjoint=True)(np.ones((1, 2, 2), np.float32)).tolist()
    [[[2.0, 2.0], [2.0, 2.0]]]
    """
    missing = [name for name in ("__call__", "T", "domain_shape", "range_shape") if not hasattr(op, name)]
    if missing:
        raise TypeError(f"`op` must be a tomosipo operator; {type(op).__name__} has no {', '.join(missing)}.")
    if type(op).__module__.split(".")[0] == "tomosipo" and not import_astra().use_cuda():
        raise RuntimeError(
            "tomosipo needs a GPU, and ASTRA sees none: take a built-in operator such as `ParallelBeam`."
        )
    shapes = shape_of(op.domain_shape, "op.domain_shape"), shape_of(op.range_shape, "op.range_shape")
    hosts = _Host(op, False), _Host(op, True)
    return from_callbacks(*hosts, *shapes, batched=True, exact_adjoint=exact_adjoint)


@dataclass(frozen=True, eq=False)
class _Host:
    """Runs inside the callback, (n, ...) to (n, ...). Compares by the identity of ``op``, which need not hash."""

    op: Any
    transposed: bool

    def __call__(self, batch):
        apply = self.op.T if self.transposed else self.op
        # a copy each: tomosipo links the memory that it is given, and JAX's must not be written to
        return np.stack([np.asarray(apply(np.array(v, np.float32, order="C"))) for v in batch])

    def __eq__(self, other):
        return isinstance(other, _Host) and self.op is other.op and self.transposed == other.transposed

    def __hash__(self):
        return hash((id(self.op), self.transposed))
