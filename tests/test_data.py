"""Photographs, folders of pictures written on the spot, crops and noise."""

import builtins
import socket
import struct
import sys
import warnings
import zlib
from importlib.metadata import files

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jbilevel.data import (
    PHOTOGRAPHS,
    TEST_PHOTOGRAPHS,
    TRAIN_PHOTOGRAPHS,
    centre_crop,
    crops,
    gaussian,
    image_folder,
    photographs,
)

rng = np.random.default_rng(0)
GREY = rng.integers(0, 256, (12, 17), dtype=np.uint8)
COLOUR = rng.integers(0, 256, (12, 17, 3), dtype=np.uint8)
SMOOTH = np.stack([np.add.outer(np.arange(48) * 2, np.arange(64)) + c for c in (0, 30, 60)], axis=-1).astype(np.uint8)
LUMA = np.array([0.299, 0.587, 0.114])


def front(image):
    """Channels, which files have last, in front."""
    return np.moveaxis(image, -1, 0)


@pytest.fixture
def offline(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


# --- photographs


def test_all_photographs_are_read_without_network(offline):
    images = photographs()
    assert images.shape == (15, 128, 128) and images.dtype == np.float32
    assert images.min() >= 0 and images.max() <= 1
    assert np.all(images.std(axis=(1, 2)) > 0.01)


def test_photographs_come_with_the_wheel_of_scikit_image():
    shipped = {
        f.stem for f in files("scikit-image") if str(f.parent) == "skimage/data" and f.suffix in (".png", ".jpg")
    }
    assert set(PHOTOGRAPHS) <= shipped


def test_photographs_equal_the_centre_of_scikit_image_s_own_reading():
    from skimage import color, data

    for name, own in (("camera", data.camera()), ("coffee", data.coffee()), ("rocket", data.rocket())):
        own = own / 255 if own.ndim == 2 else color.rgb2gray(own)
        top, left = (own.shape[0] - 100) // 2, (own.shape[1] - 100) // 2
        expected = own[top : top + 100, left : left + 100]
        np.testing.assert_allclose(photographs(100, [name], np.float64)[0], expected, atol=1e-12)


def test_the_photographs_stay_those_of_the_published_tables():
    # Means of the stack on which accelerated dual TV (lambda 0.081, noise as below) gave 28.59 dB; table: 28.58.
    means = [0.27708, 0.42296, 0.25613, 0.43295, 0.42747, 0.36214, 0.46433, 0.4933, 0.34386, 0.41967, 0.30416, 0.68849]
    means += [0.72405, 0.07937, 0.24128]
    np.testing.assert_allclose(photographs(dtype=np.float64).mean(axis=(1, 2)), means, atol=2e-5)


def test_noise_on_the_photographs_has_the_published_psnr():
    images = photographs()
    noisy = gaussian(np.random.default_rng(0), images, 0.1)
    mse = np.mean((noisy - images).astype(np.float64) ** 2, axis=(1, 2))
    assert np.mean(-10 * np.log10(mse)) == pytest.approx(19.9911, abs=1e-3)


def test_train_and_test_photographs_share_no_image():
    assert not set(TRAIN_PHOTOGRAPHS) & set(TEST_PHOTOGRAPHS)
    assert set(TRAIN_PHOTOGRAPHS) | set(TEST_PHOTOGRAPHS) == set(PHOTOGRAPHS)
    train, test = photographs(32, TRAIN_PHOTOGRAPHS), photographs(32, TEST_PHOTOGRAPHS)
    assert (len(train), len(test)) == (10, 5)
    assert all(np.abs(a - b).max() > 0.05 for a in train for b in test)


def test_order_and_dtype_of_photographs():
    pair = photographs(16, ("moon", "camera"), np.float64)
    assert pair.dtype == np.float64
    np.testing.assert_array_equal(pair[::-1], photographs(16, ("camera", "moon"), np.float64))
    np.testing.assert_array_equal(photographs(16, "moon", np.float64), pair[:1])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"names": ("camera", "lena")}, r"\['lena'\].*astronaut"),
        ({"names": ()}, "no entries"),
        ({"size": 192}, "page"),
        ({"size": 0}, "positive"),
    ],
)
def test_wrong_photographs_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        photographs(**arguments)


