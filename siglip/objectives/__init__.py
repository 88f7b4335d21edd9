"""What a step optimises: one loss over embeddings, a sum over examples, or both."""

from collections.abc import Callable

from siglip.objectives.objective import Objective

__all__ = ["OBJECTIVES"]

# Config name -> factory (model, mesh, *, options) -> Objective. The losses of LOSSES are objectives
# too, under their own names (contrastive.py makes them so).
OBJECTIVES: dict[str, Callable[..., Objective]] = {}
