"""What a run will see of its data, before it starts.

  python -m programs.inspect_data --config configs/pairs.py:path=pairs.jsonl
  python -m programs.inspect_data --config configs/emoji.py:data_dir=FOLDER \\
      --config.input.corrupt="image(0.3)" --step 1000 --batches 20 --sheet sheet.png

Prints shapes, counts by source, language and kind of damage, and images/s; draws a batch, with its
captions and the text that its tokens stand for. It takes any config and override of main.py.
"""

# A program, not a part: it reads configs, which is why it alone imports trainers.

import argparse
import collections
import pathlib
import sys
import time
from typing import Any, NoReturn

import numpy as np

from base.errors import UserError
from input_pipeline import loader
from input_pipeline.bad_examples import BadExamples
from input_pipeline.errors import KINDS, BadExample
from input_pipeline.order import order_of
from programs import contact_sheet

MOST_ROWS = 256  # of a batch that is looked at


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = _Parser(
        prog="python -m programs.inspect_data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", required=True, metavar="file.py[:args]")
    add("--step", type=int, default=0, metavar="k", help="of the first batch (0)")
    add("--batches", type=int, default=8, metavar="n", help="that are counted and timed (8)")
    add("--sheet", default="inspect.png", metavar="file.png", help="the picture (inspect.png)")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Does what the command line says; the exit code."""
    from trainers.config import complete

    try:
        overrides, rest = complete.split_overrides(argv)
        flags = _parse(rest)
        for name, least in (("step", 0), ("batches", 1)):
            if getattr(flags, name) < least:
                raise UserError(f"--{name}={getattr(flags, name)} must be at least {least}")
        _show(complete.load(flags.config, overrides), flags)
    except UserError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _show(config: Any, flags: argparse.Namespace) -> None:
    from trainers import data

    preprocess, source = data.make_input(config), data.make_source(config)
    whole = config.input.batch_size
    if whole < 1:
        raise UserError(f"config.input.batch_size={whole} must be at least 1")
    # The rows of the first of so many processes: the same batches, of which few rows are made.
    parts = next(k for k in range(1, whole + 1) if whole % k == 0 and whole // k <= MOST_ROWS)
    size = whole // parts
    print(f"{len(source):,} examples; the first {size} rows of each batch of {whole} are made")
    for (kind, shard), count in sorted(getattr(source, "damage", {}).items()):
        print(f"  left out of {shard}: {count} {kind}")
    bad, begin, cpu = BadExamples(), time.monotonic(), time.process_time()
    with loader.train_batches(
        source,
        preprocess,
        batch_size=whole,
        process_count=parts,
        seed=config.seed,
        start_step=flags.step,
        num_threads=config.input.num_threads,
        prefetch=config.input.prefetch,
        corrupt=config.input.corrupt,
        bad=bad,
    ) as batches:
        first = next(batches)
        waited = time.monotonic() - begin
        seen = [first, *(next(batches) for _ in range(flags.batches - 1))]
    seconds, cpu = time.monotonic() - begin, time.process_time() - cpu
    rows = size * len(seen)

    print("\nbatch:")
    for name, array in first.items():
        print(f"  {name:12} {array.dtype}{list(array.shape)}")
    examples = _Examples(source, preprocess, config.seed)
    print(f"\n{rows} rows of steps {flags.step} to {flags.step + len(seen) - 1}:")
    for title, counts in examples.counts(seen).items():
        print(f"  {title}: " + ", ".join(f"{k} {n}" for k, n in counts.most_common(40)))
    codes = np.concatenate([batch["bad"] for batch in seen])
    for code, count in zip(*np.unique(codes[codes > 0], return_counts=True)):
        print(f"  unusable: {count} {KINDS[code - 1]}")
    allowed = config.input.max_bad_fraction
    if codes.any() and (codes > 0).mean() > allowed:
        print(
            f"  {100 * (codes > 0).mean():.1f} % of the rows: a run stops above "
            f"{100 * allowed:g} % (config.input.max_bad_fraction={allowed})"
        )
    if not codes.any():
        print("  unusable: none")
    if bad.count:
        print(f"  the worst: {bad.worst()}")
    print(
        f"\n{rows / seconds:,.0f} images/s, {rows / cpu:,.0f} per second of one core, with "
        f"{config.input.num_threads} threads; the first batch after {waited:.1f} s"
    )
    cells = [
        (
            contact_sheet.pixels(first, i),
            examples.caption(int(first["position"][i])),
            preprocess.tokenizer.decode(first["text"][i]),
        )
        for i in range(min(size, contact_sheet.MOST))
    ]
    print()
    for _, caption, tokens in cells[:5]:
        print(f"  {caption!r}\n    -> {tokens!r}")
    path = pathlib.Path(flags.sheet)
    try:
        contact_sheet.draw(cells).save(path)
    except (OSError, ValueError) as error:
        raise UserError(f"--sheet={path} cannot be written: {error}") from error
    print(f"\nwritten: {path}")


class _Examples:
    """The examples behind the rows of batches."""

    def __init__(self, source: Any, preprocess: Any, seed: int):
        self._source, self._preprocess, self._seed = source, preprocess, seed
        self._order = order_of(source, seed)

    def caption(self, position: int) -> str:
        """As the loader draws it, before noise on purpose."""
        try:
            example = self._source[self._order[position]]
            return self._preprocess.caption(example, np.random.default_rng((self._seed, position)))
        except BadExample as error:
            return f"({error})"

    def counts(self, batches: list[dict[str, np.ndarray]]) -> dict[str, collections.Counter]:
        """By source of a mixture, and by language; what the data do not tell is left out."""
        found: dict[str, collections.Counter] = {}
        for batch in batches:
            for position in batch["position"]:
                try:
                    example = self._source[self._order[int(position)]]
                except BadExample:
                    continue
                tags = set(example.get("languages", ()))
                language = tags.pop() if len(tags) == 1 else "several" if tags else None
                for title, value in (("sources", example.get("source")), ("languages", language)):
                    if value is not None:
                        found.setdefault(title, collections.Counter())[value] += 1
        return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
