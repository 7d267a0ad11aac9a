"""Every command that pages and docstrings show can be parsed, and its config passes the checks.

A command is `python -m jaxfm.main` or `python -m tools.X` with arguments, in README.md, docs/,
CONTRIBUTING.md, CHANGELOG.md, or in a comment or string (docstrings, messages) of configs/, jaxfm/,
tools/ and tests/conftest.py. A placeholder in it, such as PATH, is replaced by something that
exists. Further checks: files, headings, tests and modules that the pages, pyproject.toml and
.ci/run name exist; README is short, links every page of docs/, and its tree matches jaxfm/; every
page of docs/ ends with its tests.
"""

import ast
import collections
import contextlib
import dataclasses
import importlib
import importlib.util
import io
import itertools
import re
import shlex
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest

from jaxfm import main
from jaxfm.config.load import load_config, write_config
from jaxfm.errors import ConfigError, MissingInputError, UsageError
from tests import doc_examples
from tests.conftest import ROOT
from tests.hf_directories import write_model
from tests.orbax_trees import FORMATS

DOCS = sorted((ROOT / 'docs').rglob('*.md'))
PAGES = [*(ROOT / f'{name}.md' for name in ('README', 'CONTRIBUTING', 'CHANGELOG')), *DOCS]
SOURCES = sorted(
    path for room in ('configs', 'jaxfm', 'tools') for path in (ROOT / room).rglob('*.py')
)
SOURCES += [ROOT / 'tests' / 'conftest.py']

COMMAND = re.compile(
    r'(?P<tick>`?)(?:[^\s`]*/)?python[\d.]*\s+-m\s+(?P<module>jaxfm\.main|tools(?:\.\w+)+)'
)
END = {'&&', '||', '|', ';', '>', '2>'}

# What replaces a placeholder: things that the fixture `desk` makes.
STANDS_FOR = {
    'PATH': 'model',
    'MODEL': 'model',
    'ADAPTER': 'adapter',
    'CHECKPOINT': 'theirs',
    'DIR': 'new',
    'FILE': 'configs/quickstart.py',
    'N': '1',
    'STAGE': 'timing',
    'VALUE': 'new',  # filled in by an f-string
    'A': 'new',  # one of two things that are compared
    'B': 'new',
}
# Runs that other commands start from, with the config and overrides that README gives for them.
RUNS = {
    'quickstart': ('configs/quickstart.py', []),
    'tuned': ('configs/sft.py', ['init_from=model', 'data.path=my.jsonl']),
    'lora': ('configs/sft.py', ['init_from=model', 'data.path=my.jsonl', 'model.lora.rank=16']),
}


@dataclasses.dataclass(frozen=True)
class Command:
    """A command line as shown: the module after -m, and the words after it."""

    module: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return ' '.join([self.module, *self.words])

    def lines(self) -> Iterator[tuple[str, ...]]:
        """The command lines it stands for: with and without parts in [], for each choice in a|b."""
        for words in {_required(self.words), _everything(self.words)}:
            yield from itertools.product(*(_choices(_filled(word)) for word in words))


def _required(words) -> tuple[str, ...]:
    return tuple(word for word, is_optional in _optional(words) if not is_optional)


def _everything(words) -> tuple[str, ...]:
    return tuple(word for word, _ in _optional(words))


def _optional(words) -> Iterator[tuple[str, bool]]:
    """(word, whether it is in []) for the words of a usage line, without brackets and dots."""
    inside = False
    for word in words:
        begins = word.startswith('[')
        inside = inside or begins
        ends = inside and word.endswith(']')
        bare = word[begins : len(word) - ends]
        if bare not in ('...', '--config.a.b=value'):
            yield bare, inside
        inside = inside and not ends


def _choices(word: str) -> list[str]:
    return word.split('|') if re.fullmatch(r'\w+(\|\w+)+', word) else [word]


def _filled(word: str) -> str:
    word = re.sub(r'configs/(x|<run>)\.py', 'configs/quickstart.py', word)
    return re.sub(r'(?:^|(?<==))[A-Z]+$', lambda match: STANDS_FOR[match[0]], word)


def find(text: str) -> list[Command]:
    """The commands in a text; a module name without arguments does not count."""
    text = re.sub(r'\\\n\s*', ' ', text)
    found = []
    for match in COMMAND.finditer(text):
        rest, _, _ = text[match.end() :].partition('`' if match['tick'] else '\n')
        lexer = shlex.shlex(rest.replace('\n', ' '), posix=True)
        lexer.whitespace_split = True
        words = tuple(itertools.takewhile(lambda word: word not in END, lexer))
        if words:
            found.append(Command(match['module'], words))
    return found


