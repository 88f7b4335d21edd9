"""Bad examples of a process: which kinds, in which files, and which ones."""

import collections
import threading

from input_pipeline.errors import BadExample

MOST_NAMES = 1000  # distinct examples that are remembered by name; counts go on


class Bad:
    """Counts by (file, kind), and names some. Safe to use from threads; memory is bounded by the
    number of files.

    What is counted was made, and may still wait for its step: exact counts of the steps that were
    done are the run's (`bad_examples` and `bad/<kind>` in metrics.jsonl).
    """

    def __init__(self):
        self._lock = threading.Lock()
        self._counts: collections.Counter[tuple[str, str]] = collections.Counter()
        self._names: collections.Counter[str] = collections.Counter()
        self._reasons: dict[str, str] = {}

    def record(self, error: BadExample, id: str = "", shard: str = "") -> None:
        id, shard = error.id or id, error.shard or shard
        with self._lock:
            self._counts[shard, error.kind] += 1
            if id in self._reasons or len(self._reasons) < MOST_NAMES:
                self._names[id] += 1
                self._reasons[id] = str(error)

    def add(self, kind: str, shard: str, count: int) -> None:
        """Samples of a file, without names."""
        with self._lock:
            self._counts[shard, kind] += count

    @property
    def count(self) -> int:
        """How often a bad example was met."""
        with self._lock:
            return sum(self._counts.values())

    def kinds(self) -> dict[str, int]:
        with self._lock:
            kinds: collections.Counter[str] = collections.Counter()
            for (_, kind), count in self._counts.items():
                kinds[kind] += count
        return dict(kinds.most_common())

    def shards(self) -> dict[str, dict[str, int]]:
        """Kinds and counts of each file, the worst file first."""
        with self._lock:
            counts = dict(self._counts)
        found: dict[str, dict[str, int]] = {}
        for (shard, kind), count in counts.items():
            found.setdefault(shard, {})[kind] = count
        return dict(sorted(found.items(), key=lambda item: (-sum(item[1].values()), item[0])))

    def worst(self, most: int = 3) -> str:
        """The worst files, and examples met most often, for one line of a message."""
        shards = {shard: kinds for shard, kinds in self.shards().items() if shard}
        with self._lock:
            names = sorted(self._names, key=lambda name: (-self._names[name], name))
            told = [f"{name} ({self._reasons[name]})" for name in names[:most]]
        more = len(names) - len(told)
        line = ", ".join(told) + (f", and {more} more" if more > 0 else "")
        if shards:
            files = [
                f"{shard}: {', '.join(f'{count} {kind}' for kind, count in kinds.items())}"
                for shard, kinds in list(shards.items())[:most]
            ]
            rest = f"; and {len(shards) - most} more files" if len(shards) > most else ""
            line = f"{'; '.join(files)}{rest}" + (f"; such as {line}" if line else "")
        return line
