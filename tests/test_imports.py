"""Who may import whom, and what training must never import."""

import ast
import pathlib
import sys

import processes
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
BELOW_TRAINERS = {"base", "siglip", "input_pipeline", "embedding", "evaluators"}
# The model that people call prepares pixels and tokens: these files of siglip look sideways at
# input_pipeline. Nothing else of siglip does, and input_pipeline imports nothing but base.
SIDEWAYS = {"siglip/library.py", "siglip/inputs.py", "siglip/export.py"}
MAY_IMPORT = {
    "base": set(),
    "configs": set(),
    "siglip": {"base"},
    "input_pipeline": {"base"},
    "embedding": {"base", "siglip", "input_pipeline"},
    "evaluators": {"base", "siglip", "input_pipeline"},
    "trainers": BELOW_TRAINERS,
    "programs": {*BELOW_TRAINERS, "trainers"},
    "benchmarks": {*BELOW_TRAINERS, "trainers"},
}
OURS = {*MAY_IMPORT, "main"}
MOST_LINES = 400
# Modules of ours must not hide one of these where a script's folder is first on the path.
OTHERS = {"jax", "flax", "optax", "orbax", "grain", "tokenizers", "transformers", "open_clip"} | {
    "safetensors", "timm", "torch", "clu", "numpy", "pyarrow", "fsspec",
}  # fmt: skip
TAKEN_AS_A_WORD = {"sources", "files", "tfds"}  # folders and formats that are called so


def python_files(folder: str) -> list[pathlib.Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imported(file: pathlib.Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names.add((node.module or "").partition(".")[0])
    return names


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports_point_one_way(folder):
    files = python_files(folder)
    assert files
    for file in files:
        name = str(file.relative_to(ROOT))
        may = MAY_IMPORT[folder] | {folder} | ({"input_pipeline"} if name in SIDEWAYS else set())
        wrong = (imported(file) & OURS) - may
        assert not wrong, f"{name} imports {wrong}"


def test_every_folder_with_code_has_a_rule():
    folders = {file.relative_to(ROOT).parts[0] for file in ROOT.glob("*/**/*.py")}
    assert {f for f in folders if not f.startswith(".")} - {"tests"} <= OURS


def test_the_ground_floor_is_standard_library_only():
    for file in python_files("base"):
        others = imported(file) - {"base", "tqdm"}  # tqdm: the one progress line
        assert others <= sys.stdlib_module_names, file


def test_configs_import_nothing_but_ml_collections():
    for file in python_files("configs"):
        others = imported(file) - {"configs", "ml_collections"}
        assert others <= sys.stdlib_module_names, file


def test_main_imports_only_what_is_below_it():
    assert imported(ROOT / "main.py") & OURS <= {"trainers", "base"}


def test_input_pipeline_does_not_import_jax():
    assert not [f for f in python_files("input_pipeline") if "jax" in imported(f)]


def test_training_imports_neither_tensorflow_nor_pytorch():
    modules = "trainers.loop", "trainers.config.complete", "programs.sweep", "programs.embed"
    code = f"import sys, {', '.join(modules)}\n"
    code += "print([m for m in ('tensorflow', 'torch') if m in sys.modules])"
    out = processes.run([sys.executable, "-c", code], cwd=ROOT)
    assert out.stdout.strip() == "[]"


def test_the_science_does_not_import_the_library():
    for file in python_files("siglip"):
        if str(file.relative_to(ROOT)) in SIDEWAYS:
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            at_the_top = isinstance(node, ast.ImportFrom) and node.col_offset == 0
            named = at_the_top and {node.module, *(f"{node.module}.{n.name}" for n in node.names)}
            assert not named or not {"siglip.library", "siglip.inputs"} & named, file


def test_nothing_imports_a_program():
    for folder in OURS - {"main", "programs"}:
        for file in python_files(folder):
            assert "programs" not in imported(file), file


def test_no_file_is_longer_than_a_reader_follows():
    long = {
        str(file.relative_to(ROOT)): lines
        for folder in MAY_IMPORT
        for file in python_files(folder)
        if (lines := len(file.read_text().splitlines())) > MOST_LINES
    }
    assert not long


def test_no_file_is_named_like_the_standard_library_or_a_package_in_use():
    taken = (set(sys.stdlib_module_names) | OTHERS) - TAKEN_AS_A_WORD
    names = [file for folder in MAY_IMPORT for file in python_files(folder) if file.stem in taken]
    assert not [file for file in names if file.stem not in ("__init__", "__main__")]
