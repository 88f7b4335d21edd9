"""What is known of each kind of accelerator: speed, memory, links. The one table of its kind."""

import dataclasses
from collections.abc import Mapping
from typing import Any

GiB = 2**30


def fusions_may_have(mebibytes: int) -> dict[str, str]:
    """Options for more of a TPU's vector memory (128 MiB in v5e and v6e) to one operation than the
    16 MiB of default, for larger tiles of matmuls."""
    return {"xla_tpu_scoped_vmem_limit_kib": str(mebibytes * 1024)}


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device as JAX counts them: a chip, or one of the two cores of a TPU7x.

    Vendors' figures, except for `latency` (an estimate), `clock` of TPUs (that at which their
    matrix units reach `flops`) and `memory` of TPUs (what XLA lets a program have).

    Attributes:
      flops: dense matmul FLOP/s in bfloat16.
      memory: bytes that a program can have.
      bandwidth: bytes/s to and from that memory.
      wire: bytes/s of one link to another device, in one direction.
      latency: seconds before the first byte of a message arrives.
      torus: whether each device has links of its own to its neighbours, which run at once.
      clock: cycles/s, for XLA's estimates of cycles; None where XLA gives none.
      compiler_options: XLA's, with which a training step is compiled.
      cores: that share the work of a kernel.
    """

    flops: float
    memory: int
    bandwidth: float
    wire: float
    latency: float
    torus: bool
    clock: float | None = None
    compiler_options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    cores: int = 1


# The beginning of JAX's device_kind -> the chip; the first that fits counts.
CHIPS = {
    "TPU v4": Chip(275e12, int(30.75 * GiB), 1228e9, 45e9, 2e-6, True, 1.05e9, cores=2),
    "TPU v5 lite": Chip(
        197e12, int(15.75 * GiB), 819e9, 45e9, 2e-6, True, 1.5e9, fusions_may_have(32)
    ),
    "TPU v5e": Chip(197e12, int(15.75 * GiB), 819e9, 45e9, 2e-6, True, 1.5e9, fusions_may_have(32)),
    "TPU v5": Chip(459e12, int(95.74 * GiB), 2765e9, 90e9, 2e-6, True, 1.75e9, cores=2),
    "TPU v6": Chip(
        918e12, int(31.25 * GiB), 1640e9, 90e9, 2e-6, True, 1.75e9, fusions_may_have(32)
    ),
    "TPU7x": Chip(1153e12, int(94.75 * GiB), 3690e9, 100e9, 2e-6, True, 2.2e9),
    "NVIDIA A100": Chip(312e12, 80 * GiB, 2039e9, 300e9, 2e-5, False),
    "NVIDIA H100 PCIe": Chip(756e12, 80 * GiB, 2000e9, 300e9, 2e-5, False),
    "NVIDIA H100 NVL": Chip(835e12, 94 * GiB, 3900e9, 300e9, 2e-5, False),
    "NVIDIA H100": Chip(989e12, 80 * GiB, 3352e9, 450e9, 2e-5, False),
    "NVIDIA H200": Chip(989e12, 140 * GiB, 4800e9, 450e9, 2e-5, False),
}
# Emulated devices share the cores and the memory of one machine, see docs/ring.md.
CPU = Chip(60e9, 0, 20e9, 5e9, 5e-4, False)
UNKNOWN = Chip(300e12, 0, 1e12, 50e9, 2e-5, False)


def find_chip(device: Any) -> Chip | None:
    """The chip of a JAX device; None for kinds that are not in the table, CPUs among them."""
    return find_kind(device.device_kind)


def find_kind(kind: str) -> Chip | None:
    """The chip of a device_kind; None for kinds that are not in the table, CPUs among them."""
    return next((chip for name, chip in CHIPS.items() if kind.startswith(name)), None)
