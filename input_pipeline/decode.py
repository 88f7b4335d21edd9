"""Image bytes -> RGB pixels. Whatever is wrong with them becomes one exception, BadImage.

JPEG goes through simplejpeg (libjpeg-turbo); what it refuses, and all else, through PIL.
"""

import io
from collections.abc import Callable

import numpy as np
import simplejpeg
from jaxtyping import UInt8
from PIL import Image

# A small file can claim to be a huge image and take all memory, so the size in the header is
# checked before any pixel is decoded. PIL's own limit: 268 MB as RGB.
MAX_PIXELS = 89_478_485

# No others: PIL has readers that nobody needs here and that start programs (EPS).
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "AVIF")

# EXIF orientation -> how to turn the stored pixels upright.
_UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x.swapaxes(0, 1)[::-1, ::-1],
    8: lambda x: np.rot90(x, 1),
}


class BadImage(Exception):
    """An image that cannot be used; str() is the reason, in a few words."""


def decode(image: bytes | np.ndarray) -> UInt8[np.ndarray, "h w 3"]:
    """RGB pixels, upright by EXIF, transparent parts over white, the first frame of a film.

    Of 16 bits the upper 8 are kept. Arrays are checked and returned as they are.

    Raises:
      BadImage: with the reason.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise BadImage(f"an array must be uint8[h,w,3], not {image.dtype}{[*image.shape]}")
        return image
    if not image:
        raise BadImage("the file is missing or empty")
    try:
        pixels = _decode_jpeg(image) if image[:2] == b"\xff\xd8" else None
        return np.ascontiguousarray(_decode_pil(image) if pixels is None else pixels)
    except (BadImage, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadImage(f"more than {MAX_PIXELS} pixels") from error
    except Image.UnidentifiedImageError as error:
        raise BadImage(f"no image of a known format ({', '.join(FORMATS)})") from error
    except Exception as error:  # decoders raise whatever a damaged file leads them to
        raise BadImage(" ".join(str(error).split())[:200] or type(error).__name__) from error


def _decode_jpeg(data: bytes) -> np.ndarray | None:
    """None: one for PIL (CMYK; or with an error, of which PIL knows the harmless ones)."""
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        _check_size(int(width), int(height))
        if colorspace in ("CMYK", "YCCK"):
            return None
        pixels = simplejpeg.decode_jpeg(data, "RGB")
    except ValueError:
        return None
    # The orientation stands in the first segments. To ask PIL for it costs more than this search.
    if data.find(b"Exif\0\0", 0, 1 << 16) >= 0:
        try:
            with Image.open(io.BytesIO(data), formats=("JPEG",)) as header:
                return _upright(pixels, header)
        except Exception:  # see _upright; Image.open reads EXIF itself
            return pixels
    return pixels


def _decode_pil(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        _check_size(*image.size)
        return _upright(_rgb(image), image)


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise BadImage(f"{width} x {height} is more than {MAX_PIXELS} pixels")


def _rgb(image: Image.Image) -> np.ndarray:
    if image.mode == "I" or image.mode.startswith("I;16"):
        # PIL's own conversion to 8 bits clips at 255 instead of dividing.
        gray = np.asarray(image).astype(np.int64)
        if gray.min() < 0 or gray.max() > 0xFFFF:
            raise BadImage("values of more than 16 bits")
        return np.repeat((gray >> 8).astype(np.uint8)[..., None], 3, axis=-1)
    if image.mode == "F":
        raise BadImage("floating-point pixels, whose range is not known")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return np.asarray(Image.alpha_composite(white, rgba).convert("RGB"))
    return np.asarray(image.convert("RGB"))


def _upright(pixels: np.ndarray, image: Image.Image) -> np.ndarray:
    try:
        orientation = image.getexif().get(0x0112, 1)
    except Exception:  # damaged EXIF is no reason to lose the pixels
        return pixels
    turn = _UPRIGHT.get(orientation)
    return turn(pixels) if turn else pixels
