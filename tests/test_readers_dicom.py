"""DICOM series from small files made here, whole and damaged."""

import io
import struct
import sys
import tracemalloc

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.encaps import encapsulate
from pydicom.uid import (
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
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
    data.RescaleSlope, data.RescaleIntercept, data.KVP = 1, -1024, 120
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


def test_bits_that_are_not_stored_do_not_count(tmp_path):
    """Twelve bits in sixteen, the others of which once held overlays; or the sign of none."""
    save(ct(PIXELS | np.uint16(0xA000)), tmp_path / "a.dcm")
    np.testing.assert_array_equal(dicom_series(tmp_path)[0].slices[0].hu, PIXELS - 1024.0)
    save(ct(PIXELS, PixelRepresentation=1, PhotometricInterpretation="MONOCHROME1"), tmp_path / "a.dcm")
    expected = np.where(PIXELS < 2048, PIXELS, PIXELS.astype(int) - 4096) - 1024.0  # how to show it changes no value
    np.testing.assert_array_equal(dicom_series(tmp_path)[0].slices[0].hu, expected)


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
    with pytest.raises(ValueError, match=r"series 1.2.3 of patient p1 are 1 to 2 mm apart.*between 2\.dcm and 3\.dcm"):
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
    with pytest.raises(ValueError, match=r"cut\.dcm is damaged, truncated"):
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
        ({"Rows": 41}, "damaged, truncated"),
        ({"RescaleSlope": 0}, "slope 0.0"),
        ({"PixelData": None}, "damaged, truncated"),
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
        ({"z": 1.0, "PixelSpacing": [0.8, 0.8]}, "differ in size, spacing, direction .*3.3 mm at a corner"),
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


# --- how slices lie to each other

COS, SIN = np.cos(np.radians(20)), np.sin(np.radians(20))
TILTED = [1, 0, 0, 0, COS, -SIN]


def stack(folder, places, **changes):
    for k, place in enumerate(places):
        save(ct(PIXELS[:8, :6] // 2 + np.uint16(k), ImagePositionPatient=list(place), **changes), folder / f"{k}.dcm")
    (series,) = dicom_series(folder)
    return series


def test_slices_of_a_tilted_gantry_are_not_stacked_as_if_they_were_upright(tmp_path):
    series = stack(tmp_path, [(0, 0, 5.0 * k) for k in range(31)], ImageOrientationPatient=TILTED)  # a head of 150 mm
    with pytest.raises(
        ValueError, match=r"series 1\.2\.3 of patient p1 move by 51\.3 mm .* 141 mm.* 20\.0 degrees.*30\.dcm"
    ):
        series.volume()
    # Each slice is where its file says: the first pixel, put together from what the series tells.
    np.testing.assert_allclose(np.diff(series.positions), 5 * COS, rtol=1e-6)
    normal, down = np.array([0, SIN, COS]), np.array(TILTED[3:])
    for k, (position, (rows, columns)) in enumerate(zip(series.positions, series.shifts_mm, strict=True)):
        np.testing.assert_allclose(position * normal + rows * down + [columns, 0, 0], [0, 0, 5 * k], atol=1e-6)
    np.testing.assert_array_equal(series.slices[30].hu, PIXELS[:8, :6] // 2 + 30.0 - 1024)


@pytest.mark.parametrize(
    "places, orientation, message",
    [
        ([(0, 0, 0), (0, 0, 1), (0.3, 0, 2)], [1, 0, 0, 0, 1, 0], r"move by 0\.3 mm within their plane over 2 mm"),
        ([(0, 0, 0), (0, -4, 1), (0, 0, 2)], [1, 0, 0, 0, 1, 0], r"move by 4 mm"),
        ([(0, 0, 0), (0.04, 0.04, 1), (0, 0, 2)], [1, 0, 0, 0, 1, 0], None),  # less than a tenth of a pixel
        ([(0, 2 * SIN * k, 2 * COS * k) for k in range(9)], TILTED, None),  # oblique and upright
    ],
)
def test_slices_that_move_within_their_plane(tmp_path, places, orientation, message):
    series = stack(tmp_path, places, ImageOrientationPatient=orientation)
    if message is None:
        assert series.volume().shape == (len(places), 8, 6)
    else:
        with pytest.raises(ValueError, match=message):
            series.volume()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"FrameOfReferenceUID": "1.9"}, "frame of reference"),
        ({"PixelSpacing": [0.803, 0.7]}, r"by 0\.117 mm at a corner"),  # 39 rows
        ({"ImageOrientationPatient": [1, 0, 0, 0, np.cos(0.004), np.sin(0.004)]}, r"by 0\.125 mm at a corner"),
    ],
)
def test_small_differences_in_a_series_are_told_by_what_they_do(tmp_path, changes, message):
    save(ct(FrameOfReferenceUID="1.8"), tmp_path / "first.dcm")
    save(ct(z=1.0, **{"FrameOfReferenceUID": "1.8"} | changes), tmp_path / "second.dcm")
    with pytest.raises(ValueError, match=rf"first\.dcm and .*second\.dcm are of one series.*{message}"):
        dicom_series(tmp_path)


