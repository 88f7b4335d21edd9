"""What README, CONTRIBUTING and docs/ say about files, modules, keys and links is true.

Nothing that they mention is run here. docs/log.md is history: what it names may be gone.
"""

import ast
import importlib
import importlib.util
import inspect
import pathlib
import re

import pytest

from trainers.config import complete
from trainers.config.schema import BLOCKS, leaf, parameters_of, parent, pattern_of

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
CURRENT = [page for page in PAGES if page.name != "log.md"]
TEXTS = {str(page.relative_to(ROOT)): page.read_text() for page in CURRENT}

FOLDERS = ["configs", "docs", "tests", *(p.parent.name for p in ROOT.glob("*/__init__.py"))]
FILES = {
    str(path.relative_to(ROOT))
    for folder in (*FOLDERS, "")
    for path in (ROOT / folder).glob("**/*" if folder else "*")
    if path.is_file() and "__pycache__" not in path.parts
}
# Files that a reader is told to write, and placeholders.
EXAMPLES = {
    "mine.py",
    "path.py",
    "file.py",
    "siglip/objectives/token_classes.py",
    "siglip/losses/hinge.py",
    "evaluators/alignment.py",
    "input_pipeline/sources/folder.py",
}
EXAMPLE_KEYS = {"x", "x.y"}
# Names of released weights begin like a folder of ours.
NOT_OURS = (".npz",)


def pages(texts: dict[str, str] = TEXTS):
    return pytest.mark.parametrize("text", texts.values(), ids=texts.keys())


def paths_in(text: str) -> set[str]:
    """Words that look like files of the repository: 'siglip/losses/ring.py', 'docs/', 'ring.py'."""
    below = rf"(?<![\w./~<-])((?:{'|'.join(FOLDERS)})/[\w/.-]*[\w/])"
    scripts = r"(?<![\w./~<{*-])([\w/]+\.py)\b"
    words = {*re.findall(below, text), *re.findall(scripts, text)} - EXAMPLES
    return {word for word in words if not word.endswith(NOT_OURS)}


def exists(word: str) -> bool:
    """Whether a file or folder ends in this path: 'sources/registry.py' is enough."""
    return (ROOT / word).exists() or any(file.endswith(f"/{word}") for file in FILES)


def keys_in(text: str) -> set[str]:
    """Keys of the config: --config.a.b, config.a.b, and a.b=... where `a` is a block."""
    blocks = "|".join(sorted({path.partition(".")[0] for path in BLOCKS if path}))
    full = re.findall(r"(?<![\w.])config\.((?!json\b|md\b)[a-z_]\w*(?:\.\w+)*)", text)
    short = re.findall(rf"(?<![\w./])((?:{blocks})\.[a-z_]\w*(?:\.\w+)*)=", text)
    return {*full, *short} - EXAMPLE_KEYS


def is_key(key: str) -> bool:
    """Whether some component gives the config this key, or it is a block."""
    if pattern_of(key):
        return True
    pattern = pattern_of(parent(key))
    if parent(key) and not pattern:
        return False
    block = BLOCKS[pattern]
    callables = (*block.schemas, *(block.of.values() if block.choice else ()))
    names = {name for fn in callables for name in parameters_of(fn)}
    return leaf(key) in {*names, block.choice}


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


def test_the_checks_see_what_is_wrong():
    """Each check finds its mistake, so none of them passes because it sees nothing."""
    assert {w for w in paths_in("see `siglip/ring.py`, base/ and no_such.py") if not exists(w)} == {
        "siglip/ring.py",
        "no_such.py",
    }
    wrong = "--config.loss.name=x config.lr=1 model.remats=full --config.objectives.a.dtype=x"
    assert {key for key in keys_in(wrong) if not is_key(key)} == {"loss.name", "model.remats"}
    assert not _importable("trainers.sweep") and _importable("programs.sweep")


@pages()
def test_every_file_that_is_named_exists(text):
    assert not [word for word in sorted(paths_in(text)) if not exists(word)]


