"""The progress line of every program: redrawn in place on a terminal, plain lines elsewhere."""

import shutil
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TextIO

import tqdm

from base.words import duration


class _Bar(tqdm.tqdm):
    monitor_interval = 0  # no thread beside ours


_Bar.set_lock(threading.RLock())  # tqdm's default lock is one across processes


class StatusLine:
    """One line of status. It goes to `stream`: by default stderr.

    Args:
      keep: the last text stays on the terminal after close().
    """

    def __init__(self, stream: TextIO | None = None, *, keep: bool = True):
        self._stream = stream or sys.stderr
        self._keep = keep
        self.live = self._stream.isatty()
        self._bar: _Bar | None = None

    def show(self, text: str, fraction: float | None = None) -> None:
        """Replaces the line on a terminal, with a bar for the fraction done; else prints a line."""
        if not self.live:
            print(text, file=self._stream, flush=True)
            return
        if self._bar is None:
            form = "{desc}{bar}" if fraction is None else "{percentage:3.0f}%|{bar:20}| {desc}"
            total = None if fraction is None else 1.0
            self._bar = _Bar(
                total=total, bar_format=form, file=self._stream, leave=self._keep, delay=1e9
            )
            self._bar.delay = 0  # the delay only kept the constructor from drawing
        # Text that wraps could not be overwritten.
        self._bar.ncols = shutil.get_terminal_size().columns - 1
        self._bar.n = fraction or 0
        self._bar.set_description_str(text)

    def note(self, text: str) -> None:
        """Prints lines that stay, above the status line."""
        if self._bar is not None:
            self._bar.clear()
        print(text, file=self._stream, flush=True)
        if self._bar is not None:
            self._bar.refresh()

    def close(self) -> None:
        """Ends the line, so that what follows begins on one of its own."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class Progress:
    """How far a known amount of work is: '4096/100000 rows, 812 rows/s, 1m58s left'.

    Rates count from the first update on, as the first piece of work often waits for a compiler.
    A context manager that ends the line.

    Args:
      total: units of work.
      unit: plural, such as 'rows'.
      others: further counts whose rates are shown, such as 'texts'.
      title: what the line begins with.
      tell: called with each line in place of drawing it.
      interval: seconds between two lines; by default 0.5 on a terminal and 30 elsewhere.
      quiet: seconds until the first line; shorter work shows none.
      hidden: nothing is shown at all.
      keep: the last line stays on a terminal.
    """

    def __init__(
        self,
        total: int,
        unit: str,
        *,
        others: tuple[str, ...] = (),
        title: str = "",
        tell: Callable[[str], None] | None = None,
        stream: TextIO | None = None,
        interval: float | None = None,
        quiet: float = 0.0,
        keep: bool = True,
        hidden: bool = False,
        now: Callable[[], float] = time.monotonic,
    ):
        self._total, self._unit, self._title, self._tell = total, unit, title, tell
        self._line = StatusLine(stream, keep=keep)
        self._interval = (0.5 if self._line.live else 30) if interval is None else interval
        self._now, self._started = now, now()
        self._next = self._started + (quiet or self._interval)
        self._counts = dict.fromkeys((unit, *others), 0)
        self._first: tuple[float, dict[str, int]] | None = None  # time and counts of first update
        self._shown = ""  # the last line
        self._quiet, self._hidden = quiet, hidden

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def update(self, count: int = 1, **others: int) -> None:
        """Counts work that is done, and shows the line when it is time."""
        for unit, more in {self._unit: count, **others}.items():
            self._counts[unit] += more
        if self._first is None:
            self._first = self._now(), dict(self._counts)
        self.tick()

    def tick(self) -> None:
        """Shows the line when it is time, without new work."""
        if (now := self._now()) >= self._next:
            self._next = now + self._interval
            self._show(now)

    def text(self, now: float) -> str:
        """The line at time `now`."""
        done, rates = self._counts[self._unit], dict.fromkeys(self._counts, 0.0)
        if self._first is not None and now > self._first[0]:
            began, first = self._first
            rates = {u: (n - first[u]) / (now - began) for u, n in self._counts.items()}
        rate = rates[self._unit]
        left = (self._total - done) / rate if rate else 0.0 if done >= self._total else None
        parts = [f"{self._title}{done}/{self._total} {self._unit}"]
        parts += [f"{rate:.{int(rate < 10)}f} {unit}/s" for unit, rate in rates.items()]
        return ", ".join([*parts, f"{duration(left)} left"])

    def close(self) -> None:
        """Shows the last state, unless the work was short, and ends the line."""
        now = self._now()
        if self._total and (self._shown or now - self._started >= self._quiet):
            self._show(now)
        self._line.close()

    def _show(self, now: float) -> None:
        if self._hidden or (text := self.text(now)) == self._shown:
            return
        self._shown = text
        if self._tell is not None:
            self._tell(text)
        else:
            fraction = min(self._counts[self._unit] / self._total, 1.0) if self._total else 1.0
            self._line.show(text, fraction)
