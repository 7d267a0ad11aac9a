"""Planted mistakes meet the tests in a copy of the tree, and nothing that is known is lost."""

import json
import time

import pytest

from tools import mutate
from tools.import_graph import Graph
from tools.mutants import draw
from tools.mutate import Copy, Fate, find_fate, find_fates, make_stages, read_fate

LONG = '\ndef test_quick():\n    pass\ndef test_run(tiny):\n    pass'
FILES = {
    'pyproject.toml': '[tool.pytest.ini_options]\npythonpath = ["."]',
    'jaxfm/__init__.py': '',
    'jaxfm/apple.py': 'def f(x):\n    return x + 1',
    'tests/test_apple.py': (
        'from jaxfm.apple import f\nimport time\ndef test_early():\n    pass\n'
        'def test_f():\n    if f(1) == 0:\n        time.sleep(60)\n    assert f(1) == 2'
    ),
    'tests/test_long.py': 'import jaxfm.apple\ndef test_run(tiny):\n    pass',
}


@pytest.fixture
def root(tmp_path):
    for name, text in FILES.items():
        path = tmp_path / 'tree' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / 'tree'


@pytest.fixture
def copy(root, tmp_path, monkeypatch):
    """A copy of the small tree, whose test processes import nothing heavy."""
    monkeypatch.setattr(mutate, 'list_files', lambda root: list(FILES))
    monkeypatch.setattr(mutate, 'PRELOADED', ('pytest',))
    return Copy(root, tmp_path / 'copy')


@pytest.fixture
def graph(root):
    return Graph(root, FILES)


@pytest.fixture
def mutants(root):
    """{operator: mutant} of jaxfm/apple.py, which has one of each."""
    drawn = draw(root, FILES, seed=0, count=9)
    assert len(drawn) == 3
    return {mutant.operator: mutant for mutant in drawn}


@pytest.fixture
def scripted(copy, monkeypatch):
    """Test runs that end as they are told; returns (ends to come, runs so far)."""
    ends, runs = [], []

    def run(arguments, seconds):
        source = (copy.place / 'jaxfm/apple.py').read_text()
        runs.append((arguments, source.partition('return ')[2]))
        end = ends.pop(0)
        if isinstance(end, BaseException):
            raise end
        return Fate(end, num_tests=3, seconds=1.5)

    monkeypatch.setattr(copy, 'test', run)
    return ends, runs


def test_a_mutant_that_fails_a_test_is_caught_by_it(copy, graph, mutants):
    """With real processes: pytest runs in the copy, on the changed source."""
    fate = find_fate(copy, graph, mutants['constant'], seconds=60)
    assert (fate.fate, fate.test) == ('caught', 'tests/test_apple.py::test_f')
    assert 'assert 3 == 2' in fate.message and fate.num_tests == 2 and fate.seconds > 0
    assert copy.test(['tests/test_apple.py'], 60).fate == 'survived'  # the change is gone
    fate = copy.test(['tests/test_long.py'], 60)
    assert (fate.fate, fate.num_tests) == ('caught', 1)  # there is no such fixture
    assert copy.test(['tests/test_apple.py', '-k', 'nothing'], 60).fate == 'untested'


def test_a_mutant_that_hangs_is_killed(copy, graph, mutants):
    began = time.monotonic()
    fate = find_fate(copy, graph, mutants['arithmetic'], seconds=6)
    assert fate.fate in ('hangs', 'unfinished')  # the latter where pytest itself takes seconds
    assert time.monotonic() - began < 60


def test_long_tests_run_once_the_quick_ones_have_passed(copy, graph, mutants, scripted):
    ends, runs = scripted
    ends += ['survived', 'caught', 'caught', 'survived', 'survived']
    changed = 'x + 2'
    assert find_fate(copy, graph, mutants['constant'], 60) == Fate('caught', '', '', 6, 3.0)
    assert runs == [(['tests/test_apple.py'], changed), (['tests/test_long.py'], changed)]
    assert find_fate(copy, graph, mutants['constant'], 60).num_tests == 3
    assert find_fate(copy, graph, mutants['constant'], 60).fate == 'survived'


