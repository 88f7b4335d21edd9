"""A contact sheet: images with their captions and the text of their tokens, in one picture."""

import pathlib
import textwrap

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

MAX_IMAGES = 24
COLUMNS, SIDE, MARGIN, LINE = 6, 200, 10, 13  # pixels, but for COLUMNS
CAPTION_LINES, TOKEN_LINES, LINE_LENGTH = 4, 4, 33
GRAY, BLUE = (70, 70, 70), (20, 70, 160)


def draw(cells: list[tuple[np.ndarray, str, str]]) -> Image.Image:
    """The sheet of cells (image, caption in gray, text of the tokens in blue)."""
    height = SIDE + LINE * (CAPTION_LINES + TOKEN_LINES) + MARGIN
    rows = -(-len(cells) // COLUMNS)
    columns = min(COLUMNS, len(cells))
    size = (columns * (SIDE + MARGIN) + MARGIN, rows * (height + MARGIN) + MARGIN)
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    # matplotlib ships this font, which has more alphabets than PIL's own.
    font = ImageFont.truetype(
        str(pathlib.Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), 10
    )
    for i, (image, caption, tokens) in enumerate(cells):
        left = MARGIN + i % COLUMNS * (SIDE + MARGIN)
        top = MARGIN + i // COLUMNS * (height + MARGIN)
        picture = Image.fromarray(image)
        picture.thumbnail((SIDE, SIDE))
        if max(picture.size) < SIDE:  # enlarge small images, pixel by pixel
            scale = SIDE // max(picture.size)
            picture = picture.resize(
                (picture.width * scale, picture.height * scale), Image.Resampling.NEAREST
            )
        sheet.paste(picture, (left, top))
        at = top + SIDE + 4
        for text, lines, color in ((caption, CAPTION_LINES, GRAY), (tokens, TOKEN_LINES, BLUE)):
            plain = "".join(c if c.isprintable() else " " for c in text)
            for line in textwrap.wrap(plain, LINE_LENGTH, max_lines=lines, placeholder=" ..."):
                pen.text((left, at), line, color, font)
                at += LINE
    return sheet


def pixels(batch: dict[str, np.ndarray], i: int) -> np.ndarray:
    """Pixels [h, w, 3] of row i, black for a bad example.

    NaFlex patches are put together; an embedding is a strip of grays, its largest number white.
    """
    if "image_shape" not in batch and batch["image"].ndim == 2:
        strip = np.abs(batch["image"][i])
        gray = (255 * strip / max(strip.max(), 1e-12)).astype(np.uint8)
        return np.repeat(np.repeat(gray[None, :, None], len(gray) // 4 + 1, axis=0), 3, axis=-1)
    if "image_shape" not in batch:
        return batch["image"][i]
    rows, columns = batch["image_shape"][i]
    if not batch["mask"][i]:
        return np.zeros((1, 1, 3), np.uint8)
    patches = batch["image"][i][: rows * columns]
    side = int((patches.shape[-1] // 3) ** 0.5)
    grid = patches.reshape(rows, columns, side, side, 3).swapaxes(1, 2)
    return np.ascontiguousarray(grid.reshape(rows * side, columns * side, 3))
