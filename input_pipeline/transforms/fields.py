"""Steps of config.input.fields: what of an example goes into the batch beside image and text."""

from typing import Any

import numpy as np

from input_pipeline.errors import BadExample

OF_A_BATCH = ("image", "image_mask", "image_shape", "text", "mask", "bad", "position", "index")


def keep(extra: dict[str, Any], example: dict[str, Any], *, name: str) -> dict[str, Any]:
    """A number, or an array of fixed shape, of the example, such as its label."""
    if name in OF_A_BATCH:
        raise ValueError(f"{name!r} is a name that every batch has")
    if name not in example:
        raise BadExample("damaged record", f"no {name!r} among {', '.join(sorted(example))}")
    value = np.asarray(example[name])
    if value.dtype.kind not in "biuf":
        raise ValueError(f"{name!r} is no number ({value.dtype}), which a batch cannot hold")
    return {**extra, name: value}


def rename(extra: dict[str, Any], example: dict[str, Any], *, old: str, new: str) -> dict[str, Any]:
    """A field that was kept, under another name."""
    if old not in extra:
        raise ValueError(f"{old!r} is not kept, so it cannot be renamed; there are {sorted(extra)}")
    if new in OF_A_BATCH:
        raise ValueError(f"{new!r} is a name that every batch has")
    return {new if key == old else key: value for key, value in extra.items()}


FIELD_OPS = {"keep": keep, "rename": rename}