def test_tests_of_the_room_come_before_long_ones(tmp_path):
    files = {
        'jaxfm/fruit/apple.py': '',
        'jaxfm/fruit/press.py': 'import jaxfm.fruit.apple',
        'tests/fruit/test_apple.py': LONG,
        'tests/fruit/test_press.py': 'import jaxfm.fruit.press' + LONG,
        'tests/test_press.py': 'import jaxfm.fruit.press',
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    near, room, long = make_stages(Graph(tmp_path, files), 'jaxfm/fruit/apple.py')
    runs = [f'tests/fruit/test_{name}.py::test_run' for name in ('apple', 'press')]
    deselected = [f'--deselect={run}' for run in runs]
    assert near == [*deselected, 'tests/fruit/test_apple.py']
    assert room == [*deselected, 'tests/fruit/test_press.py'] and long == runs


def test_the_working_tree_is_never_touched_and_the_copy_is_put_back(
    copy, root, graph, mutants, scripted
):
    ends, runs = scripted
    ends += ['caught', KeyboardInterrupt(), 'caught']
    before = {name: (root / name).stat() for name in FILES}
    there = (copy.place / 'jaxfm/apple.py').stat()
    for mutant in mutants.values():
        try:
            find_fate(copy, graph, mutant, 60)
        except KeyboardInterrupt:
            pass
        now = (copy.place / 'jaxfm/apple.py').stat()
        assert (now.st_mtime_ns, now.st_size) == (there.st_mtime_ns, there.st_size)
        assert (copy.place / 'jaxfm/apple.py').read_text() == FILES['jaxfm/apple.py']
    assert {source for _, source in runs} == {'x - 1', 'x + 2', 'None'}
    assert {name: (root / name).stat() for name in FILES} == before


def test_an_interruption_loses_nothing_and_the_same_line_goes_on(
    copy, graph, mutants, scripted, tmp_path
):
    ends, runs = scripted
    out, mutants = tmp_path / 'out.json', list(mutants.values())
    ends += ['caught', 'survived', KeyboardInterrupt()]
    with pytest.raises(KeyboardInterrupt):
        list(find_fates(copy, graph, mutants, out, 60))
    assert [record['fate'] for record in json.loads(out.read_text())] == ['caught']
    ends += ['caught', 'caught']
    fates = list(find_fates(copy, graph, mutants, out, 60))
    assert [mutant for mutant, _ in fates] == mutants and not ends and len(runs) == 5
    records = json.loads(out.read_text())
    assert [record['fate'] for record in records] == ['caught'] * 3
    assert {record['path'] for record in records} == {'jaxfm/apple.py'}
    assert list(find_fates(copy, graph, mutants, out, 60)) == fates and len(runs) == 5
    # What another draw has found stays there, too.
    out.write_text(json.dumps(records[1:]))
    ends += ['caught']
    assert next(find_fates(copy, graph, mutants[:1], out, 60)) == fates[0]
    assert len(json.loads(out.read_text())) == 3


STARTED = '{"started": "a::b", "time": 100.0}\n{"started": "a::c", "time": 200.0}\n'


@pytest.mark.parametrize(
    'log, exit_code, killed_at, fate',
    [
        (STARTED, 0, None, Fate('survived', num_tests=2)),
        ('', 5, None, Fate('untested')),
        (STARTED, -11, None, Fate('caught', 'a::c', 'pytest ended with -11', 2)),
        ('', 3, None, Fate('caught', 'collection', 'pytest ended with 3')),
        (STARTED, -9, 230.0, Fate('unfinished', 'a::c', '', 2, 30.0)),
        (STARTED + '{"failed": "a::c", "message": "E"}', 1, None, Fate('caught', 'a::c', 'E', 2)),
        (STARTED + '{"failed": "a::c", "message": "E"}', -9, 230.0, Fate('caught', 'a::c', 'E', 2)),
        (STARTED + '{"started": "cut', -9, 230.0, Fate('unfinished', 'a::c', '', 2, 30.0)),
    ],
)
def test_the_log_of_a_run_tells_the_fate(log, exit_code, killed_at, fate):
    assert read_fate(log, exit_code, killed_at) == fate


def test_a_test_that_fails_without_a_mutant_has_caught_nothing(copy, monkeypatch):
    failing = {'a::flaky'}

    def run(tests, seconds):
        bad = [test for test in tests if test in failing]
        return Fate('caught', bad[0]) if bad else Fate('survived')

    monkeypatch.setattr(copy, 'test', run)
    fates = [Fate('caught', 'a::b'), Fate('caught', 'a::flaky'), Fate('hangs', 'a::c')]
    assert mutate.find_doubtful(copy, fates) == failing


def test_the_table_has_a_line_for_each_mutant_and_the_sums(mutants):
    constant = mutants['constant']
    table = mutate.make_table([(constant, Fate('caught', 'a::b')), (constant, Fate('survived'))])
    assert (
        '| 0 | jaxfm/apple.py:2 | constant: `return x + 1` -> `return x + 2` | caught | a::b |'
        in table.splitlines()
    )
    assert table.endswith('1 caught, 1 survived')


def test_an_unknown_room_is_one_clear_message(root, monkeypatch, capsys):
    monkeypatch.setattr(mutate, 'list_files', lambda root: list(FILES))
    assert mutate.main(['--rooms', 'dta'], root) == 64
    assert 'error: --rooms: no package dta; there are: jaxfm' in capsys.readouterr().err
