"""The science of SigLIP: towers, losses and their sharding, in pure JAX and Flax.

`siglip.load(...)` is a model to call, see library.py.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from siglip.library import Model, load

__all__ = ["Model", "load"]


def __getattr__(name: str) -> Any:
    # When it is asked for: it needs the image and text transforms, which the science does not.
    if name in ("Model", "load"):
        from siglip import library

        return getattr(library, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
