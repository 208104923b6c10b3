"""What picture files say about their pixels: which value is white, how many bits count, what is up, what labels are."""

import struct
import tracemalloc
import warnings
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image

from jbilevel.data import image_folder
from jbilevel.data.pictures import read_label_picture, read_picture

rng = np.random.default_rng(0)
BITS8 = rng.integers(0, 256, (9, 8), dtype=np.uint8)
BITS16 = rng.integers(0, 65536, (9, 8), dtype=np.uint16)
FLOATS = rng.random((9, 8), dtype=np.float32)


def grey(path):
    return read_picture(path, grey=True, dtype=np.float64)


# --- which value is white


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("kind", ["1", "8", "16", "float"])
@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
def test_white_is_zero_in_every_depth(tmp_path, photometric, kind, compression, order):
    pixels, expected = {
        "1": (BITS8 > 127, (BITS8 > 127).astype(float)),
        "8": (BITS8, BITS8 / 255),
        "16": (BITS16, BITS16 / 65535),
        "float": (FLOATS, FLOATS.astype(float)),
    }[kind]
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, pixels, photometric=photometric, compression=compression, byteorder=order)
    if (kind, photometric, order) == ("16", "miniswhite", ">"):  # unknown to Pillow
        with pytest.raises(ValueError, match=r"a\.tif is damaged.*no picture"):
            grey(path)
    elif (kind, compression, order) == ("float", "zlib", ">"):  # misread by Pillow
        with pytest.raises(ValueError, match=r"a\.tif has compressed big-endian floats"):
            grey(path)
    else:
        np.testing.assert_allclose(grey(path), expected if photometric == "minisblack" else 1 - expected, atol=1e-12)


@pytest.mark.parametrize("compression", ["tiff_lzw", "packbits", "group4"])
def test_white_is_zero_under_other_compressions(tmp_path, compression):
    mode = "1" if compression == "group4" else "L"
    picture = Image.fromarray(BITS8 > 127 if mode == "1" else BITS8)
    picture.save(tmp_path / "a.tif", compression=compression, tiffinfo={262: 0})
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        assert file.pages[0].photometric == 0
    np.testing.assert_allclose(grey(tmp_path / "a.tif"), np.asarray(picture) / (1 if mode == "1" else 255), atol=1e-12)


def test_a_tiff_that_does_not_say_what_is_white_is_refused(tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, BITS16, photometric="minisblack")
    content = path.read_bytes()
    place = content.index(b"\x06\x01\x03\x00\x01\x00\x00\x00")  # tag 262
    path.write_bytes(content[:place] + b"\x05" + content[place + 1 :])
    with pytest.raises(ValueError, match=r"a\.tif does not say whether 0 is black or white"):
        grey(path)


# --- how many bits count


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32, np.uint32])
@pytest.mark.parametrize("order", ["<", ">"])
def test_numbers_of_no_known_range_are_refused(tmp_path, dtype, order):
    tifffile.imwrite(tmp_path / "a.tif", BITS8.astype(dtype), photometric="minisblack", byteorder=order)
    with pytest.raises(ValueError, match=r"a\.tif (has signed or 32-bit|is damaged.*cannot identify)"):
        grey(tmp_path / "a.tif")


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.complex64])
def test_other_numbers_are_refused(tmp_path, dtype):
    tifffile.imwrite(tmp_path / "a.tif", FLOATS.astype(dtype), photometric="minisblack")
    with pytest.raises(ValueError, match=r"a\.tif "):
        grey(tmp_path / "a.tif")


def test_twelve_bits_that_are_packed(tmp_path):
    values = rng.integers(0, 4096, (4, 6), dtype=np.uint16)
    pairs = values.reshape(-1, 2).astype(np.uint32)
    packed = np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], 1)
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, packed.astype(np.uint8).reshape(4, 9), photometric="minisblack")
    content = bytearray(path.read_bytes())
    for tag, value in ((256, 6), (258, 12)):  # the width, the bits
        place = content.index(int(tag).to_bytes(2, "little"), 8)
        content[place + 8 : place + 10] = value.to_bytes(2, "little")
    path.write_bytes(content)
    np.testing.assert_allclose(grey(path), values / 4095, atol=1e-12)


