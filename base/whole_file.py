"""Files and folders that appear under their name only when they are complete.

The content is written under another name in the same folder, synced to disk, then renamed. So no
reader, and no later run after a crash or a power cut, meets half a file.
"""

import contextlib
import os
import pathlib
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from typing import IO, Any

Path = str | os.PathLike[str]


@contextlib.contextmanager
def create(path: Path, mode: str = "wb", **options: Any) -> Iterator[IO[Any]]:
    """An open file that becomes `path` at the end of the block, or disappears after an error.

    Args:
      mode: 'wb', or 'w' for text in UTF-8.
      options: for open().
    """
    path = pathlib.Path(path)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    encoding = None if "b" in mode else "utf-8"
    try:
        with open(part, mode, encoding=encoding, **options) as file:
            yield file
        rename(part, path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def write_bytes(path: Path, content: bytes) -> None:
    """Writes or replaces a whole file."""
    with create(path) as file:
        file.write(content)


def write_text(path: Path, text: str, *, errors: str = "strict") -> None:
    """Writes or replaces a whole file of text in UTF-8; `errors` as for str.encode."""
    write_bytes(path, text.encode("utf-8", errors))


def rename(part: Path, path: Path) -> None:
    """Gives the complete file `part` its name, in place of any file that has it.

    Content and name are on disk when this returns.
    """
    with open(part, "rb") as file:
        os.fsync(file.fileno())
    os.replace(part, path)
    folder = os.open(pathlib.Path(path).parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextlib.contextmanager
def create_folder(path: Path) -> Iterator[pathlib.Path]:
    """A folder to fill that becomes `path` at the end of the block, or disappears after an error.

    Raises:
      OSError: `path` is a file or a folder with content.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = pathlib.Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        os.chmod(scratch, 0o755)  # mkdtemp's mode is for one user alone
        yield scratch
        scratch.rename(path)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
