"""FLOPs of a traced step, memory of a compiled one, and what an error says of memory."""

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import AxisType, Mesh, PartitionSpec

from base.errors import UserError
from benchmarks import train
from benchmarks.train_case import step_flops
from siglip.chips import CHIPS
from siglip.towers.remat import REMAT
from trainers.fit import trial
from trainers.fit.compiled import Memory, buffers_reported, memory_of, needed, shortage
from trainers.fit.config import load
from trainers.fit.flops import matmul_flops

SMALL = [("model.img.variant", "mu/16"), ("model.txt.variant", "mu"), ("input.res", "32")]


def flops_of(f, *args) -> int:
    return matmul_flops(jax.make_jaxpr(f)(*args).jaxpr)


def test_flops_of_matmuls_in_loops_branches_and_recomputation():
    x = jnp.ones((8, 8))
    once = 2 * 8**3
    assert flops_of(lambda x: x @ x, x) == once
    assert (
        flops_of(lambda x: jax.lax.scan(lambda c, _: (c @ c, None), x, length=7)[0], x) == 7 * once
    )
    assert flops_of(lambda x: jax.lax.cond(x[0, 0] > 0, lambda x: x @ x, lambda x: x, x), x) == 0
    assert flops_of(jax.jit(lambda x: jnp.sin(x @ x)), x) == once
    loss = lambda x: jnp.sin(jnp.sin(x @ x) @ x).sum()  # noqa: E731
    assert flops_of(jax.grad(loss), x) == 6 * once  # without the last product's value
    assert flops_of(jax.grad(jax.checkpoint(loss)), x) > flops_of(jax.grad(loss), x)


def test_flops_of_a_convolution():
    image, kernel = jnp.ones((2, 32, 32, 3)), jnp.ones((16, 16, 3, 64))
    conv = lambda x, k: jax.lax.conv_general_dilated(  # noqa: E731
        x, k, (16, 16), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    assert flops_of(conv, image, kernel) == 2 * (2 * 2 * 2) * 64 * 16 * 16 * 3


def test_flops_inside_a_shard_map_are_those_of_all_devices():
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",), axis_types=(AxisType.Auto,))
    rows = PartitionSpec("data")
    f = jax.shard_map(lambda x: x @ x.T, mesh=mesh, in_specs=rows, out_specs=rows)
    assert flops_of(f, jnp.ones((8, 16))) == 4 * 2 * 2 * 2 * 16


def test_flops_of_a_kernel_are_those_of_all_its_blocks():
    def kernel(x, out):
        out[...] = x[...] @ x[...]

    call = pl.pallas_call(
        kernel,
        grid=(5,),
        in_specs=[pl.BlockSpec((8, 8), lambda i: (i, 0))],
        out_specs=pl.BlockSpec((8, 8), lambda i: (i, 0)),
        out_shape=jax.ShapeDtypeStruct((40, 8), jnp.float32),
    )
    assert flops_of(call, jnp.ones((40, 8))) == 5 * 2 * 8**3


def test_flops_of_a_step_are_three_forward_passes_and_the_loss():
    """Less what needs no gradient: that of the pixels."""
    case = train.built_in("small", 8, "float32")
    towers = step_flops(case)
    settings = [
        ("input.batch_size", "8"),
        ("model.img.variant", "S/16"),
        ("model.txt.variant", "S"),
        *((f"model.{t}.depth", "6") for t in ("img", "txt")),
        ("input.token_len", "64"),
        ("model.txt.vocab_size", "32000"),
        ("model.dtype", "float32"),
    ]
    config, _ = load("configs/siglip_b16.py", settings)
    counted = trial._model_flops(config, jax.devices()[:1])
    patches = 2 * 8 * 196 * 768 * 384  # the gradient by the pixels, which nobody asks for
    loss = 3 * 2 * 8 * 8 * 384
    assert counted == towers - patches + loss


@pytest.mark.parametrize(
    "message, log, peak, limit",
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (65.50G) exceeds available HBM (30.75G).",
            "",
            65.5,
            30.75,
        ),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory "
            "space hbm. Used 256.00G of 30.75G hbm. Exceeded hbm capacity by 225.25G.",
            "",
            256,
            30.75,
        ),
    ],
)
def test_memory_that_an_error_says_is_needed(message, log, peak, limit):
    memory = needed(message, log)
    assert memory is not None
    assert memory.peak == peak * 2**30 and memory.limit == limit * 2**30 and not memory.fits
    assert needed(message.replace("RESOURCE_EXHAUSTED", "INTERNAL"), log) is None


