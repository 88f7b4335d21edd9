"""Preprocessing of examples by the steps that config.input names.

It runs in the loader's threads: decoding and resizing release the GIL.
"""

from typing import Any

import cv2
import numpy as np
from jaxtyping import Int32

from base.errors import UserError
from base.words import one_line
from input_pipeline.errors import BadExample
from input_pipeline.transforms.image_ops import IMAGE_OPS, PRESETS, ImageContext
from input_pipeline.transforms.steps import Steps, format_steps, parse_steps
from input_pipeline.transforms.text_ops import TEXT_OPS, TextContext

# What a step raises on a good example where its options are wrong.
STEP_ERRORS = (ValueError, TypeError, ArithmeticError, cv2.error, BadExample)


def make_preprocess(
    tokenizer: Any,
    *,
    res: int = 224,
    token_len: int = 64,
    image: str | tuple = "decode | resize",
    text: str | tuple = "lower | tokenize",
) -> "Preprocess":
    """The preprocessing of a run, for training and evaluation alike.

    Args:
      tokenizer: see tokenizer.py.
      res: side of the square image, in pixels.
      token_len: number of tokens of a text.
      image: steps of image_ops.IMAGE_OPS, or the name of one of image_ops.PRESETS. Random steps
        are random in training only. 'embedding' alone: images are embeddings already.
      text: steps of text_ops.TEXT_OPS.

    Raises:
      UserError: steps cannot be parsed, do not exist, or do not end in what a model takes.
    """
    for key, value in (("res", res), ("token_len", token_len)):
        if value < 1:
            raise UserError(f"config.input.{key}={value} must be at least 1")
    if isinstance(image, str):
        image = PRESETS.get(image, image)
    try:
        image_steps = parse_steps(image, IMAGE_OPS, "input.image")
    except UserError as error:
        if not any(name.replace("-", "_") in str(image).replace("-", "_") for name in PRESETS):
            raise
        raise UserError(f"{error} (presets stand alone: {', '.join(PRESETS)})") from None
    preprocess = Preprocess(
        tokenizer,
        res=res,
        token_len=token_len,
        image=image_steps,
        text=parse_steps(text, TEXT_OPS, "input.text"),
    )
    preprocess.check()
    return preprocess