@pytest.mark.parametrize("orientation", [[1, 0, 0, 1, 0, 0], [2, 0, 0, 0, 1, 0], [1, 0, 0, 0.1, 1, 0], [0] * 6])
def test_rows_and_columns_that_are_no_right_angle_are_refused(tmp_path, orientation):
    save(ct(ImageOrientationPatient=orientation), tmp_path / "odd.dcm")
    with pytest.raises(ValueError, match=r"odd\.dcm has rows and columns that are not at right angles"):
        dicom_series(tmp_path)


def test_slope_and_intercept_are_those_of_each_slice(tmp_path):
    for k in range(3):
        save(ct(z=float(k), RescaleSlope=k + 1, RescaleIntercept=-10 * k), tmp_path / f"{k}.dcm")
    volume = dicom_series(tmp_path)[0].volume()
    np.testing.assert_array_equal(volume, [PIXELS * (k + 1.0) - 10 * k for k in range(3)])


# --- units


@pytest.mark.parametrize(
    "changes, unit, words",
    [
        ({"RescaleType": "HU"}, "HU", None),
        ({"RescaleType": ""}, "HU", None),
        ({"RescaleType": "HU", "ImageType": ["DERIVED", "PRIMARY", "AXIAL", "VMI"]}, "HU", None),  # one energy
        ({"ImageType": ["DERIVED", "SECONDARY", "AXIAL", "AVERAGE"]}, "HU", None),
        ({"RescaleType": "MGML"}, "MGML", "is in MGML, not in Hounsfield units"),
        ({"RescaleType": "Z_EFF"}, "Z_EFF", "is in Z_EFF"),
        ({"RescaleType": "HU_MOD"}, "HU_MOD", "is in HU_MOD"),
        ({"RescaleType": "US"}, "US", "is in US"),
        ({"Units": "BQML", "Modality": "", "SOPClassUID": ""}, "BQML", "is in BQML"),
        ({"ImageType": ["DERIVED", "PRIMARY", "AXIAL", "MAT_SPECIFIC"]}, "", "a unit that the file does not tell"),
        ({"ImageType": ["DERIVED", "PRIMARY", "OTHER", "IODINE MAP"]}, "", "a unit that the file does not tell"),
        ({"ImageType": ["DERIVED", "SECONDARY", "AXIAL", "CBV"]}, "", "a unit that the file does not tell"),
        ({"ImageType": ["DERIVED", "PRIMARY", "AXIAL", "EFF_ATOMIC_NUM"], "RescaleType": "HU"}, "", "does not tell"),
        ({"MultienergyCTAcquisition": "YES"}, "", "a unit that the file does not tell"),
        ({"Modality": "", "SOPClassUID": "", "KVP": None}, "", "a unit that the file does not tell"),  # of anything
    ],
)
def test_only_hounsfield_units_are_called_so(tmp_path, changes, unit, words):
    save(ct(**changes), tmp_path / "map.dcm")
    (series,) = dicom_series(tmp_path)
    (slice_,) = series.slices
    assert series.unit == slice_.unit == unit
    np.testing.assert_array_equal(slice_.values, PIXELS - 1024.0)
    if words is None:
        np.testing.assert_array_equal(slice_.hu, slice_.values)
    else:
        for read in (lambda: slice_.hu, series.volume):
            with pytest.raises(ValueError, match=rf"map\.dcm .*{words}"):
                read()


