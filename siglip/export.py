"""Exports a model as programs that run without this project: `python -m siglip.export --help`.

The folder holds, for each tower, the program (StableHLO, a few hundred kilobytes) and its weights
(safetensors, float32, by the names of the released checkpoints), which are its first argument.
Weights as constants in the program could not exceed 2 GB, the limit of jax.export's flatbuffers
(SigLIP 2's text towers from L/16 on and the image tower of g-opt have more). And weights that are
fine-tuned later run in the same program.

Every export is read back and compared with the Flax model before the folder appears. That runs on
the CPU, and so does the tracing: on a GPU the towers would take cuDNN's attention, which is no
StableHLO. An exported program uses XLA's attention on every platform.
"""

import importlib.util
import json
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export
from jaxtyping import Array

from base import command_line, whole_file
from base.nested import insert
from siglip.checkpoints import adapt, read
from siglip.checkpoints import spec as contract
from siglip.checkpoints.errors import CheckpointError
from siglip.checkpoints.files import safetensors_file
from siglip.checkpoints.files.lazy_array import LazyArray
from siglip.checkpoints.spec import Spec
from siglip.checkpoints.weights import Weights
from siglip.embed import embed_batch
from siglip.towers.vit import IMAGE_FIELDS, Patches

PIXELS = ("uint8", "float32")
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")  # that --platforms may name
TOWERS = {"image": "img", "text": "txt"}  # name of the files -> prefix of the arrays
LIMIT = 1e-6  # largest difference from the Flax model in any number of an embedding
BATCHES = (1, 3)  # sizes of the batches that are compared

HELP = """\
Exports a SigLIP model to StableHLO: a program per tower for any batch size on CPU, GPU and TPU,
which needs jax, flatbuffers and safetensors to run, and nothing of this project.

  python -m siglip.export runs/mine exported
  python -m siglip.export siglip2-b16-256 exported --dtype bfloat16

SRC: whatever siglip.checkpoints.convert reads. DST must not be there yet; README.txt in it says
how to call the programs. They are compared with the model, and DST appears only if they are equal.
"""

README = """\
{source}, exported by siglip.export with jax {jax}; matmuls in {dtype}; for {platforms}.
In Python, with jax, flatbuffers and safetensors installed, in this folder:

    import functools, json, jax, jax.export, safetensors.numpy
    def tower(name):
        program = jax.export.deserialize(bytearray(open(f"{{name}}.stablehlo", "rb").read()))
        weights = jax.device_put(safetensors.numpy.load_file(f"{{name}}.safetensors"))
        return functools.partial(jax.jit(program.call), weights)
{calls}

siglip.json: how images and texts must be prepared. Any batch size runs.
*.mlir: StableHLO for other runtimes, for a batch of {batch} and no platform in particular. Its
arguments are the arrays of the .safetensors sorted by name, then the inputs as above.
"""


class Options(NamedTuple):
    """The options of an export.

    Attributes:
      dtype: of matmuls. float32 has the highest precision on every platform: no TF32 on GPUs, no
        passes of bfloat16 on TPUs.
      pixels: 'uint8', or 'float32' for values in [-1, 1].
      platforms: of PLATFORMS. With 'cpu', where the export is compared.
      batch: of the .mlir files, whose shapes are fixed.
      text: the .mlir files are text, and not bytecode.
    """

    dtype: str = "float32"
    pixels: str = "uint8"
    platforms: tuple[str, ...] = ("cpu", "cuda", "tpu")
    batch: int = 1
    text: bool = False


def export(weights: Weights, folder: pathlib.Path, options: Options) -> dict[str, float]:
    """Writes the folder, and returns the largest difference from the Flax model by tower.

    The keys of the result are 'image' and 'text', or one of them.

    Raises:
      CheckpointError: the folder is there already, the weights do not fit their model or are
        damaged, or what was exported is not equal to the model. Then no folder is left.
      ValueError: an option has an invalid value, or this process cannot export. One line.
    """
    check(folder, options)
    weights.check()
    weights = adapt.cast(weights, "float32")
    names = [name for name in TOWERS if arrays_of(weights, name)]
    if not names:
        raise CheckpointError(f"{weights.source} has no tower with weights to export")
    with whole_file.create_folder(folder) as scratch:
        for name in names:
            write_tower(weights, name, scratch, options)
        differences = {name: compare(weights, name, scratch, options) for name in names}
        write_contract(weights, names, scratch, options)
    return differences


def check(folder: pathlib.Path, options: Options) -> None:
    """Raises CheckpointError or ValueError, one line, for mistakes that show without weights."""
    if folder.exists():
        raise CheckpointError(f"{folder} is there already; choose another name, or delete it")
    unknown = [platform for platform in options.platforms if platform not in PLATFORMS]
    if unknown:
        raise ValueError(f"platform {unknown[0]!r} is none of {', '.join(PLATFORMS)}")
    if "cpu" not in options.platforms:
        raise ValueError("platforms lack cpu, where every export is compared with the model")
    if options.pixels not in PIXELS:
        raise ValueError(f"pixels {options.pixels!r} is none of {', '.join(PIXELS)}")
    if options.batch < 1:
        raise ValueError(f"batch must be at least 1, not {options.batch}")
    if importlib.util.find_spec("flatbuffers") is None:
        raise ValueError("jax.export needs the package flatbuffers: pip install flatbuffers")
    if jax.default_backend() != "cpu":
        raise ValueError(
            f"an export is made on the CPU, not on {jax.default_backend()}: set JAX_PLATFORMS=cpu"
        )


