"""Devices of machines that are not here, to compile programs for: TPU slices, NVIDIA hosts, CPUs.

Nothing can run on such devices. A program is lowered for shapes with shardings over them, compiled
by the compiler of their kind (libtpu, or JAX's CUDA plugin), and asked what it needs.
"""

import importlib.util
import re
from collections.abc import MutableMapping
from typing import Any

from base.errors import UserError
from base.words import nearest, one_line

# Name of a generation -> (axes of its layout, dimension of a host, options of libtpu).
TPUS: dict[str, dict[str, Any]] = {
    "v4": {"axes": 3, "chip_config_name": "megacore"},
    "v5e": {"axes": 2},
    "v5p": {"axes": 3},
    "v6e": {"axes": 2},
    "tpu7x": {"axes": 3},
}
# Name -> (compute capability, multiprocessors, bytes/s, L2 bytes, GHz, memory, JAX's kind).
GPUS: dict[str, tuple] = {
    "a100": ((8, 0), 108, 2039e9, 40 << 20, 1.41, 80 << 30, "NVIDIA A100-SXM4-80GB"),
    "h100": ((9, 0), 132, 3352e9, 50 << 20, 1.98, 80 << 30, "NVIDIA H100 80GB HBM3"),
    "h200": ((9, 0), 132, 4800e9, 50 << 20, 1.98, 140 << 30, "NVIDIA H200"),
}
EXAMPLES = ("v4:4x4x2", "v5e:16x16", "v6e:8x8", "h200:1x1x8", "cpu:8")
INSTALL = {
    "tpu": "pip install -r requirements-tpu.txt",
    "cuda": "pip install -r requirements-cuda.txt",
}

# Without these libtpu looks for a TPU machine around it, and only one process can load it.
LIBTPU_ALONE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_LOG_DIR": "disabled",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "none",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TF_CPP_MIN_LOG_LEVEL": "2",
}


def prepare(environ: MutableMapping[str, str]) -> None:
    """Sets the variables that compile-only needs; before jax is imported. The user's win."""
    environ["JAX_PLATFORMS"] = "cpu"
    for name, value in LIBTPU_ALONE.items():
        environ.setdefault(name, value)


def find_devices(name: str) -> list[Any]:
    """The devices of 'v4:4x4x2', 'h200:1x1x8' (slices x hosts x cards) or 'cpu:8', in JAX's order.

    Raises:
      UserError: an unknown name, a layout that does not exist, or a compiler that is not installed.
    """
    kind, colon, layout = name.partition(":")
    if not colon or not re.fullmatch(r"\d+(x\d+)*", layout) or "0" in layout.split("x"):
        raise UserError(f"topology {name!r} is not KIND:LAYOUT, such as {', '.join(EXAMPLES)}")
    sizes = [int(size) for size in layout.split("x")]
    if kind == "cpu" and len(sizes) == 1:
        return _cpus(name, sizes[0])
    if kind in TPUS and len(sizes) == TPUS[kind]["axes"]:
        return _tpus(name, kind)
    if kind in GPUS and len(sizes) == 3:
        return _gpus(name, kind, layout)
    if kind in (*TPUS, *GPUS, "cpu"):
        example = next(example for example in (*EXAMPLES, f"{kind}:2x2x1") if kind in example)
        raise UserError(f"topology {name!r}: {kind} has another number of axes, such as {example}")
    raise UserError(
        f"topology {name!r}: {kind!r} is unknown; {nearest(kind, (*TPUS, *GPUS, 'cpu'))}"
    )


def _cpus(name: str, count: int) -> list[Any]:
    import jax

    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError as error:  # the backend is up already
        if len(jax.devices("cpu")) < count:
            raise UserError(f"topology {name!r}: {one_line(error)}") from error
    return jax.devices("cpu")[:count]


def _tpus(name: str, kind: str) -> list[Any]:
    from jax.experimental import topologies

    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"topology {name!r} needs libtpu, the TPU's compiler: {INSTALL['tpu']}")
    options = {k: v for k, v in TPUS[kind].items() if k != "axes"}
    try:
        return list(topologies.get_topology_desc(name, "tpu", **options).devices)
    except Exception as error:  # jax raises several kinds for a layout that libtpu refuses
        raise UserError(
            f"topology {name!r} is no slice that libtpu knows ({one_line(error, 120)}); layouts "
            "are powers of two from 2x2 or 2x2x1 on, such as " + ", ".join(EXAMPLES[:3])
        ) from error


def _gpus(name: str, kind: str, layout: str) -> list[Any]:
    from jax.experimental import topologies

    plugins = ("jax_cuda13_plugin", "jax_cuda12_plugin")
    if not any(importlib.util.find_spec(plugin) for plugin in plugins):
        raise UserError(f"topology {name!r} needs JAX's CUDA plugin: {INSTALL['cuda']}")
    return list(
        topologies.get_topology_desc(
            name, "cuda", topology=layout, target_config=_target_config(kind)
        ).devices
    )


def _target_config(kind: str) -> str:
    """What XLA wants to know of a card that it cannot ask (its GpuTargetConfigProto)."""
    (major, minor), cores, bandwidth, cache, clock, memory, description = GPUS[kind]
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {233472 if major >= 9 else 167936}
  shared_memory_per_block_optin: {232448 if major >= 9 else 166912}
  threads_per_core_limit: 2048
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  core_count: {cores}
  fpus_per_core: {128 if major >= 9 else 64}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {int(bandwidth)}
  l2_cache_size: {cache}
  clock_rate_ghz: {clock}
  device_memory_size: {memory}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 }}
runtime_version {{ major: 13 }}
device_description_str: "{description}"
"""
