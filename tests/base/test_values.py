from typing import Annotated, Any, Literal

import pytest

from base import values
from base.errors import UserError


@pytest.mark.parametrize(
    ("text", "annotation", "value"),
    [
        ("True", bool, True),
        ("f", bool, False),
        ("0", bool, False),
        ("-3", int, -3),
        ("0x10", int, 16),
        ("0o17", int, 15),
        ("1e-3", float, 1e-3),
        ("1", float, 1.0),
        ("inf", float, float("inf")),
        ("1", str, "1"),
        ("'a,b'", str, "a,b"),
        ("'a' and 'b'", str, "'a' and 'b'"),
        ("", str, ""),
        ("None", float | None, None),
        ("None", str, "None"),
        ("1", int | str, 1),
        ("x", int | str, "x"),
        ("en,de", tuple, ("en", "de")),
        ("en", tuple[str, ...], ("en",)),
        ("(1, 2)", tuple[int, ...], (1, 2)),
        ("(('a', 1.0),)", tuple, (("a", 1.0),)),
        ("a,b", str | tuple, "a,b"),
        ("'a','b'", str | tuple, ("a", "b")),
        ("'a,b'", str | tuple, "a,b"),
        ("(a,b)", str | tuple, ("a", "b")),
        ("{'a': 1}", dict, {"a": 1}),
        ("avg", Literal["max", "avg"], "avg"),
        ("[1]", Any, [1]),
        ("a b", Any, "a b"),
    ],
)
def test_a_text_becomes_a_value_of_the_annotated_type(text, annotation, value):
    parsed = values.parse(text, annotation)
    assert parsed == value and type(parsed) is type(value)


@pytest.mark.parametrize(
    ("text", "annotation"),
    [
        ("yes", bool),
        ("2", bool),
        ("1.0", int),
        ("True", int),
        ("x", float | None),
        ("b", Literal["a"]),
        ("1", dict),
        ("(1, 'a')", tuple[int, ...]),
        ("[" * 10_000, dict),
    ],
)
def test_a_text_of_another_type_is_refused(text, annotation):
    with pytest.raises((ValueError, TypeError)):
        values.parse(text, annotation)
    with pytest.raises(UserError, match=r"^--x=.* is not (an? |one of)"):
        values.parse_key(text, annotation, "x", "--x")


def test_values_are_cast_only_where_nothing_is_lost():
    assert values.cast(1, float) == 1.0 and type(values.cast(1, float)) is float
    assert values.cast([[1], 2], tuple) == ((1,), 2)
    for value, annotation in ((True, int), (1, bool), (1.0, int), ("1", float)):
        with pytest.raises(TypeError):
            values.cast(value, annotation)


def test_the_check_of_an_annotation_sees_parsed_and_given_values():
    def check(value, key):
        if value < 0:
            raise UserError(f"{key} is negative")

    natural = Annotated[int, check]
    assert values.parse_key("1", natural, "n", "--n") == 1
    with pytest.raises(UserError, match="n is negative"):
        values.parse_key("-1", natural, "n", "--n")
    with pytest.raises(UserError, match="n is negative"):
        values.cast_key(-1, natural, "n", "x.py:3")


def test_a_wrong_value_names_its_key_and_place():
    with pytest.raises(UserError, match=r"^x.py:3: n = 'a' must be an int or None, not a str$"):
        values.cast_key("a", int | None, "n", "x.py:3")
