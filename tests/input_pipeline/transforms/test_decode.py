"""Every kind of image to RGB; whatever is damaged or too large becomes BadExample."""

import io
import pathlib
import struct
import sys
import zlib

import numpy as np
import processes
import pytest
from PIL import Image

from input_pipeline.errors import BadExample
from input_pipeline.transforms.decode import MAX_PIXELS, decode

ROOT = pathlib.Path(__file__).resolve().parents[3]

# Four blocks of colour, large enough that JPEG keeps them in their middles.
H, W = 32, 48
COLORS = np.array([[[200, 30, 40], [20, 180, 60]], [[10, 50, 220], [240, 220, 20]]], np.uint8)
RGB = COLORS.repeat(H // 2, 0).repeat(W // 2, 1)


def encoded(image, format, **kw):
    file = io.BytesIO()
    image.save(file, format, **kw)
    return file.getvalue()


def corners(pixels):
    h, w = pixels.shape[:2]
    return pixels[np.ix_([h // 4, 3 * h // 4], [w // 4, 3 * w // 4])].astype(int)


def rgba(alpha):
    image = Image.fromarray(RGB).convert("RGBA")
    image.putalpha(alpha)
    return image


def gray16():
    return Image.fromarray(np.full((H, W), 0x8001, np.uint16))


def rgb16_png():
    """PIL cannot write it."""

    def chunk(name, data):
        crc = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + crc

    rows = (RGB.astype(">u2") * 256 + 255).astype(">u2")
    data = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", W, H, 16, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def palette_png(**kw):
    return encoded(Image.fromarray(RGB).quantize(8), "PNG", **kw)


WHITE = np.full((2, 2, 3), 255)
HALF = (COLORS.astype(int) + 255) / 2  # half transparent over white
LUMA = np.asarray(Image.fromarray(COLORS).convert("L")).astype(int)[..., None].repeat(3, -1)
PIL_RGB = Image.fromarray(RGB)


@pytest.mark.parametrize(
    ("data", "expected", "tolerance"),
    [
        pytest.param(encoded(PIL_RGB, "PNG"), COLORS, 0, id="png"),
        pytest.param(encoded(PIL_RGB, "JPEG", quality=95), COLORS, 4, id="jpeg"),
        pytest.param(encoded(PIL_RGB, "JPEG", progressive=True), COLORS, 6, id="jpeg progressive"),
        pytest.param(encoded(PIL_RGB.convert("L"), "JPEG"), LUMA, 4, id="jpeg gray"),
        pytest.param(encoded(PIL_RGB.convert("CMYK"), "JPEG"), COLORS, 6, id="jpeg cmyk"),
        pytest.param(encoded(PIL_RGB, "WEBP", lossless=True), COLORS, 0, id="webp"),
        pytest.param(encoded(PIL_RGB, "BMP"), COLORS, 0, id="bmp"),
        pytest.param(encoded(PIL_RGB, "TIFF"), COLORS, 0, id="tiff"),
        pytest.param(encoded(PIL_RGB, "PPM"), COLORS, 0, id="ppm"),
        pytest.param(encoded(PIL_RGB.quantize(8), "GIF"), COLORS, 3, id="gif"),
        pytest.param(palette_png(), COLORS, 3, id="palette"),
        pytest.param(palette_png(transparency=bytes(8)), WHITE, 0, id="palette transparent"),
        pytest.param(encoded(rgba(0), "PNG"), WHITE, 0, id="rgba transparent"),
        pytest.param(encoded(rgba(128), "PNG"), HALF, 2, id="rgba half transparent"),
        pytest.param(encoded(rgba(255), "PNG"), COLORS, 0, id="rgba opaque"),
        pytest.param(encoded(rgba(0), "WEBP", lossless=True), WHITE, 0, id="webp transparent"),
        pytest.param(encoded(rgba(0).convert("LA"), "PNG"), WHITE, 0, id="la transparent"),
        pytest.param(
            encoded(PIL_RGB, "PNG", transparency=(200, 30, 40)),
            np.concatenate([[[WHITE[0, 0], COLORS[0, 1]]], COLORS[1:]]),
            0,
            id="one colour transparent",
        ),
        pytest.param(encoded(PIL_RGB.convert("L"), "PNG"), LUMA, 0, id="gray"),
        pytest.param(encoded(gray16(), "PNG"), np.full((2, 2, 3), 0x80), 0, id="gray 16 bits"),
        pytest.param(encoded(gray16(), "TIFF"), np.full((2, 2, 3), 0x80), 0, id="tiff 16 bits"),
        pytest.param(rgb16_png(), COLORS, 0, id="rgb 16 bits"),
        pytest.param(
            encoded(PIL_RGB.convert("1", dither=0), "PNG"), (LUMA > 127) * 255, 0, id="1 bit"
        ),
    ],
)
def test_formats(data, expected, tolerance):
    pixels = decode(data)
    assert pixels.shape == (H, W, 3) and pixels.dtype == np.uint8
    np.testing.assert_allclose(corners(pixels), expected, atol=tolerance)


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_the_image_upright(format, orientation):
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(PIL_RGB, format, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    pixels = decode(data)
    assert pixels.shape == expected.shape and pixels.flags.c_contiguous
    np.testing.assert_allclose(pixels.astype(int), expected, atol=3)


def test_damaged_exif_keeps_the_pixels():
    data = encoded(PIL_RGB, "JPEG", quality=95, exif=b"Exif\0\0" + b"II*\0\xff\xff\xff\xff")
    np.testing.assert_allclose(corners(decode(data)), COLORS, atol=4)


def test_harmless_jpeg_error_keeps_the_pixels():
    data = encoded(PIL_RGB, "JPEG", quality=95)
    scan = data.index(b"\xff\xda")
    np.testing.assert_allclose(
        corners(decode(data[:scan] + b"\0\0\0" + data[scan:])), COLORS, atol=4
    )


def test_only_the_first_frame_counts():
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(decode(data)[4, 4], [255, 0, 0])


def png_claiming(width, height):
    data = bytearray(encoded(Image.new("L", (1, 1)), "PNG"))
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    return bytes(data)


def jpeg_claiming(width, height):
    data = bytearray(encoded(Image.new("L", (1, 1)), "JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


@pytest.mark.parametrize("claiming", [png_claiming, jpeg_claiming])
@pytest.mark.parametrize("size", [(65000, 65000), (10_000, MAX_PIXELS // 10_000 + 1)])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bomb_is_refused_by_its_header(claiming, size, monkeypatch):
    def never(*args, **kw):
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr("simplejpeg.decode_jpeg", never)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", never)
    with pytest.raises(BadExample, match=f"more than {MAX_PIXELS} pixels"):
        decode(claiming(*size))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        pytest.param(b"", "the file is missing or empty", id="empty"),
        pytest.param(b"<html>not found</html>", "unknown image format", id="html"),
        pytest.param(b"\xff\xd8\xff", ".", id="jpeg of three bytes"),
        pytest.param(encoded(PIL_RGB, "PNG")[:-60], ".", id="png cut"),
        pytest.param(encoded(PIL_RGB, "JPEG")[:-60], "truncated", id="jpeg cut"),
        pytest.param(encoded(PIL_RGB, "EPS"), "unknown image format", id="eps"),
        pytest.param(
            encoded(Image.fromarray(np.zeros((2, 2), np.float32)), "TIFF"), "floating", id="float"
        ),
        pytest.param(
            encoded(Image.fromarray(np.full((2, 2), 70_000, np.int32)), "TIFF"), "16 bits", id="int"
        ),
        pytest.param(np.zeros((4, 4), np.uint8), r"not uint8\[4, 4\]", id="array gray"),
        pytest.param(np.zeros((4, 4, 3)), r"not float64\[4, 4, 3\]", id="array float"),
        pytest.param(np.zeros((0, 4, 3), np.uint8), r"not uint8\[0, 4, 3\]", id="array empty"),
    ],
)
def test_bad_images_say_why_in_one_line(data, reason):
    with pytest.raises(BadExample, match=reason) as bad:
        decode(data)
    assert "\n" not in str(bad.value)


def test_any_damage_is_a_bad_image_or_pixels():
    rng = np.random.default_rng(0)
    for data in (encoded(PIL_RGB, "PNG"), encoded(PIL_RGB, "JPEG"), encoded(rgba(9), "WEBP")):
        for _ in range(100):
            damaged = bytearray(data)
            for place in rng.integers(len(data), size=4):
                damaged[place] = rng.integers(256)
            try:
                pixels = decode(bytes(damaged))
            except BadExample:
                continue
            assert pixels.ndim == 3 and pixels.dtype == np.uint8


@pytest.mark.parametrize("quality", [30, 95])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_is_decoded_as_pil_decodes_it_to_the_bit(quality, subsampling, progressive):
    noise = np.random.default_rng(0).integers(0, 256, (12, 13, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((333, 257))
    data = encoded(image, "JPEG", quality=quality, subsampling=subsampling, progressive=progressive)
    with Image.open(io.BytesIO(data)) as opened:
        np.testing.assert_array_equal(decode(data), np.asarray(opened.convert("RGB")))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("form", ["PNG", "GIF", "TIFF"])
def test_a_bomb_is_refused_in_bounded_memory(form, tmp_path):
    """20,000 x 20,000 pixels of one colour, in little more than a megabyte."""
    (tmp_path / "bomb").write_bytes(encoded(Image.new("L", (20_000, 20_000)), form))
    code = """
import resource, sys
from input_pipeline.transforms.decode import decode
from input_pipeline.errors import BadExample
data = open(sys.argv[1], "rb").read()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    decode(data)
except BadExample as error:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, error)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "bomb")]
    done = processes.run(command, cwd=ROOT)
    kilobytes, _, message = done.stdout.partition(" ")
    assert message.startswith("image too large") and int(kilobytes) < 50_000, done.stderr
