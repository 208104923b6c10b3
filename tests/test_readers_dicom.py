"""DICOM series from small files made here, whole and damaged."""

import struct
import sys

import numpy as np
import pydicom
import pytest
from pydicom.uid import (
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    RLELossless,
    generate_uid,
)

from jbilevel.data import dicom_series, split_by_patient

rng = np.random.default_rng(0)
PIXELS = rng.integers(0, 4096, (40, 34), dtype=np.uint16)


def ct(pixels=PIXELS, z=0.0, patient="p1", series="1.2.3", syntax=ImplicitVRLittleEndian, **changes):
    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian if syntax.is_compressed else syntax
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = CTImageStorage
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = generate_uid()
    data.PatientID, data.SeriesInstanceUID, data.Modality = patient, series, "CT"
    data.Rows, data.Columns = pixels.shape
    data.BitsAllocated, data.BitsStored, data.HighBit = 16, 12, 11
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.PixelRepresentation = int(pixels.dtype.kind == "i")
    data.PixelSpacing, data.ImagePositionPatient = [0.8, 0.7], [-10, -20, z]
    data.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    data.RescaleSlope, data.RescaleIntercept = 1, -1024
    data.PixelData = pixels.tobytes()
    if syntax.is_compressed:
        data.compress(syntax)
    for name, value in changes.items():
        if value is None:
            delattr(data, name)
        else:
            setattr(data, name, value)
    return data


def save(data, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(path, enforce_file_format=True)
    return path


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, JPEG2000Lossless, RLELossless])
def test_hounsfield_units_of_a_slice(tmp_path, syntax):
    save(ct(syntax=syntax, RescaleSlope=0.5, RescaleIntercept=-1000.5), tmp_path / "a.dcm")
    (series,) = dicom_series(tmp_path)
    assert series.pixel_mm == (0.8, 0.7) and (series.patient, series.uid) == ("p1", "1.2.3")
    (slice_,) = series.slices
    assert slice_.hu.dtype == np.float32 and slice_.name == "a.dcm"
    np.testing.assert_allclose(slice_.hu, PIXELS * 0.5 - 1000.5)


def test_signed_pixels(tmp_path):
    pixels = PIXELS.astype(np.int16) - 2048
    save(ct(pixels, RescaleIntercept=0), tmp_path / "a.dcm")
    np.testing.assert_array_equal(dicom_series(tmp_path)[0].slices[0].hu, pixels)


def test_series_are_sorted_by_position_not_by_name(tmp_path):
    heights = [5.0, -2.5, 0.0, 2.5, -5.0]
    for k, z in enumerate(heights):
        save(ct(PIXELS + np.uint16(k), z), tmp_path / f"{k}.dcm")
    (series,) = dicom_series(str(tmp_path))
    assert series.positions == (-5.0, -2.5, 0.0, 2.5, 5.0)
    assert [s.name for s in series.slices] == ["4.dcm", "1.dcm", "2.dcm", "3.dcm", "0.dcm"]
    volume = series.volume()
    assert volume.shape == (5, 40, 34) and volume.dtype == np.float32
    np.testing.assert_array_equal(volume[1], (PIXELS + 1.0) - 1024)


def test_oblique_series_are_sorted_along_their_normal(tmp_path):
    orientation = [0, 1, 0, 0, 0, -1]  # sagittal: the normal is -x
    for k, x in enumerate([3.0, 1.0, 2.0]):
        save(ct(ImagePositionPatient=[x, 0, 50], ImageOrientationPatient=orientation), tmp_path / f"{k}.dcm")
    (series,) = dicom_series(tmp_path)
    assert series.positions == (-3.0, -2.0, -1.0) and series.slices[0].name == "0.dcm"