# A tower as a function of its weights and inputs


def arrays_of(weights: Weights, name: str) -> dict[str, Any]:
    """The leaves of a tower. A precomputed image tower has none."""
    return {n: x for n, x in weights.arrays.items() if n.startswith(f"{TOWERS[name]}/")}


def embed(spec: Spec, name: str, dtype: str) -> Callable[..., Array]:
    """(arrays by name, *inputs [n, ...]) -> unit-norm embeddings, float32 [n, d]."""
    model = spec.make_model(dtype=dtype)

    def apply(arrays: dict[str, Array], *inputs: Array) -> Array:
        # Embeddings depend on neither temperature nor bias, but the model reads both.
        params: dict[str, Any] = {"t": jnp.zeros(1), "b": jnp.zeros(1)}
        for array_name, array in arrays.items():
            insert(params, array_name, array, "/")
        fields = ("text",) if name == "text" else IMAGE_FIELDS
        return embed_batch(model, params, dict(zip(fields, inputs)))

    return apply


def exported_program(spec: Spec, name: str, dtype: str) -> jax.stages.Wrapped:
    return jax.jit(embed(spec, name, dtype))


def inputs_of(spec: Spec, name: str, pixels: str, n: Any, l: Any) -> list[jax.ShapeDtypeStruct]:
    """Shapes of a program's arguments after its weights.

    Texts [n, token_len], images [n, res, res, 3], or for NaFlex values [n, l, p * p * 3],
    mask [n, l] and shape [n, 2].
    """
    image, text = spec.inputs()
    if name == "text":
        return [jax.ShapeDtypeStruct((n, *text.shape[1:]), np.int32)]
    if isinstance(image, Patches):
        return [
            jax.ShapeDtypeStruct((n, l, image.values.shape[2]), pixels),
            jax.ShapeDtypeStruct((n, l), np.bool_),
            jax.ShapeDtypeStruct((n, 2), np.int32),
        ]
    return [jax.ShapeDtypeStruct((n, *image.shape[1:]), pixels)]


def positions_of(spec: Spec) -> int:
    """Number of patches in the grid of a NaFlex tower's positions; 0 for other towers."""
    return ((spec.img or {}).get("naflex_grid") or 0) ** 2


def precision(dtype: str) -> Any:
    return jax.default_matmul_precision("highest" if dtype == "float32" else "default")


# Files


def write_tower(weights: Weights, name: str, folder: pathlib.Path, options: Options) -> None:
    """Writes NAME.stablehlo, NAME.mlir and NAME.safetensors."""
    spec, leaves = weights.spec, arrays_of(weights, name)
    arrays = {n: jax.ShapeDtypeStruct(leaf.shape, np.float32) for n, leaf in leaves.items()}
    any_size = inputs_of(spec, name, options.pixels, *jax_export.symbolic_shape("n, l"))
    fixed_size = inputs_of(spec, name, options.pixels, options.batch, positions_of(spec))
    with precision(options.dtype):
        program = exported_program(spec, name, options.dtype)
        exported = jax_export.export(program, platforms=options.platforms)(arrays, *any_size)
        # Programs for several platforms or sizes have arguments that only jax.export understands.
        program = exported_program(spec, name, options.dtype)
        plain = jax_export.export(program, platforms=["cpu"])(arrays, *fixed_size)
    (folder / f"{name}.stablehlo").write_bytes(exported.serialize())
    if options.text:
        (folder / f"{name}.mlir").write_text(plain.mlir_module())
    else:
        (folder / f"{name}.mlir").write_bytes(plain.mlir_module_serialized)
    safetensors_file.write(folder / f"{name}.safetensors", leaves, {"format": "np"})


def write_contract(
    weights: Weights, names: Sequence[str], folder: pathlib.Path, options: Options
) -> None:
    """Writes siglip.json, README.txt, and scalars.json if there is a temperature."""
    spec, leaves = weights.spec, weights.arrays
    spec = contract.with_tokenizer_beside(spec, folder / contract.FILE)
    contract.save(spec, folder / contract.FILE)
    lines = []
    for name in names:
        inputs = inputs_of(spec, name, options.pixels, *jax_export.symbolic_shape("n, l"))
        arguments = "values, mask, shape" if len(inputs) == 3 else f"{name}s"
        shapes = ", ".join(f"{x.dtype}[{', '.join(map(str, x.shape))}]" for x in inputs)
        lines.append(f'z{TOWERS[name]} = tower("{name}")({arguments})')
        lines.append(f"# {shapes} -> float32[n, {spec.embedding_dim}], unit norm")
    if "t" in leaves:
        t = float(np.exp(leaves["t"].read().item()))
        b = float(leaves["b"].read().item()) if "b" in leaves else 0.0
        (folder / "scalars.json").write_text(json.dumps({"t": t, "b": b}) + "\n")
        lines.append('scalars = json.load(open("scalars.json"))')
    if "t" in leaves and len(names) == 2:
        lines.append('logits = scalars["t"] * zimg @ ztxt.T + scalars["b"]')
    text = README.format(
        source=weights.source,
        jax=jax.__version__,
        dtype=options.dtype,
        platforms=", ".join(options.platforms),
        batch=options.batch,
        calls="\n".join(f"    {line}" for line in lines),
    )
    (folder / "README.txt").write_text(text)


