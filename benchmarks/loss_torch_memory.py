"""Counts the peak bytes of PyTorch's tensors on a CPU, where PyTorch has no such counter."""

# pyright: reportMissingImports=false
# The peers are optional, and mostly in another environment.
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakBytes(TorchDispatchMode):
    """A context whose `peak` is the most bytes that storages allocated in it held at one time.

    It sees what operators return, so neither what an operator allocates and frees inside (packed
    operands of a matmul, say) nor what gloo copies into sockets is in it; receive buffers are.
    """

    def __init__(self, *known: torch.Tensor):
        super().__init__()
        self.live = self.peak = 0
        self._seen: dict[int, weakref.ref] = {}
        self._known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(results):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf.untyped_storage())
        return results

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen or key in self._known:
            return
        self.live += size
        self.peak = max(self.peak, self.live)

        def gone(_) -> None:
            self.live -= size
            del self._seen[key]

        self._seen[key] = weakref.ref(storage, gone)
