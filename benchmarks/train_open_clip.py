"""The worker that trains open_clip's model: started by `benchmarks.train` in the peer's Python.

A step does what open_clip_train does: towers under autocast (bfloat16) or not (float32),
SigLipLoss, clipped gradients, AdamW, the clamped logit scale; compiled is its `--torchcompile`.
AdamW is given fused=True, which open_clip does not set and which is faster. Of this project it
imports only modules that need the standard library alone. `loss_worker` has the protocol.
"""

# pyright: reportMissingImports=false

import contextlib
import dataclasses
import importlib
import itertools
import json
import math
import os
import sys
import time
import warnings
from typing import Any

from benchmarks.loss_worker import Failed, serve
from benchmarks.train_case import TrainCase
from benchmarks.train_memory import host_peak_bytes, reset_host_peak

TRUNK = "benchmark_vit"  # the name under which timm learns the sizes of the image tower
WARM_UP = 3  # steps: compilation, the optimizer's state, the allocator
PARTS = ("transfer", "forward", "loss", "backward", "update")


@dataclasses.dataclass(frozen=True)
class TrainJob:
    case: dict[str, Any]
    compiled: bool
    import_first: str


def why_not(case: TrainCase) -> str:
    """The reason why open_clip has no such towers; "" if it has them."""
    img, txt = case.img, case.txt
    for wrong, reason in (
        (img["pool"] != "map", f"image pool {img['pool']!r}"),
        (img["out_dim"], "a head on the image tower"),
        (img["drop_patches"], "dropped patches of a SigLIP tower"),
        (txt["pool"] not in ("last", "first"), f"text pool {txt['pool']!r}"),
        (txt["bottleneck"], "a bottleneck behind the token table"),
        (case.model.get("b_init", -10.0) is None, "a sigmoid loss without a bias"),
    ):
        if wrong:
            return f"open_clip's model has no {reason.removeprefix('a ')} as this one"
    return ""


