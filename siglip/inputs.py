"""Images and texts as people have them -> batches of arrays, as the model was trained with.

With library.py and export.py the part of siglip that knows input_pipeline.
"""

import concurrent.futures
import io
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from base.errors import UserError
from input_pipeline.errors import BadExample
from input_pipeline.transforms import tokenizer as tokenizers
from input_pipeline.transforms.preprocess import Preprocess, make_preprocess
from siglip.checkpoints.errors import CheckpointError
from siglip.checkpoints.spec import Spec, check_contract
from siglip.checkpoints.weights import Weights

ImageLike = Any  # path | bytes | PIL.Image.Image | uint8 [h, w, 3] | uint8 [h, w]
THREADS = min(16, os.cpu_count() or 1)


def make_model_preprocess(weights: Weights, tokenizer: Any, image: str) -> tuple[Preprocess, bool]:
    """(preprocessing of images and texts, whether there is a tokenizer for texts).

    Args:
      tokenizer: as in library.load.
      image: steps or preset of the image preprocessing.

    Raises:
      CheckpointError: steps that do not exist, or a tokenizer that does not fit the weights.
    """
    spec = weights.spec
    tokenizer = _make_tokenizer(spec, tokenizer) if spec.txt is not None else None
    has_tokenizer = tokenizer is not None
    text = spec.text if has_tokenizer else "lower | tokenize"
    tokenizer = tokenizer or tokenizers.Bytes()  # a stand-in: encode_text refuses every text
    res, token_len = spec.res or 16, spec.token_len or 2
    try:
        preprocess = make_preprocess(
            tokenizer, res=res, token_len=token_len, image=image, text=text
        )
    except UserError as error:
        message = str(error).replace("config.input.", "")
        raise CheckpointError(f"{weights.source}: {message}") from None
    if has_tokenizer:
        ids = preprocess.text("")
        check_contract(
            spec,
            vocab_size=tokenizer.vocab_size,
            token_len=token_len,
            eos_id=int(ids[0]),
            pad_id=int(ids[-1]),
            where=weights.source,
        )
    return preprocess, has_tokenizer


def _make_tokenizer(spec: Spec, tokenizer: Any) -> Any:
    if tokenizer is not None and not isinstance(tokenizer, str | pathlib.Path):
        return tokenizer
    if tokenizer is not None:
        name = "huggingface" if str(tokenizer).endswith(".json") else "sentencepiece"
        block = {"name": name, "path": str(tokenizer)}
    elif spec.tokenizer is not None:
        block = dict(spec.tokenizer)
    else:
        return None
    name = block.pop("name")
    if name not in tokenizers.TOKENIZERS:
        raise CheckpointError(
            f"tokenizer {name!r} is none of {', '.join(tokenizers.TOKENIZERS)}; pass tokenizer="
        )
    try:
        return tokenizers.TOKENIZERS[name](**block)
    except UserError as error:
        raise CheckpointError(str(error).replace("config.input.", "")) from None


def batches(n: int, size: int, make: Callable[[int], dict]) -> Iterator[dict[str, np.ndarray]]:
    """The rows make(0), ..., make(n - 1) in batches [size, ...], the last filled up with copies.

    Threads make the rows of the next batch while the caller uses this one.
    """
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:

        def start(first: int) -> list[concurrent.futures.Future]:
            return [pool.submit(make, i) for i in range(first, min(first + size, n))]

        try:
            coming = start(0)
            for first in range(0, n, size):
                rows = [future.result() for future in coming]
                coming = start(first + size)
                rows += rows[:1] * (size - len(rows))
                yield {key: np.stack([row[key] for row in rows]) for key in rows[0]}
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def pixels(image: ImageLike) -> bytes | np.ndarray:
    """The image as input_pipeline decodes it: the bytes of a file, or uint8 [h, w, 3].

    Raises:
      BadExample: it is nothing that could be an image.
      OSError: the file cannot be read.
    """
    if isinstance(image, str) and "://" in image:
        raise BadExample("no image", "addresses are not fetched; give the file or its bytes")
    if isinstance(image, str | pathlib.Path):
        return pathlib.Path(image).expanduser().read_bytes()
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image)
    if isinstance(image, Image.Image):
        image = ImageOps.exif_transpose(image)
        if image.mode == "RGB":
            return np.asarray(image)
        # Through a file, so that transparency and 16 bits mean what they mean there.
        stream, is_tiff = io.BytesIO(), image.mode in ("CMYK", "YCbCr", "LAB", "HSV")
        options = {} if is_tiff else {"compress_level": 0}
        image.save(stream, "TIFF" if is_tiff else "PNG", **options)
        return stream.getvalue()
    array = np.asarray(image)
    if array.dtype != np.uint8:
        message = f"an array must be uint8, from 0 to 255, not {array.dtype}; or give a PIL image"
        raise BadExample("unusable image", message)
    if array.ndim == 3 and array.shape[2] == 4 and array.size:
        return pixels(Image.fromarray(array))
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    return np.repeat(array[..., None], 3, axis=-1) if array.ndim == 2 else array


def is_image(x: Any) -> bool:
    """Whether x is one image, and not a list or an array [n, h, w, 3] of them."""
    if isinstance(x, np.ndarray) or (hasattr(x, "ndim") and hasattr(x, "dtype")):
        return x.ndim < 4
    return isinstance(x, str | bytes | bytearray | memoryview | pathlib.Path | Image.Image)


def one_or_many(x: Any, is_one: Callable[[Any], bool]) -> tuple[bool, list[Any]]:
    """(whether x is many, x as a list).

    Raises:
      ValueError: x is neither one nor iterable.
    """
    if is_one(x):
        return False, [x]
    try:
        return True, list(x)
    except TypeError:
        raise ValueError(f"one or many are taken, not a {type(x).__name__}") from None
