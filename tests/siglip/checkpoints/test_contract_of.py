"""siglip.checkpoints.contract_of: the contract of whatever read reads, without its arrays."""

import sys

import huggingface_hub
import processes
import pytest
from tiny_models import TINY, one_line, tiny

from siglip import checkpoints, presets
from siglip.checkpoints import CheckpointError, contract_of, convert, spec
from siglip.checkpoints.files import npz_file

FORMATS = {"huggingface": "hf", "open_clip": "oc", "big_vision": "x.npz"}


@pytest.fixture
def offline(monkeypatch):
    """The hub's cache is empty, and no download is tried."""

    def snapshot_download(repo, *, local_files_only=False, **options):
        assert local_files_only, "a download"
        raise FileNotFoundError(repo)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)


@pytest.mark.parametrize("with_json", [True, False])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("parts", ["both", "img", "txt", "no head, no bias"])
def test_it_is_the_contract_that_read_gives(format, parts, with_json, tmp_path, monkeypatch):
    weights = tiny(img={"variant": "mu/16"})  # whose heads open_clip's arrays tell
    if parts == "no head, no bias":
        weights = tiny(img={"variant": "mu/16"}, txt={**TINY.txt, "out_dim": 0}, bias=False)
    elif parts != "both":
        weights = weights.only(parts)
    path = tmp_path / FORMATS[format]
    if format == "open_clip" and parts in ("img", "txt"):
        pytest.skip("open_clip has no towers alone")
    checkpoints.write(weights, path, format)
    if not with_json:
        for file in tmp_path.rglob("*siglip.json"):
            file.unlink()
    expected = checkpoints.read(path).spec
    monkeypatch.setattr(spec.Spec, "shapes", None)  # nothing is traced
    assert contract_of(path) == expected
    assert contract_of(str(path)) == expected


def test_of_a_workdir_siglip_json_is_read_and_no_array(tmp_path):
    for step in ("10", "20"):
        (tmp_path / "checkpoints" / step / "state").mkdir(parents=True)  # without any array
    spec.save(tiny().spec, tmp_path / spec.FILE)
    for path in (tmp_path, tmp_path / "checkpoints", tmp_path / "checkpoints" / "10"):
        assert contract_of(path) == tiny().spec


def test_of_a_name_nothing_is_downloaded(offline):
    for name in ("siglip2-b16-256", "google/siglip2-base-patch16-256"):
        contract = contract_of(name)
        assert contract == spec.of_preset(presets.PRESETS["siglip2-b16-256"])
        assert contract.tokenizer is None
    assert contract_of("random:siglip-b16-224:small").img == {"variant": "mu/16"}


def test_of_a_name_in_the_cache_the_tokenizer_is_known(tmp_path, monkeypatch):
    checkpoints.write(tiny(), tmp_path / "hf", "huggingface")
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *args, **options: str(tmp_path / "hf")
    )
    assert contract_of("siglip-b16-224") == checkpoints.read(tmp_path / "hf").spec


def test_no_array_is_read_from_an_archive(tmp_path, monkeypatch):
    checkpoints.write(tiny(), tmp_path / "x.npz", "big_vision")
    monkeypatch.setattr(npz_file, "_read", None)
    assert contract_of(tmp_path / "x.npz") == tiny().spec


def test_what_is_no_model_is_one_line(tmp_path, offline):
    for path, message in (
        (tmp_path, "holds neither a run of this project"),
        (tmp_path / "x.npz", "there is no such file or folder"),
        ("siglip-b16-223", "the nearest: siglip-b16-2"),
    ):
        with pytest.raises(CheckpointError) as error:
            contract_of(path)
        assert message in one_line(error)


def test_no_jax_backend_is_started(tmp_path):
    """A backend that runs before jax.distributed.initialize makes it fail."""
    checkpoints.write(tiny(), tmp_path / "x.npz", "big_vision")
    (tmp_path / "x.siglip.json").unlink()
    checkpoints.write(tiny(), tmp_path / "hf", "huggingface")
    code = (
        "from siglip.checkpoints import contract_of\n"
        "from jax._src import xla_bridge\n"
        f"for source in ({str(tmp_path / 'x.npz')!r}, {str(tmp_path / 'hf')!r},\n"
        "               'random:siglip-b16-224:small'):\n"
        "    assert contract_of(source).img == {'variant': 'mu/16'} | contract_of(source).img\n"
        "assert not xla_bridge.backends_are_initialized()\n"
    )
    root = convert.__file__.partition("/siglip/checkpoints/")[0]
    processes.run([sys.executable, "-c", code], cwd=root)
