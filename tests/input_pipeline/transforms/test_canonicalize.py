import pytest

from input_pipeline.transforms.canonicalize import canonicalize_text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rock_crab", "rock crab"),
        ("hot___dog", "hot dog"),
        ("hay", "hay"),
        ("hay!", "hay"),
        ("  red wine ", "red wine"),
        ("pot\npie", "pot pie"),
        ("pot \t  pie", "pot pie"),
        ("a photo of {}", "a photo of"),
        ("Kite (bird of prey)", "kite bird of prey"),
        ("yellow lady's slipper", "yellow ladys slipper"),
        ("Crème Brûlée, «frais»", "crème brûlée «frais»"),
        ("!?", ""),
        ("", ""),
    ],
)
def test_lower_case_without_punctuation_in_single_spaces(text, expected):
    assert canonicalize_text(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a photo of {}", "a photo of {}"),
        (" art of   {}...", "art of {}"),
        ("{} or {}   and  {}", "{} or {} and {}"),
        ("{A} photo of {}!", "a photo of {}"),
        ("{}", "{}"),
    ],
)
def test_the_exact_string_is_kept_and_its_parts_are_not(text, expected):
    assert canonicalize_text(text, keep_punctuation_exact_string="{}") == expected


def test_commas_are_kept_in_class_names():
    name = canonicalize_text("Great_White Shark, man-eater.", keep_punctuation_exact_string=",")
    assert name == "great white shark, maneater"
