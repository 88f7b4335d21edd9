"""Example -> what a model takes: uint8 pixels of one size, int32 tokens of one length.

Runs in the loader's threads: decoding and resizing release the GIL.
"""

import math
import threading
from typing import Any

import cv2
import numpy as np
from jaxtyping import Int32, UInt8
from PIL import Image

from input_pipeline.decode import BadImage, decode
from input_pipeline.errors import UserError
from input_pipeline.nearest import nearest
from input_pipeline.tokenizers import EOS_MODES, pad_to_length

__all__ = ["RESIZES", "BadImage", "BadRecord", "Preprocess", "make_preprocess"]

# The loader has a thread for each core already; OpenCV's own would only compete with them.
cv2.setNumThreads(0)


def _cv2_bilinear(image: np.ndarray, res: int) -> np.ndarray:
    return cv2.resize(image, (res, res), interpolation=cv2.INTER_LINEAR)


def _pil_bilinear(image: np.ndarray, res: int) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((res, res), Image.Resampling.BILINEAR))


def _pil_bicubic(image: np.ndarray, res: int) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((res, res), Image.Resampling.BICUBIC))


# All squash to the square: aspect ratio is ignored, as in the released models.
RESIZES = {
    "bilinear": _cv2_bilinear,  # no antialias, as big_vision trains; the fastest
    "bilinear-pil": _pil_bilinear,  # antialias; what Hugging Face's SigLIP 2 processor does
    "bicubic-pil": _pil_bicubic,  # antialias; what Hugging Face's SigLIP processor does
}


def make_preprocess(
    tokenizer: Any,
    *,
    res: int = 224,
    token_len: int = 64,
    lower: bool = True,
    pad_id: int | None = None,
    eos: str = "sticky",
    resize: str = "bilinear",
    random_crop: float = 1.0,
    flip: bool = False,
) -> "Preprocess":
    """The preprocessing of a run, for training and evaluation alike.

    Args:
      tokenizer: vocab_size, eos_id, encode(text) -> ids; see tokenizers.py.
      res: side of the square image, in pixels.
      token_len: number of tokens of a text.
      lower: lower-case the text, as all released models were trained.
      pad_id: id that fills a text up; None: the EOS id, as in SigLIP v1. SigLIP 2 has 0.
      eos: 'sticky', 'yes' or 'none'; see tokenizers.pad_to_length.
      resize: a name of RESIZES.
      random_crop: in training, cut out a random part of at least this share of the area, of an
        aspect ratio from 3:4 to 4:3; 1.0: the whole image.
      flip: in training, mirror every second image. Captions that say left or right become wrong.

    Raises:
      UserError: a value out of its range.
    """
    for key, value in (("res", res), ("token_len", token_len)):
        if value < 1:
            raise UserError(f"config.input.{key}={value} must be at least 1")
    if not 0.0 < random_crop <= 1.0:
        raise UserError(
            f"config.input.random_crop={random_crop} must be above 0 and at most 1: the least "
            "share of the area that is kept (1.0: no crop)"
        )
    for key, value, known in (("eos", eos, EOS_MODES), ("resize", resize, RESIZES)):
        if value not in known:
            raise UserError(f"config.input.{key}={value!r} is unknown; {nearest(value, known)}")
    pad: int = tokenizer.eos_id if pad_id is None else pad_id
    if not 0 <= pad < tokenizer.vocab_size:
        raise UserError(
            f"config.input.pad_id={pad} is not an id of the tokenizer, which has "
            f"{tokenizer.vocab_size}; leave it unset for the EOS id"
        )
    return Preprocess(
        tokenizer,
        res=res,
        token_len=token_len,
        lower=lower,
        pad_id=pad,
        eos=eos,
        resize=resize,
        random_crop=random_crop,
        flip=flip,
    )