def test_without_scikit_image_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage.color", None)
    with pytest.raises(ImportError, match=r"jbilevel\[examples\]"):
        photographs()


def test_a_scikit_image_without_the_files_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.resources.files", lambda package: tmp_path)
    with pytest.raises(FileNotFoundError, match="camera.png"):
        photographs(8, ["camera"])


# --- crops


def test_centre_crop_of_odd_margins():
    image = np.arange(7 * 6).reshape(7, 6)
    np.testing.assert_array_equal(centre_crop(image, 4), image[1:5, 1:5])
    np.testing.assert_array_equal(centre_crop(image, 6), image[:6])


def test_crops_are_parts_of_the_image_and_reach_every_position():
    image = front(np.arange(5 * 6 * 2).reshape(5, 6, 2))
    parts = crops(image, 3, 300, np.random.default_rng(0))
    assert parts.shape == (300, 2, 3, 3) and parts.dtype == image.dtype
    corners = {tuple(np.argwhere(image[0] == part[0, 0, 0])[0]) for part in parts}
    assert corners == {(i, j) for i in range(3) for j in range(4)}
    for part in parts[:20]:
        i, j = np.argwhere(image[0] == part[0, 0, 0])[0]
        np.testing.assert_array_equal(part, image[:, i : i + 3, j : j + 3])


def test_crops_repeat_with_the_seed():
    image = rng.random((20, 20))
    np.testing.assert_array_equal(crops(image, 4, 5, 7), crops(image, 4, 5, np.random.default_rng(7)))
    assert np.any(crops(image, 4, 5, 7) != crops(image, 4, 5, 8))


@pytest.mark.parametrize("size, n, message", [(9, 1, "smaller"), (0, 1, "size"), (4, 0, "`n`")])
def test_impossible_crops_are_refused(size, n, message):
    with pytest.raises(ValueError, match=message):
        crops(np.zeros((8, 12)), size, n, 0)


# --- folders


def save(path, pixels, mode=None, **options):
    picture = Image.fromarray(pixels)
    picture = picture if mode is None else picture.convert(mode)
    picture.save(path, **options)
    return path


def read_one(folder, **options):
    images, names = image_folder(folder, dtype=np.float64, **options)
    assert len(images) == len(names) == 1
    return images[0]


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.TIFF", "a.bmp", "a.PNG"])
def test_lossless_eight_bit_files(tmp_path, name):
    save(tmp_path / name, COLOUR)
    np.testing.assert_allclose(read_one(tmp_path), COLOUR @ LUMA / 255, atol=1e-12)
    np.testing.assert_allclose(read_one(tmp_path, grey=False), front(COLOUR) / 255, atol=1e-12)


def test_lossless_webp(tmp_path):
    save(tmp_path / "a.webp", COLOUR, lossless=True)
    np.testing.assert_allclose(read_one(tmp_path, grey=False), front(COLOUR) / 255, atol=1e-12)


@pytest.mark.parametrize("name", ["a.jpg", "a.jpeg", "a.JPG", "a.webp"])
def test_lossy_files(tmp_path, name):
    save(tmp_path / name, SMOOTH, quality=95)
    np.testing.assert_allclose(read_one(tmp_path, grey=False), front(SMOOTH) / 255, atol=0.03)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.jpg", "a.bmp"])
def test_grey_files_are_repeated_when_colour_is_asked_for(tmp_path, name):
    save(tmp_path / name, SMOOTH[..., 0])
    image = read_one(tmp_path, grey=False)
    assert image.shape == (3, 48, 64)
    np.testing.assert_array_equal(image[0], image[2])
    np.testing.assert_array_equal(read_one(tmp_path), image[0])


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_sixteen_bit_grey(tmp_path, name):
    pixels = rng.integers(0, 65536, (9, 8), dtype=np.uint16)
    save(tmp_path / name, pixels)
    np.testing.assert_allclose(read_one(tmp_path), pixels / 65535, atol=1e-12)


