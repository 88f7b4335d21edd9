"""Converts a model from one format to another: `python -m siglip.checkpoints.convert --help`."""

import argparse
import dataclasses
import pathlib
import sys
import time
from collections.abc import Sequence

from base import command_line
from base.command_line import DONE, INTERRUPTED
from siglip.checkpoints import FORMATS, adapt, read, write
from siglip.checkpoints.errors import CheckpointError
from siglip.checkpoints.files.lazy_array import LazyArray
from siglip.checkpoints.formats import hf_config, hf_tokenizer, names, open_clip_format
from siglip.checkpoints.spec import check_contract
from siglip.checkpoints.weights import Weights, report, split
from siglip.towers import positions
from siglip.towers.two_towers import TOWERS

HELP = """\
Converts a SigLIP or SigLIP 2 model between formats, exactly to the bit, and says what it did with
every array.

  python -m siglip.checkpoints.convert runs/mine mine               to Hugging Face
  python -m siglip.checkpoints.convert webli_en_b16_224_63724782.npz b16 --tokenizer c4_en.model
  python -m siglip.checkpoints.convert mine mine.npz                to big_vision
  python -m siglip.checkpoints.convert mine tower --only img        SiglipVisionModel, for a VLM

SRC: an .npz of big_vision, a folder of Hugging Face or open_clip, a workdir or a step of it, the
name of a released model (siglip2-b16-256), or random:NAME. DST must not be there yet.
"""


def make_parser() -> command_line.Parser:
    parser = command_line.Parser(prog="python -m siglip.checkpoints.convert", description=HELP)
    add = parser.add_argument
    add("source", metavar="SRC")
    add("target", metavar="DST")
    add("--format", choices=FORMATS, help="of DST; .npz is big_vision, anything else huggingface")
    add("--img", metavar="SRC2", help="take the image tower from there: for a text tower of SigLiT")
    add("--only", choices=TOWERS, help="one tower")
    add("--stacked", action="store_true", help="big_vision: layers stacked, as its SigLIP 2 files")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="round every array")
    add("--tokenizer", metavar="FILE", help="a SentencePiece .model or a tokenizer.json")
    add("--res", type=int, metavar="pixels", help="resize the image positions to this size ...")
    add("--positions", choices=positions.METHODS, help="... by this method")
    add("--token_len", type=int, metavar="n", help="change the text positions to this length ...")
    add("--text_positions", choices=positions.TEXT_METHODS, help="... by this method")
    add("--dry_run", action="store_true", help="read and check SRC, report, write nothing")
    add("--quiet", action="store_true", help="no report of every array")
    return parser


def main(argv: Sequence[str]) -> int:
    return command_line.run(
        lambda: convert(make_parser().parse_args(argv)),
        mistakes=(OSError,),
        interrupted="interrupted; nothing was written",
    )


def convert(flags: argparse.Namespace) -> int:
    """Reads, reports, writes, and compares what was written with the source.

    Raises:
      CheckpointError: the source cannot be read, or the format has no such model.
      OSError: the target cannot be written.
    """
    started = time.monotonic()
    target = pathlib.Path(flags.target)
    format = flags.format or ("big_vision" if target.suffix == ".npz" else "huggingface")
    if flags.stacked and format != "big_vision":
        raise CheckpointError(f"--stacked is for big_vision's .npz, not for {format}")
    if (target.suffix == ".npz") != (format == "big_vision"):
        raise CheckpointError(f"{target}: DST ends in .npz for big_vision, and for nothing else")
    if target.exists() and not flags.dry_run:
        raise CheckpointError(f"{target} is there already; choose another name, or delete it")
    weights, left_out = split(adapted(read(flags.source), flags))
    if format == "open_clip":
        open_clip_format.check(weights.spec)
    elif format == "huggingface":
        hf_config.check_expressible(weights.spec, format)
    if not flags.quiet:
        print("\n".join(report(renamed(weights, format))))
    spec = weights.spec
    print(
        f"{weights.source} ({weights.format}): {weights.parameters:,} parameters in "
        f"{len(weights.arrays)} arrays"
        + (f", taken for the released {spec.preset}" if spec.preset else "")
    )
    for note in (*weights.notes, *left_out):
        print(f"note: {note}")
    if flags.dry_run:
        return DONE
    options = {"stacked": True} if flags.stacked else {}
    for note in write(weights, target, format, **options):
        print(f"note: {note}")
    try:
        count = verify(weights, target)
    except KeyboardInterrupt:
        return command_line.report(
            INTERRUPTED, f"interrupted; {target} is written but not compared with the source"
        )
    print(
        f"{target} ({format}): written and read again, {count} arrays equal to the bit, "
        f"{time.monotonic() - started:.1f} s"
    )
    return DONE


