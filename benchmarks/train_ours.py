"""The worker that trains with this project: started by `benchmarks.train`.

It runs the step of `main.py`: trainers.step.update.make_update with AdamW and the ring loss, on a
mesh of all devices, from uint8 images on the host. `loss_worker` has the protocol.
"""

import functools
import json
import sys
import time
from typing import Any

import numpy as np

from benchmarks.loss_worker import serve
from benchmarks.train_case import TrainCase
from benchmarks.train_memory import host_peak_bytes, reset_host_peak

# A run's settings; open_clip's worker has the same optimizer.
RUN = {
    "lr": 1e-3,
    "wd": 1e-4,  # not multiplied by lr: 0.1 in torch.optim.AdamW's terms
    "wd_mults": ((".*/kernel", 1.0), ("else", 0.0)),
    "lr_mults": ((".*", 1.0),),
    "frozen": ((".*", False),),
    "clip_norm": 1.0,
    "optimizer": {"name": "adamw"},
    "schedule": {"name": "constant"},
}
LOG_EVERY = 50
WARM_UP = 3  # steps, for compilation and allocations


class Ours:
    def __init__(self, case: TrainCase):
        import jax
        from ml_collections import ConfigDict

        from siglip.losses import LOSSES
        from siglip.objectives.contrastive import make_contrastive
        from siglip.sharding import make_mesh
        from siglip.towers.two_towers import make_model
        from trainers.machine.host_memory import keep_freed_memory
        from trainers.step import train_state
        from trainers.step.optimizer import frozen_mask, make_tx
        from trainers.step.update import make_update

        self.on_cpu = jax.default_backend() == "cpu"
        if self.on_cpu:
            keep_freed_memory()  # as main.py does
        self.case, self.mesh = case, make_mesh()
        self.model = make_model(**case.model)
        image = np.zeros((1, case.res, case.res, 3), np.uint8)
        text = np.zeros((1, case.token_len), np.int32)
        config = ConfigDict(RUN)
        params = jax.eval_shape(self.model.init, jax.random.key(0), image, text)["params"]
        self.parameters = sum(x.size for x in jax.tree.leaves(params))
        tx, schedule = make_tx(
            config, params, total_steps=10**6, batch_size=case.batch, examples_per_epoch=None
        )
        self.loss_fn = LOSSES["sigmoid"](self.mesh)
        objectives = {"contrastive": make_contrastive(self.model, self.mesh, self.loss_fn)}
        abstract, init = train_state.make_state(
            self.model, objectives, tx, self.mesh, seed=0, inputs=(image, text)
        )
        self.update = make_update(
            self.model,
            objectives,
            tx,
            schedule,
            frozen_mask(config, params),
            self.mesh,
            jax.tree.map(lambda x: x.sharding, abstract),
            seed=0,
            log_every=LOG_EVERY,
        )
        self.state, self.tally = init(), train_state.new_tally(self.mesh)
        rng = np.random.default_rng(0)
        self.host = {
            "image": rng.integers(0, 256, (case.batch, *image.shape[1:]), np.uint8),
            "text": rng.integers(0, case.txt["vocab_size"], (case.batch, case.token_len), np.int32),
            "mask": np.ones(case.batch, bool),
        }

    def prepare(self) -> dict[str, Any]:
        import jax

        begin = time.monotonic()
        self._steps(WARM_UP)
        compile_s = time.monotonic() - begin
        if self.on_cpu:
            reset_host_peak()
        self._steps(1)
        peak = host_peak_bytes() if self.on_cpu else _device_peak_bytes()
        return {
            "parameters": self.parameters,
            "prepare_s": compile_s,
            "peak_bytes": peak,
            "parts": self._parts(),
            "loss": float(self.metrics["loss"]),
            "devices": jax.device_count(),
            "device_kind": jax.devices()[0].device_kind,
        }

    def measure(self, steps: int) -> list[float]:
        self._steps(1)  # other systems had the caches meanwhile
        begin = time.monotonic()
        self._steps(steps)
        return [(time.monotonic() - begin) / steps]

    def _steps(self, steps: int) -> None:
        """Runs steps, each prepared while the one before it runs, as in training."""
        import jax

        from siglip.sharding import to_device

        for _ in range(steps):
            batch = to_device(self.host, self.mesh)
            self.state, self.tally, self.metrics = self.update(self.state, self.tally, batch)
        jax.block_until_ready(self.state)

    def _parts(self) -> dict[str, float]:
        """Seconds of the parts of a step.

        The step is one program, so its parts are timed as programs of their own: towers; loss with
        its gradients; both with all gradients. Backward and update are what remains.
        """
        import jax

        from siglip.sharding import to_device

        def embed(params, batch) -> Any:
            rngs = {"dropout": jax.random.key(0)}
            outputs: Any = self.model.apply(
                {"params": params}, batch["image"], batch["text"], train=True, rngs=rngs
            )
            zimg, ztxt, out = outputs
            # Without the tokens: what a program returns, it has to write.
            return zimg, ztxt, {name: out[name] for name in ("t", "b")}

        def loss(zimg, ztxt, t, b, mask):
            return self.loss_fn(zimg, ztxt, t, b, mask)

        def whole(params, batch):
            zimg, ztxt, out = embed(params, batch)
            return loss(zimg, ztxt, out["t"], out["b"], batch["mask"])

        clock = functools.partial(_seconds, block=jax.block_until_ready)
        batch = to_device(self.host, self.mesh)
        forward = jax.jit(embed)
        zimg, ztxt, out = forward(self.state.params, batch)
        learned = (0, 1, 2) if out["b"] is None else (0, 1, 2, 3)
        loss_grads = jax.jit(jax.value_and_grad(loss, learned))
        all_grads = jax.jit(jax.value_and_grad(whole))
        seconds = {
            "transfer": clock(lambda: to_device(self.host, self.mesh)),
            "forward": clock(lambda: forward(self.state.params, batch)),
            "loss": clock(lambda: loss_grads(zimg, ztxt, out["t"], out["b"], batch["mask"])),
        }
        gradients = clock(lambda: all_grads(self.state.params, batch))
        step = clock(lambda: self._steps(1))
        seconds["backward"] = max(0.0, gradients - seconds["forward"] - seconds["loss"])
        seconds["update"] = max(0.0, step - gradients - seconds["transfer"])
        return seconds


def _seconds(step, *, block, repeats: int = 5) -> float:
    """Median of a few calls, the first not counted."""
    block(step())
    seconds = []
    for _ in range(repeats):
        begin = time.monotonic()
        block(step())
        seconds.append(time.monotonic() - begin)
    return sorted(seconds)[repeats // 2]


def _device_peak_bytes() -> int | None:
    """Peak bytes on the first device, initialisation and compilation included."""
    import jax

    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


if __name__ == "__main__":
    ours: list[Ours] = []

    def prepare() -> dict[str, Any]:
        ours.append(Ours(TrainCase(**json.loads(sys.argv[1]))))
        return ours[0].prepare()

    serve(prepare, lambda steps: ours[0].measure(steps))