def test_sixteen_bit_colour_is_read_with_a_warning(tmp_path):
    pixels = rng.integers(0, 65536, (4, 5, 3), dtype=np.uint16)
    (tmp_path / "a.png").write_bytes(sixteen_bit_png(pixels))
    with pytest.warns(UserWarning, match=r"a\.png.*16 bits"):
        image = read_one(tmp_path, grey=False)
    np.testing.assert_allclose(image, front(pixels) / 65535, atol=1 / 255)


def sixteen_bit_png(pixels):
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    )


def test_float_tiff_in_the_unit_interval(tmp_path):
    pixels = rng.random((6, 7), dtype=np.float32)
    save(tmp_path / "a.tif", pixels)
    np.testing.assert_array_equal(read_one(tmp_path), pixels)


@pytest.mark.parametrize("bad", [np.nan, -0.1, 1.1, np.inf])
def test_float_tiff_outside_the_unit_interval_is_refused(tmp_path, bad):
    pixels = np.full((6, 7), 0.5, np.float32)
    pixels[2, 3] = bad
    save(tmp_path / "a.tif", pixels)
    with pytest.raises(ValueError, match=r"a\.tif.*\[0, 1\]"):
        image_folder(tmp_path)


def test_thirty_two_bit_tiff_is_refused(tmp_path):
    save(tmp_path / "a.tif", np.ones((6, 7), np.int32))
    with pytest.raises(ValueError, match=r"a\.tif.*unknown range"):
        image_folder(tmp_path)


def test_alpha_is_dropped(tmp_path):
    alpha = rng.integers(0, 256, GREY.shape, dtype=np.uint8)
    save(tmp_path / "a.png", np.dstack([COLOUR, alpha]))
    np.testing.assert_allclose(read_one(tmp_path, grey=False), front(COLOUR) / 255, atol=1e-12)
    Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(alpha)]).save(tmp_path / "a.png")
    np.testing.assert_allclose(read_one(tmp_path), GREY / 255, atol=1e-12)


def test_palettes_with_transparency(tmp_path):
    picture = Image.fromarray(GREY % 4, mode=None).convert("P")
    table = rng.integers(0, 256, (256, 3), dtype=np.uint8)
    picture.putpalette(table.tobytes())
    picture.save(tmp_path / "a.png", transparency=bytes([0, 100, 200, 255]))
    index = np.asarray(picture)
    np.testing.assert_allclose(read_one(tmp_path, grey=False), front(table[index]) / 255, atol=1e-12)


def test_one_bit_and_cmyk(tmp_path):
    save(tmp_path / "a.png", np.where(GREY > 127, 255, 0).astype(np.uint8), "1")
    np.testing.assert_array_equal(read_one(tmp_path), GREY > 127)
    (tmp_path / "a.png").unlink()
    save(tmp_path / "a.tif", SMOOTH, "CMYK")
    np.testing.assert_allclose(read_one(tmp_path, grey=False), front(SMOOTH) / 255, atol=0.01)


def test_cmyk_jpeg_of_adobe(tmp_path):
    """In which full ink is 0."""
    save(tmp_path / "a.jpg", SMOOTH, "CMYK", quality=95)
    np.testing.assert_allclose(read_one(tmp_path, grey=False), front(SMOOTH) / 255, atol=0.03)


@pytest.mark.parametrize("orientation, turn", [(3, lambda v: v[::-1, ::-1]), (6, lambda v: np.rot90(v, -1))])
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif"])
def test_exif_orientation(tmp_path, name, orientation, turn):
    exif = Image.Exif()
    exif[0x0112] = orientation
    save(tmp_path / name, SMOOTH, exif=exif, quality=95)
    image = read_one(tmp_path, grey=False)
    np.testing.assert_allclose(image, front(turn(SMOOTH)) / 255, atol=0.03)