# The check


def compare(weights: Weights, name: str, folder: pathlib.Path, options: Options) -> float:
    """The largest difference between the embeddings of an exported tower and of the Flax model.

    Raises:
      CheckpointError: it is more than LIMIT, or the model's embeddings are not finite.
    """
    spec = weights.spec
    batches = [random_inputs(spec, name, options.pixels, n) for n in BATCHES]

    # One after the other, so that the weights are in memory once.
    with precision(options.dtype):
        model = jax.jit(embed(spec, name, options.dtype))
        expected = _run(model, arrays_of(weights, name), batches)
    program = jax_export.deserialize(bytearray((folder / f"{name}.stablehlo").read_bytes()))
    exported = _run(program.call, safetensors_file.read(folder / f"{name}.safetensors"), batches)

    if not np.isfinite(expected).all():
        raise CheckpointError(f"{weights.source}: its {name} embeddings are not finite numbers")
    difference = float(np.max(np.abs(exported - expected)))
    if not difference <= LIMIT:  # nor NaN
        raise CheckpointError(
            f"the exported {name} tower differs from the model by {difference:.1e}, more than "
            f"{LIMIT:.0e}; nothing was written"
        )
    return difference


def _run(program: Callable, leaves: Mapping[str, LazyArray], batches: list) -> np.ndarray:
    arrays = {name: jnp.asarray(leaf.read()) for name, leaf in leaves.items()}
    return np.concatenate([program(arrays, *inputs) for inputs in batches])


def random_inputs(spec: Spec, name: str, pixels: str, n: int) -> list[np.ndarray]:
    """Random inputs as `inputs_of` describes them; a NaFlex image has positions_of / n patches."""
    rng = np.random.default_rng(n)
    max_patches = positions_of(spec) // n
    first, *rest = inputs_of(spec, name, pixels, n, max_patches)
    if name == "text":
        assert spec.txt is not None
        return [rng.integers(spec.txt["vocab_size"], size=first.shape, dtype=np.int32)]
    if pixels == "uint8":
        image = rng.integers(256, size=first.shape, dtype=np.uint8)
    else:
        image = rng.uniform(-1, 1, first.shape).astype(np.float32)
    if not rest:
        return [image]
    rows = rng.integers(1, 1 + max_patches, size=n)
    shape = np.stack([rows, rng.integers(1, 1 + max_patches // rows)], axis=1).astype(np.int32)
    return [image, np.arange(max_patches) < shape.prod(axis=1, keepdims=True), shape]


# The program


def make_parser() -> command_line.Parser:
    parser = command_line.Parser(prog="python -m siglip.export", description=HELP)
    add, default = parser.add_argument, Options()
    add("source", metavar="SRC")
    add("target", metavar="DST")
    add("--only", choices=tuple(TOWERS.values()), help="one tower")
    add("--dtype", choices=("float32", "bfloat16"), default=default.dtype, help="of matmuls")
    add("--pixels", choices=PIXELS, default=default.pixels, help="float32: values in [-1, 1]")
    add("--platforms", default=",".join(default.platforms), help=f"of {', '.join(PLATFORMS)}")
    add("--batch", type=int, default=default.batch, metavar="n", help="of the .mlir files")
    add("--text", action="store_true", help="write the .mlir files as text")
    return parser


def main(argv: Sequence[str]) -> int:
    return command_line.run(
        lambda: _main(argv),
        mistakes=(ValueError, OSError),
        interrupted="interrupted; nothing was written",
    )


def _main(argv: Sequence[str]) -> None:
    flags = make_parser().parse_args(argv)
    jax.config.update("jax_platforms", "cpu")
    started, folder = time.monotonic(), pathlib.Path(flags.target)
    platforms = tuple(platform.strip() for platform in flags.platforms.split(","))
    options = Options(flags.dtype, flags.pixels, platforms, flags.batch, flags.text)
    check(folder, options)  # before a large model is looked at
    weights = read(flags.source)
    weights = weights.only(flags.only) if flags.only else weights
    differences = export(weights, folder, options)
    for name, difference in differences.items():
        print(f"{name}: read back, it differs from the model by at most {difference:.1e}")
    print(f"{folder}: {time.monotonic() - started:.1f} s; how to call it is in README.txt there")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