def adapted(weights: Weights, flags: argparse.Namespace) -> Weights:
    """The weights with the changes that the flags ask for."""
    if flags.img:
        weights = with_image_tower(weights, read(flags.img))
    if flags.only:
        weights = weights.only(flags.only)
    if flags.res is not None:
        weights = adapt.to_res(weights, flags.res, flags.positions)
    if flags.token_len is not None:
        weights = adapt.to_token_len(weights, flags.token_len, flags.text_positions)
    if flags.dtype:
        weights = adapt.cast(weights, flags.dtype)
    if flags.tokenizer:
        path = pathlib.Path(flags.tokenizer)
        if not path.is_file():
            raise CheckpointError(f"--tokenizer={path}: there is no such file")
        name = "huggingface" if path.suffix == ".json" else "sentencepiece"
        spec = dataclasses.replace(
            weights.spec, tokenizer={"name": name, "path": str(path.absolute())}
        )
        size = hf_tokenizer.vocab_size(spec.tokenizer or {})
        check_contract(
            spec,
            vocab_size=size or 0,
            token_len=spec.token_len or 0,
            eos_id=spec.eos_id,
            pad_id=spec.pad_id,
            where=weights.source,
        )
        weights = dataclasses.replace(weights, spec=spec)
    return weights


def with_image_tower(weights: Weights, other: Weights) -> Weights:
    """The text tower, t and b of `weights` with the image tower and its preprocessing of `other`.

    Raises:
      CheckpointError: a tower is missing, or their embeddings have different lengths.
    """
    if weights.spec.txt is None or other.spec.img is None:
        raise CheckpointError(
            f"--img: {weights.source} must hold a text tower and {other.source} an image tower"
        )
    texts, images = weights.spec, other.spec
    if texts.embedding_dim != images.embedding_dim:
        raise CheckpointError(
            f"--img: embeddings of {weights.source} have {texts.embedding_dim} numbers, those of "
            f"{other.source} {images.embedding_dim}"
        )
    arrays = {n: array for n, array in other.arrays.items() if n.startswith("img/")}
    arrays |= {n: array for n, array in weights.arrays.items() if not n.startswith("img/")}
    spec = dataclasses.replace(texts, img=images.img, res=images.res, image=images.image, preset="")
    joined = dataclasses.replace(weights, arrays=arrays, spec=spec)
    joined.check()
    return joined


def renamed(weights: Weights, format: str) -> dict[str, LazyArray]:
    """The arrays with the names and shapes of the format, for the report."""
    shapes = {name: array.shape for name, array in weights.arrays.items()}
    if format == "big_vision":
        return {f"params/{name}": array for name, array in weights.arrays.items()}
    entries = names.huggingface(shapes) if format == "huggingface" else names.open_clip(shapes)
    return {entry.theirs: names.to_theirs(entry, weights.arrays) for entry in entries}


def verify(weights: Weights, target: pathlib.Path) -> int:
    """Reads what was written and compares every array; the number of arrays.

    Raises:
      CheckpointError: an array is missing or differs.
    """
    written = read(target).arrays
    for name, array in weights.arrays.items():
        if name not in written:
            raise CheckpointError(f"{target} was written without {name}; delete it")
        before, after = array.read(), written[name].read()
        same = before.dtype == after.dtype and before.shape == after.shape
        if not same or before.tobytes() != after.tobytes():
            raise CheckpointError(f"{name} is not in {target} as it was in the source; delete it")
    return len(weights.arrays)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
