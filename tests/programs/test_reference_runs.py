"""Two reference runs, compiled for the machines that their configs name.

The quick way, which takes minutes less of the compiler. All of them in full, with estimates of
their time: `python -m benchmarks.fit`.
"""

import json

import pods
import pytest

from trainers.fit.compiled import SPARE

RUNS = {"siglip_b16": "v4:4x4x2", "siglip_so400m": "v5e:16x16"}


@pytest.mark.parametrize("name, topology", RUNS.items())
def test_a_reference_run_fits(name, topology, tmp_path):
    ran = pods.run(
        *["-m", "programs.compile_only", f"--config=configs/{name}.py:slice={topology}"],
        *["--quick", f"--json={tmp_path / 'fit.json'}"],
    )
    assert "fits: yes" in ran.stdout
    record = json.loads((tmp_path / "fit.json").read_text())
    assert record["spare"] >= SPARE
    assert record["unknown_loops"] == 0
    kinds = {c["kind"] for c in record["collectives"]}
    assert "collective-permute" in kinds  # the ring of the loss
    assert ("reduce-scatter" in kinds) == (record["mesh"]["fsdp"] > 1)