class Preprocess:
    """See make_preprocess. Safe to call from many threads.

    Attributes:
      bad: BadRecord of the examples that could not be used in training.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        res: int,
        token_len: int,
        lower: bool,
        pad_id: int,
        eos: str,
        resize: str,
        random_crop: float,
        flip: bool,
    ):
        self._tokenizer, self._lower = tokenizer, lower
        self._res, self._resize = res, RESIZES[resize]
        self._random_crop, self._flip = random_crop, flip
        self._token_len, self._pad_id, self._eos = token_len, pad_id, eos
        self.bad = BadRecord()

    def image(
        self, image: bytes | np.ndarray, rng: np.random.Generator | None = None
    ) -> UInt8[np.ndarray, "res res 3"]:
        """Pixels of the model's size; random crop and flip only where rng is given.

        Raises:
          BadImage: it does not decode, or is refused.
        """
        pixels = decode(image)
        if rng is not None and self._random_crop < 1.0:
            pixels = _crop(pixels, self._random_crop, rng)
        pixels = self._resize(pixels, self._res)
        if rng is not None and self._flip and rng.random() < 0.5:
            pixels = np.ascontiguousarray(pixels[:, ::-1])
        return pixels

    def text(self, text: str) -> Int32[np.ndarray, " token_len"]:
        """Tokens of the cleaned text."""
        # JSON can hold half a character pair, which no tokenizer takes: it becomes '?'.
        text = text.encode("utf-8", "replace").decode("utf-8")
        return pad_to_length(
            self._tokenizer.encode(text.lower() if self._lower else text),
            self._token_len,
            eos_id=self._tokenizer.eos_id,
            pad_id=self._pad_id,
            eos=self._eos,
        )

    def example(self, example: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """A row of a training batch: image, one of the texts (drawn by rng), mask.

        An example that cannot be used is zeros with mask False, and is entered in `bad`: one file
        among millions must not end a run.
        """
        try:
            if not example["texts"]:
                raise BadImage("there is no caption")
            text = self.text(example["texts"][int(rng.integers(len(example["texts"])))])
            image = self.image(example["image"], rng)
        except BadImage as bad:
            self.bad.record(example["id"], str(bad))
            return {
                "image": np.zeros((self._res, self._res, 3), np.uint8),
                "text": np.zeros(self._token_len, np.int32),
                "mask": np.False_,
            }
        return {"image": image, "text": text, "mask": np.True_}


def _crop(image: np.ndarray, least: float, rng: np.random.Generator) -> np.ndarray:
    """A random rectangle of `least` to all of the area (Szegedy et al. 2015, arXiv:1409.4842)."""
    height, width = image.shape[:2]
    for _ in range(10):
        area = rng.uniform(least, 1.0) * height * width
        ratio = math.exp(rng.uniform(-1.0, 1.0) * math.log(4 / 3))  # width / height
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            return image[top : top + h, left : left + w]
    return image  # too long and thin for any such rectangle


class BadRecord:
    """Which examples were bad, why, and how often they were met. Safe to use from threads."""

    def __init__(self):
        self._lock = threading.Lock()
        self._reasons: dict[str, str] = {}
        self._times: dict[str, int] = {}

    def record(self, id: str, reason: str) -> None:
        with self._lock:
            self._reasons[id] = reason
            self._times[id] = self._times.get(id, 0) + 1

    def __len__(self) -> int:
        """Number of different bad examples."""
        return len(self._reasons)

    @property
    def count(self) -> int:
        """How often a bad example was met."""
        with self._lock:
            return sum(self._times.values())

    @property
    def reasons(self) -> dict[str, str]:
        """Id -> reason."""
        with self._lock:
            return dict(self._reasons)

    def worst(self, most: int = 3) -> str:
        """The bad examples met most often, for one line of a message."""
        with self._lock:
            names = sorted(self._times, key=lambda name: (-self._times[name], name))[:most]
            said = [f"{name} ({self._reasons[name]})" for name in names]
            more = len(self._times) - len(said)
        return ", ".join(said) + (f", and {more} more" if more > 0 else "")
