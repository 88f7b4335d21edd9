"""Compiling for machines that are not here: without libtpu these tests skip, or fail where CI asks
for them.

libtpu is not in .venv but in .venv/pods (`make pods`), so such tests start processes.
"""

import os
import pathlib
import subprocess
from typing import Any

import processes
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PYTHON = ROOT / ".venv" / "pods" / "bin" / "python"
REQUIRED = "SIGLIP_REQUIRE_PODS"  # set in CI, where a skipped test would go unseen


def run(*arguments: Any, code: int = 0, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs a command of the interpreter that has libtpu, on a clean environment, to its end."""
    if not PYTHON.exists():
        told = f"{PYTHON.relative_to(ROOT)} is not there; 'make pods' installs libtpu for this test"
        if os.environ.get(REQUIRED):
            pytest.fail(f"{told} ({REQUIRED} is set)", pytrace=False)
        pytest.skip(told)
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_", "TPU_"))}
    options = {"cwd": ROOT, "env": clean, **options}
    return processes.run([PYTHON, *arguments], code=code, **options)