def spoken(source: str) -> Iterator[str]:
    """Yields every string and comment of a Python file; VALUE replaces fields of f-strings."""
    nodes = list(ast.walk(ast.parse(source)))
    texts = [node for node in nodes if isinstance(node, ast.JoinedStr)]
    parts = {id(part) for text in texts for part in text.values}
    for text in texts:
        yield ''.join(
            getattr(part, 'value', '') if isinstance(part, ast.Constant) else 'VALUE'
            for part in text.values
        )
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
            yield node.value
    comments, last = [], None
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            if last != token.start[0] - 1:
                comments.append('')
            comments[-1] += token.string.lstrip('# ') + '\n'
            last = token.start[0]
    yield from comments


def documented() -> list[tuple[str, Command]]:
    """(file, command) for every command that is shown, without repetitions."""
    texts = [(path, path.read_text()) for path in PAGES]
    texts += [(path, text) for path in SOURCES for text in spoken(path.read_text())]
    found = {
        (str(path.relative_to(ROOT)), command): None
        for path, text in texts
        for command in find(text)
    }
    return sorted(found, key=str)


def understand(module: str, line: tuple[str, ...]) -> None:
    """Parses a command line as the module does, and loads its config; data need not exist."""
    if module == 'jaxfm.main':
        flags, overrides = main.parse(list(line))
        config = load_config(flags.config, overrides, workdir=flags.workdir)
        main._check_mode(flags, config)
        return
    spec = importlib.util.find_spec(module)
    assert spec is not None, f'there is no {module}'
    is_package = spec.submodule_search_locations is not None
    tool = importlib.import_module(f'{module}.__main__' if is_package else module)
    if len(line) == 1 and line[0] in getattr(tool, 'COMMANDS', ()):
        return  # only the subcommand's name, in a sentence
    parsed = tool.parse(list(line))
    flags, overrides = parsed if isinstance(parsed, tuple) else (parsed, [])
    if getattr(flags, 'config', None) is not None:
        load_config(flags.config, overrides)
        if module == 'tools.corpus':
            tool._phase(flags, overrides)  # which of several


@pytest.fixture(scope='module')
def desk(tmp_path_factory) -> Iterator[Path]:
    """A directory with everything that commands name: configs, a model, an adapter, chats, runs."""
    root = tmp_path_factory.mktemp('desk')
    (root / 'configs').symlink_to(ROOT / 'configs')
    (root / 'adapter').symlink_to(ROOT / 'tests' / 'goldens' / 'llama3_lora')
    (root / 'my.jsonl').write_text('{"messages": []}\n')
    write_model(root / 'model')
    FORMATS['zarr'](root / 'theirs', {'w': np.ones(2)})
    with contextlib.chdir(root):
        for name, (argument, overrides) in RUNS.items():
            Path('runs', name).mkdir(parents=True)
            write_config(load_config(argument, overrides), Path('runs', name, 'config.json'))
    with doc_examples.written(root):
        yield root


@pytest.fixture
def at_desk(desk, monkeypatch):
    """Changes to the desk, and mocks packages that some tools import and tests do not have."""
    monkeypatch.chdir(desk)
    monkeypatch.setattr(main, 'check_absent', lambda path: None)  # another command reads `adapter`
    # Goldens are made in a separate environment, which has these packages.
    theirs = ('torch', 'torch.nn', 'torch.nn.functional', 'peft', 'accelerate', 'trl')
    theirs += ('trl.experimental', 'trl.experimental.cpo', 'trl.experimental.gkd')
    evals = ('lm_eval', 'lm_eval.models', 'lm_eval.models.huggingface', 'lm_eval.tasks')
    for name in (*theirs, *evals, 'transformers', 'transformers.utils'):
        monkeypatch.setitem(sys.modules, name, MagicMock())
    for name in [name for name in sys.modules if name.startswith('tools.goldens')]:
        monkeypatch.delitem(sys.modules, name)
    yield
    for name in [name for name in sys.modules if name.startswith('tools.goldens')]:
        del sys.modules[name]


DOCUMENTED = documented()


