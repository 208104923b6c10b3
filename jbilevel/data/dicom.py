"""CT series in DICOM files, in Hounsfield units."""

from __future__ import annotations

import io
import os
import struct
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .files import Unusable, is_entry, missing_file, named, optional_package
from .pictures import check_scans
from .samples import Samples, check_limit
from .stacks import leaning

_TREE = """\
  ANYTHING/ANYTHING.dcm ...
DICOM files at any depth, named as they like; each series of each patient is found by what the files say."""
_SUFFIXES = (".dcm", ".dicom", ".ima")
_KIND = "DICOM file"
_DEFLATED = "1.2.840.10008.1.2.1.99"
_CT_IMAGES = ("1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.2.1")  # of one frame and of several
_HU = "HU"
# Words in ImageType of what is computed from several energies or times (DICOM PS3.3, C.8.15.2.1.1, and makers' own)
_MAPS = ("MAT_", "EFF_ATOMIC_NUM", "ELECTRON_DENSITY", "IODINE", "PERFUSION", "CBF", "CBV", "MTT", "TTP", "TMAX")
_NEVER_HU = ("MAT_SPECIFIC", "MAT_FRACTIONAL", "EFF_ATOMIC_NUM", "ELECTRON_DENSITY")
_NEEDED = (
    "Rows",
    "Columns",
    "PixelSpacing",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "RescaleSlope",
    "RescaleIntercept",
)
_TAGS = (
    "SOPClassUID",
    "ImageType",
    "Modality",
    "PatientID",
    "SeriesInstanceUID",
    "SeriesDescription",
    "FrameOfReferenceUID",
    "NumberOfFrames",
    "SamplesPerPixel",
    "KVP",
    "MultienergyCTAcquisition",
    "ModalityLUTSequence",
    "RescaleType",
    "Units",
    *_NEEDED,
)


class CTSlice(NamedTuple):
    """A slice of a CT series.

    Attributes:
        values: float32 (rows, columns) in ``unit``; what the scanner put outside of its field of view is kept.
        position: of the slice along the normal of the series, in mm.
        name: of the file.
        unit: "HU" for an ordinary CT; else as :attr:`CTSeries.unit`.

    >>> slice_ = CTSlice(np.full((4, 4), -1000.0, np.float32), position=12.5, name="0001.dcm")
    >>> float(slice_.hu.mean()), slice_.position  # air
    (-1000.0, 12.5)
    """

    values: np.ndarray
    position: float
    name: str
    unit: str = _HU

    @property
    def hu(self) -> np.ndarray:
        """The values, which are in Hounsfield units.

        Raises:
            ValueError: they are not: this is a map of something else.
        """
        if self.unit != _HU:
            unit = f"in {self.unit}" if self.unit else "a map in a unit that the file does not tell"
            raise ValueError(f"{self.name} is {unit}, not in Hounsfield units: take its `values`.")
        return self.values


