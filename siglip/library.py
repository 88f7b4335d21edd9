"""A model that people call: `siglip.load(...)`, then images and texts in, embeddings out.

The one file of this folder that knows how images and texts are prepared (input_pipeline). Nothing
else of siglip imports it, so imports still point one way; a test holds that.
"""

import collections
import concurrent.futures
import io
import logging
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int
from PIL import Image, ImageOps

from base.errors import UserError
from input_pipeline.errors import BadExample
from input_pipeline.transforms import prompts
from input_pipeline.transforms import tokenizer as tokenizers
from input_pipeline.transforms.preprocess import Preprocess, make_preprocess
from siglip import checkpoints, presets
from siglip.checkpoints import adapt
from siglip.checkpoints.errors import CheckpointError
from siglip.checkpoints.spec import Spec, check_contract
from siglip.checkpoints.weights import Weights
from siglip.embed import embed_batch
from siglip.sharding import batch_sharding, local_mesh, replicated
from siglip.towers.two_towers import TwoTowers

ImageLike = Any  # path | bytes | PIL.Image.Image | uint8 [h, w, 3] | uint8 [h, w]
THREADS = min(16, os.cpu_count() or 1)

log = logging.getLogger("siglip")


class Similarity(NamedTuple):
    """Of n images and m texts.

    cosine: of the embeddings, in [-1, 1].
    logit: t * cosine + b.
    probability: sigmoid(logit), that image and text belong together, each pair for itself: the
      rows do not sum to 1. None for a model without a bias (a softmax was its loss).
    """

    cosine: Float[np.ndarray, "n m"]
    logit: Float[np.ndarray, "n m"]
    probability: Float[np.ndarray, "n m"] | None


class ZeroShot(NamedTuple):
    """Of n images and c classes; `label` and `name` are the class of the largest cosine."""

    label: Int[np.ndarray, " n"]
    name: list[str]
    cosine: Float[np.ndarray, "n c"]
    logit: Float[np.ndarray, "n c"]
    probability: Float[np.ndarray, "n c"] | None


def load(
    source: str | pathlib.Path,
    *,
    tokenizer: str | pathlib.Path | Any = None,
    dtype: str = "float32",
    image: str | None = None,
    res: int | None = None,
    positions: str | None = None,
    token_len: int | None = None,
    text_positions: str | None = None,
    batch_size: int = 64,
    progress: bool | None = None,
) -> "Model":
    """A model with its weights on all local devices.

    Args:
      source: a workdir or a step of it, a folder of Hugging Face or open_clip, an .npz of
        big_vision, the name of a released model ('siglip2-b16-256', 'google/siglip-...'), or
        'random:NAME'. See checkpoints.read.
      tokenizer: a SentencePiece .model or a tokenizer.json, or an object with vocab_size, eos_id
        and encode; by default the one beside the weights.
      dtype: of matmuls, 'float32' (exactly that, also on GPUs and TPUs) or 'bfloat16', which is
        faster there; embeddings are float32.
      image: steps or preset of the image preprocessing (image_ops.PRESETS); by
        default what the model was released or trained with.
      res, positions: another image size, to which position embeddings are resized by a method of
        siglip.towers.positions.METHODS.
      token_len, text_positions: another text length, by a method of TEXT_METHODS.
      batch_size: images or texts at a time, over all local devices. No result depends on it.
      progress: a progress bar; None: where there is a terminal and more than one batch.

    Raises:
      CheckpointError: the weights cannot be read, or do not fit the tokenizer. One line.
    """
    weights = checkpoints.read(source)
    if res is not None:
        weights = adapt.to_res(weights, res, positions)
    if token_len is not None:
        weights = adapt.to_token_len(weights, token_len, text_positions)
    for note in weights.notes:
        log.warning("%s: %s", source, note)
    spec = weights.spec
    preprocess, has_tokenizer = _preprocess(weights, tokenizer, image or spec.image)
    mesh = local_mesh()
    params: dict[str, Any] = {"t": np.zeros(1, np.float32)}
    if spec.bias:
        params["b"] = np.zeros(1, np.float32)
    params = jax.device_put(params | weights.tree(), replicated(mesh))
    return Model(
        name=str(source),
        spec=spec,
        module=spec.make_model(dtype=dtype),
        params=params,
        preprocess=preprocess,
        mesh=mesh,
        batch_size=batch_size,
        progress=progress,
        has_tokenizer=has_tokenizer,
    )


