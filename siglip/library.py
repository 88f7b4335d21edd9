"""A model that people call: `siglip.load(...)`, then images and texts in, embeddings out.

With inputs.py and export.py the part of siglip that knows input_pipeline. Nothing else of siglip
imports these, so imports still point one way; a test holds that.
"""

import collections
import logging
import pathlib
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from base.errors import UserError
from base.progress import Progress
from input_pipeline.errors import BadExample
from input_pipeline.transforms import prompts
from input_pipeline.transforms.preprocess import Preprocess
from siglip import checkpoints, presets
from siglip.checkpoints import adapt
from siglip.checkpoints.spec import Spec
from siglip.inputs import ImageLike, batches, is_image, make_model_preprocess, one_or_many, pixels
from siglip.outputs import check_output, encode
from siglip.sharding import batch_sharding, local_mesh, replicated
from siglip.towers.two_towers import TwoTowers
from siglip.towers.vit import IMAGE_FIELDS, Patches

log = logging.getLogger("siglip")


class Similarity(NamedTuple):
    """How well n images and m texts fit.

    cosine: of the embeddings, in [-1, 1].
    logit: t * cosine + b.
    probability: sigmoid(logit), that image and text belong together, each pair for itself: the
      rows do not sum to 1. None for a model without a bias (a softmax was its loss).
    """

    cosine: Float[np.ndarray, "n m"]
    logit: Float[np.ndarray, "n m"]
    probability: Float[np.ndarray, "n m"] | None


class ZeroShot(NamedTuple):
    """The class of each of n images, among c: `label` and `name` are that of the largest cosine."""

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
    preprocess, has_tokenizer = make_model_preprocess(weights, tokenizer, image or spec.image)
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


