"""Example -> what a model takes, by the steps that config.input names.

Runs in the loader's threads: decoding and resizing release the GIL.
"""

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
from jaxtyping import Int32

from base.errors import UserError
from input_pipeline.errors import BadExample
from input_pipeline.sources.storage import one_line
from input_pipeline.transforms import steps as program
from input_pipeline.transforms.fields import FIELD_OPS
from input_pipeline.transforms.image_ops import IMAGE_OPS, PRESETS, At
from input_pipeline.transforms.text_ops import TEXT_OPS, To

# The loader has a thread for each core already; OpenCV's own would only compete with them.
cv2.setNumThreads(0)


# What steps raise where their options are of no use.
MISTAKES = (ValueError, TypeError, ArithmeticError, cv2.error, BadExample)


def make_preprocess(
    tokenizer: Any,
    *,
    res: int = 224,
    token_len: int = 64,
    image: str | tuple = "decode | resize",
    text: str | tuple = "lower | tokenize",
    fields: str | tuple = "",
) -> "Preprocess":
    """The preprocessing of a run, for training and evaluation alike.

    Args:
      tokenizer: vocab_size, eos_id, encode(text) -> ids; see tokenizers.py.
      res: side of the square image, in pixels.
      token_len: number of tokens of a text.
      image: steps of image_ops.IMAGE_OPS, or the name of one of image_ops.PRESETS. What is random
        in them happens in training only. 'embedding' alone: images are embedded already.
      text: steps of text_ops.TEXT_OPS.
      fields: steps of fields.FIELD_OPS.

    Raises:
      UserError: steps that cannot be read, do not exist, or do not end in what a model takes.
    """
    for key, value in (("res", res), ("token_len", token_len)):
        if value < 1:
            raise UserError(f"config.input.{key}={value} must be at least 1")
    if isinstance(image, str):
        image = PRESETS.get(image, image)
    try:
        steps = program.parse(image, IMAGE_OPS, "input.image")
    except UserError as error:
        if not any(name.replace("-", "_") in str(image).replace("-", "_") for name in PRESETS):
            raise
        raise UserError(f"{error} (presets stand alone: {', '.join(PRESETS)})") from None
    made = Preprocess(
        tokenizer,
        res=res,
        token_len=token_len,
        image=steps,
        text=program.parse(text, TEXT_OPS, "input.text"),
        fields=program.parse(fields, FIELD_OPS, "input.fields"),
    )
    made.check()
    return made


Steps = list[tuple[str, Callable]]


