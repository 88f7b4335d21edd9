"""The keys of the config in words."""

import pathlib
import re

import pytest

import main as program
from base.nested import flatten
from programs import config_page
from trainers.config import complete, explain, schema, stored

QUICKSTART = str(pathlib.Path(program.__file__).parent / "configs" / "quickstart.py")


def shown(capsys, *flags):
    """{key: the rest of its line} that --show_config prints."""
    assert program.main(["--show_config", *flags]) == program.DONE
    return dict(line.split(" = ", 1) for line in capsys.readouterr().out.splitlines())


def test_every_key_is_shown_with_value_type_source_and_meaning(capsys):
    keys = shown(
        capsys, f"--config={QUICKSTART}", "--config.lr=0.5", "--config.optimizer.name=lion"
    )
    config = complete.load(QUICKSTART, [("lr", "0.5"), ("optimizer.name", "lion")])
    values = flatten(config.to_dict())
    assert set(keys) == {key for key, value in values.items() if value != {}}
    for key, line in keys.items():
        assert line.startswith(f"{values[key]!r}  # "), line
    assert keys["lr"] == "0.5  # float; --config.lr; the schedule's peak"
    assert "; --config.optimizer.name; Lion's direction" in keys["optimizer.name"]
    assert "; default of trainers.step.optimizer.lion" in keys["optimizer.b2"]
    assert re.search(r"; \S*quickstart\.py:\d+; length of the run", keys["total"])
    assert (
        "; default of trainers.config.schema.InputKeys; batches that are prepared ahead"
        in (keys["input.prefetch"])
    )


def test_the_config_of_a_workdir_is_shown(capsys, tmp_path):
    stored.save(complete.load(QUICKSTART), tmp_path)
    keys = shown(capsys, f"--workdir={tmp_path}", "--config.seed=7")
    assert keys["seed"].startswith("7  # int; --config.seed; ")
    assert f"{tmp_path}/config.json" in keys["total"]


def test_a_mistake_is_one_line(capsys):
    assert program.main(["--show_config", f"--config={QUICKSTART}", "--config.lrr=1"]) == 2
    assert re.match(r"error: unknown key --config.lrr; [^\n]*\n$", capsys.readouterr().err)


def test_the_page_of_all_keys_is_up_to_date():
    page = config_page.PAGE.read_text() if config_page.PAGE.exists() else ""
    assert page == explain.page(), f"write it anew: {explain.COMMAND}"


def test_every_key_of_the_page_has_a_meaning():
    rows = [line for line in explain.page().splitlines() if line.startswith("| `")]
    assert rows
    assert [row for row in rows if row.endswith("|  |")] == []


@pytest.mark.parametrize(
    "keys",
    [
        schema.RunKeys,
        schema.MeshKeys,
        schema.InputKeys,
        schema.PartKeys,
        schema.EvalKeys,
        schema.CheckpointKeys,
    ],
)
def test_every_key_of_the_loop_has_a_meaning(keys):
    assert set(explain.meanings(keys)) == set(schema.parameters_of(keys))


def test_a_meaning_is_the_comment_or_the_entry_of_the_docstring():
    def component(
        *,
        size: int = 1,  # pixels
        rate: float = 0.5,
        other: str = "",
    ) -> None:
        """Makes something.

        Args:
          rate: of examples, in
            [0, 1].
        """

    assert explain.meanings(component) == {"size": "pixels", "rate": "of examples, in [0, 1]"}
