"""A config file: `def get_config(batch_size=256, runlocal=False)` -> a ConfigDict.

It is Python, so whatever goes wrong in it becomes one line with its place.
"""

import importlib.util
import inspect
import pathlib
import re
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from base import values
from base.errors import UserError
from base.words import listed, nearest, one_line, show, similar

_EMPTY = inspect.Parameter.empty


MISSING = "missing"  # what a config sets where it was called without the data that it needs


def run(config_flag: str, *, without_data: bool = False) -> tuple[dict[str, Any], pathlib.Path]:
    """What get_config returns, as a nested dict, and the file.

    Args:
      config_flag: 'path.py' or 'path.py:batch_size=512,runlocal'. An argument has the type of its
        default; the bare name of a bool is True.
      without_data: `config.missing`, a line that says which data the file lacks, is no mistake.

    Raises:
      UserError: no such file, no such argument, an argument without a value or of another type,
        an exception in the file. One line.
    """
    file, args = _split(config_flag)
    try:
        spec = importlib.util.spec_from_file_location(f"config_{file.stem}", file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise UserError(f"{show(file)} defines no get_config()")
        config = module.get_config(**_arguments(module.get_config, args, file))
        config = config.to_dict() if isinstance(config, ConfigDict) else config
    except UserError:
        raise
    except Exception as error:
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        raise UserError(f"{_where(error, file)}: {kind}{one_line(error)}") from error
    if not isinstance(config, Mapping):
        raise UserError(f"{show(file)}: get_config() must return a ConfigDict, not {config!r}")
    given = dict(config)
    missing = given.pop(MISSING, "")
    if missing and not without_data:
        raise UserError(f"{show(file)}: {missing}")
    return given, file


def split_list(text: str) -> list[str]:
    """'a=1,b=(2,3)' -> ['a=1', 'b=(2,3)']: split at the commas outside brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for char in text:
        if quote or char in "'\"":
            quote = "" if char == quote else quote or char
        else:
            depth += (char in "([{") - (char in ")]}")
        if char == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += char
    return [part.strip() for part in parts if part.strip()]


def _split(config_flag: str) -> tuple[pathlib.Path, str]:
    match = re.match(r"(.*?\.py)(?::(.*))?$", config_flag, re.DOTALL)
    file = pathlib.Path(match[1] if match else config_flag)
    if match and file.is_file():
        return file, match[2] or ""
    folders = [folder for folder in (file.parent, pathlib.Path("configs")) if folder.is_dir()]
    files = sorted({str(f) for folder in folders for f in folder.glob("*.py") if f.stem[0] != "_"})
    near = similar(str(file), files) or files
    what = "there is no such file" if match else "a config is a Python file, path.py[:arguments]"
    hint = f"; the nearest: {listed(near)}" if near else ""
    raise UserError(f"--config={config_flag}: {what}{hint}")


def _arguments(get_config: Callable, args: str, file: pathlib.Path) -> dict[str, Any]:
    parameters = inspect.signature(get_config).parameters
    given: dict[str, Any] = {}
    for arg in split_list(args):
        name, equals, text = arg.partition("=")
        name = name.strip()
        if name not in parameters:
            known = f"; {nearest(name, parameters)}" if parameters else ""
            raise UserError(f"{show(file)} takes no argument '{name}'{known}")
        if name in given:
            raise UserError(f"{show(file)}: argument {name} is given twice")
        default = parameters[name].default
        kind = Any if default is None or default is _EMPTY else type(default)
        if not equals and kind is not bool:
            raise UserError(f"{show(file)}: argument {name} needs a value, {name}=...")
        text = text if equals else "true"
        given[name] = values.parse_key(text, kind, name, f"{show(file)}: argument {name}")
    if lacking := [n for n, p in parameters.items() if p.default is _EMPTY and n not in given]:
        asked = ",".join(f"{name}=..." for name in lacking)
        raise UserError(f"{show(file)} needs an argument: --config={show(file)}:{asked}")
    return given


def _where(error: Exception, file: pathlib.Path) -> str:
    """The last place in the config file, or in a config that it imports, on the way to an error."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{show(pathlib.Path(error.filename))}:{error.lineno}"
    here = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if pathlib.Path(frame.filename).resolve().parent == file.resolve().parent
    ]
    return f"{show(pathlib.Path(here[-1].filename))}:{here[-1].lineno}" if here else show(file)
