"""The table of chips agrees with the compilers, where they are installed."""

import jax
import jax.numpy as jnp
import pytest
import topologies
from jax.sharding import SingleDeviceSharding

from siglip.chips import CHIPS, find_chip
from trainers.fit.compiled import needed
from trainers.machine.topology import GPUS


@pytest.mark.parametrize("name", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_a_program_can_have_the_memory_of_a_tpu_that_the_table_says(name):
    device = topologies.devices_of(name)[0]
    sharding = SingleDeviceSharding(device)
    x = jax.ShapeDtypeStruct((2**16, 2**20), jnp.float32, sharding=sharding)  # 256 GiB
    with pytest.raises(jax.errors.JaxRuntimeError) as error:
        topologies.compile_for(lambda x: (x @ x.T).sum(), x)
    memory, chip = needed(str(error.value)), find_chip(device)
    assert memory is not None and chip is not None
    assert memory.limit == chip.memory and not memory.fits


@pytest.mark.parametrize("kind", GPUS)
def test_gpus_to_compile_for_are_in_the_table(kind):
    _, _, bandwidth, _, _, memory, description = GPUS[kind]
    chip = next(chip for name, chip in CHIPS.items() if description.startswith(name))
    assert (chip.bandwidth, chip.memory) == (bandwidth, memory)
