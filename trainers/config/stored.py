"""config.json of a workdir: the complete config of its run, and what may change in it."""

import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Iterable
from typing import Any

from ml_collections import ConfigDict

from base import whole_file
from base.errors import UserError
from base.nested import flatten
from base.words import one_line
from trainers.config import complete
from trainers.config.schema import FREE, REQUIRED, is_choice, parent

CONFIG_FILE = "config.json"


def read(workdir: str | os.PathLike, overrides: Iterable[tuple[str, str]] = ()) -> ConfigDict:
    """The config that the run in `workdir` was started with, overrides applied; locked.

    Raises:
      UserError: as `load` does, or there is no run.
    """
    return complete.locked(read_settings(workdir, overrides))


def read_settings(
    workdir: str | os.PathLike, overrides: Iterable[tuple[str, str]] = ()
) -> dict[str, Any]:
    """The tree of Settings of the run in `workdir`, overrides applied. Raises UserError."""
    file = pathlib.Path(workdir) / CONFIG_FILE
    return complete.completed(_read_json(file), file, overrides)


def save(config: ConfigDict, workdir: str | os.PathLike) -> None:
    """Writes config.json, whole or not at all (a power cut leaves the old one)."""
    file = pathlib.Path(workdir) / CONFIG_FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    whole_file.write_text(file, json.dumps(config.to_dict(), indent=2) + "\n")


def check_workdir(config: ConfigDict, workdir: str | os.PathLike) -> None:
    """Refuses a workdir that holds a run of another configuration.

    Keys in FREE may differ. Raises UserError, one line, with the differences.
    """
    workdir = pathlib.Path(workdir)
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir={workdir} is a file, not a folder")
    if differing := [d for d in differences(config, workdir) if not d.free]:
        shown = "; ".join(map(str, differing[:6]))
        more = f"; and {len(differing) - 6} more" if len(differing) > 6 else ""
        raise UserError(
            f"{workdir} holds a run of another configuration: {shown}{more} (use another "
            "--workdir, or the settings of the run to go on with it)"
        )


@dataclasses.dataclass(frozen=True)
class Difference:
    """A key whose value in the workdir's config is another than in this run's."""

    key: str
    there: str
    here: str

    @property
    def free(self) -> bool:
        """May the key differ when a run goes on?"""
        # In a part of a mixture the same keys are free as in a source.
        key = re.sub(r"^input\.mixture\.[^.]+\.", "input.source.", f"{self.key}.")
        key = re.sub(r"^objectives\.[^.]+\.", "objectives.*.", key)
        return any(key.startswith(f"{free}.") for free in FREE)

    def __str__(self) -> str:
        return f"config.{self.key}: there {self.there}, here {self.here}"


def differences(config: ConfigDict, workdir: str | os.PathLike) -> list[Difference]:
    """Where `config` and the one in `workdir` differ; [] where there is none, or no difference.

    A key that the stored config lacks (of an older version) is taken to have had its default.
    The settings of a component are not listed where the component itself is another one.
    """
    file = pathlib.Path(workdir) / CONFIG_FILE
    if not file.exists():
        return []
    plain = json.loads(json.dumps(config.to_dict()))
    defaults = {
        path: json.loads(json.dumps(setting.default))
        for path, setting in flatten(complete.settings(plain, unknown=[], where=file)).items()
        if setting.default is not REQUIRED
    }
    here, there = flatten(plain), flatten(_read_json(file))
    there = {**{key: defaults[key] for key in here if key in defaults}, **there}
    differing, other_component = [], []
    # Choices before the keys beside them.
    for key in sorted(here | there, key=lambda key: (parent(key), not is_choice(key), key)):
        if here.get(key, REQUIRED) == there.get(key, REQUIRED):
            continue
        if any(key.startswith(block) for block in other_component):
            continue
        if is_choice(key):
            other_component.append(f"{parent(key)}.")
        shown = [repr(c[key]) if key in c else "absent" for c in (there, here)]
        differing.append(Difference(key, *shown))
    return differing


def _read_json(file: pathlib.Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text())
    except FileNotFoundError:
        raise UserError(f"{file.parent} holds no run: there is no {file.name} in it") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {one_line(error)}") from error
    if not isinstance(config, dict):
        raise UserError(f"{file} is not a config: it holds a {type(config).__name__}")
    return config
