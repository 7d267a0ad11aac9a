"""Text files are UTF-8 in every locale: no call leaves the encoding to the machine it runs on."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [
    path
    for directory in ('jaxfm', 'pallas_kernels', 'tools', 'configs')
    for path in sorted((ROOT / directory).rglob('*.py'))
]
SUSPICIOUS = re.compile(r'open\(|_text\(|text=')  # most files need no parsing
# Method -> how many arguments stand before `encoding`, so that it may be given by position.
BEFORE_ENCODING = {'read_text': 0, 'write_text': 1}


def without_encoding(source: str) -> list[int]:
    """Lines with a call that reads or writes text in the encoding of the locale."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [call.lineno for call in calls if _is_text(call) and not _has_encoding(call)]


def _is_text(call: ast.Call) -> bool:
    if isinstance(call.func, ast.Attribute) and call.func.attr in BEFORE_ENCODING:
        return True
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    if isinstance(keywords.get('text'), ast.Constant):  # subprocess.run(..., text=True)
        return keywords['text'].value is True
    if isinstance(call.func, ast.Name) and call.func.id == 'open':
        return 'b' not in _mode([*call.args[1:2], keywords.get('mode')], default='r')
    is_method = isinstance(call.func, ast.Attribute) and call.func.attr in ('open', 'fdopen')
    # `path.open('w')`, `gzip.open(path, 'rt')`; `store.open(spec)` has no mode.
    mode = _mode([*call.args[:2], keywords.get('mode')], default='')
    if is_method and getattr(call.func.value, 'id', '') in ('gzip', 'bz2', 'lzma'):
        return 't' in mode
    return is_method and bool(mode) and 'b' not in mode


def _mode(candidates: list[ast.expr | None], default: str) -> str:
    values = [one.value for one in candidates if isinstance(one, ast.Constant)]
    modes = [v for v in values if isinstance(v, str) and v and set(v) <= set('rwaxbt+')]
    return modes[0] if modes else default


def _has_encoding(call: ast.Call) -> bool:
    if any(keyword.arg == 'encoding' for keyword in call.keywords):
        return True
    before = BEFORE_ENCODING.get(getattr(call.func, 'attr', ''))
    return before is not None and len(call.args) > before


def test_every_text_file_has_an_encoding():
    sources = {path: path.read_text('utf-8') for path in SOURCES}
    found = {
        str(path.relative_to(ROOT)): lines
        for path, source in sources.items()
        if SUSPICIOUS.search(source) and (lines := without_encoding(source))
    }
    assert found == {}, 'add encoding="utf-8"'


@pytest.mark.parametrize(
    'call, is_found',
    [
        ('open(path)', True),
        ("open(path, 'w')", True),
        ("open(path, mode='a')", True),
        ("open(path, 'rb')", False),
        ("open(path, 'w', encoding='utf-8')", False),
        ("path.open('a')", True),
        ("path.open('wb')", False),
        ('file.open(start)', False),
        ('ts.open(spec, open=True)', False),
        ('gzip.open(path)', False),
        ("gzip.open(path, 'rt')", True),
        ("os.fdopen(descriptor, 'w')", True),
        ('path.read_text()', True),
        ("path.read_text('utf-8')", False),
        ("path.read_text(errors='replace')", True),
        ('path.write_text(text)', True),
        ("path.write_text(text, 'utf-8')", False),
        ('subprocess.run(command, text=True)', True),
        ("subprocess.run(command, text=True, encoding='utf-8')", False),
    ],
)
def test_a_call_without_encoding_is_found(call, is_found):
    assert bool(without_encoding(call)) == is_found
