"""One picture file as an array; the files are data of unknown origin and are read as such."""

from __future__ import annotations

import warnings

import numpy as np

from .samples import MAX_PIXELS

# Pillow recognises files by their content: without this list a renamed PostScript file would start an interpreter.
_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP")
_LUMA = np.array([0.299, 0.587, 0.114])


def read_picture(path, grey: bool = False, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """One picture as a float64 array in [0, 1], (height, width) or (3, height, width); see :func:`image_folder`.

    Raises:
        ValueError: the file is damaged, too large or of a kind that has no known range, with its name.
        FileNotFoundError: there is no such file.
        ImportError: Pillow is not installed.
    """
    pixels, raw = _decoded(path, max_pixels, _pixels)
    if pixels.dtype == np.uint8 and ";16" in raw:
        warnings.warn(f"{path} has 16 bits per colour, of which Pillow keeps 8.", UserWarning, stacklevel=3)
    image = _unit_range(pixels, raw, path)
    if grey:
        return image @ _LUMA if image.ndim == 3 else image
    return np.moveaxis(image, -1, 0) if image.ndim == 3 else np.repeat(image[None], 3, axis=0)


def read_label_picture(path, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The numbers in an eight-bit picture of one channel, or in front of its palette: uint8 (height, width).

    Raises:
        ValueError: the file is damaged or too large, or holds colours or more than eight bits, with its name.
        FileNotFoundError: there is no such file.
        ImportError: Pillow is not installed.
    """

    def numbers(picture):
        if picture.mode not in ("L", "P"):
            raise _Unusable(f"has pixels of mode {picture.mode!r}: labels are one number of 8 bits per pixel.")
        return np.asarray(picture)

    return _decoded(path, max_pixels, numbers)[0]


def _decoded(path, max_pixels, decode):
    """Pixels as ``decode`` gives them, and the names of the raw modes in the file."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("Pictures need Pillow, which is missing: pip install 'jbilevel[data]'.") from error

    with open(path, "rb") as stream:
        try:
            with warnings.catch_warnings():
                # Pillow's own limit warns first and raises at twice the size; ours holds at once.
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                picture = Image.open(stream, formats=_FORMATS)
        except Image.DecompressionBombError as error:
            raise ValueError(f"{path} has too many pixels for Pillow: {error}") from error
        except Exception as error:
            raise _damaged(path, error) from error
        with picture:
            if picture.width * picture.height > max_pixels:
                raise ValueError(
                    f"{path} is {picture.width} x {picture.height} pixels, more than `max_pixels`={max_pixels}: "
                    "raise the limit if you trust the file."
                )
            raw = repr([tile[3] for tile in picture.tile])
            try:
                return decode(picture), raw
            except _Unusable as error:
                raise ValueError(f"{path} {error}") from None
            except Exception as error:  # decoders raise anything on damaged files: SyntaxError, struct.error, ...
                raise _damaged(path, error) from error


class _Unusable(Exception):
    """A sound picture whose pixels do not tell what is asked for."""


def _pixels(picture):
    """Decode, turn upright, drop alpha: an array of uint8, uint16 or float32 pixels, grey or RGB."""
    from PIL import ImageOps

    mode, source = picture.mode, picture.format
    picture = ImageOps.exif_transpose(picture)
    if mode.startswith("I;16"):
        return np.asarray(picture).astype(np.uint16)
    if mode == "I" and source == "PNG":  # Pillow before 11.3 widens 16-bit PNG to 32 bits
        return np.asarray(picture).astype(np.uint16)
    if mode == "I":
        raise _Unusable("has signed or 32-bit pixels of unknown range: convert it to 8 or 16 bits.")
    if mode == "F":
        return np.asarray(picture)
    if mode == "La":  # premultiplied alpha: Pillow converts it to LA only
        picture = picture.convert("LA")
    elif mode in ("RGBa", "P", "PA"):  # and transparent palettes, without a warning, to RGBA only
        picture = picture.convert("RGBA")
    return np.asarray(picture.convert("L" if mode in ("1", "L", "LA", "La") else "RGB"))


def _unit_range(pixels, raw, path):
    if pixels.dtype == np.uint8:
        return pixels / 255
    if pixels.dtype == np.uint16:
        return pixels / (4095 if "I;12" in raw else 65535)  # 12-bit TIFF is decoded without rescaling
    if not (np.all(pixels >= 0) and np.all(pixels <= 1)):  # false for NaN as well
        raise ValueError(f"{path} has float pixels outside [0, 1]: rescale the file.")
    return pixels.astype(np.float64)


def _damaged(path, error):
    return ValueError(f"{path} is damaged, or not one of {', '.join(_FORMATS)}: {error}")