def _preprocess(weights: Weights, given: Any, image: str) -> tuple[Preprocess, bool]:
    """How images and texts are prepared, and whether there is a tokenizer for texts."""
    spec = weights.spec
    tokenizer = _tokenizer(spec, given) if spec.txt is not None else None
    has_tokenizer = tokenizer is not None
    text = spec.text if has_tokenizer else "lower | tokenize"
    tokenizer = tokenizer or tokenizers.Bytes()  # for texts that nobody will give
    res, token_len = spec.res or 16, spec.token_len or 2
    try:
        made = make_preprocess(tokenizer, res=res, token_len=token_len, image=image, text=text)
    except UserError as error:
        told = str(error).replace("config.input.", "")
        raise CheckpointError(f"{weights.source}: {told}") from None
    if has_tokenizer:
        ids = made.text("")
        check_contract(
            spec,
            vocab_size=tokenizer.vocab_size,
            token_len=token_len,
            eos_id=int(ids[0]),
            pad_id=int(ids[-1]),
            where=weights.source,
        )
    return made, has_tokenizer


def _tokenizer(spec: Spec, given: Any) -> Any:
    if given is not None and not isinstance(given, str | pathlib.Path):
        return given
    if given is not None:
        name = "huggingface" if str(given).endswith(".json") else "sentencepiece"
        block = {"name": name, "path": str(given)}
    elif spec.tokenizer is not None:
        block = dict(spec.tokenizer)
    else:
        return None
    kinds = {"bytes": tokenizers.Bytes, "sentencepiece": tokenizers.SentencePiece}
    kinds["huggingface"] = tokenizers.HuggingFace
    name = block.pop("name")
    if name not in kinds:
        raise CheckpointError(f"tokenizer {name!r} is none of {', '.join(kinds)}; pass tokenizer=")
    try:
        return kinds[name](**block)
    except UserError as error:
        raise CheckpointError(str(error).replace("config.input.", "")) from None