def test_names_are_sorted_and_everything_else_is_left_out(tmp_path):
    for i, name in enumerate(["b.png", "a.bmp", "10.png", "c.jpg"]):
        save(tmp_path / name, np.full((4, 4), 10 * i, np.uint8))
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "._b.png").write_bytes(b"resource fork")
    (tmp_path / "folder.png").mkdir()
    images, names = image_folder(tmp_path)
    assert names == ("10.png", "a.bmp", "b.png", "c.jpg")
    assert [round(255 * float(v[0, 0])) for v in images] == [20, 10, 0, 30]
    assert image_folder(str(tmp_path), limit=2).names == ("10.png", "a.bmp")


def test_size_crops_and_stacks(tmp_path):
    save(tmp_path / "a.png", GREY)
    save(tmp_path / "b.png", COLOUR)
    whole, small, colour = (image_folder(tmp_path, **o).images for o in ({}, {"size": 8}, {"size": 8, "grey": False}))
    assert isinstance(whole, list) and whole[0].shape == (12, 17) and whole[0].dtype == np.float32
    assert small.shape == (2, 8, 8) and colour.shape == (2, 3, 8, 8) and small.dtype == np.float32
    np.testing.assert_array_equal(small[0], whole[0][2:10, 4:12])


def test_a_picture_smaller_than_size_is_named(tmp_path):
    save(tmp_path / "large.png", np.zeros((20, 20), np.uint8))
    save(tmp_path / "small.png", GREY)
    with pytest.raises(ValueError, match=r"small\.png has shape \(12, 17\)"):
        image_folder(tmp_path, size=13)


@pytest.mark.parametrize("option", ["size", "limit"])
def test_numbers_that_are_not_positive_are_refused(tmp_path, option):
    save(tmp_path / "a.png", GREY)
    with pytest.raises(ValueError, match=option):
        image_folder(tmp_path, **{option: 0})


@pytest.mark.parametrize("kind", ["missing", "empty", "no pictures", "file"])
def test_a_folder_without_pictures_shows_the_expected_tree(tmp_path, kind):
    root = tmp_path / "pictures"
    if kind == "file":
        root.write_text("x")
    elif kind != "missing":
        root.mkdir()
        if kind == "no pictures":
            (root / "notes.txt").write_text("x")
    with pytest.raises(FileNotFoundError, match=r"(?s)pictures.*pictures/\n +0001\.png"):
        image_folder(root)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "a.bmp", "a.webp"])
@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9])
def test_truncated_files_are_named(tmp_path, name, keep):
    path = save(tmp_path / name, rng.integers(0, 256, (40, 50, 3), dtype=np.uint8))
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(ValueError, match=rf"{name[0]}\.{name[2:]} is damaged"):
        image_folder(tmp_path)


def test_damaged_bytes_are_named(tmp_path):
    path = save(tmp_path / "a.png", COLOUR)
    content = bytearray(path.read_bytes())
    content[60:70] = bytes(10)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.png is damaged"):
        image_folder(tmp_path)


def test_other_formats_in_disguise_are_refused(tmp_path):
    save(tmp_path / "good.png", GREY)
    Image.fromarray(COLOUR).save(tmp_path / "bad.png", format="EPS")
    with pytest.raises(ValueError, match=r"bad\.png is damaged, truncated or no picture \(PNG"):
        image_folder(tmp_path)
    Image.fromarray(COLOUR).save(tmp_path / "bad.png", format="GIF")
    with pytest.raises(ValueError, match=r"bad\.png"):
        image_folder(tmp_path)


def test_bombs_are_refused_before_they_are_decompressed(tmp_path, monkeypatch):
    save(tmp_path / "bomb.png", GREY)
    monkeypatch.setattr(Image.Image, "convert", lambda *a, **k: pytest.fail("decoded"))
    with pytest.raises(ValueError, match=r"bomb\.png is 17 x 12 pixels.*max_pixels"):
        image_folder(tmp_path, max_pixels=203)