@dataclass(frozen=True)
class CTSeries:
    """One series of one patient.

    Attributes:
        patient, uid, description: as the files say; empty where they do not.
        pixel_mm: distance of the rows and of the columns.
        positions: of the slices along their normal in mm, ascending: for axial slices from the feet to the head.
        slices: entries of :class:`CTSlice` in this order, read when they are asked for. Axial slices of a patient on
            the back have the front at the top and the patient's right on the left.
        shifts_mm: how far the first pixel of each slice lies from that of the first slice within the plane, down the
            rows and along the columns; zeros but for a tilted gantry, or a table that was moved.
        unit: what the values are in: "HU", or what DICOM calls it: "MGML" (mg/ml, such as of iodine), "Z_EFF", "PCT",
            "US" (unspecified) and so on; empty for maps whose files do not say.

    >>> import shutil, tempfile
    >>> from pathlib import Path
    >>> from pydicom.data import get_testdata_file
    >>> root = Path(tempfile.mkdtemp())
    >>> _ = shutil.copy(get_testdata_file("CT_small.dcm", download=False), root)
    >>> (series,) = dicom_series(root)
    >>> series.volume().shape, series.unit, len(series.positions) == len(series.slices)
    ((1, 128, 128), 'HU', True)
    """

    patient: str
    uid: str
    description: str
    pixel_mm: tuple[float, float]
    positions: tuple[float, ...]
    slices: Samples
    shifts_mm: tuple[tuple[float, float], ...]
    unit: str = _HU

    def volume(self) -> np.ndarray:
        """All slices in one float32 array (slices, rows, columns), in Hounsfield units.

        Raises:
            ValueError: distances between slices differ by more than 1 %, as where one is missing; slices move within
                their plane by more than a tenth of a pixel, as under a tilted gantry, so that the volume would be
                sheared; they are not in Hounsfield units; or a file is damaged.
        """
        name = f"the slices of series {self.uid or '(no uid)'} of patient {self.patient or '(no id)'}"
        files, steps = [path.name for path, *_ in self.slices.keys], np.diff(self.positions)
        if steps.size and np.ptp(steps) > 0.01 * steps.mean():
            k = int(np.argmax(steps))
            raise ValueError(
                f"{name} are {steps.min():.3g} to {steps.max():.3g} mm apart, the latter between {files[k]} and "
                f"{files[k + 1]}: take them one by one from `slices`."
            )
        moved = np.hypot(*np.transpose(self.shifts_mm))
        k = int(np.argmax(moved))
        if words := leaning(moved[k], self.positions[-1] - self.positions[0], min(self.pixel_mm)):
            raise ValueError(
                f"{name} {words}, from {files[0]} to {files[k]}: take them one by one from `slices`, or move them by "
                "`shifts_mm`."
            )
        return np.stack([s.hu for s in self.slices])


class _Header(NamedTuple):
    path: Path
    patient: str
    uid: str
    description: str
    frame: str
    unit: str
    shape: tuple[int, int]
    pixel_mm: tuple[float, ...]
    orientation: tuple[float, ...]
    position: tuple[float, ...]

    def corners(self) -> np.ndarray:
        """Where the last column and the last row lie, as seen from the first pixel, in mm: (2, 3)."""
        lengths = [(n - 1) * step for n, step in zip(self.shape[::-1], self.pixel_mm[::-1], strict=True)]
        return np.array(lengths)[:, None] * self.axes()

    def axes(self) -> np.ndarray:
        """Unit vectors along the columns and down the rows: (2, 3)."""
        return np.reshape(self.orientation, (2, 3))


def dicom_series(root, *, limit: int | None = None, max_pixels: int = 2048 * 2048) -> list[CTSeries]:
    """The CT series in the DICOM files under a folder, by patient and series; pixels are read when they are asked for.

    Files that end in dcm, dicom or ima, whatever the case, must be DICOM; of other files those that begin like DICOM
    are read. What is no slice of a CT (other modalities, structures, segmentations, scouts, screenshots) is left out.
    Maps that a CT scanner computed, such as of iodine, are series of their own whose ``unit`` is not "HU". Give the
    patients of the series to :func:`split_by_patient`. Where series have no uid, as in anonymised files, each folder is
    one.

    Args:
        root: the folder.
        limit: look at the first ``limit`` files by path only.
        max_pixels: refuse larger slices, before they are decompressed.

    Returns:
        The series, in the order of their patients, uids and units.

    Raises:
        FileNotFoundError: ``root`` is no folder, or holds no CT image.
        ValueError: ``limit`` is not positive; a file is empty, truncated, damaged, too large, has several frames or
            colours, or says nothing about position, spacing or units; two slices of a series lie at one place, or
            differ in size, spacing, direction or frame of reference, with the names of the files.
        ImportError: pydicom is not installed; or, on reading, the decoder for JPEG 2000.

    >>> import shutil, tempfile
    >>> from pathlib import Path
    >>> from pydicom.data import get_testdata_file
    >>> root = Path(tempfile.mkdtemp())
    >>> _ = shutil.copy(get_testdata_file("CT_small.dcm", download=False), root)
    >>> (series,) = dicom_series(root)
    >>> series.patient, series.slices[0].hu.shape, series.pixel_mm
    ('1CT1', (128, 128), (0.661468, 0.661468))
    """
    optional_package("pydicom", "medical")
    check_limit(limit)
    root = Path(root)
    if not root.is_dir():
        raise missing_file(root, _TREE)
    paths = sorted(p for p in root.rglob("*") if is_entry(p) and not p.name.startswith(".") and _is_dicom(p))[:limit]
    headers = [header for path in paths if (header := _header(path, max_pixels)) is not None]
    if not headers:
        raise missing_file(root / "*.dcm (of a CT)", _TREE)
    groups: dict[tuple[str, ...], list[_Header]] = {}
    for header in headers:
        groups.setdefault((header.patient, header.uid or str(header.path.parent), header.unit), []).append(header)
    return [_series(groups[key]) for key in sorted(groups)]


