"""Random access to files, on local disks or behind a URL that fsspec knows.

gs://, s3://, https://, memory:// and chains such as filecache::s3:// work where the package that
fsspec needs for them is installed. The protocol pipe: is refused, as it would run a program.
"""

import functools
import itertools
import os
import pathlib
import re
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import fsspec
import fsspec.core

from base.errors import UserError
from base.words import one_line


def is_url(path: str) -> bool:
    return bool(re.match(r"[A-Za-z][A-Za-z0-9+.-]*(::|://)", path)) or path.startswith("pipe:")


def join(folder: str, name: str) -> str:
    return f"{folder.rstrip('/')}/{name}" if is_url(folder) else os.path.join(folder, name)


class Blob:
    """One file, read at any place from any thread: nothing is kept open between reads.

    Args:
      path: a local path or a URL.

    Raises:
      UserError: there is no such file, or its protocol is not known or not installed.
    """

    def __init__(self, path: str):
        self.path, self._fs = path, None
        try:
            if is_url(path):
                self._fs, self._inside = _file_system(path)
                self._info = _retry(self._fs.info, self._inside)
                if self._info.get("type") == "directory":
                    raise IsADirectoryError(path)
                self.size = int(self._info["size"])
            else:
                self._inside = os.path.expanduser(path)
                with open(self._inside, "rb") as file:  # raises for a folder or without permission
                    self.size = os.fstat(file.fileno()).st_size
        except (OSError, KeyError, TypeError) as error:
            reason = getattr(error, "strerror", None) or one_line(error)
            raise UserError(f"{path} cannot be read ({reason})") from error

    def read(self, size: int, offset: int = 0) -> bytes:
        """`size` bytes from `offset` on; fewer only where the file ends.

        Raises:
          OSError: the file has gone, or its storage does not answer.
        """
        end = min(offset + size, self.size)
        if end <= offset:
            return b""
        if self._fs is not None:
            data = bytes(_retry(self._fs.cat_file, self._inside, start=offset, end=end))
            if len(data) != end - offset:
                raise OSError(
                    f"{self.path} answered {len(data)} bytes where {end - offset} were asked for; "
                    "copy the files, if their server does not serve parts of them"
                )
            return data
        parts = []
        with open(self._inside, "rb", buffering=0) as file:
            while offset < end:  # one call may return less, e.g. over a network file system
                part = os.pread(file.fileno(), end - offset, offset)
                if not part:
                    break
                parts.append(part)
                offset += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def open(self) -> Any:
        """A new file object, for readers that need one."""
        if self._fs is not None:
            return _retry(self._fs.open, self._inside, "rb")
        return open(self._inside, "rb")

    def fingerprint(self) -> str:
        """A text that changes when the file does, as far as its storage reports that."""
        if self._fs is None:
            stat = os.stat(self._inside)
            return f"{os.path.abspath(self._inside)}|{stat.st_size}|{stat.st_mtime_ns}"
        known = [f"{key}={self._info[key]}" for key in VERSIONS if self._info.get(key)]
        return "|".join([self.path, str(self.size), *known])


# Fields of a storage's answer that change when the bytes of a file do.
VERSIONS = ("etag", "ETag", "md5Hash", "Content-MD5", "generation", "mtime", "updated", "created")
VERSIONS += ("LastModified", "last_modified", "Last-Modified", "blob_id", "xet_hash")


def read(path: str) -> bytes:
    """All of a file, by one request.

    Raises:
      OSError: it cannot be read.
      UserError: its protocol is not known or not installed.
    """
    if not is_url(path):
        with open(os.path.expanduser(path), "rb", opener=_open_file) as file:
            return file.read()
    fs, inside = _file_system(path)
    return bytes(_retry(fs.cat_file, inside))


