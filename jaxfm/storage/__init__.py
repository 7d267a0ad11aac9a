"""Storage: where files are kept and found, on disk and in buckets; who may write; what is whole.

`base.py` says what every storage answers; `open_storage` chooses the one of a place. `whole.py`
writes files and directories of this machine, `files.py` says what went wrong with one.
"""

import re
from pathlib import Path

from jaxfm.errors import ConfigError
from jaxfm.storage.base import S3, Storage


def open_storage(place: str | Path) -> Storage:
    """The storage of a path or of `s3://bucket/prefix`; nothing is asked or made yet.

    Raises:
      ConfigError: an address of another kind, or without a bucket.
      MissingInputError: S3 without the package that speaks to it.
    """
    if str(place).startswith(S3):
        from jaxfm.storage.s3 import S3Storage  # botocore, for those alone who need it

        return S3Storage(str(place))
    if re.match(r'\w+:/', str(place)):
        raise ConfigError(
            f'checkpoint.directory = {str(place)!r}: want a path of a file system or '
            's3://bucket/prefix'
        )
    from jaxfm.storage.posix import PosixStorage

    return PosixStorage(place)