class OpenClip:
    def __init__(self, case: TrainCase, compiled: bool, import_first: str):
        if import_first:
            importlib.import_module(import_first)
        try:
            import open_clip
            import torch
            from open_clip.loss import SigLipLoss
        except ImportError as error:
            raise Failed(f"not installed in {sys.executable}: {error}") from None

        warnings.filterwarnings("ignore")
        torch.manual_seed(0)
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        torch.backends.cuda.matmul.allow_tf32 = True  # as open_clip_train does
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
        self.torch, self.amp = torch, case.precision == "bfloat16"
        self.versions = {"open_clip": open_clip.__version__, "torch": torch.__version__}
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.original = make_model(case).to(self.device).train()
        self.model = torch.compile(self.original) if compiled else self.original
        self.loss_fn = SigLipLoss()
        parameters = list(self.original.parameters())
        self.parameters = sum(p.numel() for p in parameters)
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
                {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.1},
            ],
            lr=1e-3,
            betas=(0.9, 0.95),
            fused=True,
        )
        # Its loader hands over normalised float32 images, in pinned memory for a GPU.
        self.host = (
            torch.rand(case.batch, 3, case.res, case.res) * 2 - 1,
            torch.randint(case.txt["vocab_size"], (case.batch, case.token_len)),
        )
        if self.device.type == "cuda":
            self.host = tuple(x.pin_memory() for x in self.host)

    def prepare(self) -> dict[str, Any]:
        begin = time.monotonic()
        self._steps(WARM_UP)
        prepare_s = time.monotonic() - begin
        if self.device.type == "cuda":
            self.torch.cuda.reset_peak_memory_stats()
        else:
            reset_host_peak()
        self._steps(1)
        on_gpu = self.device.type == "cuda"
        return {
            "parameters": self.parameters,
            "prepare_s": prepare_s,
            "peak_bytes": self.torch.cuda.max_memory_allocated() if on_gpu else host_peak_bytes(),
            "parts": self._parts(),
            "versions": self.versions,
        }

    def measure(self, steps: int) -> list[float]:
        self._steps(1)  # other systems had the caches meanwhile
        begin = time.monotonic()
        self._steps(steps)
        return [(time.monotonic() - begin) / steps]

    def _steps(self, steps: int) -> None:
        for _ in range(steps):
            self._step(lambda: None)
        self._wait()

    def _step(self, mark) -> None:
        """`mark()` is called between the parts."""
        mark()
        images, texts = (x.to(self.device, non_blocking=True) for x in self.host)
        mark()
        self.optimizer.zero_grad()
        with self._autocast():
            out = self.model(images, texts)
            mark()
            loss = self.loss_fn(**out)
        mark()
        loss.backward()
        mark()
        self.torch.nn.utils.clip_grad_norm_(self.original.parameters(), 1.0, norm_type=2.0)
        self.optimizer.step()
        with self.torch.no_grad():
            self.original.logit_scale.clamp_(0, math.log(100))
        mark()

    def _parts(self, repeats: int = 5) -> dict[str, float]:
        """Medians of the seconds of each part, which waits for the one before it."""
        seconds = []
        for _ in range(repeats):
            marks: list[float] = []

            def mark(marks=marks):
                self._wait()
                marks.append(time.monotonic())

            self._step(mark)
            seconds.append([b - a for a, b in itertools.pairwise(marks)])
        return {name: sorted(column)[repeats // 2] for name, column in zip(PARTS, zip(*seconds))}

    def _autocast(self):
        if not self.amp:
            return contextlib.nullcontext()
        return self.torch.amp.autocast(self.device.type, dtype=self.torch.bfloat16)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            self.torch.cuda.synchronize()


def make_model(case: TrainCase):
    """open_clip's CustomTextCLIP with these towers, otherwise as in its ViT-B-16-SigLIP2.json.

    timm makes models by name, so the sizes of the image tower get one first. GELU is the tanh form,
    as in ours and in the released weights.
    """
    import timm
    from open_clip.model import CustomTextCLIP
    from timm.models.vision_transformer import VisionTransformer

    img, txt = case.img, case.txt

    def ratio(tower: dict[str, Any]) -> float:
        return (tower["mlp_dim"] + 0.5) / tower["width"]  # both round the product down

    def trunk(num_classes: int, global_pool: str, **unused):
        del unused  # pretrained weights and where they are
        return VisionTransformer(
            img_size=case.res,
            patch_size=img["patch_size"],
            embed_dim=img["width"],
            depth=img["depth"],
            num_heads=img["num_heads"],
            mlp_ratio=ratio(img),
            class_token=False,
            act_layer="gelu_tanh",
            num_classes=num_classes,
            global_pool=global_pool,
        )

    trunk.__name__ = TRUNK
    timm.models.register_model(trunk)
    return CustomTextCLIP(
        embed_dim=img["width"],
        vision_cfg={
            "image_size": case.res,
            "timm_model_name": TRUNK,
            "timm_model_pretrained": False,
            "timm_pool": "map",
            "timm_proj": "none",
        },
        text_cfg={
            "context_length": case.token_len,
            "vocab_size": txt["vocab_size"],
            "width": txt["width"],
            "heads": txt["num_heads"],
            "layers": txt["depth"],
            "mlp_ratio": ratio(txt),
            "no_causal_mask": True,
            "proj_bias": True,
            "pool_type": txt["pool"],
            "norm_kwargs": {"eps": 1e-6},
            "act_kwargs": {"approximate": "tanh"},
        },
        init_logit_scale=math.log(10),
        init_logit_bias=-10,
        output_dict=True,
    )


if __name__ == "__main__":
    peers: list[OpenClip] = []

    def prepare() -> dict[str, Any]:
        job = TrainJob(**json.loads(sys.argv[1]))
        peers.append(OpenClip(TrainCase(**job.case), job.compiled, job.import_first))
        return peers[0].prepare()

    serve(prepare, lambda steps: peers[0].measure(steps))