def _open_file(path: str, flags: int) -> int:
    """Opens regular files only: data may name a pipe that blocks, or a device without an end."""
    number = os.open(path, flags | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise OSError(f"{path} is no regular file")
    return number


TRIES, PAUSE = 3, 0.5  # tries of a failed request; seconds between them, doubled each time
FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


def _retry(call: Callable, *args: Any, **options: Any) -> Any:
    """Calls a storage, and again after an error that may pass, such as a busy server's.

    Raises:
      OSError: the last try failed, with whatever error of the storage.
    """
    for trial in range(TRIES):
        try:
            return call(*args, **options)
        except FINAL:
            raise
        except Exception as error:  # each storage has errors of its own
            if trial == TRIES - 1:
                raise OSError(one_line(error)) from error
            time.sleep(PAUSE * 2**trial)
    raise AssertionError


def is_file(path: str) -> bool:
    if not is_url(path):
        return os.path.isfile(os.path.expanduser(path))
    fs, inside = _file_system(path)
    return bool(_retry(fs.isfile, inside))


def parent(path: str) -> str:
    """The folder of a file."""
    return path.rpartition("/")[0] if is_url(path) else str(pathlib.Path(path).expanduser().parent)


def expand(patterns: str | Sequence[str]) -> list[str]:
    """Files that patterns name: braces as in 'a-{000..127}.tar' or '{a,b}.tar', and globs (*, ?,
    [ab]) in sorted order. Several patterns, in a sequence, keep their order.

    Raises:
      UserError: a glob matches nothing, a brace is invalid, or there is no pattern at all.
    """
    several = [patterns] if isinstance(patterns, str) else patterns
    if not isinstance(several, list | tuple) or not all(isinstance(p, str) for p in several):
        raise UserError(f"path={patterns!r} is neither a pattern of files nor several")
    paths = []
    for path in itertools.chain.from_iterable(map(_braces, several)):
        literal = not is_url(path) and os.path.exists(os.path.expanduser(path))
        if literal or not re.search(r"[*?\[]", path) or re.match(r"https?://", path):
            paths.append(path)
            continue
        matches = _glob(path)
        if not matches:
            raise UserError(f"no file matches {path}")
        _check_complete(path, matches)
        paths += matches
    if not paths or not all(paths):
        raise UserError("no files are named: set `path` to a file or a pattern of files")
    return paths


def _check_complete(pattern: str, paths: list[str]) -> None:
    """Refuses an incomplete set of files named like train-00003-of-00128.tar."""
    seen: dict[tuple[str, str], set[int]] = {}
    for path in paths:
        if match := re.search(r"-(\d+)-of-(\d+)", path):
            seen.setdefault((path[: match.start()], match[2]), set()).add(int(match[1]))
    for (name, total), numbers in seen.items():
        missing = sorted(set(range(int(total))) - numbers)
        if missing:
            raise UserError(
                f"{pattern} matches {len(numbers)} of {int(total)} files {name}-*-of-{total}, not "
                f"number {missing[0]}; copy it, or name those that you want"
            )


MAX_BRACE_NAMES = 10_000_000  # names that one brace may expand to; more are a typing error


def _braces(pattern: str) -> Iterator[str]:
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        if "{" in pattern or "}" in pattern:
            raise UserError(f"{pattern} has a brace without its partner")
        yield pattern
        return
    before, inside, after = pattern[: match.start()], match.group(1), pattern[match.end() :]
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    if numbers:
        low, high = map(int, numbers.groups())
        width = len(numbers[1]) if numbers[1].startswith("0") or low == 0 else 0
        if high < low or high - low >= MAX_BRACE_NAMES:
            raise UserError(f"{{{inside}}} in {pattern} is no range of file numbers")
        names: Iterator[str] = (f"{i:0{width}d}" for i in range(low, high + 1))
    elif "," in inside:
        names = iter(inside.split(","))
    else:
        raise UserError(f"{{{inside}}} in {pattern} is neither a range a..b nor a list a,b")
    for name in names:
        yield from _braces(f"{before}{name}{after}")


def _glob(path: str) -> list[str]:
    if not is_url(path):
        full = pathlib.Path(path).expanduser()
        root = pathlib.Path(full.anchor or ".")
        parts = full.relative_to(root) if full.anchor else full
        return sorted(str(p) for p in root.glob(str(parts)) if p.is_file())
    fs, inside = _file_system(path)
    try:
        return sorted(fs.unstrip_protocol(name) for name in _retry(fs.glob, inside))
    except OSError as error:
        raise UserError(f"{path} cannot be listed ({one_line(error)})") from error


def _file_system(url: str) -> tuple[Any, str]:
    protocol = re.split(r"::|://|:", url, maxsplit=1)[0]
    if protocol == "pipe":
        raise UserError(f"{url} would start a program: pipe: is not read, name files or URLs")
    try:
        return _connect(url)
    except ImportError as error:
        raise UserError(f"{url} needs one more package: {one_line(error)}") from error
    except ValueError as error:
        raise UserError(f"{url} is no URL that can be read: {one_line(error)}") from error


@functools.lru_cache(maxsize=1 << 16)
def _connect(url: str) -> tuple[Any, str]:
    # Cached, so that the file system of many shards is made once.
    return fsspec.core.url_to_fs(url)


_index_folder = "~/.cache/siglip-jax/index"


def keep_indexes_in(folder: str) -> None:
    """Sets the folder in which sources of this process keep the indexes of their files."""
    global _index_folder
    if not folder or is_url(folder):
        raise UserError(f"indexes are kept in a local folder, which {folder!r} is not")
    _index_folder = folder


def index_folder() -> pathlib.Path:
    """The folder of keep_indexes_in, created with access for this user only.

    Raises:
      UserError: it cannot be created or written to.
    """
    folder = pathlib.Path(_index_folder).expanduser()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError("not allowed to write")
    except (OSError, RuntimeError) as error:
        raise UserError(f"indexes cannot be kept in {folder}: {one_line(error)}") from error
    return folder
