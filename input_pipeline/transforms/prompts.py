"""Class names and prompt templates, and the prompts made of them."""

import functools
import json
import pathlib
from collections.abc import Sequence

from base.errors import UserError
from input_pipeline.transforms.canonicalize import canonicalize_text


@functools.cache
def _imagenet() -> dict:
    # CLIP's names and templates, with their source and licence inside the file.
    path = pathlib.Path(__file__).with_name("imagenet_prompts.json")
    return json.loads(path.read_text(encoding="utf-8"))


# Named sets, as in big_vision: clip_paper is CLIP's 80 and clip_best CLIP's 7, each with the bare
# name added.
TEMPLATES = {
    "class_name_only": lambda: ("{}",),
    "clip_paper": lambda: (*_imagenet()["templates_80"], "{}"),
    "clip_best": lambda: (*_imagenet()["templates_7"], "{}"),
}

# 1,000 names curated by CLIP, in the order of the labels (sorted wnids). "missile" (657, 744) and
# "sunglasses" (836, 837) name two classes each: images of the later one never count as top-1.
CLASSNAMES = {"imagenet": lambda: tuple(_imagenet()["classnames"])}


def resolve_templates(templates: tuple | str) -> tuple[str, ...]:
    """Templates from templates (with '{}') and names of sets, in any mixture.

    Raises:
      UserError: neither a template nor the name of a set.
    """
    found: list[str] = []
    for item in (templates,) if isinstance(templates, str) else templates:
        if "{}" in item:
            found.append(item)
        elif item in TEMPLATES:
            found.extend(TEMPLATES[item]())
        else:
            raise UserError(
                f"template {item!r} has no {{}} for the class name and names no set of templates "
                f"({', '.join(TEMPLATES)})"
            )
    if not found:
        raise UserError(f"templates is empty: give strings with {{}} or one of {list(TEMPLATES)}")
    return tuple(found)


def resolve_classnames(
    classnames: tuple | str, source_names: Sequence[str] | None
) -> tuple[str, ...]:
    """Class names in the order of the labels: given, of a named list, or ('source') the source's.

    Raises:
      UserError: the source has no names, or `classnames` is no named list.
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
    """The prompts of each class; every class has equally many unless aliases is 'all'.

    Args:
      names: one per class; commas separate aliases.
      templates: each with '{}' where the name goes.
      canonicalize: canonicalize_text on names (',' kept) and templates ('{}' kept), as big_vision.
      aliases: 'first' uses the name up to its first comma, 'all' every alias.

    Raises:
      UserError: `aliases` is neither, or nothing is left of a name.
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