def test_twelve_bits_in_sixteen_are_told(tmp_path):
    tag = (281, "H", 1, 4095, True)  # MaxSampleValue, which by the standard changes nothing
    tifffile.imwrite(tmp_path / "a.tif", BITS16 >> 4, photometric="minisblack", extratags=[tag])
    with pytest.warns(UserWarning, match=r"a\.tif says that its values end at 4095; they are divided by 65535") as told:
        images, _ = image_folder(tmp_path)
    assert told[0].filename == __file__
    np.testing.assert_allclose(images[0], (BITS16 >> 4) / 65535, atol=1e-7)
    tag = (281, "H", 1, 5000, True)  # a statistic
    tifffile.imwrite(tmp_path / "a.tif", BITS16 >> 4, photometric="minisblack", extratags=[tag])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        grey(tmp_path / "a.tif")


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_few_bits_fill_the_unit_interval(tmp_path, bits):
    pixels = (BITS8 >> (8 - bits)).astype(np.uint8)
    write_png(tmp_path / "a.png", pixels, bits)
    np.testing.assert_allclose(grey(tmp_path / "a.png"), pixels / (2**bits - 1), atol=1e-12)


def write_png(path, pixels, bits):
    """Grey PNG of less than eight bits, which Pillow does not write."""
    width = pixels.shape[1]
    ones = np.unpackbits(pixels[..., None], axis=-1)[..., 8 - bits :].reshape(len(pixels), width * bits)
    rows = b"".join(b"\0" + np.packbits(row).tobytes() for row in ones)
    head = struct.pack(">IIBBBBB", width, len(pixels), bits, 0, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b)) for k, b in chunks)
    )


# --- what is up


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["8", "16", "float", "white"])
def test_all_orientations(tmp_path, kind, orientation):
    pixels, largest = {"8": (BITS8, 255), "16": (BITS16, 65535), "float": (FLOATS, 1), "white": (BITS16, 65535)}[kind]
    turned = {  # TIFF 6.0: where the first row and the first column of the file lie
        1: pixels, 2: pixels[:, ::-1], 3: pixels[::-1, ::-1], 4: pixels[::-1],
        5: pixels.T, 6: np.rot90(pixels, -1), 7: pixels[::-1, ::-1].T, 8: np.rot90(pixels, 1),
    }[orientation] / largest  # fmt: skip
    photometric = "miniswhite" if kind == "white" else "minisblack"
    tag = (274, "H", 1, orientation, True)
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric=photometric, extratags=[tag])
    np.testing.assert_allclose(grey(tmp_path / "a.tif"), 1 - turned if kind == "white" else turned, atol=1e-12)


# --- labels


def test_labels_are_turned_as_their_image_is(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(BITS8).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_label_picture(tmp_path / "a.png"), np.rot90(BITS8, -1))


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_labels_of_few_bits_are_not_stretched(tmp_path, bits):
    """Pillow would make 255, which stands for no class, of the last label."""
    write_png(tmp_path / "a.png", (BITS8 >> (8 - bits)).astype(np.uint8), bits)
    with pytest.raises(ValueError, match=r"a\.png has pixels of kind .*: labels are one number of 8 bits"):
        read_label_picture(tmp_path / "a.png")


# --- size


def test_a_jpeg_is_not_decoded_again_and_again(tmp_path):
    """Each scan goes over all pixels, and takes twenty bytes."""
    path = tmp_path / "a.jpg"
    Image.fromarray(BITS8).save(path, progressive=True, quality=100)
    np.testing.assert_allclose(grey(path), BITS8 / 255, atol=0.02)
    content = path.read_bytes()
    start = content.rindex(b"\xff\xc4", 0, content.rindex(b"\xff\xda"))
    path.write_bytes(content[:-2] + content[start:-2] * 100 + content[-2:])
    with pytest.raises(ValueError, match=r"a\.jpg has more than 100 scans"):
        grey(path)


def test_a_large_picture_does_not_take_more_than_it_must(tmp_path):
    """In blocks: the pixels and the image in single precision, never a whole one in double precision."""
    Image.fromarray(np.zeros((2000, 1500, 3), np.uint8)).save(tmp_path / "a.png")
    tracemalloc.start()
    image = read_picture(tmp_path / "a.png")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert image.nbytes == 36_000_000 and peak < image.nbytes + 3 * 9_000_000  # of 9 MB of pixels