def test_pictures_between_pillow_s_limits_follow_ours(tmp_path, monkeypatch):
    save(tmp_path / "a.png", GREY)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 150)  # 204 pixels: Pillow would warn
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(image_folder(tmp_path).images) == 1
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # and now raise
    with pytest.raises(ValueError, match=r"a\.png has too many pixels"):
        image_folder(tmp_path)


def test_without_pillow_the_extra_is_named(tmp_path, monkeypatch):
    save(tmp_path / "a.png", GREY)
    original = builtins.__import__

    def without_pillow(name, *args, **kwargs):
        if name == "PIL" or name.startswith("PIL."):
            raise ModuleNotFoundError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_pillow)
    with pytest.raises(ImportError, match=r"jbilevel\[data\]"):
        image_folder(tmp_path)


# --- noise


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_numpy_noise_is_one_standard_draw(dtype):
    x = rng.random((3, 4, 5)).astype(dtype)
    generator = np.random.default_rng(5)
    noisy = gaussian(generator, x, 0.2)
    twin = np.random.default_rng(5)
    expected = (x + 0.2 * twin.standard_normal((3, 4, 5))).astype(dtype)
    assert isinstance(noisy, np.ndarray) and noisy.dtype == dtype
    np.testing.assert_array_equal(noisy, expected)
    assert generator.bit_generator.state == twin.bit_generator.state


@pytest.mark.parametrize("make", [jax.random.key, jax.random.PRNGKey])
def test_jax_noise(make):
    x = jnp.full((200, 200), 3.0, jnp.float32)
    noisy = gaussian(make(0), x, 0.5)
    assert noisy.dtype == jnp.float32 and isinstance(noisy, jax.Array)
    assert float(noisy.mean()) == pytest.approx(3.0, abs=0.01)
    assert float(noisy.std()) == pytest.approx(0.5, abs=0.01)
    np.testing.assert_array_equal(noisy, gaussian(make(0), x, 0.5))
    assert np.any(np.asarray(noisy != gaussian(make(1), x, 0.5)))
    np.testing.assert_allclose(noisy, jax.jit(gaussian)(make(0), x, 0.5), rtol=1e-6)


@pytest.mark.parametrize("source", [np.random.default_rng(0), jax.random.key(0)])
def test_one_sigma_per_image(source):
    x = np.zeros((3, 100, 100), np.float32)
    noisy = gaussian(source, x, np.array([0.0, 0.1, 1.0]).reshape(3, 1, 1))
    np.testing.assert_allclose(np.asarray(noisy).std(axis=(1, 2)), [0, 0.1, 1], rtol=0.05)


@pytest.mark.parametrize("source", [np.random.default_rng(0), jax.random.key(0)])
@pytest.mark.parametrize("sigma", [-0.1, np.nan, np.inf, np.array([[0.1], [-0.1]]), np.ones(3), np.ones((3, 3))])
def test_wrong_sigmas_are_refused(source, sigma):
    with pytest.raises(ValueError, match="sigma"):
        gaussian(source, np.zeros((2, 3), np.float32), sigma)


def test_no_noise_leaves_the_image():
    np.testing.assert_array_equal(gaussian(np.random.default_rng(0), GREY / 255, 0), GREY / 255)


@pytest.mark.parametrize("source", [0, None, np.random.RandomState(0), np.zeros(2)])
def test_other_sources_of_randomness_are_refused(source):
    with pytest.raises(TypeError, match="default_rng"):
        gaussian(source, np.zeros(3, np.float32), 0.1)


@pytest.mark.parametrize("x", [GREY, np.zeros(3, np.complex64)])
def test_images_that_are_not_floating_are_refused(x):
    with pytest.raises(TypeError, match="dtype"):
        gaussian(np.random.default_rng(0), x, 0.1)