@pytest.mark.parametrize(
    'command', [pytest.param(command, id=f'{where}: {command}') for where, command in DOCUMENTED]
)
def test_a_documented_command_can_be_parsed(at_desk, command):
    for line in command.lines():
        understand(command.module, line)


def test_commands_are_found_in_every_place():
    """Guards against a `find` that misses commands."""
    places = collections.Counter(where.split('/')[0] for where, _ in DOCUMENTED)
    assert places['README.md'] >= 13
    assert places['docs'] >= 40
    assert places['configs'] >= 8
    assert places['jaxfm'] >= 4
    assert places['tools'] >= 18


@pytest.mark.parametrize(
    'line, error, words',
    [
        (
            'jaxfm.main --config configs/llama_1b.py --config.data.source.files=x',
            ConfigError,
            'source: unknown key',
        ),
        ('jaxfm.main --config configs/quickstart.py --config.steps=few', ConfigError, 'steps'),
        ('jaxfm.main --config configs/quickstart.py --mode serve', UsageError, 'serve'),
        ('jaxfm.main --config configs/quickstart.py --promt x', UsageError, '--promt'),
        ('jaxfm.main --config configs/quikstart.py', MissingInputError, 'quickstart'),
        (
            'jaxfm.main --config configs/pretrained.py --config.init_from=no',
            MissingInputError,
            'no',
        ),
        ('jaxfm.main --config configs/pretrained.py --config.init_from=PATH', ConfigError, 'steps'),
        ('tools.corpus build --config FILE --config.data.pth=x', ConfigError, 'pth'),
        ('tools.corpus decode --config configs/lifecycle.py --phase rl', UsageError, 'rl'),
        ('tools.corpus inspect --config configs/lifecycle.py', UsageError, 'phase is needed'),
        ('tools.corpus decode --config configs/rl_addition.py --phase rl', UsageError, 'samples'),
        ('tools.corpus bild --config FILE', UsageError, 'bild'),
        ('tools.checkpoint verify DIR --stp N', UsageError, '--stp'),
        ('tools.bench.gpu --part kernel|train --out DIR', SystemExit, '2'),
        ('tools.goldens.families --output DIR [--only llama4 ...]', SystemExit, '2'),
        ('tools.bench.speed --out DIR', AssertionError, 'tools.bench.speed'),
    ],
)
def test_a_wrong_command_fails(at_desk, line, error, words):
    [command] = find(f'python -m {line}')
    with pytest.raises(error, match=words):
        for words in command.lines():
            understand(command.module, words)


def test_an_unknown_placeholder_fails():
    [command] = find('python -m tools.checkpoint ls BUCKET')
    with pytest.raises(KeyError, match='BUCKET'):
        list(command.lines())


@pytest.mark.parametrize(
    'text, found',
    [
        ('```bash\npython -m tools.a b   # then c\n```', ['tools.a b']),
        (
            'python -m tools.a b \\\n    --c=1\npython -m tools.d e',
            ['tools.a b --c=1', 'tools.d e'],
        ),
        ('Make one (`python -m tools.a b\n--c`), and use it', ['tools.a b --c']),
        ('python3.12 -m venv x && .venv/bin/python -m jaxfm.main a && b', ['jaxfm.main a']),
        ("ENV/bin/python3 -m tools.a.b 'c d'", ['tools.a.b c d']),
        ('`python -m tools.a` reads, python -m pytest tests', []),
    ],
)
def test_a_command_is_found_in_a_text(text, found):
    assert [str(command) for command in find(text)] == found


def test_commands_in_strings_and_comments_are_found():
    source = '''
"""Title.

    python -m tools.a b \\\\
        --c
"""
x = 1  # python -m tools.d e \\
       # --f
# `python -m tools.g
# h`
MESSAGE = f'`python -m tools.i --j {x}` ' 'makes it'
'''
    found = {str(command) for text in spoken(source) for command in find(text)}
    assert found == {'tools.a b --c', 'tools.d e --f', 'tools.g h', 'tools.i --j VALUE'}


def test_a_usage_line_stands_for_several():
    [command] = find("python -m tools.a b|c DIR [--d N] ['--e=x|y' ...] --f=\"['g']\"")
    assert set(command.lines()) == {
        *((part, 'new', "--f=['g']") for part in 'bc'),
        *((part, 'new', '--d', '1', '--e=x|y', "--f=['g']") for part in 'bc'),
    }


# Files and modules that pages name