class Model:
    """A model with its weights, see `load`. Methods take one or many, and return a row or rows.

    Attributes:
      name: what it was loaded from.
      spec: the model's contract: its towers, and how its images and texts are prepared.
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

        def run(params, batch: dict[str, Any], output: str) -> Any:
            # Elsewhere float32 may mean TF32 (GPUs) or passes of bfloat16 (TPUs).
            full = module.txt.dtype == np.float32
            with jax.default_matmul_precision("highest" if full else "default"):
                return encode(module, params, batch, output)

        self._run = jax.jit(run, out_shardings=replicated(mesh), static_argnames="output")

    def __repr__(self) -> str:
        towers = ", ".join(
            f"{name} {block['variant']}"
            for name, block in (("image", self.spec.img), ("text", self.spec.txt))
            if block
        )
        width, rest = self.spec.embedding_dim, "" if self.has_tokenizer else ", no tokenizer"
        return f"<siglip.Model {self.name}: {towers}, embeddings of {width}{rest}>"

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

    def encode_image(
        self, images: ImageLike | Iterable[ImageLike], output: str = "embedding"
    ) -> Any:
        """Embeddings of images, or what leads to them.

        Args:
          images: paths, bytes of files, PIL images, or uint8 arrays [h, w, 3]; [n, h, w, 3] is a
            list. Upright by EXIF, transparent parts over white, gray as RGB.
          output: one of
            'embedding'     [d] of one image, [n, d] of a list or array of them; unit norm
            'unnormalized'  [n, d]: the embedding before it is normalised
            'pooled'        [n, width]: all tokens in one vector, before the head; equal to
                            'unnormalized' where there is no head, as in SigLIP
            'tokens'        TokenOutput [n, l, width]: after the last LayerNorm
            'block:i'       TokenOutput [n, l, width]: after block i; 'block:-2': the one but last
            'attention'     TokenOutput [n, heads, l]: weights of the attention pooling, sum 1

        Returns:
          float32 arrays. Tokens of many images are large (B/16 at 224 px: 0.6 MB an image).

        Raises:
          ValueError: one cannot be read (which, and why), or there is no such output.
        """
        if self.spec.img is None:
            raise ValueError(f"{self.name} holds no image tower")
        if self.preprocess.embeddings:
            raise ValueError(
                f"{self.name} was trained on embeddings of another image tower; join the two with "
                "python -m siglip.checkpoints.convert --img"
            )
        check_output(output, self.module.img, f"the image tower of {self.name}")
        many, items = one_or_many(images, is_image)

        def make(i: int) -> dict[str, Any]:
            try:
                return self.preprocess.pixels({"image": pixels(items[i])})
            except (BadExample, OSError, SyntaxError) as error:  # what Pillow raises
                shown = f" ({items[i]})" if isinstance(items[i], str | pathlib.Path) else ""
                reason = error.strerror if isinstance(error, OSError) else error
                raise ValueError(f"image {i}{shown} cannot be read: {reason or error}") from None

        rows = self._rows(len(items), make, "image", output)
        return rows if many else jax.tree.map(lambda x: x[0], rows)

    def encode_text(self, texts: str | Iterable[str], output: str = "embedding") -> Any:
        """Embeddings of texts, or what leads to them: [d] of one text, [n, d] of a list of them.

        Lower-cased, padded to the full length and cut with EOS kept, as the model was trained;
        texts that are cut are counted in `truncated`, each distinct one once in a call.

        Args:
          output: as of encode_image; 'attention' only with a text tower of attention pooling.

        Raises:
          ValueError: there is no tokenizer, text tower or such an output, or one is no string.
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
        check_output(output, self.module.txt, f"the text tower of {self.name}")
        many, items = one_or_many(texts, lambda x: isinstance(x, str))
        for i, text in enumerate(items):
            if not isinstance(text, str):
                raise ValueError(f"text {i} is no string but a {type(text).__name__}")
        before, vocab_size = self.truncated, self.module.txt.vocab_size
        # Equal texts are embedded once, and equal to the last bit.
        distinct = list(dict.fromkeys(items))

        def make(i: int) -> dict[str, Any]:
            ids = self.preprocess.text(distinct[i])
            if ids.max() >= vocab_size:  # its row would be NaN
                raise ValueError(
                    f"text {items.index(distinct[i])} has the token {ids.max()}, but the model "
                    f"{vocab_size:,} only"
                )
            return {"text": ids}

        rows = self._rows(len(distinct), make, "text", output)
        if cut := self.truncated - before:
            log.warning(
                "%d of %d texts were longer than %d tokens and were cut, EOS kept",
                cut,
                len(distinct),
                self.spec.token_len,
            )
        place = {text: i for i, text in enumerate(distinct)}
        index: Any = [place[text] for text in items] if many else 0
        return jax.tree.map(lambda x: x[index], rows)

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

    def _embedding(self, inputs: Any, encode: Callable[[Any], np.ndarray]) -> np.ndarray:
        """[n, d] of unit norm: inputs that are floats [n, d] or [d], else encode(inputs)."""
        if not hasattr(inputs, "dtype") or not hasattr(inputs, "ndim") or inputs.ndim not in (1, 2):
            return np.atleast_2d(encode(inputs))
        array = np.asarray(inputs)
        if not jnp.issubdtype(array.dtype, np.floating):
            return np.atleast_2d(encode(inputs))
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
            classes = prompts.class_prompts(
                list(classnames), resolved, canonicalize=True, aliases="first"
            )
        except UserError as error:
            raise ValueError(str(error)) from None
        z = self.encode_text([prompt for of_class in classes for prompt in of_class])
        means = z.reshape(len(classes), len(resolved), -1).mean(axis=1)
        return means / np.linalg.norm(means, axis=1, keepdims=True)

    def zero_shot(
        self,
        images: Any,
        classnames: Sequence[str],
        templates: str | Sequence[str] = "clip_best",
    ) -> ZeroShot:
        """The class of each image, by names that the model need not have been trained on.

        Args:
          images: as encode_image takes them, or embeddings (float [n, d]).
          classnames, templates: see class_embeddings.
        """
        if isinstance(classnames, str) or not len(classnames):
            raise ValueError("classnames must be a list of one or more names")
        if self.spec.img is None or self.spec.txt is None:
            raise ValueError(f"{self.name} holds one tower alone, and no temperature")
        zimg = self._embedding(images, self.encode_image)
        similarity = self._similarity(zimg @ self.class_embeddings(classnames, templates).T)
        label = similarity.cosine.argmax(axis=1)
        names = [str(classnames[int(i)]) for i in label]
        return ZeroShot(label, names, *similarity)

    # Batches

    def _rows(self, n: int, make: Callable[[int], dict], unit: str, output: str) -> Any:
        """The output of make(0), ..., make(n - 1), whose batches are prepared by threads while the
        devices work: an array [n, d], or TokenOutput."""
        if not n:
            image, text = self.spec.inputs()
            inputs = zip(IMAGE_FIELDS, image if isinstance(image, Patches) else (image,))
            batch = {"text": text} if unit == "text" else dict(inputs)
            shapes = jax.eval_shape(lambda: self._run(self.params, batch, output=output))
            return jax.tree.map(lambda x: np.zeros((0, *x.shape[1:]), x.dtype), shapes)
        size = self._size(n)
        visible = n > size and sys.stderr.isatty() if self._progress is None else self._progress
        results: list[Any] = []
        with Progress(n, f"{unit}s", keep=False, hidden=not visible) as progress:
            waiting: collections.deque[Any] = collections.deque()

            def take() -> None:
                results.append(jax.tree.map(np.asarray, waiting.popleft()))
                progress.update(min(size, n - size * (len(results) - 1)))

            for batch in batches(n, size, make):
                batch = jax.device_put(batch, batch_sharding(self.mesh))
                waiting.append(self._run(self.params, batch, output=output))
                if len(waiting) > 1:
                    take()
            while waiting:
                take()
        return jax.tree.map(lambda *arrays: np.concatenate(arrays)[:n], *results)

    def _size(self, n: int) -> int:
        """Rows of a batch: a multiple of the devices; for few rows the next power of two, so that
        calls with 1, 2, 3 ... images do not each compile a program of their own."""
        devices = self.mesh.size
        most = max(1, self._batch_size // devices)
        needed = -(-n // devices)
        return devices * min(most, 1 << (needed - 1).bit_length())
