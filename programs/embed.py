"""Embeds images and texts of any source with a model, on every device: see --help."""

import argparse
import functools
import hashlib
import os
import pathlib
import signal
import sys
from typing import Any, NoReturn

import jax

import siglip
from base.command_line import AGAIN, INTERRUPTED, Parser, run
from base.errors import UserError
from base.progress import StatusLine
from base.words import one_line
from embedding.job import SHARD_ROWS, Embedded, embed_source
from input_pipeline.sources.embeddings import KINDS
from input_pipeline.sources.from_words import make_source, settings_of
from input_pipeline.sources.storage import is_url
from trainers.machine import compilation
from trainers.machine.host_memory import keep_freed_memory

HELP = """\
Writes embeddings of the images and texts of a source into a folder.

  python -m programs.embed --model MODEL --source files path=pairs.jsonl --out FOLDER
  python -m programs.embed --model MODEL --source parquet path='train-*.parquet' --what image \\
      --dtype float16 --num_processes 2 --process_id 0 --out FOLDER     (beside it: --process_id 1)

MODEL is what siglip.load takes: a checkpoint or a preset. The source is its name, then its settings
as in config.input.source. FOLDER gets image-*.npy and text-*.npy (rows of unit norm), rows-*.arrow
(id, texts, languages, label of each row) and manifest.json; the source 'embeddings' reads it.
Killed? Run the same command again: shards that are whole stay.

Several processes share the shards between them and need nothing but the same folder: with process
id 0, 1, ... on any hosts, each on its own devices (CUDA_VISIBLE_DEVICES, where one host runs two).
"""

EPILOG = """\
exit codes: 0 done, 1 failed (a full disk, say), 2 a mistake in command or data, 85 interrupted (run
the same command again).
"""
# Texts whose tokens differ between tokenizers, and between ways to clean a text before.
PROBES = (
    "A photo of 3 dogs, in São Paulo.",
    "Ein Hund läuft.",
    "一只狗在雪地里",
    "كلب",
    "the " * 200,
)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog="python -m programs.embed", description=HELP, epilog=EPILOG)
    add = parser.add_argument
    add("--model", required=True, help="a checkpoint or a preset")
    add("--model_option", nargs="+", default=[], metavar="KEY=VALUE", help="for siglip.load")
    add("--source", nargs="+", required=True, metavar="WORD", help="name key=value ...")
    add("--out", required=True, metavar="FOLDER", help="a new folder, or that of an earlier run")
    add("--what", default=",".join(KINDS), help="image, text, or image,text (both)")
    add("--batch_size", type=int, default=256, help="on the devices of this process (256)")
    add("--dtype", default="float32", help="of the files: float32 or float16")
    add("--shard_rows", type=int, default=SHARD_ROWS, help=f"examples of a file ({SHARD_ROWS})")
    add(
        "--max_bad_fraction",
        type=float,
        default=0.01,
        help="of examples that may be bad (0.01); one alone is never too many",
    )
    add("--num_processes", type=int, default=1, help="that share the shards (1)")
    add("--process_id", type=int, default=0, help="which of them this is (0)")
    add("--cpu_devices", type=int, default=0, help="emulate so many devices, on a CPU")
    flags = parser.parse_args(argv)
    flags.what = tuple(flags.what.split(","))
    if unknown := sorted(set(flags.what) - set(KINDS)):
        parser.error(f"--what {unknown[0]!r} is none of {', '.join(KINDS)}")
    if is_url(flags.out):
        parser.error(f"--out {flags.out} is no folder of a file system; mount the bucket")
    if not 0 <= flags.max_bad_fraction <= 1:
        parser.error(f"--max_bad_fraction {flags.max_bad_fraction} must be from 0 to 1")
    return flags


def main(argv: list[str]) -> int:
    """Embeds as the command line says; returns the exit code."""
    return run(lambda: _main(argv), failures=(OSError,))  # a full disk, say


def _main(argv: list[str]) -> None:
    flags = _parse(argv)
    embedded, cut = _embed(flags)
    print("\n".join(summary(embedded, flags.out, cut)))


