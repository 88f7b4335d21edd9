"""No test can hang on a process that it starts, and none starts one in another way."""

import contextlib
import pathlib
import re
import sys

import processes
import pytest

TESTS = pathlib.Path(__file__).parent
FOR_EVER = "import time; print('up', flush=True); time.sleep(9999)"


@pytest.fixture
def soon(monkeypatch):
    monkeypatch.setattr(processes, "DEADLINE", 0.1)


def test_what_hangs_is_killed_with_the_processes_that_it_started(soon):
    # A child that holds the pipes would keep them open beyond the end of its parent.
    parent = f"import subprocess as s, sys; s.run([sys.executable, '-c', {FOR_EVER!r}])"
    with processes.started([sys.executable, "-c", parent], deadline=False) as process:
        processes.read_until(process, "up")
        with (
            pytest.raises(AssertionError, match="exit code -9, not 0"),
            processes.limited(process),
        ):
            processes.end(process)
    with pytest.raises(AssertionError, match="exit code -9, not 0"):
        processes.run([sys.executable, "-c", FOR_EVER])


def test_what_hangs_is_not_taken_for_what_was_killed_on_purpose(soon):
    with pytest.raises(AssertionError, match=r"was killed after 0\.1 s"):
        processes.run([sys.executable, "-c", FOR_EVER], code=-9)


def test_processes_that_depend_on_each_other_show_the_output_of_all():
    codes = ("import sys; sys.exit('one')", "import sys; sys.exit('two')")
    with contextlib.ExitStack() as running:
        commands = [[sys.executable, "-c", code] for code in codes]
        two = [running.enter_context(processes.started(command)) for command in commands]
        with pytest.raises(AssertionError, match=r"(?s)one.*two"):
            processes.end_all(two)


def test_a_wait_for_a_line_ends_with_the_process(soon):
    with (
        pytest.raises(AssertionError, match="no 'down' in"),
        processes.started([sys.executable, "-c", FOR_EVER]) as process,
    ):
        processes.read_until(process, "down")


def test_a_wait_for_a_condition_ends_with_the_process():
    code = "import sys; sys.exit('it failed')"
    with (
        processes.started([sys.executable, "-c", code]) as process,
        pytest.raises(AssertionError, match="it failed"),
    ):
        processes.wait_until(lambda: False, process)


def test_a_process_ends_with_its_block():
    with processes.started([sys.executable, "-c", FOR_EVER]) as process:
        assert processes.read_until(process, "up") == "up\n"
    assert process.returncode == -9
    with processes.started([sys.executable, "-c", FOR_EVER], deadline=False) as process:
        pass
    assert process.returncode == -9


def test_one_that_fails_shows_what_it_printed():
    code = "import sys; print('on stdout'); print('on stderr', file=sys.stderr); sys.exit(3)"
    with pytest.raises(AssertionError, match="exit code 3, not 0\non stdout\n\non stderr"):
        processes.run([sys.executable, "-c", code])
    assert processes.run([sys.executable, "-c", code], code=3).stdout == "on stdout\n"


def test_tests_start_processes_in_no_other_way():
    start = re.compile(r"\bsubprocess\.(run|Popen|call|check_\w+|get\w+)\(|os\.(system|popen)\(")
    others = [file for file in TESTS.rglob("*.py") if file.name != "processes.py"]
    assert len(others) > 100
    assert not [str(file) for file in others if start.search(file.read_text())]
