"""Any part of any file, local or behind a URL; patterns of files."""

import uuid

import fsspec
import pytest

from input_pipeline import storage
from input_pipeline.errors import UserError


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
