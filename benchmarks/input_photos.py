"""Draws JPEGs of ImageNet's size, the same on every machine.

ImageNet's training images are 500 x 375 on average, of 110 KB. Pictures of that size, from
photographs or from seeded textures, get film grain as strong as it takes to reach 110 KB at
quality 95: what a decoder does is in proportion to these bytes as much as to the pixels.
"""

import hashlib
import io
import pathlib
import zipfile
from collections.abc import Callable, Iterator

import cv2
import numpy as np
from PIL import Image

from base.errors import UserError
from input_pipeline.errors import BadExample
from input_pipeline.sources.zip_file import Zip
from input_pipeline.transforms.decode import decode

WIDTH, HEIGHT, QUALITY, MEAN_BYTES = 500, 375, 95, 110_000
GRAIN_PX = 0.6  # a grain is wider than a pixel, so that not all of it is lost in quantisation
MAX_GRAIN = 60.0  # levels; more leaves nothing of the picture
TUNED_ON = 16  # images
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")

Picture = Callable[[int], np.ndarray]  # i -> uint8 [HEIGHT, WIDTH, 3]


class Photos:
    """Photographs of a folder or a zip file, each the middle 4:3 of itself at 500 x 375."""

    def __init__(self, path: str, count: int):
        place = pathlib.Path(path).expanduser()
        self._zip = None
        if place.is_dir():
            names = [str(p) for p in place.rglob("*") if p.suffix.lower() in SUFFIXES]
        elif zipfile.is_zipfile(place):
            try:
                self._zip = Zip(place)
            except UserError as error:
                raise UserError(f"--photos: {error}") from None
            names = [name for name in self._zip.names() if name.lower().endswith(SUFFIXES)]
        else:
            raise UserError(f"--photos {path} is neither a folder nor a zip file")
        if not names:
            raise UserError(f"--photos {path} has no {', '.join(SUFFIXES)}")
        names.sort()
        self._names = [names[i * len(names) // count] for i in range(min(count, len(names)))]
        shown = "\n".join(name.removeprefix(str(place)) for name in self._names)
        self.key = hashlib.sha256(shown.encode()).hexdigest()[:16]
        self.description = f"{len(self._names):,} photographs, the middle 4:3 of each"

    def __call__(self, i: int) -> np.ndarray:
        """Photograph i; where there are too few, they come again mirrored."""
        name = self._names[i % len(self._names)]
        try:
            image = decode(self._zip.read(name) if self._zip else pathlib.Path(name).read_bytes())
        except (BadExample, OSError, zipfile.BadZipFile) as error:
            raise UserError(f"--photos: {name} cannot be read: {error}") from None
        height, width = image.shape[:2]
        h, w = min(height, width * HEIGHT // WIDTH), min(width, height * WIDTH // HEIGHT)
        if not h or not w:
            raise UserError(f"--photos: {name} is {width} x {height}, too thin")
        top, left = (height - h) // 2, (width - w) // 2
        method = cv2.INTER_AREA if w > WIDTH else cv2.INTER_CUBIC
        cut = image[top : top + h, left : left + w]
        photo = cv2.resize(cut, (WIDTH, HEIGHT), interpolation=method)
        return photo[:, ::-1] if i // len(self._names) % 2 else photo


class Textures:
    """Sums of smooth random fields, each half as strong and twice as fine as the one before.

    So amplitude falls with frequency, as in photographs.
    """

    key = "textures"
    description = "seeded textures"

    def __call__(self, i: int) -> np.ndarray:
        rng = np.random.default_rng((1, i))
        image = np.full((HEIGHT, WIDTH, 3), 128, np.float32)
        for octave in range(6):
            grid = rng.standard_normal((3 * 2**octave, 4 * 2**octave, 3), np.float32)
            field = cv2.resize(grid, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
            image += 48 / 2**octave * field
        return np.clip(image, 0, 255).astype(np.uint8)


def make(picture: Picture, count: int) -> tuple[float, Iterator[bytes]]:
    """The standard deviation of the grain, in levels of 255, and `count` JPEGs with it."""
    grain = _tuned([picture(i) for i in range(min(count, TUNED_ON))])
    return grain, (jpeg(picture(i), grain, i) for i in range(count))


def jpeg(image: np.ndarray, grain: float, seed: int) -> bytes:
    """The image as a JPEG with Gaussian grain in the luminance.

    The quality is 95, and the chroma has half the resolution.
    """
    noise = np.random.default_rng((2, seed)).standard_normal(image.shape[:2], np.float32)
    noise = cv2.GaussianBlur(noise, (0, 0), GRAIN_PX)
    noise *= grain / noise.std()
    noisy = np.clip(image + noise[..., None], 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(noisy).save(file, "JPEG", quality=QUALITY, subsampling="4:2:0")
    return file.getvalue()


def _tuned(images: list[np.ndarray]) -> float:
    """The grain that gives MEAN_BYTES on average, to a tenth of a level."""
    low, high = 0.0, MAX_GRAIN
    while high - low > 0.1:
        middle = (low + high) / 2
        size = sum(len(jpeg(image, middle, i)) for i, image in enumerate(images)) / len(images)
        low, high = (middle, high) if size < MEAN_BYTES else (low, middle)
    return round(low, 1)


WORDS = [
    "a",
    "photo",
    "of",
    "the",
    "old",
    "red",
    "house",
    "near",
    "river",
    "small",
    "dog",
    "street",
    "green",
    "market",
    "two",
    "people",
    "with",
    "bicycle",
    "under",
    "bright",
    "sky",
    "morning",
    "snow",
    "mountain",
    "wooden",
    "table",
    "cup",
    "coffee",
    "blue",
    "boat",
    "harbour",
]


def caption(i: int) -> str:
    """11 words, about the mean of published sets of alt texts."""
    return " ".join(np.random.default_rng((3, i)).choice(WORDS, 11))
