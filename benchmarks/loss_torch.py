"""The loss in PyTorch: the installed peers' public functions, called as their documents say.

`LOSSES` maps a peer to make(group, t, **options) -> loss(zimg, ztxt, t, b) of one process' rows.
The mean over processes of such a loss is the sum over all pairs divided by N, so the mean of its
gradients is that of the whole batch. What would average t, b and the loss over processes
(DistributedDataParallel does) is not part of a peer's time here.
"""

# pyright: reportMissingImports=false
# The peers are optional, and mostly in another environment.
import dataclasses
import importlib.metadata
import importlib.util
import inspect
import pathlib
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Group:
    """The processes of a run, and which one this is."""

    rank: int
    size: int


def open_clip(group: Group, d: int, *, dist_impl: str, chunk_size: int = 0) -> Callable:
    chunks = {"chunk_size": chunk_size} if chunk_size else {}
    return open_clip_module().SigLipLoss(
        rank=group.rank, world_size=group.size, dist_impl=dist_impl, **chunks
    )


def open_clip_module() -> Any:
    """open_clip/loss.py alone: the package imports torchvision and more, the loss only torch."""
    package = importlib.util.find_spec("open_clip")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError("open_clip is not installed")
    file = pathlib.Path(package.submodule_search_locations[0]) / "loss.py"
    spec = importlib.util.spec_from_file_location("open_clip_loss", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def siglip_kernel(group: Group, d: int, *, chunk_size: int = 0, backend: str = "") -> Callable:
    import siglip_kernel as peer

    if group.size > 1:
        return peer.DistributedSigLIPLoss(
            chunk_size=chunk_size, strategy="ring", rank=group.rank, world_size=group.size
        )

    # On one GPU it takes log t; autograd carries the gradient on to t.
    def loss(x, y, t, b):
        if chunk_size:
            return peer.fused_chunked_bf16_siglip_loss(x, y, t.log(), b, chunk_size=chunk_size)
        return peer.fused_siglip_loss(x, y, t.log(), b, backend=backend or "auto")

    return loss


def inf_cl(group: Group, d: int) -> Callable:
    import inf_cl as peer

    head = next(size for size in (256, 128, 64, 32, 16) if d % size == 0)

    # Off a process group only its single-GPU function differentiates `scale`.
    def one_way(q, k, t):
        if group.size == 1:
            return peer.cal_flash_loss(q, k, scale=t, head_dim=head).mean()
        return peer.cal_inf_loss(q, k, scale=t, head_dim=head)

    def loss(x, y, t, b):
        del b  # it cancels in a softmax
        return (one_way(x, y, t) + one_way(y, x, t)) / 2

    return loss


LOSSES = {"open_clip": open_clip, "siglip-kernel": siglip_kernel, "inf-cl": inf_cl}
PACKAGES = {"open_clip": "open_clip_torch", "siglip-kernel": "siglip-kernel", "inf-cl": "inf-cl"}


def probe() -> dict[str, Any]:
    """Versions of torch and the peers, number of GPUs, and whether open_clip's loss has chunks."""
    installed: dict[str, Any] = {"versions": {}, "gpus": 0, "open_clip_chunks": False}
    for name, package in {"torch": "torch", "triton": "triton", **PACKAGES}.items():
        try:
            installed["versions"][name] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if "torch" in installed["versions"]:
        import torch

        installed["gpus"] = torch.cuda.device_count()
        if "open_clip" in installed["versions"]:
            options = inspect.signature(open_clip_module().SigLipLoss.__init__).parameters
            installed["open_clip_chunks"] = "chunk_size" in options
    return installed
