"""What the command lines of a run and of the tools share."""

import pytest

from jaxfm.command_line import Parser, number
from jaxfm.errors import UsageError


@pytest.fixture
def parser():
    parser = Parser(prog='tool')
    parser.add_argument('--rows', type=number(int, 1))
    parser.add_argument('--share', type=number(float, 0, 1))
    parser.add_subparsers(dest='command').add_parser('ls').add_argument('path')
    return parser


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['--wrong'], 'unrecognized arguments: --wrong'),
        (['--rwos=1'], 'unrecognized arguments: --rwos=1; did you mean --rows?'),
        (['--rows'], 'argument --rows: expected one argument'),
        (['--rows=0'], 'argument --rows: must be at least 1, got 0'),
        (['--rows=1.5'], "argument --rows: invalid int value: '1.5'"),
        (['--share=1'], 'argument --share: must be in [0, 1), got 1'),
        (['ls'], 'the following arguments are required: path'),
    ],
)
def test_a_mistake_is_an_error_with_the_usage(parser, arguments, message):
    with pytest.raises(UsageError) as raised:
        parser.parse_args(arguments)
    first, _, usage = str(raised.value).partition('\n')
    assert usage.startswith('usage: tool')
    assert message in first


def test_numbers_within_their_bounds_are_read(parser):
    flags = parser.parse_args(['--rows=1', '--share=0.5'])
    assert (flags.rows, flags.share) == (1, 0.5)
