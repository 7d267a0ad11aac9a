import pytest

from jaxfm.tasks.final_answers import final_number, last_boxed
from jaxfm.tasks.thinking import visible


@pytest.mark.parametrize(
    'text, number',
    [
        ('#### 18', '18'),
        ('3 + 4 = 7\n#### 7 apples of 9', '7'),
        ('#### 5\nThen again:\n#### 6', '6'),
        ('####', None),
        (r'So \boxed{42} of 50', '42'),
        (r'\boxed{\text{about } 1,250.50}', '1250.5'),
        ('She has 3 of 4 cats, then buys 2, so 5.', '5'),
        ('That costs $1,234.00', '1234'),
        ('1,2,3', '3'),
        ('It is -3', '-3'),
        ('It is \u22123', '-3'),
        ('It is $-3.50.', '-3.5'),
        ('It is -$3', '-3'),
        ('10-4', '4'),
        ('x-4', '4'),
        ('-0', '0'),
        ('007', '7'),
        ('.50', '0.5'),
        ('2.0', '2'),
        ('1000', '1000'),
        ('9' * 5000, '9' * 5000),
        ('nothing', None),
        ('', None),
    ],
)
def test_the_final_number(text, number):
    assert final_number(text) == number


@pytest.mark.parametrize(
    'text, inside',
    [
        (r'\boxed{\frac{1}{2}}', r'\frac{1}{2}'),
        (r'\boxed{1} or \boxed{ 2 }', '2'),
        (r'\fbox{3}', None),
        (r'\boxed {3}', '3'),
        (r'\boxed{\{1, 2\}}', r'\{1, 2\}'),
        (r'\boxed{4} and \boxed{5', '4'),
        (r'\boxed{6', None),
        ('7', None),
    ],
)
def test_the_last_box(text, inside):
    assert last_boxed(text) == inside


@pytest.mark.parametrize(
    'text, begun, shown',
    [
        ('plain ', False, 'plain '),
        ('<think>1</think>\n\n2', False, '2'),
        ('0 <think>1</think>2', False, '2'),
        ('1</think>2', True, '2'),
        ('1</think>2', False, '2'),
        ('<think>1', False, None),
        ('1', True, None),
        ('<think>1</think>2<think>3', False, None),
        ('<think>1</think>2<think>3</think>4', False, '4'),
        ('<think>1</think>', False, ''),
    ],
)
def test_only_what_follows_the_thinking_is_visible(text, begun, shown):
    assert visible(text, begun=begun) == shown


def test_thinking_may_have_other_marks():
    assert visible('[T]1[/T] 2', '[T]', '[/T]') == '2'
    assert visible('[T]1', '[T]', '[/T]') is None
