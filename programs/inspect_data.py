"""Shows the data that a run will train on, before it starts.

  python -m programs.inspect_data --config configs/pairs.py:path=pairs.jsonl
  python -m programs.inspect_data --config configs/emoji.py:data_dir=FOLDER \\
      --config.input.corrupt="image(0.3)" --step 1000 --batches 20 --sheet sheet.png

Prints shapes, counts by source, language and kind of damage, and images/s; draws a batch, with its
captions and the text that its tokens stand for. It takes any config and override of main.py.
"""

import argparse
import collections
import dataclasses
import pathlib
import sys
import time
from typing import Any

import numpy as np

from base.command_line import Parser, run, split_overrides
from base.errors import UserError
from input_pipeline import loader
from input_pipeline.bad_examples import BadExamples, too_many
from input_pipeline.errors import KINDS, BadExample
from input_pipeline.order import order_of
from programs import contact_sheet

MAX_ROWS = 256  # rows of a batch that are made
Batch = dict[str, np.ndarray]


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog="python -m programs.inspect_data", description=__doc__)
    add = parser.add_argument
    add("--config", required=True, metavar="file.py[:args]")
    add("--step", type=int, default=0, metavar="k", help="of the first batch (0)")
    add("--batches", type=int, default=8, metavar="n", help="that are counted and timed (8)")
    add("--sheet", default="inspect.png", metavar="file.png", help="the picture (inspect.png)")
    flags = parser.parse_args(argv)
    for name, least in (("step", 0), ("batches", 1)):
        if getattr(flags, name) < least:
            raise UserError(f"--{name}={getattr(flags, name)} must be at least {least}")
    return flags


def main(argv: list[str]) -> int:
    """Shows the data that the command line names; returns the exit code."""
    return run(lambda: _main(argv), interrupted="interrupted")


def _main(argv: list[str]) -> None:
    from trainers import data
    from trainers.config import complete

    overrides, rest = split_overrides(argv)
    flags = _parse(rest)
    config: Any = complete.load(flags.config, overrides)
    if config.input.batch_size < 1:
        raise UserError(f"config.input.batch_size={config.input.batch_size} must be at least 1")
    preprocess, source = data.make_input(config), data.make_source(config)
    for (kind, shard), count in sorted(getattr(source, "damage", {}).items()):
        print(f"  left out of {shard}: {count} {kind}")
    sample = read_batches(config, source, preprocess, flags.step, flags.batches)
    examples = _Examples(source, preprocess, config.seed)
    print_batches(sample, examples, flags.step)
    print_bad(sample, config.input.max_bad_fraction)
    print(f"\n{sample.speed}, with {config.input.num_threads} threads")
    write_sheet(sample.batches[0], examples, preprocess.tokenizer, pathlib.Path(flags.sheet))


@dataclasses.dataclass(frozen=True)
class Sample:
    """Some batches of a run: the first rows of each, bad examples, and a line about the speed."""

    batches: list[Batch]
    bad: BadExamples
    speed: str

    @property
    def rows(self) -> int:
        return sum(len(batch["position"]) for batch in self.batches)


def read_batches(config: Any, source: Any, preprocess: Any, step: int, count: int) -> Sample:
    """Makes the first rows of `count` batches from `step` on, as the run would."""
    batch_size = config.input.batch_size
    # The rows that process 0 of several would make: those of the same batches, but few of each.
    processes = next(
        k for k in range(1, batch_size + 1) if batch_size % k == 0 and batch_size // k <= MAX_ROWS
    )
    size = batch_size // processes
    print(f"{len(source):,} examples; the first {size} rows of each batch of {batch_size} are made")
    bad, started, cpu_started = BadExamples(), time.monotonic(), time.process_time()
    with loader.train_batches(
        source,
        preprocess,
        batch_size=batch_size,
        process_count=processes,
        seed=config.seed,
        start_step=step,
        num_threads=config.input.num_threads,
        prefetch=config.input.prefetch,
        corrupt=config.input.corrupt,
        bad=bad,
    ) as loading:
        batches = [next(loading)]
        waited = time.monotonic() - started
        batches += [next(loading) for _ in range(count - 1)]
    seconds, cpu = time.monotonic() - started, time.process_time() - cpu_started
    rows = size * count
    speed = (
        f"{rows / seconds:,.0f} images/s, {rows / cpu:,.0f} per second of one core, the first "
        f"batch after {waited:.1f} s"
    )
    return Sample(batches, bad, speed)


def print_batches(sample: Sample, examples: "_Examples", step: int) -> None:
    """Prints shapes and types, and counts by source and language."""
    print("\nbatch:")
    for name, array in sample.batches[0].items():
        print(f"  {name:12} {array.dtype}{list(array.shape)}")
    print(f"\n{sample.rows} rows of steps {step} to {step + len(sample.batches) - 1}:")
    for title, counts in examples.counts(sample.batches).items():
        print(f"  {title}: " + ", ".join(f"{k} {n}" for k, n in counts.most_common(40)))


def print_bad(sample: Sample, max_bad_fraction: float) -> None:
    """Prints the counts of examples that cannot be used, and whether a run would stop."""
    codes = np.concatenate([batch["bad"] for batch in sample.batches])
    for code, count in zip(*np.unique(codes[codes > 0], return_counts=True)):
        print(f"  unusable: {count} {KINDS[code - 1]}")
    if too_many(int((codes > 0).sum()), len(codes), max_bad_fraction):
        print(
            f"  {100 * (codes > 0).mean():.1f} % of the rows: a run stops above "
            f"{100 * max_bad_fraction:g} % (config.input.max_bad_fraction={max_bad_fraction})"
        )
    if not codes.any():
        print("  unusable: none")
    if sample.bad.count:
        print(f"  the worst: {sample.bad.worst()}")


def write_sheet(batch: Batch, examples: "_Examples", tokenizer: Any, path: pathlib.Path) -> None:
    """Writes the contact sheet of a batch, and prints its first captions with their tokens."""
    cells = [
        (
            contact_sheet.pixels(batch, i),
            examples.caption(int(batch["position"][i])),
            tokenizer.decode(batch["text"][i]),
        )
        for i in range(min(len(batch["position"]), contact_sheet.MAX_IMAGES))
    ]
    print()
    for _, caption, tokens in cells[:5]:
        print(f"  {caption!r}\n    -> {tokens!r}")
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
        """The caption that the loader draws for a row, before config.input.corrupt."""
        try:
            example = self._source[self._order[position]]
            return self._preprocess.caption(example, np.random.default_rng((self._seed, position)))
        except BadExample as error:
            return f"({error})"

    def counts(self, batches: list[Batch]) -> dict[str, collections.Counter]:
        """Counts by source of a mixture and by language, where the examples have them."""
        counts: dict[str, collections.Counter] = {}
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
                        counts.setdefault(title, collections.Counter())[value] += 1
        return counts


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
