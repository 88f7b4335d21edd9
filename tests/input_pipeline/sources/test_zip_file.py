"""Zip members read by many threads."""

import concurrent.futures
import zipfile

import pytest

from base.errors import UserError
from input_pipeline.sources.zip_file import Zip


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_many_threads_read_the_right_bytes(tmp_path, method):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", method) as z:
        for i in range(50):
            z.writestr(f"{i}.png", bytes([i]) * (1000 + i))
    archive = Zip(tmp_path / "a.zip")
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        which = [i % 50 for i in range(4000)]
        for i, data in zip(which, pool.map(lambda i: archive.read(f"{i}.png"), which)):
            assert data == bytes([i]) * (1000 + i)
    with pytest.raises(KeyError):
        archive.read("none.png")


def test_missing_or_broken_file_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"^[^\n]*a.zip cannot be read [^\n]*$"):
        Zip(tmp_path / "a.zip")
    (tmp_path / "b.zip").write_bytes(b"PK not a zip")
    with pytest.raises(UserError, match=r"^[^\n]*b.zip cannot be read as a zip file[^\n]*$"):
        Zip(tmp_path / "b.zip")