def _embed(flags: argparse.Namespace) -> tuple[Embedded, int]:
    """The result, and the number of texts that were cut to the token length."""
    if flags.cpu_devices:
        jax.config.update("jax_num_cpu_devices", flags.cpu_devices)
    compilation.keep_programs(os.environ)
    keep_freed_memory()
    source = make_source(flags.source)
    model = load_model(flags.model, flags.model_option, flags.what)
    preprocessing, line = description_of(model.preprocess), StatusLine()
    before = model.preprocess.truncated
    try:
        embedded = embed_source(
            model.module,
            model.params,
            model.preprocess,
            source,
            flags.out,
            description={
                "model": [model.name, *sorted(flags.model_option)],
                "preprocessing": preprocessing,
                "source": [flags.source[0], *sorted(flags.source[1:])],
            },
            what=flags.what,
            batch_size=flags.batch_size,
            dtype=flags.dtype,
            shard_rows=flags.shard_rows,
            process_index=flags.process_id,
            process_count=flags.num_processes,
            max_bad_fraction=flags.max_bad_fraction,
            progress=line.show,
        )
    finally:
        line.close()
    return embedded, model.preprocess.truncated - before


def load_model(name: str, options: list[str], what: tuple[str, ...] = KINDS) -> Any:
    """The model of siglip.load(name, ...), with options from 'key=value' words.

    Raises:
      UserError: it cannot be loaded, has no such option, or cannot embed `what`.
    """
    load = functools.partial(siglip.load, name)
    settings = settings_of(load, options, "--model_option")
    try:
        model = load(**settings)
        # A missing tower or tokenizer has a stand-in that raises the message to show.
        if "image" in what and model.spec.img is None:
            model.encode_image(b"")
        if "text" in what and (model.spec.txt is None or not model.has_tokenizer):
            model.encode_text("")
        return model
    except ValueError as error:  # CheckpointError is one
        raise UserError(f"--model {name}: {one_line(error)}") from error


def description_of(preprocess: Any) -> dict[str, Any]:
    """A preprocessing as the manifest stores it, to be compared with that of a later run.

    The tokens of PROBES stand for the tokenizer and the cleaning of texts, so that a tokenizer's
    file may be moved.
    """
    tokenizer = preprocess.tokenizer
    tokens = b"".join(preprocess.text(text).tobytes() for text in PROBES)
    return {
        "image": preprocess.image_program,
        "text": preprocess.text_program,
        "res": preprocess.res,
        "token_len": preprocess.token_len,
        "tokenizer": {
            "name": type(tokenizer).__name__,
            "vocab_size": tokenizer.vocab_size,
            "eos_id": tokenizer.eos_id,
            "tokens_sha256": hashlib.sha256(tokens).hexdigest(),
        },
    }


def summary(embedded: Embedded, out: str, cut: int) -> list[str]:
    """Lines that say what was written, what is bad, and how to train with it."""
    manifest, bad = embedded.manifest, embedded.bad
    too_long = f"{cut} texts of this run were too long and were cut, EOS kept"
    if manifest is None:
        lines = [f"this process's shards are in {out}; those of other processes are not all there"]
        kinds = bad.kinds()
    else:
        texts = f", {manifest['texts']} texts" if "text" in manifest["what"] else ""
        lines = [f"{manifest['rows']} rows{texts} of width {manifest['d']} in {out}"]
        kinds = manifest["bad"]
    lines += [too_long] if cut else []
    if kinds:
        counts = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        lines.append(f"{sum(kinds.values())} of them are bad, and left out by the reader: {counts}")
        lines += [f"  such as {worst}"] if (worst := bad.worst()) else []
    if manifest is not None and "image" in manifest["what"]:
        lines += [
            "train with it:",
            "  --config.input.source.name=embeddings",
            f"  --config.input.source.path={pathlib.Path(out).expanduser().absolute()}",
            "  --config.input.image=embedding",
            "  --config.model.img.variant=precomputed",
            f"  --config.model.img.width={manifest['d']}",
        ]
    return lines


def interrupt(signum: int, frame: Any) -> NoReturn:
    """Ends the program at once.

    Nothing needs saving, as the files survive a kill, and an exception could get lost in a
    callback or wait for a compilation.
    """
    del frame
    name = signal.Signals(signum).name
    os.write(2, f"\n{name}: interrupted; {AGAIN}\n".encode())
    os._exit(INTERRUPTED)


if __name__ == "__main__":
    for caught in (signal.SIGINT, signal.SIGTERM):
        signal.signal(caught, interrupt)
    sys.exit(main(sys.argv[1:]))
