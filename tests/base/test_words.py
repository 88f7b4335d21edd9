import pathlib

import pytest

from base.words import duration, listed, nearest, one_line, place, show, similar


def test_nearest_names_what_is_similar_or_all_there_is():
    assert nearest("captoin", ["image", "caption"]) == "the nearest: caption"
    assert nearest("zzz", ["b", "a"]) == "there are: a, b"
    assert nearest("zzz", [f"a{i}" for i in range(5)], limit=2) == "there are: a0, a1, and 3 more"


def test_names_much_less_similar_than_the_best_are_left_out():
    assert similar("batch_size", ["batch_sizes", "bach_size", "hatches"]) == [
        "batch_sizes",
        "bach_size",
    ]


def test_similar_names_ignore_case_and_keep_their_own():
    assert similar("vit-b", ["ViT-B", "resnet"]) == ["ViT-B"]


def test_always_gives_the_best_of_names_that_are_not_similar():
    assert similar("zzz", ["abc", "xyz"]) == []
    assert similar("zzz", ["abc", "xyz", "q"], count=1, always=True) == ["xyz"]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a\n  b\tc", "a b c"),
        (ValueError("a\nb"), "a b"),
        (KeyError(), "KeyError"),
        ("x" * 201, "x" * 200 + " ..."),
    ],
)
def test_one_line_has_no_breaks_and_an_end(text, line):
    assert one_line(text) == line


def test_one_line_can_name_the_type_of_an_exception():
    assert one_line(KeyError("a"), with_type=True) == "KeyError: 'a'"


def test_listed_cuts_after_twelve_names():
    assert listed("abc") == "a, b, c"
    assert listed(map(str, range(13))).endswith("10, 11, ... (13 in all)")


def test_show_is_relative_only_inside_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert show(tmp_path / "a" / "b.py") == "a/b.py"
    assert show(pathlib.Path("/elsewhere/b.py")) == "/elsewhere/b.py"


def test_place_has_a_line_number_only_where_the_word_stands_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "x.py"
    file.write_text("lr = 1\nwd = 2\nwd = 3\nwds = 4\n")
    assert place(file, "lr") == "x.py:1"
    assert place(file, "wd") == "x.py"
    assert place(tmp_path / "none.py", "lr") == "none.py"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (59.6, "1m00s"), (61, "1m01s"), (3720, "1h02m"), (183600, "2d03h"), (None, "-")],
)
def test_durations_have_two_units_at_most(seconds, text):
    assert duration(seconds) == text