def test_a_map_in_a_series_of_slices_is_a_series_of_its_own(tmp_path):
    save(ct(), tmp_path / "hu.dcm")
    save(ct(RescaleType="MGML"), tmp_path / "iodine.dcm")
    assert [(s.unit, [c.name for c in s.slices]) for s in dicom_series(tmp_path)] == [
        ("HU", ["hu.dcm"]),
        ("MGML", ["iodine.dcm"]),
    ]


@pytest.mark.parametrize("modality", ["MR", "PT", "NM", "XA", "CR", "RTDOSE"])
def test_other_modalities_are_left_out(tmp_path, modality):
    save(ct(), tmp_path / "ct.dcm")
    save(ct(z=1.0, Modality=modality), tmp_path / "other.dcm")
    assert [len(series.slices) for series in dicom_series(tmp_path)] == [1]


def test_a_table_in_place_of_slope_and_intercept_is_refused(tmp_path):
    table = pydicom.Dataset()
    table.LUTDescriptor, table.LUTData, table.ModalityLUTType = [4, 0, 16], bytes(8), "HU"
    save(ct(ModalityLUTSequence=[table]), tmp_path / "table.dcm")
    with pytest.raises(ValueError, match=r"table\.dcm has a table in place of slope and intercept"):
        dicom_series(tmp_path)


# --- streams


def test_an_unknown_stream_is_named(tmp_path):
    path = save(ct(), tmp_path / "odd.dcm")
    path.write_bytes(path.read_bytes().replace(b"1.2.840.10008.1.2\0", b"1.2.840.10008.9.9\0"))
    with pytest.raises(ValueError, match=r"odd\.dcm is damaged"):
        dicom_series(tmp_path)[0].slices[0]


@pytest.mark.parametrize("kind", ["size", "no stream"])
def test_a_jpeg_that_lies_about_its_size_is_not_decoded(tmp_path, monkeypatch, kind):
    stream = io.BytesIO()
    Image.fromarray((PIXELS >> 4).astype(np.uint8)).save(stream, "JPEG")
    content = stream.getvalue()
    data = ct()
    data.BitsAllocated, data.BitsStored, data.HighBit = 8, 8, 7
    data.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    data.PixelData = encapsulate([content])
    data["PixelData"].VR = "OB"
    save(data, tmp_path / "a.dcm")
    expected = np.asarray(Image.open(stream)) - 1024.0
    np.testing.assert_array_equal(dicom_series(tmp_path)[0].slices[0].hu, expected)
    start = content.index(b"\xff\xc0") + 5
    lie = content[:start] + struct.pack(">HH", 60000, 60000) + content[start + 4 :] if kind == "size" else bytes(100)
    data.PixelData = encapsulate([lie])
    save(data, tmp_path / "a.dcm")
    monkeypatch.setattr(pydicom.Dataset, "pixel_array", property(lambda self: pytest.fail("decoded")))
    with pytest.raises(ValueError, match=r"a\.dcm (is packed with \(60000, 60000\) pixels|holds no JPEG)"):
        dicom_series(tmp_path)[0].slices[0]


def test_no_more_is_asked_of_a_file_than_it_has(tmp_path):
    """Or pydicom would take four gigabytes for an element that announces them."""
    path = save(ct(), tmp_path / "a.dcm")
    content = path.read_bytes()
    start = content.index(b"\x10\x00\x20\x00")  # the patient
    path.write_bytes(content[: start + 4] + struct.pack("<I", 2**32 - 2) + content[start + 8 :])
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"a\.dcm"):
        dicom_series(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20_000_000
