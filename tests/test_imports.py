"""Who may import whom, and what training must never import."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
OURS = {"configs", "siglip", "input_pipeline", "evaluators", "trainers", "main", "benchmarks"}
# Programs that live beside what they show: like main.py they read configs.
PROGRAMS = {"input_pipeline/inspect.py"}
# The model that people call prepares images and texts. Nothing of siglip imports it but the lazy
# names in __init__.py, and input_pipeline imports nothing of ours: still one way.
LIBRARY = "siglip/library.py"
MAY_IMPORT = {
    "configs": {"configs"},
    "siglip": {"siglip"},
    "input_pipeline": {"input_pipeline"},
    "evaluators": {"evaluators", "siglip", "input_pipeline"},
    "trainers": {"trainers", "evaluators", "siglip", "input_pipeline"},
}


def imported(file: pathlib.Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names.add(node.module.partition(".")[0])
    return names


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports_point_one_way(folder):
    programs = {ROOT / program for program in PROGRAMS}
    assert all(program.is_file() for program in programs)
    files = set((ROOT / folder).rglob("*.py")) - programs
    assert files
    for file in files:
        more = {"input_pipeline"} if file == ROOT / LIBRARY else set()
        wrong = (imported(file) & OURS) - MAY_IMPORT[folder] - more
        assert not wrong, f"{file.relative_to(ROOT)} imports {wrong}"


def test_configs_import_nothing_but_ml_collections():
    for file in (ROOT / "configs").rglob("*.py"):
        others = imported(file) - {"configs", "ml_collections"}
        assert others <= sys.stdlib_module_names, file


def test_main_imports_only_what_is_below_it():
    assert imported(ROOT / "main.py") & OURS <= {"trainers", "input_pipeline"}


def test_input_pipeline_uses_jax_in_one_file_only():
    files = {f.name for f in (ROOT / "input_pipeline").rglob("*.py") if "jax" in imported(f)}
    assert files == {"device.py"}


@pytest.mark.parametrize("module", ["trainers.loop", "trainers.config", "trainers.sweep"])
def test_training_imports_neither_tensorflow_nor_pytorch(module):
    code = f"import sys, {module}; print([m for m in ('tensorflow', 'torch') if m in sys.modules])"
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert out.stdout.strip() == "[]", out.stderr


def test_the_science_does_not_import_the_library():
    for file in (ROOT / "siglip").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            at_the_top = isinstance(node, ast.ImportFrom) and node.col_offset == 0
            named = at_the_top and {node.module, *(f"{node.module}.{n.name}" for n in node.names)}
            assert not named or "siglip.library" not in named, file


def test_nothing_imports_a_program():
    modules = {program.removesuffix(".py").replace("/", ".") for program in PROGRAMS}
    for folder in OURS - {"main"}:
        for file in (ROOT / folder).rglob("*.py"):
            text = file.read_text()
            assert not any(f"import {m}" in text or f"from {m}" in text for m in modules), file
