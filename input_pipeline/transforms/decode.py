"""Decoding of image bytes to RGB pixels. Every failure becomes one exception, BadExample.

JPEG is decoded by simplejpeg (libjpeg-turbo, bit for bit PIL's pixels), all other formats and
what simplejpeg refuses by PIL.
"""

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import simplejpeg
from jaxtyping import UInt8
from PIL import Image

from base.words import one_line
from input_pipeline.errors import BadExample

# A small file can claim to be a huge image and take all memory, so the size in the header is
# checked before any pixel is decoded. This is PIL's own limit, 268 MB as RGB.
MAX_PIXELS = 89_478_485

# PIL reads more formats; some, such as EPS, start other programs.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "AVIF")

# EXIF orientation -> function that turns the stored pixels upright.
_UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x.swapaxes(0, 1)[::-1, ::-1],
    8: lambda x: np.rot90(x, 1),
}


def decode(image: bytes | np.ndarray, min_side: int = 0) -> UInt8[np.ndarray, "h w 3"]:
    """RGB pixels: upright by EXIF, transparent parts over white, the first frame of an animation.

    Of 16-bit values the upper 8 bits are kept. Arrays are checked and returned as they are.

    Args:
      image: the bytes of a file, or an array.
      min_side: if above 0, a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, as long as both
        sides keep this many pixels: 2 to 10 times as fast, but other pixels.

    Raises:
      BadExample: the image cannot be used.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            detail = f"an array must be uint8[h,w,3], not {image.dtype}{[*image.shape]}"
            raise BadExample("unusable image", detail)
        return image
    if not image:
        raise BadExample("no image", "the file is missing or empty")
    try:
        pixels = _decode_jpeg(image, min_side) if image[:2] == b"\xff\xd8" else None
        return np.ascontiguousarray(_decode_pil(image) if pixels is None else pixels)
    except (BadExample, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadExample("image too large", f"more than {MAX_PIXELS} pixels") from error
    except Image.UnidentifiedImageError as error:
        raise BadExample("unknown image format", f"none of {', '.join(FORMATS)}") from error
    except Exception as error:  # on damaged files decoders raise exceptions of any type
        detail = one_line(error)
        raise BadExample("damaged image", detail) from error


def _decode_jpeg(data: bytes, min_side: int) -> np.ndarray | None:
    """Pixels, or None where PIL must decode: CMYK, and errors, of which PIL tolerates some."""
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        _check_size(int(width), int(height))
        if colorspace in ("CMYK", "YCCK"):
            return None
        # Only powers of two: other scales, such as 5/8, are slower than the whole image.
        shrink = 8
        while shrink > 1 and (not min_side or min(int(height), int(width)) // shrink < min_side):
            shrink //= 2
        smaller: dict[str, Any] = {
            "min_height": int(height) // shrink,
            "min_width": int(width) // shrink,
        }
        pixels = simplejpeg.decode_jpeg(data, "RGB", **(smaller if shrink > 1 else {}))
    except ValueError:
        return None
    if _has_exif(data):
        try:
            with Image.open(io.BytesIO(data), formats=("JPEG",)) as header:
                return _upright(pixels, header)
        except Exception:  # Image.open reads EXIF too; as in _upright, damaged EXIF is ignored
            return pixels
    return pixels


def _has_exif(data: bytes) -> bool:
    """Whether one of the APP segments, which come first, is EXIF. Faster than asking PIL."""
    offset = 2
    while offset + 4 <= len(data) and data[offset] == 0xFF and (data[offset + 1] & 0xF0) == 0xE0:
        if data[offset + 1] == 0xE1 and data[offset + 4 : offset + 10] == b"Exif\0\0":
            return True
        offset += 2 + int.from_bytes(data[offset + 2 : offset + 4], "big")
    return False


def _decode_pil(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        _check_size(*image.size)
        return _upright(_rgb(image), image)


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise BadExample("image too large", f"{width} x {height} is more than {MAX_PIXELS} pixels")


def _rgb(image: Image.Image) -> np.ndarray:
    if image.mode == "I" or image.mode.startswith("I;16"):
        # PIL's own conversion to 8 bits clips at 255 instead of dividing.
        gray = np.asarray(image).astype(np.int64)
        if gray.min() < 0 or gray.max() > 0xFFFF:
            raise BadExample("unusable image", "values of more than 16 bits")
        return np.repeat((gray >> 8).astype(np.uint8)[..., None], 3, axis=-1)
    if image.mode == "F":
        raise BadExample("unusable image", "floating-point pixels, whose range is not known")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return np.asarray(Image.alpha_composite(white, rgba).convert("RGB"))
    return np.asarray(image.convert("RGB"))


def _upright(pixels: np.ndarray, image: Image.Image) -> np.ndarray:
    try:
        orientation = image.getexif().get(0x0112, 1)
    except Exception:  # the pixels are good even if EXIF is damaged
        return pixels
    turn = _UPRIGHT.get(orientation)
    return turn(pixels) if turn else pixels
