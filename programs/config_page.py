"""Writes docs/config.md, the page of all config keys: `python -m programs.config_page`."""

import pathlib

from base import whole_file
from trainers.config import explain

PAGE = pathlib.Path(__file__).resolve().parents[1] / "docs" / "config.md"

if __name__ == "__main__":
    whole_file.write_text(PAGE, explain.page())
    print(PAGE)
