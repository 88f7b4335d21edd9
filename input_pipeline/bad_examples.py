"""Counts and names of the bad examples that one process has met."""

import collections
import threading

from input_pipeline.errors import BadExample

MAX_NAMES = 1000  # distinct examples remembered by name; the counts have no limit


def too_many(bad: int, examples: int, allowed: float) -> bool:
    """Whether more than the fraction `allowed` of the examples of a run are bad.

    Among few examples one is a large fraction, so a single one stops no run that allows any.
    """
    return bad > max(allowed * examples, 1 if allowed else 0)


def mostly_bad(bad: int, examples: int, allowed: float) -> bool:
    """Whether most of a recent sample is bad, and more than allowed.

    It catches a disk that fails mid-run, where the fraction of the whole run rises too slowly.
    """
    return bad > max(0.5, allowed) * examples


class BadExamples:
    """Counts bad examples by file and kind, and remembers the names of some.

    Thread-safe. Memory is bounded by the number of files.

    The counts include examples of prefetched batches that no step has used yet. The exact counts
    of the steps that were done are the run's: `bad_examples` and `bad/<kind>` in metrics.jsonl.
    """

    def __init__(self):
        self._lock = threading.Lock()
        self._counts: collections.Counter[tuple[str, str]] = collections.Counter()
        self._names: collections.Counter[str] = collections.Counter()
        self._reasons: dict[str, str] = {}

    def record(self, error: BadExample, id: str = "", shard: str = "") -> None:
        """Counts one example. The error's own id and shard win over the arguments."""
        id, shard = error.id or id, error.shard or shard
        with self._lock:
            self._counts[shard, error.kind] += 1
            if id in self._reasons or len(self._reasons) < MAX_NAMES:
                self._names[id] += 1
                self._reasons[id] = str(error)

    def add(self, kind: str, shard: str, count: int) -> None:
        """Counts several examples of a file, without their names."""
        with self._lock:
            self._counts[shard, kind] += count

    @property
    def count(self) -> int:
        """How often a bad example was met; one that is met twice counts twice."""
        with self._lock:
            return sum(self._counts.values())

    def kinds(self) -> dict[str, int]:
        """Kind -> count, the most frequent first."""
        with self._lock:
            kinds: collections.Counter[str] = collections.Counter()
            for (_, kind), count in self._counts.items():
                kinds[kind] += count
        return dict(kinds.most_common())

    def shards(self) -> dict[str, dict[str, int]]:
        """File -> kind -> count, the file with most bad examples first."""
        with self._lock:
            counts = dict(self._counts)
        shards: dict[str, dict[str, int]] = {}
        for (shard, kind), count in counts.items():
            shards.setdefault(shard, {})[kind] = count
        return dict(sorted(shards.items(), key=lambda item: (-sum(item[1].values()), item[0])))

    def worst(self, limit: int = 3) -> str:
        """Part of a message: the worst files and the examples met most often, `limit` of each."""
        shards = {shard: kinds for shard, kinds in self.shards().items() if shard}
        with self._lock:
            names = sorted(self._names, key=lambda name: (-self._names[name], name))
            examples = [f"{name} ({self._reasons[name]})" for name in names[:limit]]
        more = len(names) - len(examples)
        message = ", ".join(examples) + (f", and {more} more" if more > 0 else "")
        if shards:
            files = [
                f"{shard}: {', '.join(f'{count} {kind}' for kind, count in kinds.items())}"
                for shard, kinds in list(shards.items())[:limit]
            ]
            rest = f"; and {len(shards) - limit} more files" if len(shards) > limit else ""
            message = f"{'; '.join(files)}{rest}" + (f"; such as {message}" if message else "")
        return message
