"""Zip files read from many threads at once.

zipfile shares one file position and an unguarded reference count between threads. So it reads only
the directory here; members are read by their offset in the file, without any shared state.
"""

import os
import struct
import zipfile
import zlib

from base.errors import UserError
from input_pipeline.sources.storage import Blob


class Zip:
    """Members of a zip file by name, stored or deflated. The file may be behind a URL.

    Raises:
      UserError: it is no zip file, or a member is encrypted or compressed otherwise.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)
        self._blob = Blob(self.path)
        try:
            with self._blob.open() as file, zipfile.ZipFile(file) as archive:
                infos = archive.infolist()
        except (OSError, zipfile.BadZipFile) as error:
            raise UserError(f"{self.path} cannot be read as a zip file ({error})") from error
        for info in infos:
            stored = info.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
            if not stored or info.flag_bits & 1:
                raise UserError(
                    f"{self.path}: member {info.filename} is encrypted or compressed by a method "
                    "other than 'stored' or 'deflated'; pack it again with `zip -0`"
                )
        # Tuples of only what reading needs, as an archive may have millions of members.
        self._members = {
            i.filename: (i.header_offset, i.compress_size, i.file_size, i.compress_type, i.CRC)
            for i in infos
            if not i.is_dir()
        }

    def __contains__(self, name: str) -> bool:
        return name in self._members

    def __len__(self) -> int:
        return len(self._members)

    def names(self) -> list[str]:
        return list(self._members)

    def read(self, name: str) -> bytes:
        """The bytes of a member.

        Raises:
          KeyError: there is no such member.
          zipfile.BadZipFile: its bytes are damaged.
        """
        offset, packed_size, size, method, crc = self._members[name]
        header = self._read_at(30, offset)
        if header[:4] != b"PK\3\4":
            raise zipfile.BadZipFile(f"{self.path}/{name}: no header")
        # The header has lengths of its own: its extra field may differ from the directory's.
        start = offset + 30 + sum(struct.unpack_from("<HH", header, 26))
        data = self._read_at(packed_size, start)
        if method == zipfile.ZIP_DEFLATED:
            unpack = zlib.decompressobj(-15)
            try:
                data = unpack.decompress(data, size + 1)  # no more than the directory promised
            except zlib.error as error:
                raise zipfile.BadZipFile(f"{self.path}/{name}: {error}") from error
        if len(data) != size or zlib.crc32(data) != crc:
            raise zipfile.BadZipFile(f"{self.path}/{name}: damaged")
        return data

    def _read_at(self, size: int, offset: int) -> bytes:
        data = self._blob.read(size, offset)
        if len(data) < size:
            raise zipfile.BadZipFile(f"{self.path}: ends too early")
        return data
