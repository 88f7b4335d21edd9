"""Starts the peer's process; without the peers these tests skip, or fail where CI asks for them."""

import contextlib
import json
import os
import pathlib
import subprocess
import tempfile
from typing import Any

import processes
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[3]
PYTHON = ROOT / ".venv" / "parity" / "bin" / "python"
PEER = pathlib.Path(__file__).with_name("peer.py")
REQUIRED = "SIGLIP_REQUIRE_PARITY"  # set in CI, where a skipped comparison would go unseen


class Peer:
    """Asks the peer's process, one action after the other."""

    def __init__(self, process: subprocess.Popen, log: pathlib.Path):
        self._process, self._log = process, log

    def __call__(self, action: str, **arguments: Any) -> Any:
        """The action's result. Raises AssertionError with what the peer says where it fails."""
        assert self._process.stdin is not None and self._process.stdout is not None
        request = json.dumps({"action": action, **arguments}, default=str)  # of paths
        with processes.limited(self._process):
            with contextlib.suppress(BrokenPipeError):  # no answer either, then
                self._process.stdin.write(request + "\n")
                self._process.stdin.flush()
            line = self._process.stdout.readline()
        answer = json.loads(line) if line else {"failed": self._log.read_text()[-2000:]}
        if isinstance(answer, dict) and "failed" in answer:
            raise AssertionError(f"{action} of the peer failed:\n{answer['failed']}")
        return answer


@pytest.fixture(scope="session")
def peer():
    """A peer whose imports worked; skips otherwise."""
    if not PYTHON.exists():
        _missing(f"{PYTHON.relative_to(ROOT)} is not there")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with (
        tempfile.TemporaryDirectory() as folder,
        open(pathlib.Path(folder) / "log", "w+") as log,
        processes.started(
            [PYTHON, PEER], deadline=False, stdin=subprocess.PIPE, stderr=log, env=environment
        ) as process,
    ):
        ask = Peer(process, pathlib.Path(log.name))
        try:
            ask("versions")
        except (AssertionError, OSError) as error:
            last = str(error).strip().splitlines()[-1]
            _missing(f"the PyTorch peers do not load ({last})")
        yield ask


def _missing(why: str) -> None:
    told = f"{why}; 'make parity' installs the PyTorch peers that this compares with"
    if os.environ.get(REQUIRED):
        pytest.fail(f"{told} ({REQUIRED} is set)", pytrace=False)
    pytest.skip(told)
