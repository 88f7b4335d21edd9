import collections

import pytest

from base.errors import UserError
from input_pipeline.transforms.prompts import (
    CLASSNAMES,
    class_prompts,
    resolve_classnames,
    resolve_templates,
)


def test_imagenet_names_are_the_1000_of_clip():
    names = CLASSNAMES["imagenet"]()
    assert len(names) == 1000
    assert names[0] == "tench"
    assert names[999] == "toilet paper"
    assert not any("," in name or name != name.strip() for name in names)


def test_imagenet_names_two_names_stand_for_two_classes():
    names = CLASSNAMES["imagenet"]()
    twice = [name for name, count in collections.Counter(names).items() if count > 1]
    places = {name: [i for i, other in enumerate(names) if other == name] for name in twice}
    assert places == {"missile": [657, 744], "sunglasses": [836, 837]}


def test_template_sets_have_their_published_sizes():
    paper = resolve_templates("clip_paper")
    assert len(paper) == len(set(paper)) == 81
    assert len([t for t in paper if t != "{}"]) == 80
    assert paper[0] == "a bad photo of a {}." and paper[-2] == "a tattoo of the {}."
    assert all(t.count("{}") == 1 for t in paper)
    best = resolve_templates("clip_best")
    assert len(best) == 8
    assert set(best) <= set(paper)
    assert "itap of a {}." in best
    assert resolve_templates("class_name_only") == ("{}",)


def test_templates_and_names_of_sets_mix():
    mixed = resolve_templates(("class_name_only", "a drawing of {}"))
    assert mixed == ("{}", "a drawing of {}")
    assert resolve_templates("a drawing of {}") == ("a drawing of {}",)


@pytest.mark.parametrize("templates", ["clip_papr", ("a photo",), ()])
def test_what_is_no_template_is_refused(templates):
    with pytest.raises(UserError, match="clip_paper"):
        resolve_templates(templates)


def test_class_names_from_the_source_a_list_or_the_config():
    assert resolve_classnames("source", ["b", "a"]) == ("b", "a")
    assert len(resolve_classnames("imagenet", None)) == 1000
    assert resolve_classnames(("x", "y"), ["b", "a"]) == ("x", "y")
    with pytest.raises(UserError, match="none of source, imagenet"):
        resolve_classnames("imagnet", None)
    with pytest.raises(UserError, match="this source has none"):
        resolve_classnames("source", None)


def prompts(names, templates, canonicalize=True, aliases="first"):
    return class_prompts(names, templates, canonicalize=canonicalize, aliases=aliases)


def test_prompts_are_canonicalised_like_big_vision():
    assert prompts(["Great_White Shark"], ["A photo of a {}.", "{}!"]) == [
        ["a photo of a great white shark", "great white shark"]
    ]
    assert prompts(["Great White Shark"], ["A {}."], canonicalize=False) == [
        ["A Great White Shark."]
    ]


def test_only_the_first_alias_unless_all_are_asked_for():
    names = ["Tench, Tinca tinca", "hen"]
    assert prompts(names, ["a {}"]) == [["a tench"], ["a hen"]]
    assert prompts(names, ["a {}", "{}"], aliases="all") == [
        ["a tench", "tench", "a tinca tinca", "tinca tinca"],
        ["a hen", "hen"],
    ]
    assert prompts(names, ["{}"], canonicalize=False) == [["Tench"], ["hen"]]


def test_a_name_with_braces_is_no_template():
    assert prompts(["a {0} b"], ["the {}"], canonicalize=False) == [["the a {0} b"]]


def test_bad_names_are_refused():
    with pytest.raises(UserError, match="class 1 has no name left"):
        prompts(["a", "?!"], ["{}"])
    with pytest.raises(UserError, match="class 0 has no name left"):
        prompts([", b"], ["{}"])
    with pytest.raises(UserError, match="aliases 'none' is none of first, all"):
        prompts(["a"], ["{}"], aliases="none")
