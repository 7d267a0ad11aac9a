"""What is found wrong in a group."""

from jaxfm.config.run import OriginConfig
from jaxfm.config.validation import validate
from jaxfm.schema import Group


class Plain(Group):
    """A group without checks between its values."""

    width: int


def test_every_fault_of_a_group_without_checks_of_its_own_is_told():
    group, problems = validate(Plain, {'width': 'wide', 'length': 1})
    assert group is None
    assert [problem.place for problem in problems] == [('width',), ('length',)]
    assert validate(Plain, {'width': 3}) == (Plain(width=3), [])


def test_a_record_of_an_earlier_run_may_have_any_fault():
    group, problems = validate(OriginConfig, {'model': {'name': 'transformer'}, 'init_from': 3})
    assert group is None and ('init_from',) in {problem.place for problem in problems}
