import pytest

from jaxfm.config.checks import reads, run_checks
from jaxfm.schema import Problem


@reads('steps')
def steps_are_few(run, prefix):
    yield Problem(((*prefix, 'steps'),), f'steps {run.steps} are many')


@reads('steps')
def reads_more_than_it_says(run, prefix):
    yield Problem((), f'{run.seed}')


def test_a_check_runs_if_the_parts_it_reads_are_present():
    assert run_checks([steps_are_few], {'seed': 3}) == []
    found = run_checks([steps_are_few], {'steps': 4}, ('phases', 1))
    assert found == [Problem((('phases', 1, 'steps'),), 'steps 4 are many')]


def test_a_check_sees_only_the_parts_it_declares():
    with pytest.raises(AttributeError, match='seed'):
        run_checks([reads_more_than_it_says], {'steps': 4, 'seed': 3})
