"""The worker of the systems that are PyTorch: one process for each device, which this one leads.

gloo connects them on a CPU, NCCL on GPUs. A repetition lasts from the first start to the last end
of them all, after a barrier. `python -m benchmarks.loss_torch_worker --probe` prints what is
installed.
"""

# pyright: reportMissingImports=false
# The peers are optional, and mostly in another environment.
import json
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import sys
import tempfile
import time
import traceback
from typing import Any

import numpy as np

from benchmarks import loss_case as cases
from benchmarks import loss_torch
from benchmarks.loss_worker import Failed, LossJob, serve, why


class Rank:
    """One device's process: its rows, its loss, its gradients."""

    def __init__(self, job: LossJob, rank: int, meeting: str):
        import torch

        self.torch, self.job, self.rank = torch, job, rank
        self.folder, options = pathlib.Path(job.folder), dict(job.options)
        self.on_gpu = job.platform == "gpu"
        if self.on_gpu:
            torch.cuda.set_device(rank)
            # float32 is float32 for all systems, not TF32.
            torch.backends.cuda.matmul.allow_tf32 = False
        else:
            torch.set_num_threads(max(1, _cores() // job.devices))
        if job.devices > 1:
            torch.distributed.init_process_group(
                "nccl" if self.on_gpu else "gloo",
                init_method=f"file://{meeting}",
                rank=rank,
                world_size=job.devices,
            )
        device = f"cuda:{rank}" if self.on_gpu else "cpu"
        self.start = rank * job.n
        stop = self.start + job.n
        dtype = getattr(torch, job.dtype)
        self.leaves = [
            torch.from_numpy(cases.read_rows(self.folder, name, self.start, stop))
            .to(device, dtype)
            .requires_grad_()
            for name in ("zimg", "ztxt")
        ]
        self.leaves += [
            torch.tensor(value, device=device, requires_grad=True) for value in (cases.T, cases.B)
        ]
        make = loss_torch.LOSSES[options.pop("peer")]
        self.loss = make(loss_torch.Group(rank, job.devices), job.d, **options)

    def step(self):
        for leaf in self.leaves:
            leaf.grad = None
        loss = self.loss(*self.leaves)
        loss.backward()
        return loss.detach()

    def prepare(self) -> dict:
        """Peak bytes beyond inputs and gradients, and sums of squares for the error of all rows."""
        self.step()
        peak, loss = self._measured_step()
        grads = [leaf.grad for leaf in self.leaves]
        returned = sum(g.untyped_storage().nbytes() for g in grads if g is not None)
        result: dict[str, Any] = {"memory_bytes": peak - returned, "loss": float(loss)}
        if cases.has_reference(self.folder):
            rows = [g.float().cpu().numpy() / self.job.devices for g in grads[:2]]
            result["squares"] = {
                name: cases.squares(self.folder, name, value, self.start)
                for name, value in zip(cases.GRADIENTS, rows)
            }
            result["scalars"] = [0.0 if g is None else float(g) for g in grads[2:]]
        return result

    def _measured_step(self):
        torch = self.torch
        for leaf in self.leaves:
            leaf.grad = None
        if self.on_gpu:
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            loss = self.step()
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - before, loss
        from benchmarks.loss_torch_memory import PeakBytes

        with PeakBytes(*self.leaves) as bytes_held:
            loss = self.step()
        return bytes_held.peak, loss

    def measure(self, repeats: int) -> list[tuple[float, float]]:
        """Start and end of each repetition, on a clock that processes of a machine share."""
        spans = []
        self.step()  # other systems had the caches meanwhile
        for _ in range(repeats):
            if self.job.devices > 1:
                self.torch.distributed.barrier()
            self._synchronize()
            begin = time.monotonic()
            self.step()
            self._synchronize()
            spans.append((begin, time.monotonic()))
        if self.on_gpu:
            self.torch.cuda.empty_cache()  # the other systems' turn
        return spans

    def _synchronize(self) -> None:
        if self.on_gpu:
            self.torch.cuda.synchronize()


def run_rank(job: LossJob, rank: int, meeting: str, pipe) -> None:
    """Answers commands from `pipe` until it closes."""
    ranks: list[Rank] = []
    while True:
        try:
            command, *arguments = pipe.recv()
        except EOFError:
            os._exit(0)  # without leaving the process group, whose others may be gone
        try:
            if command == "prepare":
                ranks.append(Rank(job, rank, meeting))
            pipe.send(getattr(ranks[0], command)(*arguments))
        except Exception as error:
            traceback.print_exc()
            pipe.send({"failed": why(error)})


class Leader:
    """Starts the ranks, sends commands to all of them and combines their answers."""

    def __init__(self, job: LossJob):
        self.job = job
        self.pipes = []
        # A server imports PyTorch once and forks the ranks; it has neither threads nor a GPU open.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "benchmarks.loss_torch_memory"])
        meeting = str(pathlib.Path(tempfile.mkdtemp(dir=job.folder)) / "meeting")
        for rank in range(job.devices):
            pipe, theirs = context.Pipe()
            arguments = (job, rank, meeting, theirs)
            context.Process(target=run_rank, args=arguments, daemon=True).start()
            theirs.close()  # so that the end of a rank ends our waiting
            self.pipes.append(pipe)

    def ask(self, *command) -> list[Any]:
        for pipe in self.pipes:
            pipe.send(command)
        answers: dict[int, Any] = {}
        while len(answers) < len(self.pipes):
            waiting = {pipe: i for i, pipe in enumerate(self.pipes) if i not in answers}
            ready = multiprocessing.connection.wait(list(waiting))
            for pipe, rank in waiting.items():
                if pipe not in ready:
                    continue
                try:
                    answer = pipe.recv()
                except EOFError:
                    raise Failed(f"process {rank} of {self.job.devices} died") from None
                if isinstance(answer, dict) and "failed" in answer:
                    raise Failed(answer["failed"])  # the others may wait for it for ever
                answers[rank] = answer
        return [answers[rank] for rank in range(len(self.pipes))]

    def prepare(self) -> dict:
        ranks = self.ask("prepare")
        folder, loss = pathlib.Path(self.job.folder), float(np.mean([r["loss"] for r in ranks]))
        errors = None
        if "squares" in ranks[0] and self.job.options["peer"] != "inf-cl":  # that is a softmax
            errors = {
                name: cases.relative_error([r["squares"][name] for r in ranks])
                for name in ("zimg", "ztxt")
            }
            t, b = np.mean([r["scalars"] for r in ranks], axis=0)
            for name, value in (("t", t), ("b", b), ("loss", loss)):
                errors[name] = cases.relative_error([cases.squares(folder, name, value)])
        memory = max(r["memory_bytes"] for r in ranks)
        return {"memory_bytes": memory, "errors": errors, "loss": loss}

    def measure(self, repeats: int) -> list[float]:
        spans = self.ask("measure", repeats)
        return [
            max(end for _, end in together) - min(begin for begin, _ in together)
            for together in zip(*spans)
        ]


def environment(job: LossJob) -> dict[str, str]:
    if job.platform == "cpu":
        # All processes are on this machine, whatever name and address it has.
        return {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    return {}


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main(argument: str) -> None:
    if argument == "--probe":
        print(json.dumps(loss_torch.probe()))
        return
    leader = Leader(LossJob(**json.loads(argument)))
    serve(leader.prepare, leader.measure)


if __name__ == "__main__":
    main(sys.argv[1])
