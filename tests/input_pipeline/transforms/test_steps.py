"""Steps named by a short string: parsed, never evaluated, refused in one line."""

import pytest

from base.errors import UserError
from input_pipeline.transforms.steps import format_steps, parse_steps


def scale(x, *, by: float = 2.0, name: str = "a|b"):
    return x * by


def shift(x, *, by: float):
    return x + by


STEPS = {"scale": scale, "shift": shift}


def run(program, x):
    for _, step in parse_steps(program, STEPS, "input.image"):
        x = step(x)
    return x


@pytest.mark.parametrize(
    "program",
    [
        "scale | shift(3) | scale(by=10)",
        "scale()|shift(by=3)|scale(10, 'a | b')",
        ("scale", "shift(3)", "scale(10)"),
        "  scale | shift(3.0) | scale(10)\n",
    ],
)
def test_steps_are_taken_from_left_to_right(program):
    assert run(program, 1) == 50


def test_steps_can_be_written_again():
    text = format_steps(parse_steps("shift(3) | scale(name='b') | scale", STEPS, "k"))
    assert text == "shift(by=3) | scale(name='b') | scale"
    assert format_steps(parse_steps(text, STEPS, "k")) == text


def test_nothing_is_no_step():
    assert parse_steps("", STEPS, "k") == [] and parse_steps((), STEPS, "k") == []


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("scal", "config.input.image: there is no 'scal'; the nearest: scale"),
        ("scale(bye=1)", r"scale has no option 'bye'; it is scale\(by=2.0, name='a|b'\)"),
        ("shift", r"shift needs by; it is shift\(by\)"),
        ("shift(1, 2)", "too many values"),
        ("shift(1, by=2)", "given 'by' twice"),
        ("shift(", "cannot be read"),
        ("scale | 3", "'3' is not the name of a step"),
        ("scale | shift(x)", "x is not a plain value"),
        ("shift(__import__('os').getcwd())", "is not a plain value"),
        ("a.b(1)", "'a.b' is not the name|'a.b\\(1\\)' is not the name"),
        ("shift(**{'by': 1})", "has no option None"),
        ("scale & shift(1)", "is not the name of a step"),
        ("lambda: 1", "is not the name of a step"),
    ],
)
def test_mistakes_are_named(program, message):
    with pytest.raises(UserError, match=message) as error:
        run(program, 1)
    assert "\n" not in str(error.value)


def test_arguments_run_no_code(tmp_path):
    marker = tmp_path / "ran"
    with pytest.raises(UserError):
        parse_steps(f"shift(open({str(marker)!r}, 'w'))", STEPS, "k")
    assert not marker.exists()
