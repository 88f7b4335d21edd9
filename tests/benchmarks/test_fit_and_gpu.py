"""The table of compiled reference runs, and the commands for a GPU."""

import json

import pytest

from base.errors import UserError
from benchmarks import fit, gpu, loss, train


def test_commands_for_a_gpu_are_valid_and_take_less_than_ten_minutes(capsys):
    assert gpu.main(["--list"]) == 0
    assert sum(limit for limit, _ in gpu.JOBS.values()) < 600
    parsers = {"benchmarks.loss": loss.make_parser(), "benchmarks.train": train.make_parser()}
    for _, words in gpu.JOBS.values():
        module, *flags = words.split()
        parsers[module].parse_args(flags)
    assert capsys.readouterr().out.count("at most") == len(gpu.JOBS)


def test_a_command_that_takes_too_long_is_ended(tmp_path):
    assert not gpu.measure(["this_module_does_not_exist"], 60, tmp_path)
    assert not gpu.measure(["http.server", "--bind", "127.0.0.1", "0"], 0.5, tmp_path)
    assert "http.server" in (tmp_path / "gpu.log").read_text()


def test_every_run_that_a_config_names_is_recorded_and_fits():
    records = fit.read()
    named = {f"configs/{name}.py:slice={topology}" for name, topology in fit.cases()}
    assert set(records) == named
    for config, record in records.items():
        assert record["fits"], config
        if record["memory"]["limit"]:
            assert record["spare"] >= 0.08, config


def test_the_table_is_that_of_the_records():
    assert fit.TABLE.read_text() == fit.as_table(fit.read())


def test_records_are_kept_in_the_order_of_the_cases(tmp_path, monkeypatch):
    monkeypatch.setattr(fit, "RESULTS", tmp_path / "fit.json")
    configs = [f"configs/{name}.py:slice={topology}" for name, topology in fit.cases()[:2]]
    for config in reversed(configs):
        fit.keep({"config": config})
    assert list(json.loads((tmp_path / "fit.json").read_text())) == configs


def test_no_such_case(capsys):
    with pytest.raises(UserError, match="leaves nothing of: siglip_b16"):
        fit._main(["--only=spam"])