def test_patients_and_series_are_kept_apart(tmp_path):
    for k, (patient, series) in enumerate([("b", "1"), ("a", "2"), ("a", "1"), ("a", "1")]):
        save(ct(patient=patient, series=f"1.{series}", z=float(k)), tmp_path / patient / f"{k}.IMA")
    found = dicom_series(tmp_path)
    assert [(s.patient, s.uid, len(s.slices)) for s in found] == [("a", "1.1", 2), ("a", "1.2", 1), ("b", "1.1", 1)]
    train, test = split_by_patient([s.patient for s in found], (0.5, 0.5), 0)
    assert sorted([train, test]) == [[0, 1], [2]]


def test_what_is_no_ct_image_is_left_out(tmp_path):
    save(ct(), tmp_path / "without_suffix")
    save(ct(z=5.0, Modality="SEG"), tmp_path / "seg.dcm")
    save(ct(SOPClassUID="1.2.840.10008.5.1.4.1.1.7", ImagePositionPatient=None), tmp_path / "screenshot.dcm")
    scout = [0, 1, 0, 0, 0, -1]
    save(ct(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"], ImageOrientationPatient=scout), tmp_path / "scout.dcm")
    (tmp_path / "LICENSE").write_text("text")
    (tmp_path / ".hidden.dcm").write_bytes(b"x")
    assert [[s.name for s in series.slices] for series in dicom_series(tmp_path)] == [["without_suffix"]]
    (tmp_path / "without_suffix").unlink()
    with pytest.raises(FileNotFoundError, match=r"\(of a CT\) is missing: `root`"):
        dicom_series(tmp_path)


def test_anonymised_slices_are_read(tmp_path):
    save(ct(patient="", series="", SOPClassUID="", Modality=""), tmp_path / "a.dcm")
    (series,) = dicom_series(tmp_path)
    assert (series.patient, series.uid, len(series.slices)) == ("", "", 1)


def test_series_without_a_uid_are_told_apart_by_their_folders(tmp_path):
    for name in ("a/1.dcm", "b/1.dcm"):  # at one place, and so not of one series
        save(ct(series=""), tmp_path / name)
    assert [len(series.slices) for series in dicom_series(tmp_path)] == [1, 1]


def test_pixels_are_read_when_they_are_asked_for(tmp_path):
    path = save(ct(), tmp_path / "a.dcm")
    (series,) = dicom_series(tmp_path)
    save(ct(PIXELS + np.uint16(1)), path)
    np.testing.assert_array_equal(series.slices[0].hu, PIXELS + 1.0 - 1024)


def test_a_gap_in_a_volume_is_told(tmp_path):
    for k, z in enumerate([0, 1, 2, 4]):
        save(ct(z=float(z)), tmp_path / f"{k}.dcm")
    (series,) = dicom_series(tmp_path, limit=3)
    assert series.volume().shape == (3, 40, 34)
    (series,) = dicom_series(tmp_path)
    with pytest.raises(ValueError, match="series 1.2.3 of patient p1 are 1 to 2 mm apart"):
        series.volume()


@pytest.mark.parametrize("keep", [0, 100, 132, 200, 500, -1, -50])
def test_truncated_dicom_files_are_named(tmp_path, keep):
    path = save(ct(), tmp_path / "cut.dcm")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"cut\.dcm"):
        [list(series.slices) for series in dicom_series(tmp_path)]


@pytest.mark.parametrize("keep", [0.85, 0.9])
def test_truncated_jpeg_2000_is_named(tmp_path, keep):
    path = save(ct(rng.integers(0, 4096, (64, 64), dtype=np.uint16), syntax=JPEG2000Lossless), tmp_path / "cut.dcm")
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(ValueError, match=r"cut\.dcm is damaged or truncated"):
        dicom_series(tmp_path)[0].slices[0]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"RescaleSlope": None}, "no RescaleSlope"),
        ({"RescaleIntercept": None}, "no RescaleIntercept"),
        ({"ImagePositionPatient": None}, "no ImagePositionPatient"),
        ({"PixelSpacing": [0.0, 1.0]}, "makes no sense"),
        ({"ImagePositionPatient": [0, 1]}, "makes no sense"),
        ({"NumberOfFrames": 20}, "several frames"),
        ({"SamplesPerPixel": 3}, "colours"),
        ({"Rows": 0}, "none or more than"),
        ({"Rows": 65535, "Columns": 65535}, r"\(65535, 65535\) pixels.*max_pixels"),
        ({"Rows": 41}, "damaged or truncated"),
        ({"RescaleSlope": 0}, "slope 0.0"),
        ({"PixelData": None}, "damaged or truncated"),
    ],
)
def test_headers_that_cannot_be_used_are_named(tmp_path, changes, message):
    save(ct(**changes), tmp_path / "odd.dcm")
    with pytest.raises(ValueError, match=rf"odd\.dcm.*{message}"):
        dicom_series(tmp_path)[0].slices[0]


