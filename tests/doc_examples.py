"""The Python examples in docs/: complete files, programs that import jaxfm, pieces of a config."""

import contextlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from jaxfm import code
from tests.conftest import ROOT

_BLOCK = re.compile(r'^```python\n(.*?)^```$', re.M | re.S)
_FILE = re.compile(r'# ([\w/]+\.py)\n')


def blocks() -> list[tuple[str, str]]:
    """(page, source) of every Python block."""
    pages = sorted((ROOT / 'docs').rglob('*.md'))
    return [(page.name, block) for page in pages for block in _BLOCK.findall(page.read_text())]


def files() -> dict[str, str]:
    """{path: source} of the blocks whose first line is a comment with a file name."""
    return {found[1]: block for _, block in blocks() if (found := _FILE.match(block))}


def programs() -> list[tuple[str, str]]:
    """(page, source) of the blocks that use jaxfm without being files."""
    return [
        (page, block)
        for page, block in blocks()
        if not _FILE.match(block) and 'from jaxfm' in block
    ]


def pieces() -> list[tuple[str, str]]:
    """(page, source) of the other blocks that set values of `config`.

    The lines for Orbax do not: see tests/checkpoint/test_orbax.py.
    """
    return [
        (page, block)
        for page, block in blocks()
        if not _FILE.match(block) and 'import orbax' not in block and 'from jaxfm' not in block
    ]


@contextlib.contextmanager
def written(root: Path) -> Iterator[None]:
    """Writes the files below `root`; on exit, unloads the modules imported from them."""
    for name, source in files().items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(source)
    before = list(code._BESIDE), list(code._RECORDED), list(sys.path)
    try:
        yield
    finally:
        code._BESIDE[:], code._RECORDED[:], sys.path[:] = before
        for name in files():
            sys.modules.pop(Path(name).stem, None)