@pytest.mark.parametrize(
    "message, size",
    [
        ("RESOURCE_EXHAUSTED: (65.50G) exceeds available HBM (30.75G)", " (65.5 GiB of 30.8)"),
        ("RESOURCE_EXHAUSTED: trying to allocate 4294967296 bytes.", " (a buffer of 4.0 GiB)"),
        ("RESOURCE_EXHAUSTED: Out of memory allocating 1073741824 bytes", " (a buffer of 1.0 GiB)"),
        ("RESOURCE_EXHAUSTED: of something else", ""),
    ],
)
def test_what_an_error_says_of_memory(message, size):
    assert shortage(message) == size


def test_a_kernel_too_large_for_the_vector_memory_is_not_taken_for_one_that_fits():
    assert needed("RESOURCE_EXHAUSTED: Used 18.5M of 16.0M vmem. Exceeded by 2.5M.") is None
    assert needed("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem.") is None


def test_the_largest_buffers_of_a_program_that_does_not_fit():
    log = (
        "  cumulative_size;       size;       offset; used_by_n_values; shapes_list\n"
        "  ---------\n"
        "    2.00GiB(20%);     2.00GiB;            0;                1; bf16[12,128,196,3072]\n"
        "   10.00GiB(100%);    8.00GiB;            0;                3; f32[65536,1048576]\n"
    )
    memory = needed("RESOURCE_EXHAUSTED: (10.00G) exceeds available HBM (4.00G)", log)
    assert memory is not None and not memory.fits
    assert memory.largest == ((8 << 30, "f32[65536,1048576]"), (2 << 30, "bf16[12,128,196,3072]"))


def test_what_cpp_writes_on_stderr_goes_to_the_log_and_python_s_lines_to_the_terminal(capfd):
    import sys

    environ: dict[str, str] = {}
    with buffers_reported(environ) as log:
        os.write(2, b"from C++\n")
        print("from Python", file=sys.stderr)
        log.seek(0)
        assert log.read() == b"from C++\n"
    os.write(2, b"afterwards\n")
    assert capfd.readouterr().err == "from Python\nafterwards\n"
    assert environ["TPU_STDERR_LOG_LEVEL"] == "0"


def test_memory_of_a_compiled_program_counts_arguments_once_and_what_lies_between():
    def loss(x):
        return jax.lax.scan(lambda c, _: (jnp.sin(c) @ x, None), x, length=16)[0].sum()

    x = jnp.ones((256, 256))
    compiled = jax.jit(lambda x: x @ x + 1, donate_argnums=0).lower(x).compile()
    memory = memory_of(compiled, jax.devices()[0])
    assert memory.arguments == x.nbytes and x.nbytes <= memory.peak <= 3 * x.nbytes
    memory = memory_of(jax.jit(jax.grad(loss)).lower(x).compile(), jax.devices()[0])
    assert memory.limit == 0 and memory.fits
    assert memory.arguments == x.nbytes
    assert memory.peak > 16 * x.nbytes  # the residuals of the loop
    assert str(memory).endswith(" MiB a device")
    assert str(Memory(3 << 30, 4 << 30)) == "3.0 of 4.0 GiB a device, 25% to spare"


def test_settings_that_are_tried_are_ones_that_the_devices_take(monkeypatch):
    chip = dataclasses.replace(CHIPS["TPU v4"], memory=1)
    monkeypatch.setattr(trial, "find_chip", lambda device: chip)
    config, _ = load("configs/siglip_b16.py", [("input.batch_size", "24"), *SMALL])
    tried = list(trial.candidates(config, jax.devices()[:6]))
    assert tried[0] == {}
    assert tried[1] == {"mesh.data": "-1", "mesh.fsdp": "6"}
    assert [settings.get("model.remat") for settings in tried[2:6]] == [*REMAT[1:]]
    assert [settings["input.microbatch"] for settings in tried[6:]] == ["12", "6"]
    with config.unlocked():
        config.input.batch_size, config.model.img.group = 72, 4  # of 12 examples a device
    tried = list(trial.candidates(config, jax.devices()[:6]))
    assert [settings["input.microbatch"] for settings in tried[6:]] == ["18"]  # 36: 6 a device


def test_overrides_of_what_is_not_used_are_told():
    config, notes = load("configs/siglip_b16.py", [("input.tokenizer.name", "sentencepiece")])
    assert "--config.input.tokenizer.name changes nothing here" in notes
    assert config.model.txt.vocab_size == 32_000


def test_a_step_too_large_for_the_compiler_here_is_refused(monkeypatch):
    monkeypatch.setattr(trial, "_free_memory", lambda: 4 * 10**9)
    with pytest.raises(UserError, match=r"takes about 8 GB of memory, 4 GB are free here; .*scan"):
        trial.check_host_memory(50_000, "tpu", scan=False)
    with pytest.raises(UserError, match="end other programs"):
        trial.check_host_memory(50_000, "tpu", scan=True)
    trial.check_host_memory(50_000, "cpu", scan=False)
    trial.check_host_memory(8_000, "tpu", scan=False)
    monkeypatch.undo()
    assert trial._free_memory() > 10**8