NAMING = [*PAGES, ROOT / 'pyproject.toml', ROOT / '.ci' / 'run']
PLACE = re.compile(
    r'(?<![\w./-])(?:(?:configs|docs|jaxfm|pallas_kernels|tests|tools|\.ci)/(?:[\w.-]+/?)*'
    r'|[\w-]+\.(?:txt|md|toml)\b)'
)
LINK = re.compile(r'\]\((?!\w+:)([^)\s]+)')
HEADING = re.compile(r'^#+ +(.+)$', re.M)


def missing(text: str, page: Path) -> set[str]:
    """Links, repository paths and modules that a page names but that do not exist."""
    links = {link for link in LINK.findall(text) if not _leads_somewhere(link, page)}
    places = {place.rstrip('.') for place in PLACE.findall(text)} - MADE
    modules = set(re.findall(r'python[\d.]*\s+-m\s+([\w.]*\w)', text))
    return (
        links
        | {place for place in places if not _is_place(place, page)}
        | {module for module in modules if not _is_installed(module)}
    )


def _leads_somewhere(link: str, page: Path) -> bool:
    """Whether the file of a relative link exists, and has the heading after #."""
    name, _, anchor = link.partition('#')
    target = page.parent / name if name else page
    return target.exists() and (not anchor or anchor in _anchors(target))


def _anchors(page: Path) -> set[str]:
    headings = HEADING.findall(page.read_text()) if page.suffix == '.md' else []
    return {re.sub(r'[^\w -]', '', heading.lower()).replace(' ', '-') for heading in headings}


def _is_place(place: str, page: Path) -> bool:
    """Whether a path exists, relative to the root or the page, or has the placeholder NAME."""
    return 'NAME' in place or (ROOT / place).exists() or (page.parent / place).exists()


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its package is missing
        return False


MADE = {'log.txt'}  # files that runs make


@pytest.mark.parametrize('path', NAMING, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_page_names_exists(path):
    assert missing(path.read_text(), path) == set()


def test_missing_names_are_found():
    text = (
        'See [a](docs/a.md#b), [b](jaxfm/main.py), `tests/none`, tools/corpus.py, tests/NAME.py. '
    )
    text += '[c](#develop) [d](#develope) [e](CONTRIBUTING.md#set-up) [f](CONTRIBUTING.md#setup) '
    text += '`python -m tools.none` and python -m none.main; constraint.txt; tests/test_none.py'
    names = {'docs/a.md#b', 'docs/a.md', '#develope', 'CONTRIBUTING.md#setup'}
    names |= {'tests/none', 'tests/test_none.py', 'tools.none', 'none.main', 'constraint.txt'}
    assert missing(text, ROOT / 'README.md') == names


MOST_LINES = 150


def test_the_readme_is_short():
    assert len((ROOT / 'README.md').read_text().splitlines()) <= MOST_LINES


def test_the_readme_links_every_page_of_docs():
    linked = set(LINK.findall((ROOT / 'README.md').read_text()))
    assert {str(page.relative_to(ROOT)) for page in DOCS} <= linked


def name_tests(text: str) -> list[str]:
    """The test files and directories in the last section of a page, if it is about tests."""
    title, _, section = text.rpartition('\n## ')[2].partition('\n')
    places = PLACE.findall(section) if title == 'Tests for this page' else []
    return [place for place in places if place.startswith('tests/')]


@pytest.mark.parametrize('page', DOCS, ids=lambda page: page.name)
def test_a_page_of_docs_ends_with_its_tests(page):
    assert name_tests(page.read_text())


def test_a_page_without_tests_is_found():
    held = 'x\n## Tests for this page\n- `tests/test_main.py`'
    assert name_tests(held) == ['tests/test_main.py']
    assert not name_tests('x\n## Tests for this page\nMany. `jaxfm/main.py`')
    assert not name_tests(f'{held}\n## More\n`tests/test_main.py`')


def test_the_tree_in_the_readme_matches_the_package():
    tree = (ROOT / 'README.md').read_text().partition('\n```\njaxfm/\n')[2].partition('```')[0]
    lines = re.findall(r'^  ([\w.]+/?(?:, [\w.]+/?)*) ', tree, re.M)
    named = [name for line in lines for name in line.split(', ')]
    inside = [path for path in (ROOT / 'jaxfm').iterdir() if not path.name.startswith('__')]
    assert sorted(named) == sorted(
        f'{path.name}/' if path.is_dir() else path.name for path in inside
    )