class Preprocess:
    """Turns examples into the arrays that a model takes; see make_preprocess. Thread-safe.

    Attributes:
      tokenizer, res, token_len: as given.
      patches: images are patches (NaFlex), not squares.
      embeddings: images are embeddings.
      width: the width that an embedding must have; None: any.
      rows: rows of the model's token table, where the tokenizer may have more ids; None: not
        checked.
    """

    def __init__(self, tokenizer: Any, *, res: int, token_len: int, image: Steps, text: Steps):
        self.tokenizer, self.res, self.token_len = tokenizer, res, token_len
        self._image_steps, self._text_steps = image, text
        self._text_context = TextContext(tokenizer, token_len)
        self.patches = bool(image) and image[-1][0] == "naflex"
        self.embeddings = bool(image) and image[0][0] == "embedding"
        self.width: int | None = None
        self.rows: int | None = None

    @property
    def image_program(self) -> str:
        """The image steps as a string, presets written out."""
        return format_steps(self._image_steps)

    @property
    def text_program(self) -> str:
        """The text steps as a string."""
        return format_steps(self._text_steps)

    @property
    def truncated(self) -> int:
        """Texts so far that were longer than token_len and lost their end."""
        return self._text_context.truncated

    def example(self, example: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """A row of a training batch: `text`, and the fields of `pixels`.

        Raises:
          BadExample: the example cannot be used.
        """
        text = self.text(self.caption(example, rng))
        return {"text": text, **self.pixels(example, rng)}

    def pixels(
        self, example: dict[str, Any], rng: np.random.Generator | None = None
    ) -> dict[str, Any]:
        """Fields of a batch that are made of the example's image: `image`, and those of NaFlex.

        Raises:
          BadExample: it does not decode, or a step refuses it.
          UserError: an embedding has another width than the model takes.
        """
        image = self.image(example["image"], rng)
        if self.width is not None and image.shape != (self.width,):
            raise UserError(
                f"the embedding of {example.get('id', 'an image')} has {len(image)} numbers, the "
                f"model takes config.model.img.width={self.width}"
            )
        return image if isinstance(image, dict) else {"image": image}

    def image(self, image: bytes | np.ndarray, rng: np.random.Generator | None = None) -> Any:
        """uint8 [res, res, 3]; after `naflex` the dict of image_ops.to_patches; of an `embedding`
        float32 [d]. Random only if rng is given.

        Raises:
          BadExample: it does not decode, or a step refuses it.
        """
        context, value = ImageContext(self.res, rng), image
        for _, step in self._image_steps:
            value = step(value, context)
        return np.ascontiguousarray(value) if isinstance(value, np.ndarray) else value

    def caption(self, example: dict[str, Any], rng: np.random.Generator) -> str:
        """One of the example's texts, drawn by its `weights` if it has some, else uniformly.

        Raises:
          BadExample: it has no text.
        """
        texts = example["texts"]
        if not texts:
            raise BadExample("no caption", id=example["id"])
        weights = example.get("weights") or [1.0] * len(texts)
        if len(weights) != len(texts):
            detail = f"{len(weights)} weights of {len(texts)} captions"
            raise BadExample("damaged record", detail, id=example["id"])
        # Equal weights draw like none at all, so the same data in a format without weights gives
        # the same batches.
        if len(set(weights)) == 1 and weights[0] > 0:
            return texts[int(rng.integers(len(texts)))]
        ends = np.cumsum(weights)
        if not ends[-1] > 0:
            raise BadExample("no caption", "all have probability 0", id=example["id"])
        return texts[int(np.searchsorted(ends, rng.random() * ends[-1], "right"))]

    def text(self, text: str) -> Int32[np.ndarray, " token_len"]:
        """Tokens of a text.

        Raises:
          BadExample: a token is beyond `rows`.
        """
        # JSON can hold lone surrogates, which no tokenizer takes: they become '?'.
        value: Any = text.encode("utf-8", "replace").decode("utf-8")
        for _, step in self._text_steps:
            value = step(value, self._text_context)
        if self.rows is not None and value.max() >= self.rows:  # its embedding would be NaN
            detail = f"token {value.max()}, and the model has {self.rows} rows"
            raise BadExample("unusable caption", detail)
        return value

    def check(self) -> None:
        """Runs all steps once on a gray image and a short text, so that mistakes show at the start.

        Raises:
          UserError: a step fails, or the steps do not end in what a model takes.
        """
        if any(name == "embedding" for name, _ in self._image_steps):
            if len(self._image_steps) > 1:
                raise UserError("config.input.image: `embedding` stands alone, without other steps")
        else:
            self._check_image_steps()
        self._check_text_steps()

    def _check_image_steps(self) -> None:
        gray = np.full((self.res + 9, self.res + 13, 3), 127, np.uint8)
        for rng in (None, np.random.default_rng(0)):
            context, value = ImageContext(self.res, rng), gray
            for name, step in self._image_steps:
                if not isinstance(value, np.ndarray):
                    raise UserError(
                        f"config.input.image: nothing can follow naflex, as {name} does"
                    )
                try:
                    value = step(value, context)
                except STEP_ERRORS as error:
                    raise UserError(f"config.input.image: {name}: {_reason(error)}") from None
            shape = (self.res, self.res, 3)
            if isinstance(value, np.ndarray) and (value.shape != shape or value.dtype != np.uint8):
                raise UserError(
                    f"config.input.image ends in {value.dtype}{list(value.shape)}, the model takes "
                    f"uint8{list(shape)}; end it with `resize` or a crop"
                )
        if not self._image_steps or self._image_steps[0][0] != "decode":
            raise UserError("config.input.image must begin with `decode`")

    def _check_text_steps(self) -> None:
        value: Any = "A text."
        for name, step in self._text_steps:
            if not isinstance(value, str):
                raise UserError(f"config.input.text: nothing can follow tokenize, as {name} does")
            try:
                value = step(value, self._text_context)
            except STEP_ERRORS as error:
                raise UserError(f"config.input.text: {name}: {_reason(error)}") from None
        if isinstance(value, str):
            raise UserError("config.input.text must end with `tokenize`")


def _reason(error: Exception) -> str:
    return one_line(error)
