"""The tools: how they are called, and what they say."""

import pytest

from jaxfm.config.validation import validate
from jaxfm.environments import ENVIRONMENTS, CalculatorConfig, PythonConfig
from jaxfm.environments.base import Observation
from jaxfm.environments.calculator import Calculator, calculate
from jaxfm.environments.python import Python


@pytest.mark.parametrize(
    'expression, value',
    [
        ('12+34', '46'),
        (' 437 * 982 ', '429134'),
        ('2*(3-10)', '-14'),
        ('-5--3', '-2'),
        ('7/2', '3.5'),
        ('6/3', '2'),
        ('1/3', '0.3333333333'),
        ('0.1+0.2', '0.3'),
        ('1.50*2', '3'),
        ('1/3*3', '1'),
        ('999999999999999999*999999999999999999', '999999999999999998000000000000000001'),
    ],
)
def test_the_calculator_is_exact(expression, value):
    assert calculate(expression) == value


OTHERS = 'only numbers, + - * / and parentheses are allowed'


@pytest.mark.parametrize(
    'expression, wrong',
    [
        ('1/0', 'division by zero'),
        ('1/(2-2)', 'division by zero'),
        ('9**9', OTHERS),
        ('9//2', OTHERS),
        ('3(4)', OTHERS),
        ('1,000', OTHERS),
        ('__import__("os")', OTHERS),
        ('1e999', OTHERS),
        ('0x10', OTHERS),
        ('٣+٤', OTHERS),
        ('', 'that is no expression'),
        ('12+', 'that is no expression'),
        ('007', 'that is no expression'),
        ('(' * 150, 'that is no expression'),
        ('1' + '+1' * 100, 'more than 200 characters'),
        ('9' * 40 + '*' + '9' * 40, 'the result has more than 60 digits'),
    ],
)
def test_what_is_wrong_with_an_expression_is_an_answer(expression, wrong):
    assert calculate(expression) == f'error: {wrong}'


@pytest.mark.parametrize('expression', ['-' * 199 + '1', '(' * 99 + '1' + ')' * 99])
def test_the_deepest_expressions_are_answered(expression):
    assert calculate(expression) in ('1', '-1')


def test_a_call_is_answered_behind_it():
    tool = Calculator(CalculatorConfig(start='<calc>', end='</calc>', result='={result};'))
    assert (tool.stop, tool.role, tool.tools) == (('</calc>',), None, ())
    assert tool.step(None, 'so <calc>12+34</calc>', ()) == Observation('=46;')
    assert tool.step(None, 'so <calc>1/0</calc>', ()) == Observation('=error: division by zero;')
    for text in ('it is 46', '', 'so <calc>12+34', '12</calc>'):
        assert tool.step(None, text, ()) == Observation(done=True)


def test_calls_of_a_chat_are_json_or_plain():
    tool = Calculator(CalculatorConfig(role='tool'))
    assert tool.stop == () and tool.role == 'tool'
    [schema] = tool.tools
    assert schema['name'] == 'calculator' and schema['parameters']['required'] == ['expression']

    def say(call):
        return tool.step(None, f'Let me see. <tool_call>{call}</tool_call>', ()).text

    assert say('\n{"name": "calculator", "arguments": {"expression": "2*21"}}\n') == '42'
    assert say('2*21') == '42'
    assert say('{"name": "search", "arguments": {}}') == (
        "error: there is no tool 'search', only calculator"
    )
    for arguments in ('"2*21"', '{}', '{"expression": 42}'):
        call = f'{{"name": "calculator", "arguments": {arguments}}}'
        assert say(call) == 'error: the arguments need expression, a string'
    assert say('1+1</tool_call> and <tool_call>2+2') == '2\n4'
    assert say('[' * 10000) == 'error: more than 200 characters'


def python(code, **values):
    return Python(PythonConfig(**values)).answer(code)


def test_a_program_shows_what_it_prints():
    assert python('for i in range(3):\n    print(i * i)') == '0\n1\n4'
    assert python('x = 1') == 'the program printed nothing'
    assert python('print("é" * 2000)', max_characters=10) == 'é' * 10 + '... (cut)'
    assert python('print("a" * 10)', max_characters=10).startswith('a' * 10)


def test_a_program_that_fails_says_how():
    assert python('print(1)\n1 / 0') == '1\nerror: ZeroDivisionError: division by zero'
    assert python('print(1, flush=True)\nwhile True: pass', seconds=0.5) == '1\nerror: timeout'
    assert python('x = "a" * (1 << 31)', memory_mb=256) == 'error: MemoryError'
    assert 'SyntaxError' in python('print(')


@pytest.mark.parametrize(
    'values, told',
    [
        (dict(start='a]', end=']'), "end ']' must not be in start 'a]'"),
        (dict(result='='), 'result must contain {result}'),
        (dict(max_turns=0), 'max_turns'),
        (dict(role='system'), 'role'),
    ],
)
def test_marks_that_cannot_work_are_refused(values, told):
    _, problems = validate(ENVIRONMENTS['calculator'].schema, {'name': 'calculator', **values})
    assert any(told in str(problem) for problem in problems)
