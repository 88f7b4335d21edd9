"""The data of an evaluation: all of it, or an error."""

from typing import Any

from base.errors import UserError
from input_pipeline.errors import BadExample

ADVICE = "evaluation skips nothing: repair it or take it out of the data"


class StrictSource:
    """A source whose examples must all be usable: what training would leave out is an error.

    Raises:
      UserError: the source left something out when it was opened; later, an example cannot be read.
    """

    def __init__(self, source: Any):
        self._source, self.class_names = source, source.class_names
        damage = getattr(source, "damage", None)
        if damage:
            (kind, shard), count = max(damage.items(), key=lambda item: item[1])
            raise UserError(
                f"{sum(damage.values())} samples of an evaluation's data cannot be used, such as "
                f"{count} of {shard} ({kind}); {ADVICE}"
            )

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, i: int) -> dict[str, Any]:
        try:
            return self._source[i]
        except BadExample as bad:
            raise UserError(f"example {bad.id or i} cannot be read ({bad}); {ADVICE}") from bad
