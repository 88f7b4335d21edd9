"""Class names, prompt templates, and the prompts that they make together."""

import functools
import json
import pathlib
from collections.abc import Sequence

from base.errors import UserError
from input_pipeline.transforms.canonicalize import canonicalize_text


@functools.cache
def _imagenet() -> dict:
    # CLIP's class names and templates; the file holds their source and licence.
    path = pathlib.Path(__file__).with_name("imagenet_prompts.json")
    return json.loads(path.read_text(encoding="utf-8"))


# Named sets, as in big_vision: clip_paper is CLIP's 80 and clip_best CLIP's 7 templates, each
# followed by the bare name.
TEMPLATES = {
    "class_name_only": lambda: ("{}",),
    "clip_paper": lambda: (*_imagenet()["templates_80"], "{}"),
    "clip_best": lambda: (*_imagenet()["templates_7"], "{}"),
}

# CLIP's 1,000 curated names in the order of the labels (sorted wnids). "missile" (657, 744) and
# "sunglasses" (836, 837) name two classes each: images of the later one are never top-1 correct.
CLASSNAMES = {"imagenet": lambda: tuple(_imagenet()["classnames"])}


def resolve_templates(templates: tuple | str) -> tuple[str, ...]:
    """All templates: those given (with '{}'), and those of the sets given by name.

    Raises:
      UserError: an item is neither a template nor the name of a set, or there is none.
    """
    resolved: list[str] = []
    for item in (templates,) if isinstance(templates, str) else templates:
        if "{}" in item:
            resolved.append(item)
        elif item in TEMPLATES:
            resolved.extend(TEMPLATES[item]())
        else:
            raise UserError(
                f"template {item!r} has no {{}} for the class name and names no set of templates "
                f"({', '.join(TEMPLATES)})"
            )
    if not resolved:
        raise UserError(f"templates is empty: give strings with {{}} or one of {list(TEMPLATES)}")
    return tuple(resolved)


def resolve_classnames(
    classnames: tuple | str, source_names: Sequence[str] | None
) -> tuple[str, ...]:
    """Class names in the order of the labels.

    Args:
      classnames: the names themselves, the name of a list in CLASSNAMES, or 'source' for
        source_names.
      source_names: class names of the source, if it has any.

    Raises:
      UserError: the source has no names, or there is no such list.
    """
    if not isinstance(classnames, str):
        names = tuple(classnames)
    elif classnames == "source":
        names = tuple(source_names or ())
    elif classnames in CLASSNAMES:
        names = CLASSNAMES[classnames]()
    else:
        raise UserError(
            f"classnames {classnames!r} is none of source, {', '.join(CLASSNAMES)}; "
            "or give a tuple of names"
        )
    if not names:
        raise UserError(
            "zero-shot classification needs class names, and this source has none: choose its "
            "labels, or set classnames to a tuple of names in the order of the labels"
        )
    return names


def class_prompts(
    names: Sequence[str], templates: Sequence[str], *, canonicalize: bool, aliases: str
) -> list[list[str]]:
    """Prompts of each class. All classes have equally many, unless aliases is 'all'.

    Args:
      names: one per class; commas separate aliases.
      templates: with '{}' in the place of the name.
      canonicalize: apply canonicalize_text to names (',' kept) and templates ('{}' kept), as
        big_vision does.
      aliases: 'first' uses the name up to its first comma, 'all' every alias.

    Raises:
      UserError: `aliases` has another value, or nothing is left of a name.
    """
    if aliases not in ("first", "all"):
        raise UserError(f"aliases {aliases!r} is none of first, all")
    if canonicalize:
        names = [canonicalize_text(n, keep_punctuation_exact_string=",") for n in names]
        templates = [canonicalize_text(t, keep_punctuation_exact_string="{}") for t in templates]
    prompts = []
    for i, name in enumerate(names):
        parts = [alias.strip() for alias in name.split(",")]
        parts = parts[:1] if aliases == "first" else [part for part in parts if part]
        if not parts or not parts[0]:
            raise UserError(f"class {i} has no name left to write into a prompt: {name!r}")
        prompts.append([t.replace("{}", alias) for alias in parts for t in templates])
    return prompts
