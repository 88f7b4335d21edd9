"""Machines that are not here, for tests of programs that only their compilers see."""

import itertools
import math
import os
import pathlib
import sys
from typing import Any

import jax
import pods
import pytest
from jax.experimental.compilation_cache import compilation_cache

from base.errors import UserError
from trainers.machine import topology


def devices_of(name: str) -> list[Any]:
    """The devices of a topology; the test is skipped where their compiler is not installed."""
    before = dict(os.environ)
    topology.prepare(os.environ)  # libtpu reads them when it is loaded
    try:
        return topology.find_devices(name)
    except UserError as error:
        if " needs " not in str(error):
            raise
        if "libtpu" in str(error) and os.environ.get(pods.REQUIRED) and in_pods():
            pytest.fail(f"{error} ({pods.REQUIRED} is set)", pytrace=False)
        pytest.skip(str(error))
    finally:
        os.environ.clear()
        os.environ.update(before)


def in_pods() -> bool:
    """Whether this is the interpreter of `make pods`, which should have libtpu."""
    return pathlib.Path(sys.prefix).resolve() == pods.PYTHON.parents[1].resolve()


def compile_for(f: Any, *args: Any, **options: Any) -> Any:
    """f compiled for the devices of the shardings of `args`, which are shapes."""
    jax.config.update("jax_enable_compilation_cache", False)  # could be written there, not read
    compilation_cache.reset_cache()
    try:
        return jax.jit(f).lower(*args).compile(compiler_options=options)
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
        compilation_cache.reset_cache()


def slices(most: int = 1024) -> list[str]:
    """Names of all TPU slices of 4 to `most` chips whose sides do not descend, '2x2x1' aside."""
    powers = [2**i for i in range(most.bit_length())]
    names = []
    for kind, spec in topology.TPUS.items():
        for sides in itertools.combinations_with_replacement(powers, spec["axes"]):
            sides = (*sides[1:], 1) if sides[0] == 1 else sides
            if 1 not in sides[:2] and 4 <= math.prod(sides) <= most and max(sides) <= 64:
                names.append(f"{kind}:{'x'.join(map(str, sides))}")
    return names