@pages()
def test_every_module_of_a_command_can_be_imported(text):
    modules = set(re.findall(r"python3?\s+-m\s+([\w.]+\w)", text))
    assert not [module for module in sorted(modules) if not _importable(module)]


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


@pages()
def test_every_flag_of_a_command_exists(text):
    """`--flag` stands in a file beside the program that the command starts."""
    command = r"python (?:-m ([\w.]+)|main\.py)((?:[^\n`#]|\\\n)*)"
    for module, arguments in re.findall(command, text):
        if module and not _is_ours(module):
            continue
        folder = ROOT / "/".join(module.split("."))
        folder = folder if folder.is_dir() else folder.parent
        files = folder.glob("*.py") if module else [ROOT / "main.py"]
        source = "".join(file.read_text() for file in files)
        flags = set(re.findall(r"(?<!\S)--([a-z_]\w*)(?=[\s=]|$)", arguments))
        assert not [flag for flag in sorted(flags) if f'"--{flag}"' not in source], arguments


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] in FOLDERS


@pages()
def test_every_config_key_exists(text):
    assert not [key for key in sorted(keys_in(text)) if not is_key(key)]


@pages()
def test_every_argument_of_a_config_file_exists(text):
    for name, arguments in re.findall(r"configs/(\w+)\.py:([^\s`\"]+)", text):
        config = importlib.import_module(f"configs.{name}")
        known = inspect.signature(config.get_config).parameters
        passed = re.findall(r"(?:^|,)([a-z_]+)=", re.sub(r"\([^)]*\)|'[^']*'", "", arguments))
        assert set(passed) <= set(known), f"configs/{name}.py:{arguments}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_resolves(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            assert anchor in map(slug, headings), target


@pages()
def test_every_name_that_a_snippet_imports_exists(text):
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module or "")
                for alias in node.names:
                    if not hasattr(module, alias.name):
                        importlib.import_module(f"{node.module}.{alias.name}")


def test_the_index_of_the_docs_names_every_page():
    index = (ROOT / "docs" / "README.md").read_text()
    for page in PAGES:
        if page.parent.name == "docs" and page.name != "README.md":
            assert f"]({page.name})" in index, page.name


def test_the_tree_in_the_readme_is_that_of_the_repository():
    (tree,) = re.findall(r"```\n(main\.py .*?)```", TEXTS["README.md"], re.DOTALL)
    named, parents = set(), [""]
    for line in tree.splitlines():
        indent, words = re.match(r"( *)(\S+)", line).groups()
        if len(indent) > 4:  # the second line of an explanation
            continue
        depth = len(indent) // 2
        parents = [*parents[: depth + 1], f"{parents[depth]}{words}"]
        named.add(parents[-1])
    assert not [path for path in sorted(named) if not (ROOT / path).exists()]
    packages = {f"{path.parent.relative_to(ROOT)}/" for path in ROOT.glob("[a-z]*/__init__.py")}
    packages |= {f"{path.parent.relative_to(ROOT)}/" for path in ROOT.glob("[a-z]*/*/__init__.py")}
    assert packages <= named


def test_the_config_of_a_mixture_is_valid(tmp_path):
    (code,) = re.findall(r"```python\n(# mine\.py.*?)```", TEXTS["docs/input.md"], re.DOTALL)
    (tmp_path / "mine.py").write_text(code)
    config = complete.load(str(tmp_path / "mine.py"))
    assert [part.weight for part in config.input.mixture.values()] == [3.0, 1.0]


def test_the_options_of_the_ring_page_are_those_of_the_losses():
    """Keys of config.objectives.contrastive stand in its table without the block."""
    table = TEXTS["docs/ring.md"].partition("## Options")[2].partition("\n\n**")[0]
    settings = re.findall(r"^\| `(?!config)([a-z_]+)", table, re.MULTILINE)
    assert len(settings) >= 5
    assert all(is_key(f"objectives.contrastive.{name}") for name in settings)