class Preprocess:
    """See make_preprocess. Safe to call from many threads.

    Attributes:
      tokenizer, res, token_len: as given.
      patches: images are patches (NaFlex), not squares.
      embeddings: images are embeddings.
      width: that an embedding must have; None: any.
      rows: of the model's token table, where the tokenizer may have more ids; None: not checked.
    """

    def __init__(
        self, tokenizer: Any, *, res: int, token_len: int, image: Steps, text: Steps, fields: Steps
    ):
        self.tokenizer, self.res, self.token_len = tokenizer, res, token_len
        self._image, self._text, self._fields = image, text, fields
        self._to = To(tokenizer, token_len)
        self.patches = bool(image) and image[-1][0] == "naflex"
        self.embeddings = bool(image) and image[0][0] == "embedding"
        self.width: int | None = None
        self.rows: int | None = None

    def image(self, image: bytes | np.ndarray, rng: np.random.Generator | None = None) -> Any:
        """uint8 [res, res, 3]; after `naflex` a dict, see image_ops.to_patches; for `embedding`
        float32 [d]. Random only where rng is given.

        Raises:
          BadExample: it does not decode, or is refused.
        """
        at, made = At(self.res, rng), image
        for _, step in self._image:
            made = step(made, at)
        return np.ascontiguousarray(made) if isinstance(made, np.ndarray) else made

    @property
    def image_program(self) -> str:
        return program.written(self._image)

    @property
    def text_program(self) -> str:
        return program.written(self._text)

    @property
    def truncated(self) -> int:
        """Texts so far that were longer than token_len, and lost their end."""
        return self._to.cut

    def text(self, text: str) -> Int32[np.ndarray, " token_len"]:
        """Tokens of the cleaned text.

        Raises:
          BadExample: one of them is beyond `rows`.
        """
        # JSON can hold half a character pair, which no tokenizer takes: it becomes '?'.
        made: Any = text.encode("utf-8", "replace").decode("utf-8")
        for _, step in self._text:
            made = step(made, self._to)
        if self.rows is not None and made.max() >= self.rows:  # whose embedding would be NaN
            told = f"token {made.max()}, and the model has {self.rows} rows"
            raise BadExample("unusable caption", told)
        return made

    def caption(self, example: dict[str, Any], rng: np.random.Generator) -> str:
        """One of its texts, drawn by `weights` where the source has some.

        Raises:
          BadExample: it has none.
        """
        texts = example["texts"]
        if not texts:
            raise BadExample("no caption", id=example["id"])
        weights = example.get("weights") or [1.0] * len(texts)
        if len(weights) != len(texts):
            told = f"{len(weights)} weights of {len(texts)} captions"
            raise BadExample("damaged record", told, id=example["id"])
        # Equal ones draw as none do: the same data in another format are the same batches.
        if len(set(weights)) == 1 and weights[0] > 0:
            return texts[int(rng.integers(len(texts)))]
        ends = np.cumsum(weights)
        if not ends[-1] > 0:
            raise BadExample("no caption", "all have probability 0", id=example["id"])
        return texts[int(np.searchsorted(ends, rng.random() * ends[-1], "right"))]

    def example(self, example: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """A row of a training batch: image, text, and what config.input.fields keeps.

        Raises:
          BadExample: it cannot be used.
        """
        text = self.text(self.caption(example, rng))
        return {"text": text, **self.pixels(example, rng), **self.fields(example)}

    def pixels(
        self, example: dict[str, Any], rng: np.random.Generator | None = None
    ) -> dict[str, Any]:
        """`image` as `image()` makes it, and what belongs to it.

        Raises:
          BadExample: it does not decode, or is refused.
          UserError: an embedding of another width than the model takes.
        """
        made = self.image(example["image"], rng)
        if self.width is not None and made.shape != (self.width,):
            raise UserError(
                f"the embedding of {example.get('id', 'an image')} has {len(made)} numbers, the "
                f"model takes config.model.img.width={self.width}"
            )
        return made if isinstance(made, dict) else {"image": made}

    def fields(self, example: dict[str, Any]) -> dict[str, Any]:
        extra: dict[str, Any] = {}
        for _, step in self._fields:
            try:
                extra = step(extra, example)
            except ValueError as error:
                raise UserError(f"config.input.fields: {error}") from None
        return extra

    def check(self) -> None:
        """Goes through all steps once, so that what is wrong with them shows at the start."""
        if any(name == "embedding" for name, _ in self._image):
            if len(self._image) > 1:
                raise UserError("config.input.image: `embedding` stands alone, without other steps")
        else:
            self._check_image()
        self._check_text()

    def _check_image(self) -> None:
        gray = np.full((self.res + 9, self.res + 13, 3), 127, np.uint8)
        for rng in (None, np.random.default_rng(0)):
            at, made = At(self.res, rng), gray
            for name, step in self._image:
                if not isinstance(made, np.ndarray):
                    raise UserError(
                        f"config.input.image: nothing can follow naflex, as {name} does"
                    )
                try:
                    made = step(made, at)
                except MISTAKES as error:
                    raise UserError(f"config.input.image: {name}: {one_line(error)}") from None
            wanted = (self.res, self.res, 3)
            if isinstance(made, np.ndarray) and (made.shape != wanted or made.dtype != np.uint8):
                raise UserError(
                    f"config.input.image ends in {made.dtype}{list(made.shape)}, the model takes "
                    f"uint8{list(wanted)}; end it with `resize` or a crop"
                )
        if not self._image or self._image[0][0] != "decode":
            raise UserError("config.input.image must begin with `decode`")

    def _check_text(self) -> None:
        text: Any = "A text."
        for name, step in self._text:
            if not isinstance(text, str):
                raise UserError(f"config.input.text: nothing can follow tokenize, as {name} does")
            try:
                text = step(text, self._to)
            except MISTAKES as error:
                raise UserError(f"config.input.text: {name}: {one_line(error)}") from None
        if isinstance(text, str):
            raise UserError("config.input.text must end with `tokenize`")
