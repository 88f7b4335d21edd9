"""LICENSE and NOTICE say what the package and the files that they name say."""

import json
import pathlib
import re
import tomllib

ROOT = pathlib.Path(__file__).resolve().parents[2]
NOTICE = (ROOT / "NOTICE").read_text()


def test_the_package_is_under_apache_2_and_ships_both_files():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["license"] == "Apache-2.0"
    assert project["license-files"] == ["LICENSE", "NOTICE"]
    text = (ROOT / "LICENSE").read_text()
    assert "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text


def test_every_file_that_the_notice_names_exists():
    paths = [path for line in re.findall(r"Files:(.*)", NOTICE) for path in _paths(line)]
    assert len(paths) >= 4
    assert not [path for path in paths if not (ROOT / path).is_file()]


def _paths(line: str) -> list[str]:
    return re.findall(r"[\w/]+/[\w/]+\.(?:py|md|json)", line)


def test_the_notice_credits_whom_the_file_of_prompts_credits():
    file = ROOT / "input_pipeline/transforms/imagenet_prompts.json"
    licence = json.loads(file.read_text())["licence"]
    words = " ".join(NOTICE.split())
    for holder in ("Copyright (c) 2021 OpenAI", "Mitchell Wortsman", "Ludwig Schmidt"):
        assert holder in "\n".join(licence) and holder in words


def test_the_readme_cites_the_version_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = (ROOT / "README.md").read_text().partition("@software")[2]
    assert f"version = {{{project['version']}}}" in citation
    assert project["name"] in citation