@pytest.mark.parametrize(
    "offset, lie, message",
    [
        (8, struct.pack(">2I", 60000, 60000), r"\(60000, 60000\) pixels of 1 components and announces \(40, 34\)"),
        (40, struct.pack(">H", 16384), r"\(40, 34\) pixels of 16384 components"),
    ],
)
def test_a_packed_slice_that_lies_about_its_size_is_not_decoded(tmp_path, monkeypatch, offset, lie, message):
    data = ct(syntax=JPEG2000Lossless)
    start = data.PixelData.index(b"\xff\x4f\xff\x51") + offset
    data.PixelData = data.PixelData[:start] + lie + data.PixelData[start + len(lie) :]
    save(data, tmp_path / "liar.dcm")
    monkeypatch.setattr(pydicom.Dataset, "pixel_array", property(lambda self: pytest.fail("decoded")))
    with pytest.raises(ValueError, match=rf"liar\.dcm is packed with {message}"):
        dicom_series(tmp_path)[0].slices[0]


def test_deflated_files_are_not_inflated(tmp_path, monkeypatch):
    save(ct(syntax=DeflatedExplicitVRLittleEndian), tmp_path / "a.dcm")
    monkeypatch.setattr(pydicom, "dcmread", lambda *a, **k: pytest.fail("read"))
    with pytest.raises(ValueError, match=r"a\.dcm is deflated"):
        dicom_series(tmp_path)


def test_a_missing_decoder_is_named(tmp_path):
    data = ct(syntax=RLELossless)
    data.file_meta.TransferSyntaxUID = JPEGLosslessSV1  # whose decoder is GPL: no extra brings it
    save(data, tmp_path / "a.dcm")
    with pytest.raises(ImportError, match=r"a\.dcm is packed as JPEG Lossless"):
        dicom_series(tmp_path)[0].slices[0]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({}, "at one place"),
        ({"z": 1.0, "PixelSpacing": [0.8, 0.8]}, "differ in size, spacing or direction"),
        ({"z": 1.0, "pixels": PIXELS[:5]}, "differ in size"),
        ({"z": 1.0, "ImageOrientationPatient": [0, 1, 0, 0, 0, -1]}, "direction"),
    ],
)
def test_slices_that_do_not_fit_into_one_series_are_named(tmp_path, changes, message):
    save(ct(), tmp_path / "first.dcm")
    save(ct(**changes), tmp_path / "second.dcm")
    with pytest.raises(ValueError, match=rf"first\.dcm and .*second\.dcm are of one series.*{message}"):
        dicom_series(tmp_path)


def test_folders_and_arguments_of_dicom_series(tmp_path):
    for root in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match=r"is missing: `root` must be a folder with\n.*ANYTHING\.dcm"):
            dicom_series(root)
    with pytest.raises(ValueError, match="limit"):
        dicom_series(tmp_path, limit=0)


def test_without_pydicom_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(ImportError, match=r"pydicom.*jbilevel\[medical\]"):
        dicom_series(tmp_path)