def _is_dicom(path):
    if path.suffix.lower() in _SUFFIXES:
        return True
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        return stream.read(132)[128:] == b"DICM" and path.name != "DICOMDIR"


class _Bounded(io.BufferedReader):
    """A file that is asked for no more than it has: pydicom takes memory for whatever length an element announces."""

    def read(self, size=-1):
        left = os.fstat(self.fileno()).st_size - self.tell()
        return super().read(left if size is None or size < 0 else min(size, left))


def _header(path, max_pixels):
    """What is needed to sort the file, None if it is no CT image."""
    from pydicom import dcmread
    from pydicom.filereader import read_dataset

    with named(path, _KIND), _Bounded(io.FileIO(path)) as stream:
        if stream.read(132)[128:] != b"DICM":
            raise Unusable("does not begin like a DICOM file: it is damaged, or another kind of file.")
        meta = read_dataset(stream, False, True, stop_when=lambda tag, vr, length: tag.group != 2)
        if meta.get("TransferSyntaxUID") == _DEFLATED:  # pydicom would inflate the whole file, however large it gets
            raise Unusable("is deflated: convert it to another transfer syntax.")
        stream.seek(0)
        data = dcmread(stream, stop_before_pixels=True, specific_tags=list(_TAGS))
        # Anonymised files may have emptied both: then what follows decides.
        if (data.get("Modality") or "CT") != "CT" or (data.get("SOPClassUID") or _CT_IMAGES[0]) not in _CT_IMAGES:
            return None
        if "LOCALIZER" in (data.get("ImageType") or ()):
            return None
        if int(data.get("NumberOfFrames") or 1) != 1 or int(data.get("SamplesPerPixel", 1)) != 1:
            raise Unusable("has several frames or colours: convert it to single slices.")
        if data.get("ModalityLUTSequence"):
            raise Unusable("has a table in place of slope and intercept: convert it.")
        missing = [tag for tag in _NEEDED if data.get(tag) in (None, "")]
        if missing:
            raise Unusable(f"has no {missing[0]}: it is truncated, or no slice of a CT.")
        header = _Header(
            path=path,
            patient=str(data.get("PatientID") or ""),
            uid=str(data.get("SeriesInstanceUID") or ""),
            description=str(data.get("SeriesDescription") or ""),
            frame=str(data.get("FrameOfReferenceUID") or ""),
            unit=_unit(data),
            shape=(int(data.Rows), int(data.Columns)),
            pixel_mm=tuple(map(float, data.PixelSpacing)),
            orientation=tuple(map(float, data.ImageOrientationPatient)),
            position=tuple(map(float, data.ImagePositionPatient)),
        )
        vectors = (header.pixel_mm, header.orientation, header.position)
        if [len(v) for v in vectors] != [2, 6, 3] or not np.all(np.isfinite(sum(vectors, ()))) or min(vectors[0]) <= 0:
            raise Unusable("has a position, orientation or spacing that makes no sense.")
        if not np.allclose(header.axes() @ header.axes().T, np.eye(2), atol=1e-3):
            raise Unusable("has rows and columns that are not at right angles, or not of unit length.")
        if not 0 < header.shape[0] * header.shape[1] <= max_pixels:
            raise Unusable(f"announces {header.shape} pixels, none or more than `max_pixels`={max_pixels}.")
    return header


def _unit(data):
    """What slope and intercept lead to: as the file says, else Hounsfield units unless it is no ordinary CT."""
    kinds = " ".join(str(kind).upper() for kind in data.get("ImageType") or ())
    stated = str(data.get("RescaleType") or data.get("Units") or "").strip().upper()
    if stated:
        return "" if stated == _HU and any(word in kinds for word in _NEVER_HU) else stated
    is_ct = data.get("Modality") or data.get("SOPClassUID") or data.get("KVP")
    is_map = data.get("MultienergyCTAcquisition") == "YES" or any(word in kinds for word in _MAPS)
    return _HU if is_ct and not is_map else ""


