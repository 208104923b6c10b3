"""Undersampled Fourier transforms: magnetic resonance imaging, with any number of receiver coils."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from functools import cached_property

import jax.numpy as jnp
import numpy as np

from jbilevel.operators.base import LinearOperator, check_tolerance, shape_of
from jbilevel.operators.frozen import FrozenArray, frozen_field, frozen_mask


@dataclass(frozen=True)
class UndersampledFourier(LinearOperator):
    """A x = (M F (s_c x))_c: Fourier coefficients of an image seen by coils with sensitivities s_c, where M keeps them.

    F = fftshift o fft2 o ifftshift is the orthonormal discrete Fourier transform with both origins in the centre: the
    image's at pixel (H // 2, W // 2) and the zero frequency at entry (H // 2, W // 2) of the k-space. Coefficients that
    were not measured are 0. Without coils (C = 1, s = 1) the coil axis is dropped.

    Args:
      in_shape: (H, W).
      mask: (H, W) booleans or zeros and ones in the centred k-space; True is measured. See `cartesian_mask`.
      coils: None, or complex sensitivities (C, H, W).
      in_kind: "real" images or "complex" ones. For real images A.H takes the real part.

    The output is complex, (H, W) or (C, H, W). ``norm`` is a proven bound. Without coils it is exact: 1, but for real
    images max_k sqrt((M(k) + M(-k)) / 2), which is less where no frequency is measured together with its mirror image.
    With coils it is max_pixel sqrt(sum_c |s_c|^2), which full sampling attains.

    Raises:
      ValueError: a mask or coils of another shape, a mask that keeps nothing, coils that are not finite.

    Reference: K. P. Pruessmann et al., SENSE: sensitivity encoding for fast MRI, Magnetic Resonance in Medicine (1999),
    pruessmann_1999.

    >>> import jax.numpy as jnp
    >>> A = UndersampledFourier((4, 4), [[0, 0, 1, 0]] * 4)
    >>> y = A(jnp.ones((4, 4)))
    >>> y.shape, abs(y[2, 2]).item(), A.norm()
    ((4, 4), 4.0, 1.0)
    """

    in_shape: tuple[int, int]
    mask: FrozenArray
    _: KW_ONLY
    coils: FrozenArray | None = None
    in_kind: str = "real"

    out_kind = "complex"
    norm_is_bound = True

    def __post_init__(self):
        shape, mask = shape_of(self.in_shape, "in_shape"), frozen_mask(self.mask)
        if len(shape) != 2:
            raise ValueError(f"`in_shape` must be (H, W), got {shape}.")
        if mask.shape != shape:
            raise ValueError(f"`mask` must have the shape of the image {shape}, got {mask.shape}.")
        if self.in_kind not in ("real", "complex"):
            raise ValueError(f"`in_kind` must be 'real' or 'complex', got {self.in_kind!r}.")
        object.__setattr__(self, "in_shape", shape)
        object.__setattr__(self, "mask", mask)
        if self.coils is not None:
            coils = frozen_field(self.coils, "coils", "complex")
            if len(coils.shape) != 3 or coils.shape[1:] != shape:
                raise ValueError(f"`coils` must have shape (C, {shape[0]}, {shape[1]}), got {coils.shape}.")
            object.__setattr__(self, "coils", coils)

    @property
    def out_shape(self) -> tuple[int, ...]:
        return self.in_shape if self.coils is None else self.coils.shape

    def forward(self, x):
        if self.coils is not None:
            x = x[..., None, :, :]
            x = x * self._sensitivities(x)
        return self._measured(_centred_fft(x))

    def transpose(self, y):
        # F and M are symmetric
        x = _centred_fft(self._measured(y))
        if self.coils is not None:
            x = jnp.sum(x * self._sensitivities(x), axis=-3)
        return jnp.real(x) if self.in_kind == "real" else x

    def _measured(self, y):
        return jnp.where(jnp.broadcast_to(self.mask.array, y.shape), y, 0)

    def _sensitivities(self, x):
        dtype = jnp.result_type(x.dtype, jnp.complex64)
        shape = (*x.shape[:-3], *self.coils.shape)
        return jnp.broadcast_to(jnp.asarray(self.coils.array, dtype), shape)

    def norm(self, tol: float = 1e-3) -> float:
        """The bound above, in closed form."""
        check_tolerance(tol)
        return self._bound

    @cached_property
    def _bound(self) -> float:
        share = 1.0
        if self.in_kind == "real" and (self.coils is None or not np.any(self.coils.array.imag)):
            # a real image has as much of the frequency k as of -k
            mask = np.fft.ifftshift(self.mask.array).astype(float)
            share = np.max(mask + np.roll(np.flip(mask), (1, 1), (0, 1))) / 2
        most = 1.0 if self.coils is None else np.max(np.sum(np.abs(self.coils.array) ** 2, axis=0))
        return math.sqrt(share * most)


def _centred_fft(x):
    """The orthonormal Fourier transform over the last two axes with centred origins; symmetric as a matrix."""
    axes = (-2, -1)
    return jnp.fft.fftshift(jnp.fft.fft2(jnp.fft.ifftshift(x, axes), norm="ortho"), axes)


def cartesian_mask(shape, acceleration: float, centre_fraction: float, rng: np.random.Generator) -> np.ndarray:
    """A random mask of whole lines of the centred k-space, as fast Cartesian scans measure it.

    round(W / acceleration) of the W columns are kept: the round(W * centre_fraction) in the middle, and others drawn
    uniformly without repetition.

    Args:
      shape: (H, W); lines run along H.
      acceleration: at least 1.
      centre_fraction: share of the columns that is always measured, from 0 to 1 / acceleration.
      rng: numpy's random generator.

    Returns:
      Booleans (H, W).

    Raises:
      ValueError: numbers outside these ranges, or nothing left to measure.

    >>> import numpy as np
    >>> int(cartesian_mask((8, 40), 4.0, 0.1, np.random.default_rng(0)).sum(axis=1)[0])
    10
    """
    shape = shape_of(shape, "shape")
    if len(shape) != 2:
        raise ValueError(f"`shape` must be (H, W), got {shape}.")
    if not (math.isfinite(acceleration) and acceleration >= 1):
        raise ValueError(f"`acceleration` must be at least 1, got {acceleration}.")
    if not 0 <= centre_fraction <= 1:
        raise ValueError(f"`centre_fraction` must lie between 0 and 1, got {centre_fraction}.")
    width = shape[1]
    kept, centre = round(width / acceleration), round(width * centre_fraction)
    if kept == 0:
        raise ValueError(f"`acceleration` {acceleration} leaves none of {width} columns: take a smaller one.")
    if centre > kept:
        raise ValueError(
            f"`centre_fraction` {centre_fraction} keeps {centre} columns, more than the {kept} that `acceleration` "
            f"{acceleration} allows: lower one of them."
        )
    start = width // 2 - centre // 2
    middle = np.arange(start, start + centre)
    others = rng.choice(np.setdiff1d(np.arange(width), middle), kept - centre, replace=False)
    columns = np.isin(np.arange(width), np.concatenate([middle, others]))
    return np.broadcast_to(columns, shape).copy()
