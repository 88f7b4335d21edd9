"""A source of examples that are in memory."""

from collections.abc import Sequence

import numpy as np

from base.errors import UserError
from input_pipeline.sources.contract import Example


class Memory:
    """A source made of arrays or encoded bytes, for use from Python.

    Args:
      images: one per example, uint8 [h, w, 3] or encoded bytes; or one array [n, h, w, 3].
      texts: one text, or a list of texts, per example.
      labels: one integer per example, or None.
      class_names: the name of each label.
      ids: names for messages; None: 'memory/<i>'.

    Raises:
      UserError: the lengths differ, or a label has no name.
    """

    def __init__(
        self,
        *,
        images: Sequence[bytes | np.ndarray] | np.ndarray,
        texts: Sequence[str] | Sequence[Sequence[str]],
        labels: Sequence[int] | np.ndarray | None = None,
        class_names: Sequence[str] | None = None,
        ids: Sequence[str] | None = None,
    ):
        for name, values in (("texts", texts), ("labels", labels), ("ids", ids)):
            if values is not None and len(values) != len(images):
                raise UserError(
                    f"source 'memory': {len(images)} images but {len(values)} {name}; "
                    "give one per example"
                )
        self._images, self._labels, self._ids = images, labels, ids
        self._texts = [[text] if isinstance(text, str) else list(text) for text in texts]
        self.class_names = None if class_names is None else list(class_names)
        if self.class_names is not None and labels is not None and len(labels):
            low, high = int(np.min(labels)), int(np.max(labels))
            if low < 0 or high >= len(self.class_names):
                raise UserError(
                    f"source 'memory': labels go from {low} to {high}, but there are "
                    f"{len(self.class_names)} class_names"
                )

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, i: int) -> Example:
        example: Example = {
            "image": self._images[i],
            "texts": list(self._texts[i]),
            "id": f"memory/{i}" if self._ids is None else self._ids[i],
        }
        if self._labels is not None:
            example["label"] = int(self._labels[i])
        return example
