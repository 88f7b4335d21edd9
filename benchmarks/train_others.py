"""The share of the CPU that others used while this process and its children worked."""

import os
import resource


class Others:
    """The CPU time of other processes since its construction.

    Children of this process are not others, but count only once they have ended.
    """

    def __init__(self):
        self._start = _machine_seconds(), _own_seconds()

    def share(self) -> float | None:
        """The share of the machine's CPU time that was neither idle nor ours; None off Linux.

        Cycles that a host takes from this virtual machine are included.
        """
        (before, own_before), (now, own_now) = self._start, (_machine_seconds(), _own_seconds())
        if before is None or now is None:
            return None
        busy, total = (b - a for a, b in zip(before, now))
        return max(0.0, busy - (own_now - own_before)) / max(total, 1e-9)


def _machine_seconds() -> tuple[float, float] | None:
    """(busy, all) CPU seconds since the start of the machine, over its cores."""
    try:
        with open("/proc/stat") as file:
            # user nice system idle iowait irq softirq steal; guest time is in user time already.
            ticks = [int(word) for word in file.readline().split()[1:9]]
    except OSError:
        return None
    per_second = os.sysconf("SC_CLK_TCK")
    idle = ticks[3] + ticks[4]
    return (sum(ticks) - idle) / per_second, sum(ticks) / per_second


def _own_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
