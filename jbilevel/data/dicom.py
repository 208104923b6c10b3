"""CT series in DICOM files, in Hounsfield units."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .samples import Samples, check_limit, missing_file, optional_package

_TREE = """\
  ANYTHING/ANYTHING.dcm ...
DICOM files at any depth, named as they like; each series of each patient is found by what the files say."""
_SUFFIXES = (".dcm", ".dicom", ".ima")
_DEFLATED = "1.2.840.10008.1.2.1.99"
_CT_IMAGES = ("1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.2.1")  # of one frame and of several
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
    "NumberOfFrames",
    "SamplesPerPixel",
    *_NEEDED,
)


class CTSlice(NamedTuple):
    """A slice of a CT series.

    Attributes:
        hu: float32 (rows, columns) in Hounsfield units; what the scanner put outside of its field of view is kept.
        position: of the slice along the normal of the series, in mm.
        name: of the file.
    """

    hu: np.ndarray
    position: float
    name: str


@dataclass(frozen=True)
class CTSeries:
    """One series of one patient.

    Attributes:
        patient, uid, description: as the files say; empty where they do not.
        pixel_mm: distance of the rows and of the columns.
        positions: of the slices along their normal in mm, ascending: for axial slices from the feet to the head.
        slices: entries of :class:`CTSlice` in this order, read when they are asked for. Axial slices of a patient on
            the back have the front at the top and the patient's right on the left.
    """

    patient: str
    uid: str
    description: str
    pixel_mm: tuple[float, float]
    positions: tuple[float, ...]
    slices: Samples

    def volume(self) -> np.ndarray:
        """All slices in one float32 array (slices, rows, columns).

        Raises:
            ValueError: distances between slices differ by more than 1 %, as where one is missing; or a file is damaged.
        """
        steps = np.diff(self.positions)
        if steps.size and np.ptp(steps) > 0.01 * steps.mean():
            raise ValueError(
                f"the slices of series {self.uid or '(no uid)'} of patient {self.patient or '(no id)'} are "
                f"{steps.min():.3g} to {steps.max():.3g} mm apart: take them one by one from `slices`."
            )
        return np.stack([s.hu for s in self.slices])


class _Header(NamedTuple):
    path: Path
    patient: str
    uid: str
    description: str
    shape: tuple[int, int]
    pixel_mm: tuple[float, ...]
    orientation: tuple[float, ...]
    position: tuple[float, ...]


def dicom_series(root, *, limit: int | None = None, max_pixels: int = 4096 * 4096) -> list[CTSeries]:
    """The CT series in the DICOM files under a folder, by patient and series; pixels are read when they are asked for.

    Files that end in dcm, dicom or ima, whatever the case, must be DICOM; of other files those that begin like DICOM
    are read. What is no slice of a CT (structures, segmentations, scouts, screenshots) is left out. Give the patients
    of the series to :func:`split_by_patient`. Where series have no uid, as in anonymised files, each folder is one.

    Args:
        root: the folder.
        limit: look at the first ``limit`` files by path only.
        max_pixels: refuse larger slices, before they are decompressed.

    Returns:
        The series, in the order of their patients and uids.

    Raises:
        FileNotFoundError: ``root`` is no folder, or holds no CT image.
        ValueError: ``limit`` is not positive; a file is empty, truncated, damaged, too large, has several frames or
            colours, or says nothing about position, spacing or Hounsfield units; two slices of a series lie at one
            place or in different directions, with the names of the files.
        ImportError: pydicom is not installed; or, on reading, the decoder for JPEG 2000.
    """
    pydicom = optional_package("pydicom", "medical")
    check_limit(limit)
    root = Path(root)
    if not root.is_dir():
        raise missing_file(root, _TREE)
    paths = sorted(p for p in root.rglob("*") if p.is_file() and not p.name.startswith(".") and _is_dicom(p))[:limit]
    headers = [header for path in paths if (header := _header(pydicom, path, max_pixels)) is not None]
    if not headers:
        raise missing_file(root / "*.dcm (of a CT)", _TREE)
    groups: dict[tuple[str, str], list[_Header]] = {}
    for header in headers:
        groups.setdefault((header.patient, header.uid or str(header.path.parent)), []).append(header)
    return [_series(pydicom, groups[key]) for key in sorted(groups)]


def _is_dicom(path):
    if path.suffix.lower() in _SUFFIXES:
        return True
    with path.open("rb") as stream:
        return stream.read(132)[128:] == b"DICM" and path.name != "DICOMDIR"


def _header(pydicom, path, max_pixels):
    """What is needed to sort the file, None if it is no CT image."""
    try:
        with path.open("rb") as stream:
            if stream.read(132)[128:] != b"DICM":
                raise _Unusable("does not begin like a DICOM file: it is damaged, or another kind of file.")
        meta = pydicom.filereader.read_file_meta_info(path)
        if meta.get("TransferSyntaxUID") == _DEFLATED:  # pydicom would inflate the whole file, however large it gets
            raise _Unusable("is deflated: convert it to another transfer syntax.")
        data = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(_TAGS))
        # Anonymised files may have emptied both: then what follows decides.
        if (data.get("Modality") or "CT") != "CT" or (data.get("SOPClassUID") or _CT_IMAGES[0]) not in _CT_IMAGES:
            return None
        if "LOCALIZER" in (data.get("ImageType") or ()):
            return None
        if int(data.get("NumberOfFrames") or 1) != 1 or int(data.get("SamplesPerPixel", 1)) != 1:
            raise _Unusable("has several frames or colours: convert it to single slices.")
        missing = [tag for tag in _NEEDED if data.get(tag) in (None, "")]
        if missing:
            raise _Unusable(f"has no {missing[0]}: it is truncated, or no slice of a CT.")
        numbers = [tuple(map(float, data[tag].value)) for tag in ("PixelSpacing", "ImageOrientationPatient")]
        header = _Header(
            path,
            str(data.get("PatientID") or ""),
            str(data.get("SeriesInstanceUID") or ""),
            str(data.get("SeriesDescription") or ""),
            (int(data.Rows), int(data.Columns)),
            numbers[0],
            numbers[1],
            tuple(map(float, data.ImagePositionPatient)),
        )
        lengths = [len(v) for v in (header.pixel_mm, header.orientation, header.position)]
        if lengths != [2, 6, 3] or not np.all(np.isfinite([*sum(header[5:], ())])) or min(header.pixel_mm) <= 0:
            raise _Unusable("has a position, orientation or spacing that makes no sense.")
    except _Unusable as error:
        raise ValueError(f"{path} {error}") from None
    except Exception as error:  # pydicom raises anything on damaged files: EOFError, struct.error, KeyError, ...
        raise ValueError(f"{path} is damaged or truncated: {error}") from error
    if not 0 < header.shape[0] * header.shape[1] <= max_pixels:
        raise ValueError(f"{path} announces {header.shape} pixels, none or more than `max_pixels`={max_pixels}.")
    return header


class _Unusable(Exception):
    """A DICOM file that cannot be used, with the reason."""


def _series(pydicom, headers):
    first = headers[0]
    for other in headers[1:]:
        if other.shape != first.shape or not np.allclose(
            (*other.pixel_mm, *other.orientation), (*first.pixel_mm, *first.orientation), atol=1e-3
        ):
            raise ValueError(
                f"{first.path} and {other.path} are of one series, but differ in size, spacing or direction: "
                "separate them."
            )
    normal = np.cross(first.orientation[:3], first.orientation[3:])
    placed = sorted((float(np.dot(normal, h.position)), h.path) for h in headers)
    for (a, path), (b, other) in zip(placed, placed[1:], strict=False):
        if b - a < 1e-3:
            raise ValueError(f"{path} and {other} are of one series and at one place: remove the copy.")

    def read(key):
        position, path = key
        return CTSlice(_hounsfield(pydicom, path, first.shape), position, path.name)

    positions = tuple(position for position, _ in placed)
    rows, columns = first.pixel_mm
    slices = Samples(tuple(placed), read)
    return CTSeries(first.patient, first.uid, first.description, (rows, columns), positions, slices)


def _hounsfield(pydicom, path, shape):
    try:
        data = pydicom.dcmread(path)
        if (data.Rows, data.Columns) != shape:
            raise _Unusable("has changed since it was first read.")
        _check_code_stream(data, shape)
        slope, intercept = float(data.RescaleSlope), float(data.RescaleIntercept)
        if not (np.isfinite(slope) and slope != 0 and np.isfinite(intercept)):
            raise _Unusable(f"has slope {slope} and intercept {intercept}: there are no Hounsfield units in it.")
        pixels = data.pixel_array
    except _Unusable as error:
        raise ValueError(f"{path} {error}") from None
    except Exception as error:
        name = getattr(getattr(data, "file_meta", None), "TransferSyntaxUID", None) if "data" in locals() else None
        if name is not None and name.is_compressed and "dependencies" in str(error):
            raise ImportError(
                f"{path} is packed as {name.name}. JPEG 2000 needs pip install 'jbilevel[medical]'; "
                "convert files that are packed otherwise."
            ) from error
        raise ValueError(f"{path} is damaged or truncated: {error}") from error
    if pixels.shape != shape:
        raise ValueError(f"{path} holds {pixels.shape} pixels and announces {shape}: it is damaged.")
    return pixels.astype(np.float32) * np.float32(slope) + np.float32(intercept)


def _check_code_stream(data, shape):
    """JPEG 2000 has a size of its own, for which the decoder would allocate memory."""
    content = data.get("PixelData") or b""
    start = content.find(b"\xff\x4f\xff\x51")
    if not data.file_meta.TransferSyntaxUID.is_compressed or start < 0:
        return
    size = content[start + 8 : start + 42]
    if len(size) < 34:
        raise _Unusable("is truncated.")
    right, bottom, left, top, *_, components = struct.unpack(">8IH", size)
    if (bottom - top, right - left, components) != (*shape, 1):
        raise _Unusable(
            f"is packed with {(bottom - top, right - left)} pixels of {components} components and announces {shape} "
            "grey ones: it is damaged."
        )
