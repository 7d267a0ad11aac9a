"""Storage: keeps and finds files on disk and in S3 buckets; leases, atomic writes, sealed files.

`base.py` defines the interface, and `open_storage` picks the implementation for a path or URL
(`posix.py`, `s3.py`). `find.py` finds and opens data files, `lease.py` decides who may write,
`whole.py` writes local files and directories atomically, `seal.py` makes small JSON files detect
damage, and `files.py` turns errors about a file into ours.
"""

import re
from pathlib import Path

from jaxfm.errors import ConfigError
from jaxfm.storage.base import S3, Storage


def open_storage(place: str | Path) -> Storage:
    """The storage for a path or for `s3://bucket/prefix`; it contacts and creates nothing yet.

    Raises:
      ConfigError: the URL has another scheme, or no bucket.
      MissingInputError: the URL is on S3 and botocore is not installed.
    """
    if str(place).startswith(S3):
        from jaxfm.storage.s3 import S3Storage  # imports botocore only where it is needed

        return S3Storage(str(place))
    if re.match(r'\w+:/', str(place)):
        raise ConfigError(
            f'checkpoint.directory = {str(place)!r}: want a directory path or s3://bucket/prefix'
        )
    from jaxfm.storage.posix import PosixStorage

    return PosixStorage(place)
