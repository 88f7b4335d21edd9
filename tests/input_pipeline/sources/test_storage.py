"""Any part of any file, local or behind a URL; patterns of files."""

import os
import uuid

import fsspec
import pytest

from base.errors import UserError
from input_pipeline.sources import storage


@pytest.fixture(params=["local", "memory"])
def folder(request, tmp_path):
    if request.param == "local":
        return str(tmp_path)
    return f"memory://{uuid.uuid4().hex}"


def write(path, data):
    if storage.is_url(path):
        fsspec.filesystem("memory").pipe(path.removeprefix("memory:/"), data)
    else:
        with open(path, "wb") as file:
            file.write(data)


def test_any_part_of_a_file(folder):
    path = storage.join(folder, "a.bin")
    write(path, b"0123456789")
    blob = storage.Blob(path)
    assert blob.size == 10 and storage.is_file(path) and storage.read(path) == b"0123456789"
    assert (blob.read(3), blob.read(3, 4), blob.read(9, 8), blob.read(1, 10)) == (
        *(b"012", b"456", b"89", b""),
    )
    with blob.open() as file:
        file.seek(5)
        assert file.read() == b"56789"
    assert storage.parent(path) == folder


def test_a_fingerprint_changes_with_the_file(folder):
    path = storage.join(folder, "a.bin")
    write(path, b"0123456789")
    first = storage.Blob(path).fingerprint()
    assert storage.Blob(path).fingerprint() == first
    write(path, b"01234567890")
    assert storage.Blob(path).fingerprint() != first


def test_globs_match_in_sorted_order(folder):
    for name in ("b-1.tar", "a-2.tar", "a-1.tar", "a-1.txt"):
        write(storage.join(folder, name), b"")
    found = storage.expand(storage.join(folder, "*.tar"))
    assert [path.rpartition("/")[2] for path in found] == ["a-1.tar", "a-2.tar", "b-1.tar"]
    for path in found:
        assert storage.Blob(path).size == 0
    with pytest.raises(UserError, match="no file matches"):
        storage.expand(storage.join(folder, "*.zip"))


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a.tar", ["a.tar"]),
        ("{08..11}.tar", ["08.tar", "09.tar", "10.tar", "11.tar"]),
        ("{8..11}", ["8", "9", "10", "11"]),
        ("{0..2}", ["0", "1", "2"]),
        ("{000..001}-{a,bc}", ["000-a", "000-bc", "001-a", "001-bc"]),
        (("s3://b/{0..1}.tar", "z"), ["s3://b/0.tar", "s3://b/1.tar", "z"]),
        ("https://h/a.tar?x=1", ["https://h/a.tar?x=1"]),
    ],
)
def test_braces_are_written_out(pattern, names):
    assert storage.expand(pattern) == names


@pytest.mark.parametrize(
    ("pattern", "told"),
    [
        ("", "no files are named"),
        ((), "no files are named"),
        ("{3..1}", "no range of file numbers"),
        ("{0..99999999999}", "no range of file numbers"),
        ("a{b", "without its partner"),
        ("{a}", "neither a range"),
    ],
)
def test_patterns_that_are_none_are_refused(pattern, told):
    with pytest.raises(UserError, match=told):
        storage.expand(pattern)


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("pipe:touch marker", "would start a program"),
        ("pipe://touch marker", "would start a program"),
        ("foo://a/b", "foo://a/b is no URL that can be read"),
        ("memory://nowhere/a", "memory://nowhere/a cannot be read"),
        ("/nowhere/a", "/nowhere/a cannot be read"),
        (".", "cannot be read"),
    ],
)
def test_what_cannot_be_read_is_one_line(path, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=told) as error:
        storage.Blob(path)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_a_missing_package_is_named(monkeypatch):
    def connect(url):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(storage, "_connect", connect)
    with pytest.raises(UserError, match="gs://a/b needs one more package: Please install gcsfs"):
        storage.Blob("gs://a/b")


class Flaky(fsspec.AbstractFileSystem):
    """Refuses every request so many times; its server may ignore which part was asked for."""

    protocol = "flaky"
    refusals, whole, calls = 0, False, 0

    def _refuse(self):
        Flaky.calls += 1
        if Flaky.calls <= Flaky.refusals:
            raise RuntimeError("503 busy")

    def info(self, path, **unused):
        self._refuse()
        return {"name": path, "size": 10, "type": "file", "generation": Flaky.calls}

    def cat_file(self, path, start=None, end=None, **unused):
        self._refuse()
        return b"0123456789" if Flaky.whole else b"0123456789"[start:end]

    def glob(self, path, **unused):
        self._refuse()
        return ["a"]


@pytest.fixture
def flaky(monkeypatch):
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    monkeypatch.setattr(storage, "PAUSE", 0.001)
    for name, value in (("refusals", 0), ("whole", False), ("calls", 0)):
        monkeypatch.setattr(Flaky, name, value)
    return Flaky


def test_what_a_storage_refuses_is_asked_for_again(flaky):
    flaky.refusals = storage.TRIES - 1
    assert storage.Blob("flaky://a").size == 10
    flaky.calls = 0
    assert storage.read("flaky://a") == b"0123456789"


def test_a_storage_that_goes_on_refusing_is_one_line(flaky):
    flaky.refusals = 100
    with pytest.raises(UserError, match=r"flaky://a cannot be read \(503 busy\)"):
        storage.Blob("flaky://a")
    with pytest.raises(UserError, match=r"flaky://\* cannot be listed \(503 busy\)"):
        storage.expand("flaky://*")
    with pytest.raises(OSError, match="503 busy"):
        storage.read("flaky://a")


def test_a_server_that_sends_whole_files_for_parts_is_told(flaky):
    flaky.whole = True
    blob = storage.Blob("flaky://a")
    assert blob.read(10) == b"0123456789"
    with pytest.raises(OSError, match="answered 10 bytes where 3 were asked for"):
        blob.read(3, 2)


def test_a_version_of_a_storage_is_part_of_the_fingerprint(flaky):
    assert storage.Blob("flaky://a").fingerprint() != storage.Blob("flaky://a").fingerprint()


@pytest.mark.timeout(300)
def test_pipes_and_devices_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (str(tmp_path / "pipe"), "/dev/zero"):
        with pytest.raises(OSError, match="no regular file"):
            storage.read(path)


@pytest.mark.parametrize("path", [5, ("a", 5), None])
def test_a_path_is_text(path):
    with pytest.raises(UserError, match="is neither a pattern of files nor several"):
        storage.expand(path)


def test_a_file_whose_name_looks_like_a_pattern(tmp_path):
    (tmp_path / "a[1].tar").write_bytes(b"")
    assert storage.expand(str(tmp_path / "a[1].tar")) == [str(tmp_path / "a[1].tar")]


def test_a_pattern_that_misses_a_shard_is_refused(tmp_path):
    for i in (0, 2):
        (tmp_path / f"train-{i:05d}-of-00003.tar").write_bytes(b"")
    (tmp_path / "other.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"matches 2 of 3 files .*train-\*-of-00003, not number 1;"):
        storage.expand(str(tmp_path / "*.tar"))
    (tmp_path / "train-00001-of-00003.tar").write_bytes(b"")
    assert len(storage.expand(str(tmp_path / "*.tar"))) == 4
