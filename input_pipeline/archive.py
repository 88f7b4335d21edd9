"""A zip file that many threads read at once."""

import pathlib
import threading
import zipfile

from input_pipeline.errors import UserError


class Archive:
    """Members of a zip file, unchanged.

    Args:
      path: the zip file, which stays open as long as this object lives.

    Raises:
      UserError: the file is missing or is not a zip file.
    """

    def __init__(self, path: str | pathlib.Path):
        try:
            self._zip = zipfile.ZipFile(path)
        except FileNotFoundError:
            raise UserError(f"{path} does not exist") from None
        except (zipfile.BadZipFile, OSError) as e:
            raise UserError(f"{path} cannot be read as a zip file ({e}), copy it again") from None
        # ZipFile counts its open members without a lock, and closes the file when the count is 0.
        self._lock = threading.Lock()
        self.members = frozenset(self._zip.namelist())

    def read(self, member: str) -> bytes:
        """The bytes of a member. KeyError: there is none of that name."""
        with self._lock:
            return self._zip.read(member)

    def close(self) -> None:
        self._zip.close()

    def __del__(self):
        if hasattr(self, "_zip"):
            self._zip.close()
