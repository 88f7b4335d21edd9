"""Eight emulated CPU devices, strict JAX, and the data sets where they lie beside the checkout."""

import hashlib
import importlib.metadata
import os
import pathlib
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"
WEEK = 7 * 86_400


def processor() -> str:
    """Compiled programs hold instructions that another processor may not have."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else [os.uname().machine]
    features = {line for line in lines if line.startswith(("flags", "Features"))}
    return hashlib.sha256(repr(sorted(features)).encode()).hexdigest()[:12]


# Before JAX is imported. Workers of pytest-xdist and programs that tests start inherit all of it.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8 --xla_cpu_multi_thread_eigen=false"
    # Most of the tests' time is compilation.
    + " --xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
    # On a busy machine a device may be late for a collective by more than XLA's 40 s.
    + " --xla_cpu_collective_call_terminate_timeout_seconds=600"
)
if importlib.metadata.version("jaxlib").startswith("0.10."):
    # Most of the compilation of a small step; newer versions do not know the flag and would abort.
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".jax_cache" / processor()))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax  # noqa: E402
import jaxtyping  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

# beartype holds calls to the annotations of a signature, shapes included. Before the packages
# are imported, and only in the files that name shapes: each decorated function costs time.
PACKAGES = ("embedding", "evaluators", "input_pipeline", "siglip", "trainers")
WITH_SHAPES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
    if "from jaxtyping import" in path.read_text()
]
jaxtyping.Array = jax.Array | np.ndarray  # as every function of JAX takes NumPy's arrays too
jaxtyping.install_import_hook(WITH_SHAPES, "beartype_at_call.checked")

from programs import prepare_table  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """JAX keeps every program it compiles, each in more than a megabyte; a file needs its own."""
    yield
    jax.clear_caches()


@pytest.fixture
def unchecked_shapes():
    """For a test of the error that a wrong shape raises where nothing checks annotations."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def pytest_configure(config: pytest.Config) -> None:
    """Forgets compiled programs after a week, so that their folder does not grow for ever."""
    if not hasattr(config, "workerinput"):
        for entry in pathlib.Path(os.environ["JAX_COMPILATION_CACHE_DIR"]).glob("*-cache"):
            if entry.stat().st_mtime < time.time() - WEEK:
                entry.unlink()


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
