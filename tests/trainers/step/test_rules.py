"""Rules by regex: exactly one per parameter, and messages that name what is wrong."""

import pytest

from base.errors import UserError
from trainers.step.rules import match_rules

NAMES = ["img/Transformer/encoderblock_0/MlpBlock_0/Dense_0/kernel", "img/pos_embedding", "t"]


def error_of(rules):
    with pytest.raises(UserError) as error:
        match_rules(rules, NAMES, key="wd_mults")
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("wd_mults")
    return str(error.value)


def test_every_parameter_gets_the_value_of_its_one_rule():
    values = match_rules((("img/.*/kernel", 1.0), ("else", 0.0), ("t", 2.0)), NAMES, key="wd_mults")
    assert values == {NAMES[0]: 1.0, NAMES[1]: 0.0, NAMES[2]: 2.0}


def test_a_regex_matches_the_whole_name():
    for part in ("img", "Transformer", "kernel"):
        message = error_of(((part, 1.0), ("else", 0.0)))
        assert f"rule '{part}' matches no parameter" in message


def test_else_may_be_left_with_nothing():
    assert set(match_rules(((".*", 1.0), ("else", 0.0)), NAMES, key="k").values()) == {1.0}


def test_a_parameter_without_a_rule_is_named():
    message = error_of((("img/.*", 1.0),))
    assert "parameter 't' matches none of the rules 'img/.*'" in message
    assert "'else'" in message


def test_a_parameter_with_two_rules_is_named_with_both():
    message = error_of(((".*/kernel", 1.0), ("img/.*", 0.0), ("t", 1.0)))
    assert f"'{NAMES[0]}' matches 2 rules, '.*/kernel', 'img/.*'" in message


def test_a_rule_without_a_parameter_names_the_nearest():
    message = error_of((("img/pos_embeding", 1.0), ("else", 0.0)))
    assert "rule 'img/pos_embeding' matches no parameter; the nearest are 'img/pos_embedding'" in (
        message
    )


@pytest.mark.parametrize(
    ("rules", "part"),
    [
        ((("(", 1.0),), "'(' is not a regex"),
        ((("t", 1.0), ("t", 2.0), ("else", 0.0)), "the rule 't' stands there twice"),
        ((("else", 1.0), ("else", 2.0)), "the rule 'else' stands there twice"),
        (("t", 1.0), "'t' is not one"),
        (3, "not 3"),
        (((1, "t"),), "(1, 't') is not one"),
    ],
)
def test_a_malformed_list_is_refused(rules, part):
    assert part in error_of(rules)
