"""ASTRA's parallel-beam projectors as operators, through batched host callbacks.

The ASTRA Toolbox is GPL-3.0 software and no part of this library: it is imported only when an `Astra` is made.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import KW_ONLY, InitVar, dataclass, fields, replace

import numpy as np

from jbilevel.operators import norms
from jbilevel.operators.base import LinearOperator, check_tolerance
from jbilevel.operators.functions import FromCallbacks
from jbilevel.operators.mismatch import adjoint_mismatch
from jbilevel.operators.xray import ParallelBeam

KERNELS = ("linear", "line", "strip")
DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class Astra(LinearOperator):
    """The X-ray transform of `ParallelBeam`, same geometry and units, computed by the ASTRA Toolbox in float32.

    On the CPU the transpose is ASTRA's own, which uses the same matrix: exact. On a GPU its backprojection interpolates
    and is not the transpose of its projection: ``exact_adjoint`` is False, `mismatch` measures by how much, and nothing
    is certified. `ParallelBeam` needs no ASTRA, is faster on a CPU, and exact everywhere.

    Args:
      in_shape, angles, n_detectors, pixel_size, detector_size, detector_offset: as for `ParallelBeam`.
      kernel: weights of the CPU's projector, "linear" (Joseph), "line" (lengths) or "strip" (areas); the GPU has one of
        its own, near "linear".
      device: "cpu", "cuda", or "auto" for the GPU where ASTRA sees one.
      exact: let "auto" take the CPU, whose transpose is exact.

    Raises:
      ImportError: astra-toolbox is not installed.
      RuntimeError: "cuda" where ASTRA sees no GPU.
      ValueError: unknown kernel or device, ``exact`` with "cuda", or what `ParallelBeam` refuses.

    Reference: W. van Aarle et al., Fast and flexible X-ray tomography using the ASTRA toolbox, Optics Express (2016),
    van_aarle_2016.

    >>> A = Astra((64, 64), [0.0, 1.0, 2.0], 92)  # doctest: +SKIP
    """

    in_shape: tuple[int, int]
    angles: tuple[float, ...]
    n_detectors: int
    _: KW_ONLY
    pixel_size: float = 1.0
    detector_size: float = 1.0
    detector_offset: float = 0.0
    kernel: str = "linear"
    device: str = "auto"
    exact: InitVar[bool] = False

    def __post_init__(self, exact):
        same = ParallelBeam(
            self.in_shape,
            self.angles,
            self.n_detectors,
            pixel_size=self.pixel_size,
            detector_size=self.detector_size,
            detector_offset=self.detector_offset,
        )  # refuses what makes no sense
        for field in fields(same):
            object.__setattr__(self, field.name, vars(same)[field.name])
        if self.kernel not in KERNELS:
            raise ValueError(f"`kernel` must be one of {KERNELS}, got {self.kernel!r}.")
        if self.device not in DEVICES:
            raise ValueError(f"`device` must be one of {DEVICES}, got {self.device!r}.")
        if exact and self.device == "cuda":
            raise ValueError("`exact=True` needs the CPU, whose transpose is exact: leave `device` at 'auto' or 'cpu'.")
        gpu = import_astra().use_cuda()
        if self.device == "cuda" and not gpu:
            raise RuntimeError("`device='cuda'` needs a GPU, and ASTRA sees none: take 'cpu' or 'auto'.")
        device = ("cuda" if gpu and not exact else "cpu") if self.device == "auto" else self.device
        object.__setattr__(self, "device", device)

    @property
    def out_shape(self) -> tuple[int, int]:
        return len(self.angles), self.n_detectors

    @property
    def exact_adjoint(self) -> bool:
        return self.device == "cpu"

    @property
    def norm_is_bound(self) -> bool:
        return self.exact_adjoint

    def forward(self, x):
        return self._callbacks.forward(x)

    def transpose(self, y):
        return self._callbacks.transpose(y)

    @property
    def _callbacks(self):
        hosts = _Host(self, False), _Host(self, True)
        return FromCallbacks(
            *hosts,
            in_shape=self.in_shape,
            out_shape=self.out_shape,
            dtype="float32",
            takes_batch=True,
            in_kind="real",
            out_kind="real",
            exact_adjoint=self.exact_adjoint,
        )

    def norm(self, tol: float = 1e-3) -> float:
        """As for `ParallelBeam`, rounding in float32 apart; an estimate where the transpose is not exact."""
        check_tolerance(tol)
        return norms.nonnegative(self, tol) if self.exact_adjoint else super().norm(tol)

    def mismatch(self, size: int = 32) -> float:
        """`adjoint_mismatch` for the same pixels and bins, a ``size`` x ``size`` image and at most 32 of the angles."""
        reach = math.sqrt(2) * size * self.pixel_size + 2 * abs(self.detector_offset)
        bins = math.ceil(reach / self.detector_size) + 1
        few = self.angles[:: -(-len(self.angles) // 32)]
        return adjoint_mismatch(replace(self, in_shape=(size, size), angles=few, n_detectors=bins))


def import_astra():
    """The package, or an ImportError that says how to get it."""
    try:
        import astra
    except ImportError as error:
        raise ImportError("this operator needs astra-toolbox (GPL-3.0): pip install 'jbilevel[ct]'.") from error
    return astra


@dataclass(frozen=True)
class _Host:
    """Runs inside the callback: numpy and ASTRA only, (n, ...) to (n, ...).

    ASTRA's objects live for one call, so that nothing is shared between threads and nothing is left behind; setting
    them up costs little beside a projection.
    """

    operator: Astra
    transposed: bool

    def __call__(self, batch):
        astra = import_astra()
        apply = self._backproject if self.transposed else self._project
        with _projector(astra, self.operator) as projector:
            out = [apply(astra, np.ascontiguousarray(v, np.float32), projector) for v in batch]
        # ASTRA sees pixels of size 1
        return np.float32(self.operator.pixel_size) * np.stack(out)

    @staticmethod
    def _project(astra, x, projector):
        name, sinogram = astra.create_sino(x, projector)
        astra.data2d.delete(name)
        return sinogram

    @staticmethod
    def _backproject(astra, y, projector):
        name, image = astra.create_backprojection(y, projector)
        astra.data2d.delete(name)
        return image


@contextmanager
def _projector(astra, A: Astra):
    cos, sin = np.cos(A.angles), np.sin(A.angles)
    width, offset = A.detector_size / A.pixel_size, A.detector_offset / A.pixel_size
    # direction of the rays, centre of the detector, step from bin to bin
    views = np.stack([sin, -cos, offset * cos, offset * sin, width * cos, width * sin], axis=1)
    rays = astra.create_proj_geom("parallel_vec", A.n_detectors, views)
    image = astra.create_vol_geom(*A.in_shape)
    projector = astra.create_projector("cuda" if A.device == "cuda" else A.kernel, rays, image)
    try:
        yield projector
    finally:
        astra.projector.delete(projector)
