"""Freed buffers stay with the process: the next step faults no pages in."""

import sys

import processes
import pytest

CODE = """
import resource, sys
import numpy as np
from trainers.machine.host_memory import keep_freed_memory
if sys.argv[1] == "keep" and not keep_freed_memory():
    print("no glibc"); sys.exit()
for i in range(3):
    a = np.ones(2_500_000)  # 20 MB
    del a
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for i in range(10):
    a = np.ones(2_500_000)
    b = np.ones(2_500_000)
    del a, b
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode: str) -> int:
    out = processes.run([sys.executable, "-c", CODE, mode])
    if "no glibc" in out.stdout:
        pytest.skip("this platform's C library has no mallopt")
    return int(out.stdout)


def test_page_faults_of_repeated_large_buffers_vanish():
    assert faults("keep") < 0.7 * faults("default")
