"""The worker of the systems that are JAX: `loss_worker` has the protocol, `loss_jax` the losses."""

import json
import os
import pathlib
import sys
from typing import Any

import numpy as np

from benchmarks import loss_case as cases
from benchmarks.loss_worker import LossJob, serve, timed


def environment(job: LossJob) -> dict[str, str]:
    """Environment variables that must be set before JAX starts."""
    if job.platform != "cpu":
        # Several systems share the accelerator: none may take its memory in advance.
        return {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    # Emulated devices share the cores; a late one is no reason to abort.
    patience = "--xla_cpu_collective_call_terminate_timeout_seconds=600"
    emulated = f"--xla_force_host_platform_device_count={job.devices}"
    flags = f"{os.environ.get('XLA_FLAGS', '')} {patience} {emulated}".strip()
    return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}


class JaxSystem:
    def __init__(self, job: LossJob):
        import jax
        import jax.numpy as jnp

        from benchmarks import loss_jax

        self.job, self.folder, options = job, pathlib.Path(job.folder), dict(job.options)
        mesh = loss_jax.make_mesh(job.devices)
        shapes = loss_jax.Shapes(job.n * job.devices, job.d, job.dtype)
        self.form = options.pop("form")
        if self.form == "matmuls":
            self.program: Any = loss_jax.compile_matmuls(mesh, shapes)
        else:
            self.program = loss_jax.compile_loss(mesh, shapes, self.form, **options)
        shardings = loss_jax.shardings(self.program)
        self.arguments = []
        for name, sharding in zip(("zimg", "ztxt"), shardings):

            def rows_of_a_device(index, name=name):
                start, stop, _ = index[0].indices(shapes.pairs)
                rows = cases.read_rows(self.folder, name, start, stop)
                return rows.astype(jnp.dtype(shapes.dtype))

            shape = (shapes.pairs, shapes.d)
            z = jax.make_array_from_callback(shape, sharding, rows_of_a_device)
            self.arguments.append(z)
        for value, sharding in zip((cases.T, cases.B), shardings[2:]):
            self.arguments.append(jax.device_put(np.float32(value), sharding))
        self._block = jax.block_until_ready
        self._temp_bytes = loss_jax.temp_bytes

    def step(self):
        return self._block(self.program(*self.arguments))

    def prepare(self) -> dict:
        results = self.step()
        self.step()
        if self.form == "matmuls":
            return {"memory_bytes": None, "errors": None}
        loss, grads = results
        errors = None
        if cases.has_reference(self.folder):
            grads = [np.asarray(g, np.float64) for g in grads]
            errors = {
                name: cases.relative_error([cases.squares(self.folder, name, value)])
                for name, value in zip((*cases.GRADIENTS, "loss"), (*grads, np.asarray(loss)))
            }
        return {
            "memory_bytes": self._temp_bytes(self.program),
            "errors": errors,
            "loss": float(loss),
        }

    def measure(self, repeats: int) -> list[float]:
        self.step()  # other systems had the caches meanwhile
        return timed(self.step, repeats)


def main(argument: str) -> None:
    system: list[JaxSystem] = []
    job = LossJob(**json.loads(argument))

    def prepare() -> dict:
        system.append(JaxSystem(job))
        return system[0].prepare()

    serve(prepare, lambda repeats: system[0].measure(repeats))


if __name__ == "__main__":
    main(sys.argv[1])
