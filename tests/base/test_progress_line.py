import io

import pytest

from base.progress import Progress, StatusLine


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Time:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def time():
    return Time()


def test_on_a_terminal_the_line_is_redrawn_in_place(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    stream = Terminal()
    line = StatusLine(stream)
    for text in ("a" * 100, "b"):
        line.show(text)
    line.close()
    line.close()
    rows = stream.getvalue().removesuffix("\n").split("\r")
    assert [row.strip() for row in rows if row.strip()] == ["a" * 39, "b", "b"]
    assert all(len(row) < 40 for row in rows), "a row that wraps cannot be overwritten"
    assert stream.getvalue().count("\n") == 1


def test_notes_stay_above_the_line():
    stream = Terminal()
    line = StatusLine(stream)
    line.show("a")
    line.note("note\nof two lines")
    line.close()
    lines = stream.getvalue().split("\n")
    assert [text.split("\r")[-1].strip() for text in lines] == ["note", "of two lines", "a", ""]


def test_a_line_that_is_not_kept_is_wiped():
    stream = Terminal()
    line = StatusLine(stream, keep=False)
    line.show("a", 0.5)
    line.close()
    assert "50%|" in stream.getvalue() and "\n" not in stream.getvalue()
    assert not stream.getvalue().split("\r")[-2].strip()


def test_elsewhere_every_text_is_a_plain_line():
    stream = io.StringIO()
    line = StatusLine(stream)
    line.show("a", 0.5)
    line.note("b")
    line.show("c")
    line.close()
    assert stream.getvalue() == "a\nb\nc\n"


def test_rates_and_the_time_left_count_from_the_first_update(time):
    progress = Progress(1000, "rows", others=("texts",), stream=io.StringIO(), now=time)
    assert progress.text(0.0) == "0/1000 rows, 0.0 rows/s, 0.0 texts/s, - left"
    time.now = 100.0  # compiling
    progress.update(100, texts=300)
    progress.update(100, texts=300)
    assert progress.text(100.5) == "200/1000 rows, 200 rows/s, 600 texts/s, 4s left"


def test_lines_come_at_intervals_and_at_the_end(time):
    stream = io.StringIO()
    with Progress(4, "files", title="copy: ", stream=stream, now=time) as progress:
        for now in (0.0, 29.0, 31.0, 32.0):
            time.now = now
            progress.update()
    counts = [line.split(",")[0] for line in stream.getvalue().splitlines()]
    assert counts == ["copy: 3/4 files", "copy: 4/4 files"]


@pytest.mark.parametrize(("seconds", "lines"), [(2.0, 0), (4.0, 1)])
def test_short_work_is_silent_where_it_should_be(time, seconds, lines):
    stream = io.StringIO()
    with Progress(2, "files", quiet=3.0, stream=stream, now=time) as progress:
        progress.update()
        time.now = seconds
    assert stream.getvalue().count("\n") == lines


def test_hidden_progress_shows_nothing(time):
    stream = Terminal()
    with Progress(2, "files", hidden=True, stream=stream, now=time) as progress:
        time.now = 60.0
        progress.update()
    assert stream.getvalue() == ""


def test_lines_can_go_to_a_function(time):
    told = []
    with Progress(2, "rows", tell=told.append, interval=0.0, now=time) as progress:
        progress.update()
        progress.update()
    assert [line.split(",")[0] for line in told] == ["1/2 rows", "2/2 rows"]
