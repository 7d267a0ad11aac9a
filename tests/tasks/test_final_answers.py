import pytest

from jaxfm.tasks.final_answers import final_choice, final_number, last_boxed
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


@pytest.mark.parametrize(
    'text, choice',
    [
        ('B', 'B'),
        ('(B)', 'B'),
        (' B. Paris, of course.', 'B'),
        ('B. A stone falls', 'B'),
        ('B\nA stone falls', 'B'),
        ('B, because it falls. A does not.', 'B'),
        ('Answer: B', 'B'),
        ('**Answer:** B', 'B'),
        ('The answer is **B**.', 'B'),
        ('Actually the answer is B', 'B'),
        ('The correct answer is: (B) Paris.', 'B'),
        ('A lot of people say A. The answer is B because it is. A and C are wrong.', 'B'),
        ('A. The answer is A. Wait, no: the answer is B.', 'B'),
        ('The answer is B. That answer is short.', 'B'),
        ('Because it is so, C', None),
        ('Better not to say', None),
        ('A man walks', None),
        ('A or B', None),
        ('A, B and C are all right', None),
        ('A. B. and C are right', None),
        ('A. one\nB. two\nC. three', None),
        ('The answer is A or B.', None),
        ('The answer is A, or else B.', None),
        ('The answer is either A or B.', None),
        ('The answer is not A.', None),
        ("I don't think the answer is A.", None),
        ('It is not clear whether the right answer is A.', None),
        ('If it is not red, the answer is B.', 'B'),
        ('The answer is A. On second thought, the answer is either B or C.', None),
        ('The answer is A man', None),
        ('A.M. or P.M.', None),
        ('AB', None),
        ('', None),
    ],
)
def test_a_choice_is_read_only_where_it_is_clear(text, choice):
    assert final_choice(text, 'ABC') == choice


@pytest.mark.parametrize(
    'text, choice',
    [
        ('no', 'no'),
        ('yes, it is', 'yes'),
        ('not at all clear; yes', None),
        ('no or yes', None),
        ('no, or rather yes', None),
        ('north', 'north'),
        ('The answer is north.', 'north'),
        ('Hang it up. Then wait.', 'Hang it up.'),
    ],
)
def test_a_choice_of_several_words_is_whole(text, choice):
    assert final_choice(text, ['no', 'north', 'yes', 'Hang it up.']) == choice
