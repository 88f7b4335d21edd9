"""Per-parameter settings by regex: every parameter matches exactly one rule of a list."""

import re
from typing import Any

from base.errors import UserError
from base.words import similar

ELSE = "else"  # the rule for what no other rule of its list matches


def match_rules(rules: Any, names: list[str], *, key: str) -> dict[str, Any]:
    """{name: value} for the rules ((regex, value), ...), each regex matching a whole name.

    1. Every name must match exactly one regex. First-match-wins would let a rule be shadowed
       without a word, and no-match-means-default a misspelt one.
    2. The regex 'else' takes what no other rule matches, wherever it stands in the list.
    3. Every rule other than 'else' must match some name.

    Raises UserError (`key` is the setting's name) that names the rule and the parameter.
    """
    compiled = _compiled(rules, key)
    values, used = {}, set()
    for name in names:
        matches = [r for r, (regex, _) in compiled.items() if regex and regex.fullmatch(name)]
        if len(matches) > 1:
            raise UserError(
                f"{key}: parameter '{name}' matches {len(matches)} rules, "
                f"{_quoted(matches)}; it must match exactly one"
            )
        rule = matches[0] if matches else ELSE
        if rule not in compiled:
            raise UserError(
                f"{key}: parameter '{name}' matches none of the rules {_quoted(compiled)}; "
                f"add one, for instance ('{ELSE}', value) for all the others"
            )
        used.add(rule)
        values[name] = compiled[rule][1]
    for rule in compiled:
        if rule not in used and rule != ELSE:
            near = similar(rule, names, always=True)
            raise UserError(
                f"{key}: rule '{rule}' matches no parameter; the nearest are {_quoted(near)}"
            )
    return values


def _compiled(rules: Any, key: str) -> dict[str, tuple[re.Pattern | None, Any]]:
    shape = f"{key} must be a tuple of (regex, value) pairs"
    if not isinstance(rules, tuple | list):
        raise UserError(f"{shape}, not {rules!r}")
    compiled = {}
    for rule in rules:
        if not (isinstance(rule, tuple | list) and len(rule) == 2 and isinstance(rule[0], str)):
            raise UserError(f"{shape}; {rule!r} is not one")
        pattern, value = rule
        if pattern in compiled:
            raise UserError(f"{key}: the rule '{pattern}' stands there twice")
        try:
            compiled[pattern] = (None if pattern == ELSE else re.compile(pattern), value)
        except re.error as error:
            raise UserError(f"{key}: '{pattern}' is not a regex: {error}") from error
    return compiled


def _quoted(names: Any) -> str:
    return ", ".join(f"'{name}'" for name in names)
