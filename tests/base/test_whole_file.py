import os
import stat

import pytest

from base import whole_file


def test_a_file_has_its_name_only_at_the_end(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with whole_file.create(path, "w") as file:
        file.write("é")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_bytes() == "é".encode()
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("full")], ids=repr)
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "a.txt"
    whole_file.write_text(path, "old")
    with pytest.raises((KeyboardInterrupt, OSError)), whole_file.create(path) as file:
        file.write(b"new")
        raise error
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_content_is_on_disk_before_the_name(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, n=name, f=real: (calls.append(n), f(*a))[1])
    whole_file.write_bytes(tmp_path / "a", b"x")
    assert calls == ["fsync", "replace", "fsync"]  # content, name, folder


def test_text_that_has_no_utf8_is_replaced_if_asked(tmp_path):
    whole_file.write_text(tmp_path / "a", "\ud800", errors="replace")
    assert (tmp_path / "a").read_text() == "?"
    with pytest.raises(UnicodeEncodeError):
        whole_file.write_text(tmp_path / "a", "\ud800")


def test_a_folder_has_its_name_only_at_the_end(tmp_path):
    path = tmp_path / "parent" / "folder"
    with whole_file.create_folder(path) as scratch:
        (scratch / "a").write_text("x")
        assert not path.exists()
    assert (path / "a").read_text() == "x" and stat.S_IMODE(path.stat().st_mode) == 0o755
    with pytest.raises(OSError), whole_file.create_folder(path) as scratch:
        (scratch / "b").write_text("x")
    assert [p.name for p in path.parent.iterdir()] == ["folder"]
    assert [p.name for p in path.iterdir()] == ["a"]


def test_an_error_leaves_no_folder(tmp_path):
    with pytest.raises(KeyboardInterrupt), whole_file.create_folder(tmp_path / "f") as scratch:
        (scratch / "a").write_text("x")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
