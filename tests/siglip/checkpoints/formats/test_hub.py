"""Released models by name, with a hub of our own."""

import json

import huggingface_hub
import pytest
from tiny_models import arrays, one_line, tiny

import siglip
from siglip import checkpoints
from siglip.checkpoints import CheckpointError
from siglip.checkpoints.formats import hub

BESIDE = ("config.json", "preprocessor_config.json", "tokenizer.json")


class Hub:
    """What a cache holds, and what a download would bring."""

    def __init__(self, monkeypatch):
        self.cache, self.online, self.calls = None, None, []
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.download)

    def download(self, repo, *, allow_patterns, local_files_only=False, **options):
        assert not any("bin" in pattern or pattern == "*" for pattern in allow_patterns)
        self.calls.append((repo, local_files_only))
        folder = self.cache if local_files_only else self.online
        if folder is None:
            raise ConnectionError("no way\nto the hub")
        return str(folder)


@pytest.fixture
def stub(monkeypatch):
    return Hub(monkeypatch)


def make(folder, *names):
    folder.mkdir()
    for name in names:
        (folder / name).write_text("")
    return folder


def test_a_whole_model_in_the_cache_needs_no_network(tmp_path, stub):
    stub.cache = make(tmp_path / "cache", "model.safetensors", *BESIDE)
    assert hub.fetch("google/x") == stub.cache
    assert stub.calls == [("google/x", True)]


@pytest.mark.parametrize("absent", ["model.safetensors", *BESIDE])
def test_what_the_cache_lacks_is_fetched(absent, tmp_path, stub):
    names = {"model.safetensors", *BESIDE} - {absent}
    stub.cache = make(tmp_path / "cache", *names)
    stub.online = make(tmp_path / "online")
    assert hub.fetch("google/x") == stub.online
    assert stub.calls == [("google/x", True), ("google/x", False)]


def test_offline_the_weights_of_the_cache_are_taken_as_they_are(tmp_path, stub):
    stub.cache = make(tmp_path / "cache", "model.safetensors", "config.json")
    assert hub.fetch("google/x") == stub.cache


def test_no_cache_and_no_network_is_one_line(stub):
    with pytest.raises(CheckpointError) as error:
        checkpoints.read("siglip-b16-224")
    message = one_line(error)
    assert message.startswith("google/siglip-base-patch16-224 is not in the cache")
    assert "no way to the hub" in message and "pass the folder" in message


@pytest.mark.parametrize("name", ["siglip-b16-224", "google/siglip-base-patch16-224"])
def test_a_released_name_loads_what_the_hub_has(name, tmp_path, stub):
    checkpoints.write(tiny(), tmp_path / "hf", "huggingface")
    stub.cache = tmp_path / "hf"
    model = siglip.load(name)
    assert stub.calls == [("google/siglip-base-patch16-224", True)]
    assert model.encode_text("a cat").shape == (32,)
    assert arrays(checkpoints.read(name)) == arrays(tiny())


def test_an_interrupted_download_of_shards_goes_on(tmp_path, stub):
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    stub.cache = make(tmp_path / "cache", *BESIDE, shards[0])
    index = {"weight_map": {"a": shards[0], "b": shards[1]}}
    (stub.cache / "model.safetensors.index.json").write_text(json.dumps(index))
    stub.online = make(tmp_path / "online")
    assert hub.fetch("google/x") == stub.online
    (stub.cache / shards[1]).write_text("")
    assert hub.fetch("google/x") == stub.cache
