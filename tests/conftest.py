"""Eight emulated CPU devices, strict JAX, and the data sets where they lie beside the checkout."""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8 --xla_cpu_multi_thread_eigen=false"
    + " --xla_backend_optimization_level=0"  # most of the tests' time is compilation
)

import jax
import pytest

from programs import prepare_table

jax.config.update("jax_numpy_rank_promotion", "raise")

SHARED_DATA = pathlib.Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    if not SHARED_DATA.is_dir():
        pytest.skip("the emoji and grocery sets are not beside this checkout (../shared/data)")
    return SHARED_DATA


@pytest.fixture(scope="session")
def emoji_tiny(shared_data, tmp_path_factory) -> pathlib.Path:
    """The table pairs.jsonl of 256 emoji with names in 6 languages, 23 of them split 'val'."""
    folder = tmp_path_factory.mktemp("emoji_tiny")
    prepare_table.prepare(shared_data / "emoji_tiny", folder)
    return folder / "pairs.jsonl"