class Model:
    """See `load`. Methods take one thing or many, and return a row or rows.

    Attributes:
      name: what it was loaded from.
      spec: what the model is and must be given.
      module, params: the Flax module and its parameters, for your own jitted code.
      preprocess: input_pipeline's Preprocess.
      mesh: over the local devices.
      has_tokenizer: whether it can embed texts, where it has a tower for them.
      truncated: texts so far that were longer than the model takes, and lost their end.
    """

    def __init__(
        self,
        *,
        name: str,
        spec: Spec,
        module: TwoTowers,
        params: Any,
        preprocess: Preprocess,
        mesh: Mesh,
        batch_size: int = 64,
        progress: bool | None = None,
        has_tokenizer: bool = True,
    ):
        self.name, self.spec, self.module, self.params = name, spec, module, params
        self.preprocess, self.mesh = preprocess, mesh
        self._batch_size, self._progress, self.has_tokenizer = batch_size, progress, has_tokenizer

        def embed(params, batch: dict[str, Any]):
            # Elsewhere float32 may mean TF32 (GPUs) or passes of bfloat16 (TPUs).
            full = module.txt.dtype == np.float32
            with jax.default_matmul_precision("highest" if full else "default"):
                return embed_batch(module, params, batch)

        self._embed = jax.jit(embed, out_shardings=replicated(mesh))

    def __repr__(self) -> str:
        towers = ", ".join(
            f"{name} {block['variant']}"
            for name, block in (("image", self.spec.img), ("text", self.spec.txt))
            if block
        )
        told = f"{towers}, embeddings of {self.spec.embedding_dim}"
        return f"<siglip.Model {self.name}: {told}{'' if self.has_tokenizer else ', no tokenizer'}>"

    @property
    def t(self) -> float:
        """The temperature, exp of the parameter."""
        return float(np.exp(np.asarray(self.params["t"])[0]))

    @property
    def b(self) -> float | None:
        """The bias; None for a model without one."""
        return float(np.asarray(self.params["b"])[0]) if "b" in self.params else None

    @property
    def truncated(self) -> int:
        return self.preprocess.truncated

    def encode_image(self, images: ImageLike | Sequence[ImageLike]) -> Float[np.ndarray, "*n d"]:
        """Unit-norm float32 embeddings: [d] of one image, [n, d] of a list or array of them.

        Args:
          images: paths, bytes of files, PIL images, or uint8 arrays [h, w, 3]; [n, h, w, 3] is a
            list. Upright by EXIF, transparent parts over white, gray as RGB.

        Raises:
          ValueError: one cannot be read; which, and why.
        """
        if self.spec.img is None:
            raise ValueError(f"{self.name} holds no image tower")
        if self.preprocess.embeddings:
            raise ValueError(
                f"{self.name} was trained on embeddings of another image tower; join the two with "
                "python -m siglip.checkpoints.convert --img"
            )
        many, items = _many(images, _is_image)

        def make(i: int) -> dict[str, Any]:
            try:
                return self.preprocess.pixels({"image": pixels(items[i])})
            except (BadExample, OSError, SyntaxError) as error:  # what Pillow raises
                shown = f" ({items[i]})" if isinstance(items[i], str | pathlib.Path) else ""
                told = error.strerror if isinstance(error, OSError) else error
                raise ValueError(f"image {i}{shown} cannot be read: {told or error}") from None

        z = self._rows(len(items), make, "image")
        return z if many else z[0]

    def encode_text(self, texts: str | Sequence[str]) -> Float[np.ndarray, "*n d"]:
        """Unit-norm float32 embeddings: [d] of one text, [n, d] of a list of them.

        Lower-cased, padded to the full length and cut with EOS kept, as the model was trained;
        texts that are cut are counted in `truncated`, each distinct one once in a call.

        Raises:
          ValueError: there is no tokenizer or no text tower, or one is no string.
        """
        if self.spec.txt is None:
            raise ValueError(f"{self.name} holds no text tower")
        if not self.has_tokenizer:
            preset = presets.PRESETS.get(self.spec.preset)
            which = f"the {preset.tokenizer} model of {preset.huggingface}, " if preset else ""
            raise ValueError(
                f"{self.name} came without its tokenizer; pass siglip.load(..., tokenizer=FILE): "
                f"{which}a SentencePiece .model or a tokenizer.json"
            )
        many, items = _many(texts, lambda x: isinstance(x, str))
        for i, text in enumerate(items):
            if not isinstance(text, str):
                raise ValueError(f"text {i} is no string but a {type(text).__name__}")
        before, rows = self.truncated, self.module.txt.vocab_size
        # Equal texts are embedded once, and equal to the last bit.
        distinct = list(dict.fromkeys(items))

        def make(i: int) -> dict[str, Any]:
            ids = self.preprocess.text(distinct[i])
            if ids.max() >= rows:  # its row would be NaN
                raise ValueError(
                    f"text {items.index(distinct[i])} has the token {ids.max()}, but the model "
                    f"{rows:,} only"
                )
            return {"text": ids}

        z = self._rows(len(distinct), make, "text")
        if cut := self.truncated - before:
            log.warning(
                "%d of %d texts were longer than %d tokens and were cut, EOS kept",
                cut,
                len(distinct),
                self.spec.token_len,
            )
        place = {text: i for i, text in enumerate(distinct)}
        z = z[[place[text] for text in items]]
        return z if many else z[0]

    def similarity(self, images: Any, texts: Any) -> Similarity:
        """Every image with every text.

        Args:
          images, texts: as encode_image and encode_text take them, or their embeddings
            (float [n, d], [m, d]).

        Raises:
          ValueError: see there; or the weights are one tower, without a temperature.
        """
        if self.spec.img is None or self.spec.txt is None:
            raise ValueError(f"{self.name} holds one tower alone, and no temperature")
        zimg = self._embedding(images, self.encode_image)
        return self._similarity(zimg @ self._embedding(texts, self.encode_text).T)

    def _embedding(self, given: Any, encode: Callable[[Any], np.ndarray]) -> np.ndarray:
        """[n, d] of unit norm: what is given, if it is floats [n, d] or [d]; else encode(given)."""
        if not hasattr(given, "dtype") or not hasattr(given, "ndim") or given.ndim not in (1, 2):
            return np.atleast_2d(encode(given))
        array = np.asarray(given)
        if not jnp.issubdtype(array.dtype, np.floating):
            return np.atleast_2d(encode(given))
        z = np.atleast_2d(array.astype(np.float32))
        if z.shape[1] != self.spec.embedding_dim:
            raise ValueError(
                f"embeddings of width {z.shape[1]} are not of {self.name}, whose are "
                f"{self.spec.embedding_dim} wide"
            )
        return z / np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-12)

    def _similarity(self, cosine: Float[np.ndarray, "n m"]) -> Similarity:
        logit = (self.t * cosine + (self.b or 0)).astype(np.float32)
        known = self.b is not None
        return Similarity(cosine, logit, np.asarray(jax.nn.sigmoid(logit)) if known else None)

    def class_embeddings(
        self, classnames: Sequence[str], templates: str | Sequence[str] = "clip_best"
    ) -> Float[np.ndarray, "c d"]:
        """The mean of each class's prompts, of unit norm again. Like big_vision's evaluator: names
        and templates lower-cased and without punctuation.

        Args:
          templates: strings with '{}', and names of sets (clip_best, clip_paper, class_name_only).
        """
        try:
            resolved = prompts.resolve_templates(
                templates if isinstance(templates, str) else tuple(templates)
            )
            made = prompts.class_prompts(
                list(classnames), resolved, canonicalize=True, aliases="first"
            )
        except UserError as error:
            raise ValueError(str(error)) from None
        z = self.encode_text([prompt for of_class in made for prompt in of_class])
        means = z.reshape(len(made), len(resolved), -1).mean(axis=1)
        return means / np.linalg.norm(means, axis=1, keepdims=True)

    def zero_shot(
        self,
        images: Any,
        classnames: Sequence[str],
        templates: str | Sequence[str] = "clip_best",
    ) -> ZeroShot:
        """The class of each image, whose names nobody has trained on.

        Args:
          images: as encode_image takes them, or embeddings (float [n, d]).
          classnames, templates: see class_embeddings.
        """
        if isinstance(classnames, str) or not len(classnames):
            raise ValueError("classnames must be a list of one or more names")
        if self.spec.img is None or self.spec.txt is None:
            raise ValueError(f"{self.name} holds one tower alone, and no temperature")
        zimg = self._embedding(images, self.encode_image)
        found = self._similarity(zimg @ self.class_embeddings(classnames, templates).T)
        label = found.cosine.argmax(axis=1)
        names = [str(classnames[int(i)]) for i in label]
        return ZeroShot(label, names, found.cosine, found.logit, found.probability)

    # Batches

    def _rows(self, n: int, make: Callable[[int], dict], unit: str) -> Float[np.ndarray, "n d"]:
        """Embeddings of make(0), ..., make(n - 1), whose batches are prepared by threads while the
        devices work."""
        import tqdm

        if not n:
            return np.zeros((0, self.spec.embedding_dim), np.float32)
        size = self._size(n)
        hidden = {None: None if n > size else True, True: False, False: True}[self._progress]
        found: list[np.ndarray] = []
        with tqdm.tqdm(total=n, unit=f" {unit}s", disable=hidden, leave=False) as bar:
            waiting: collections.deque[jax.Array] = collections.deque()

            def take() -> None:
                rows = np.asarray(waiting.popleft())
                found.append(rows)
                bar.update(min(len(rows), n - bar.n))

            for batch in _ahead(n, size, make):
                batch = jax.device_put(batch, batch_sharding(self.mesh))
                waiting.append(self._embed(self.params, batch))
                if len(waiting) > 1:
                    take()
            while waiting:
                take()
        return np.concatenate(found)[:n]

    def _size(self, n: int) -> int:
        """Rows of a batch: a multiple of the devices; for few rows the next power of two, so that
        calls with 1, 2, 3 ... images do not each compile a program of their own."""
        devices = self.mesh.size
        most = max(1, self._batch_size // devices)
        needed = -(-n // devices)
        return devices * min(most, 1 << (needed - 1).bit_length())


def _ahead(n: int, size: int, make: Callable[[int], dict]) -> Iterator[dict[str, np.ndarray]]:
    """Batches, the next one under way in threads. The last is filled up by copies."""
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
    """What input_pipeline decodes: the bytes of a file, or uint8 [h, w, 3].

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
        stream, other = io.BytesIO(), image.mode in ("CMYK", "YCbCr", "LAB", "HSV")
        image.save(stream, "TIFF" if other else "PNG", **({} if other else {"compress_level": 0}))
        return stream.getvalue()
    array = np.asarray(image)
    if array.dtype != np.uint8:
        told = f"an array must be uint8, from 0 to 255, not {array.dtype}; or give a PIL image"
        raise BadExample("unusable image", told)
    if array.ndim == 3 and array.shape[2] == 4 and array.size:
        return pixels(Image.fromarray(array))
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    return np.repeat(array[..., None], 3, axis=-1) if array.ndim == 2 else array


def _is_image(x: Any) -> bool:
    if isinstance(x, np.ndarray) or (hasattr(x, "ndim") and hasattr(x, "dtype")):
        return x.ndim < 4
    return isinstance(x, str | bytes | bytearray | memoryview | pathlib.Path | Image.Image)


def _many(x: Any, is_one: Callable[[Any], bool]) -> tuple[bool, list[Any]]:
    if is_one(x):
        return False, [x]
    try:
        return True, list(x)
    except TypeError:
        raise ValueError(f"one or many are taken, not a {type(x).__name__}") from None
