"""Beartype as a decorator that costs nothing until the function is called."""

import functools
import threading
from collections.abc import Callable

import beartype

CONF = beartype.BeartypeConf(is_pep484_tower=True)  # 1 is a float
_one_at_a_time = threading.Lock()


def checked(fn: Callable) -> Callable:
    """`fn`, whose calls are held to its annotations.

    Beartype compiles its check at the first call: at the definition, the checks of functions that a
    test process never calls would double the time of its imports.
    """
    check: Callable | None = None

    @functools.wraps(fn)
    def call(*args, **kwargs):
        nonlocal check
        if check is None:
            with _one_at_a_time:
                check = check or beartype.beartype(conf=CONF)(fn)
        return check(*args, **kwargs)

    return call