def _series(headers):
    first = headers[0]
    pixel = min(first.pixel_mm)
    for other in headers[1:]:
        apart = np.abs(other.corners() - first.corners()).max() if other.shape == first.shape else np.inf
        if apart > 0.1 * pixel or other.frame != first.frame:
            raise ValueError(
                f"{first.path} and {other.path} are of one series, but differ in size, spacing, direction or frame of "
                f"reference{'' if apart in (0, np.inf) else f' (by {apart:.3g} mm at a corner)'}: separate them."
            )
    axes = first.axes()
    normal = np.cross(*axes)
    placed = sorted(((float(normal @ h.position), h) for h in headers), key=lambda item: (item[0], item[1].path))
    for (a, one), (b, other) in zip(placed, placed[1:], strict=False):
        if b - a < 1e-3:
            raise ValueError(f"{one.path} and {other.path} are of one series and at one place: remove the copy.")
    ways = np.array([h.position for _, h in placed]) - placed[0][1].position
    shifts = tuple((float(down), float(along)) for along, down in ways @ axes.T)
    keys = tuple((h.path, position, h.unit) for position, h in placed)
    return CTSeries(
        first.patient,
        first.uid,
        first.description,
        (first.pixel_mm[0], first.pixel_mm[1]),
        tuple(position for position, _ in placed),
        Samples(keys, partial(_slice, shape=first.shape)),
        shifts,
        first.unit,
    )


def _slice(key, shape):
    path, position, unit = key
    from pydicom import dcmread

    with named(path, _KIND):
        data = dcmread(io.BytesIO(path.read_bytes()))
        if (data.Rows, data.Columns) != shape or _unit(data) != unit:
            raise Unusable("has changed since it was first read.")
        slope, intercept = float(data.RescaleSlope), float(data.RescaleIntercept)
        if not (np.isfinite(slope) and slope != 0 and np.isfinite(intercept)):
            raise Unusable(f"has slope {slope} and intercept {intercept}: there are no measured values in it.")
        _check_decoder(data, path)
        _check_code_stream(data, shape)
        pixels = data.pixel_array
        if pixels.shape != shape:
            raise Unusable(f"holds {pixels.shape} pixels and announces {shape}: it is damaged.")
        return CTSlice((pixels * slope + intercept).astype(np.float32), position, path.name, unit)


def _check_decoder(data, path):
    from pydicom.pixels.decoders.base import get_decoder

    decoder = get_decoder(data.file_meta.TransferSyntaxUID)
    if not decoder.is_available:
        raise ImportError(
            f"{path} is packed as {decoder.UID.name}. JPEG 2000 needs pip install 'jbilevel[medical]'; "
            "convert files that are packed otherwise."
        )


def _check_code_stream(data, shape):
    """JPEG and JPEG 2000 have a size of their own, for which the decoder would take memory."""
    from pydicom.encaps import get_frame

    name = data.file_meta.TransferSyntaxUID
    if not name.is_compressed or "JPEG" not in name.name:
        return
    frame = get_frame(data.PixelData, 0, number_of_frames=1)
    size = _jpeg_2000_size(frame) if frame[:4] == b"\xff\x4f\xff\x51" else _jpeg_size(frame)
    if size != (*shape, 1):
        raise Unusable(
            f"is packed with {size[:2]} pixels of {size[2]} components and announces {shape} grey ones: it is damaged."
        )


def _jpeg_2000_size(frame):
    if len(frame) < 42:
        raise Unusable("is truncated.")
    right, bottom, left, top, *_, components = struct.unpack(">8IH", frame[8:42])
    return bottom - top, right - left, components


def _jpeg_size(frame):
    """From the start of the frame, which is the first segment but for tables and comments."""
    check_scans(frame)
    place = 2
    while frame[:2] == b"\xff\xd8" and place + 10 <= len(frame) and frame[place] == 0xFF:
        kind, length, _, height, width, components = struct.unpack(">xBHBHHB", frame[place : place + 10])
        if 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC) or kind == 0xF7:  # 0xF7: JPEG-LS
            return height, width, components
        place += 1 if kind == 0xFF else 2 + length
    raise Unusable("holds no JPEG or JPEG 2000 code stream: it is damaged.")
