"""docs/weights.md: its commands and snippets run, one after the other, and its table is ours.

Released weights are small random ones in a cache laid out as Hugging Face's hub lays it out.
"""

import importlib
import json
import os
import pathlib
import re
import shlex
import sys

import jax
import numpy as np
import processes
import pytest
from PIL import Image

from configs import finetune
from input_pipeline.sources import storage
from siglip import checkpoints, presets

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "weights.md").read_text()
BLOCKS = re.findall(r"```(bash|python)\n(.*?)```", PAGE, re.DOTALL)
MODEL, REPO = "siglip-b16-224", "google/siglip-base-patch16-224"

# What a command of the page is made smaller by: released models do not fit into CI.
SMALLER = {
    "configs/siglit.py:": "batch_size=8,total='2 steps',txt=mu,",
    "configs/evaluate.py:": "batch_size=8,",
    "configs/": "batch_size=8,total='2 steps',",
}


def make_tokenizer(path: pathlib.Path) -> None:
    """32,000 ids as SigLIP's: EOS and padding are id 1, every byte has one."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<unk0>", "</s>", "<unk>", *letters]
    words += [f"<extra{i}>" for i in range(32_000 - len(words))]
    vocab = {word: i for i, word in enumerate(words)}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.save(str(path))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the program, pairs, and a hub's cache."""
    folder = tmp_path_factory.mktemp("page")
    for name in ("main.py", "configs"):
        (folder / name).symlink_to(ROOT / name)
    rng = np.random.default_rng(0)
    (folder / "photos").mkdir()
    rows = []
    for i, name in enumerate(["cat", "dog", *(f"other{i}" for i in range(14))]):
        pixels = rng.integers(0, 256, (40, 50, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "photos" / f"{name}.jpg")
        split = "val" if i % 4 == 3 else "train"
        rows.append({"image": f"photos/{name}.jpg", "caption": f"a {name}", "split": split})
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    repo = folder / "hub" / f"models--{REPO.replace('/', '--')}"
    snapshot = repo / "snapshots" / "0123abc"
    checkpoints.write(checkpoints.read(f"random:{MODEL}:small"), snapshot, "huggingface")
    (snapshot / "siglip.json").unlink()  # others do not write it
    make_tokenizer(snapshot / "tokenizer.json")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0123abc")
    return folder


def smaller(line: str) -> str:
    for start, arguments in SMALLER.items():
        if start in line:
            line = re.sub(r"(configs/\w+\.py:)", rf"\g<1>{arguments}", line)
            break
    return line.replace("width=768", "width=32")


def environment(place: pathlib.Path) -> dict[str, str]:
    mine = {
        "HF_HUB_CACHE": str(place / "hub"),
        "HF_HUB_OFFLINE": "1",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    return {**os.environ, **mine}


@pytest.fixture
def here(place, monkeypatch):
    """Commands of the page leave this process as it was."""
    monkeypatch.chdir(place)
    monkeypatch.setattr(storage, "_index_folder", str(place / "indexes"))
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])
    platforms = jax.config.jax_platforms
    yield place
    jax.config.update("jax_platforms", platforms)


def run(kind: str, text: str, place: pathlib.Path) -> None:
    """Runs a snippet or a command line, in this process: importing and compiling take seconds.

    A process of its own has what names a released model, as it reads the hub's cache that the
    environment names.
    """
    words = ["python", "-c", text] if kind == "python" else shlex.split(smaller(text))
    assert words[0] == "python", text
    if MODEL in text:
        processes.run([sys.executable, *words[1:]], cwd=place, env=environment(place))
    elif kind == "python":
        exec(compile(text, PAGE.splitlines()[0], "exec"), {"__name__": "__main__"})
    else:
        module, argv = (words[2], words[3:]) if words[1] == "-m" else ("main", words[2:])
        assert importlib.import_module(module).main(argv) == 0, text


@pytest.mark.slow
def test_the_commands_and_snippets_of_the_page_run_in_their_order(here):
    assert len(BLOCKS) >= 8
    for kind, text in BLOCKS:
        lines = text.strip().splitlines() if kind == "bash" else [text]
        for line in lines:
            run(kind, line, here)
    written = ("weights/b16.npz", "weights/tower/model.safetensors", "runs/mine/results.json")
    for file in (*written, "runs/judged/results.json", "embedded/manifest.json", "exported"):
        assert (here / file).exists(), file
    results = json.loads((here / "runs/judged/results.json").read_text())
    assert "retrieval" in results


def test_the_table_of_models_is_that_of_the_code():
    assert presets.table().strip() in PAGE


def test_every_recipe_is_named():
    for recipe in finetune.RECIPES:
        assert f"| `{recipe}`" in PAGE
        assert f"recipe={recipe}," in PAGE or recipe == "full"
