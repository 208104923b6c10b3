"""One picture file as an array; the files are data of unknown origin and are read as such."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from .files import Unusable, named
from .samples import MAX_PIXELS

# Pillow recognises files by their content: without this list a renamed PostScript file would start an interpreter.
_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP")
_KIND = f"picture ({', '.join(_FORMATS)})"
_LUMA = np.array([0.299, 0.587, 0.114])
_BLOCK = 1 << 18  # pixels that are converted at once
_SCANS = 100
# Tags of TIFF, and what they may say:
_BITS, _PHOTOMETRIC, _LARGEST, _SAMPLE_FORMAT = 258, 262, 281, 339
_WHITE_IS_ZERO, _UNSIGNED, _FLOAT = 0, 1, 3


def read_picture(path, grey: bool = False, max_pixels: int = MAX_PIXELS, dtype=np.float32) -> np.ndarray:
    """One picture as an array in [0, 1], (height, width) or (3, height, width); see :func:`image_folder`.

    Raises:
        ValueError: the file is damaged, too large or of a kind that has no known range, with its name.
        FileNotFoundError: there is no such file.
        ImportError: Pillow is not installed.
    """
    pixels, largest, white_is_zero, notice = _decoded(path, max_pixels, _pixels)
    if notice:
        warnings.warn(f"{path} {notice}", UserWarning, stacklevel=3)
    height, width = pixels.shape[:2]
    image = np.empty((height, width) if grey else (3, height, width), dtype)
    step = max(1, _BLOCK // width)
    for top in range(0, height, step):  # in double precision, which would not fit into memory as a whole
        rows = slice(top, top + step)
        block = pixels[rows] / largest
        block = 1 - block if white_is_zero else block
        if not grey:
            image[:, rows] = np.moveaxis(block, -1, 0) if block.ndim == 3 else block
        else:
            image[rows] = block @ _LUMA if block.ndim == 3 else block
    return image


def read_label_picture(path, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The numbers in an eight-bit picture of one channel, or in front of its palette: uint8 (height, width).

    Raises:
        ValueError: the file is damaged or too large, or holds colours or other than eight bits, with its name.
        FileNotFoundError: there is no such file.
        ImportError: Pillow is not installed.
    """
    return _decoded(path, max_pixels, _numbers)


def _decoded(path, max_pixels, decode):
    """What ``decode`` makes of a picture, which is opened and turned upright, but not yet unpacked."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("Pictures need Pillow, which is missing: pip install 'jbilevel[data]'.") from error

    path = Path(path)
    with named(path, _KIND), open(path, "rb") as stream:
        try:
            with warnings.catch_warnings():
                # Pillow's own limit warns first and raises at twice the size; ours holds at once.
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                picture = Image.open(stream, formats=_FORMATS)
        except Image.DecompressionBombError as error:
            raise Unusable(f"has too many pixels for Pillow: {error}") from error
        with picture:
            if picture.width * picture.height > max_pixels:
                raise Unusable(
                    f"is {picture.width} x {picture.height} pixels, more than `max_pixels`={max_pixels}: "
                    "raise the limit if you trust the file."
                )
            if picture.format == "JPEG":
                check_scans(path.read_bytes())
            return decode(picture)


def check_scans(content: bytes) -> None:
    """Refuse a JPEG that is to be decoded again and again: its scans refine what others have made of all pixels."""
    if content.count(b"\xff\xda") > _SCANS:
        raise Unusable(f"has more than {_SCANS} scans, of which a JPEG needs a dozen.")


def _numbers(picture):
    from PIL import ImageOps

    modes = _raw_modes(picture)
    if picture.mode not in ("L", "P") or any(f"L;{bits}" in modes for bits in (2, 4)):  # Pillow stretches to 8 bits
        raise Unusable(f"has pixels of kind {modes or picture.mode}: labels are one number of 8 bits per pixel.")
    ImageOps.exif_transpose(picture, in_place=True)
    return np.asarray(picture)


def _pixels(picture):
    """Decode, turn upright, drop alpha.

    Returns:
        Grey or RGB pixels, their value at full brightness, whether 0 is white, and a sentence of warning or "".
    """
    from PIL import ImageOps

    mode, modes = picture.mode, _raw_modes(picture)
    tags: Any = picture.tag_v2 if picture.format == "TIFF" else {_PHOTOMETRIC: 1}
    if _PHOTOMETRIC not in tags:
        raise Unusable("does not say whether 0 is black or white: it lacks the tag PhotometricInterpretation.")
    kinds = set(tags.get(_SAMPLE_FORMAT, (_UNSIGNED,)))
    if not kinds <= {_UNSIGNED, _FLOAT} or mode == "I" and picture.format != "PNG":
        raise Unusable("has signed or 32-bit pixels of unknown range: convert it to 8 or 16 bits.")
    if "F;32BF" in modes and picture.tile[0][0] == "libtiff":  # Pillow turns bytes that libtiff has turned already
        raise Unusable("has compressed big-endian floats, which Pillow misreads: save it uncompressed.")
    ImageOps.exif_transpose(picture, in_place=True)
    # Pillow turns white and black of up to 8 bits, and of no more.
    white_is_zero = tags[_PHOTOMETRIC] == _WHITE_IS_ZERO and (mode == "F" or mode.startswith("I"))
    if mode == "F":
        pixels = np.asarray(picture)
        if not (np.all(pixels >= 0) and np.all(pixels <= 1)):  # false for NaN as well
            raise Unusable("has float pixels outside [0, 1]: rescale the file.")
        return pixels, 1, white_is_zero, ""
    if mode.startswith("I"):  # I;16 and its kin; Pillow before 11.3 widens 16-bit PNG to I
        largest = 2 ** tags.get(_BITS, (16,))[0] - 1  # 12 bits are unpacked, not rescaled
        pixels = np.asarray(picture).astype(np.uint16)
        return pixels, largest, white_is_zero, _unused_bits(tags.get(_LARGEST, (largest,))[0], largest)
    notice = "has 16 bits per colour, of which Pillow keeps 8." if ";16" in modes else ""
    if mode == "La":  # premultiplied alpha: Pillow converts it to LA only
        picture = picture.convert("LA")
    elif mode in ("RGBa", "P", "PA"):  # and transparent palettes, without a warning, to RGBA only
        picture = picture.convert("RGBA")
    wanted = "L" if mode in ("1", "L", "LA", "La") else "RGB"
    return np.asarray(picture if picture.mode == wanted else picture.convert(wanted)), 255, False, notice


def _raw_modes(picture):
    """What Pillow calls the packing of the pixels in the file, such as "RGB;16B"."""
    modes = [tile[3] for tile in picture.tile]
    return ", ".join(sorted({str(mode[0] if isinstance(mode, tuple) else mode) for mode in modes}))


def _unused_bits(told, largest):
    """Cameras of 10 to 14 bits say so in a tag that does not change what a value means."""
    if 255 < told < largest and told & (told + 1) == 0:
        return f"says that its values end at {told}; they are divided by {largest}, as TIFF has it."
    return ""
