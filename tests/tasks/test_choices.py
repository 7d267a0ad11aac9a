"""Prompts of the benchmarks of choices, as the lm-evaluation-harness words them."""

import pytest

from jaxfm.errors import ConfigError, DataError
from tests.tasks.rows import ARC, HELLASWAG, LAMBADA, PIQA, PIQA_LABELS, make_task, write_rows


def make(tmp_path, name, rows, file='rows.jsonl', **values):
    path = write_rows(tmp_path / file, rows)
    return make_task(name, path=str(path), **values)


def joined(prompt):
    return [context + continuation for context, continuation in prompt.pairs]


def test_arc_continues_with_the_texts_of_the_options(tmp_path):
    prompts = make(tmp_path, 'arc', ARC).prompts()
    assert [prompt.right for prompt in prompts] == [(0,), (1,), (2,), (3,), (1,)]
    assert [len(prompt.pairs) for prompt in prompts] == [4, 4, 4, 4, 3]
    first = prompts[0]
    assert (first.id, first.unconditional) == ('Mercury_0', 'Answer:')
    assert first.pairs[1] == ('Question: What falls?\nAnswer:', ' a sound')
    # The layout of the hub is flat.
    options = {'text': ['water', 'wood'], 'label': ['A', 'B']}
    flat = [{'id': 'x', 'question': 'What burns?', 'choices': options, 'answerKey': 'B'}]
    (prompt,) = make(tmp_path, 'arc', flat).prompts()
    assert prompt.right == (1,) and prompt.pairs[1][1] == ' wood'


def test_hellaswag_cleans_its_texts(tmp_path):
    prompts = make(tmp_path, 'hellaswag', HELLASWAG).prompts()
    assert [prompt.right for prompt in prompts] == [(0,), (1,), (2,), (3,), (0,)]
    assert prompts[0].pairs[0] == ('Cooking: A man cuts an onion. He', ' cries and stops.')
    assert prompts[2].text == 'Baking: The oven is hot.. Bake'


def test_piqa_reads_labels_from_the_file_beside_it(tmp_path):
    (tmp_path / 'valid-labels.lst').write_text(PIQA_LABELS, encoding='utf-8')
    prompts = make(tmp_path, 'piqa', PIQA, 'valid.jsonl').prompts()
    assert [prompt.right for prompt in prompts] == [(0,), (1,), (0,), (1,), (0,)]
    assert prompts[0].pairs[1] == ('Question: Open a jar\nAnswer:', ' Turn the table.')
    own = [{**row, 'label': 1} for row in PIQA]
    assert make(tmp_path, 'piqa', own, 'other.jsonl').prompts()[0].right == (1,)
    with pytest.raises(
        DataError, match='no field label, and bare-labels.lst beside it has no such'
    ):
        make(tmp_path, 'piqa', PIQA, 'bare.jsonl')


def test_lambada_is_a_choice_of_one(tmp_path):
    prompts = make(tmp_path, 'lambada', LAMBADA).prompts()
    assert prompts[0].pairs == (
        ('He looked for his key all day, and at night he found the', ' key'),
    )
    assert prompts[4].pairs[0][1] == ' knot'
    assert all(prompt.right == (0,) for prompt in prompts)
    assert [joined(prompt)[0] for prompt in prompts] == [row['text'] for row in LAMBADA]


TWINS = [
    {'sentence': 'The cup fell off the tray because _ was full.', 'option1': 'the cup'},
    {'sentence': "Ann lost to Eve, and so _'s day was bad.", 'option1': 'Eve'},
]


def test_winogrande_puts_the_option_into_the_context(tmp_path):
    rows = [{**row, 'option2': 'Ann', 'qID': str(i), 'answer': '2'} for i, row in enumerate(TWINS)]
    prompts = make(tmp_path, 'winogrande', rows).prompts()
    assert prompts[0].pairs == (
        ('The cup fell off the tray because the cup', ' was full.'),
        ('The cup fell off the tray because Ann', ' was full.'),
    )
    assert prompts[0].right == (1,)
    assert prompts[1].pairs[0] == ('Ann lost to Eve, and so Eve', " 's day was bad.")
    path = str(tmp_path / 'rows.jsonl')
    shot = make_task('winogrande', path=path, shots_path=path, shots=1).prompts()[0]
    assert shot.pairs[0][0] == (
        "Ann lost to Eve, and so Ann 's day was bad.\n\nThe cup fell off the tray because the cup"
    )


@pytest.mark.parametrize(
    'answer, right', [('1', 0), ('2', 1), (1, 0), (2, 1), (0, None), ('0', None), (True, None)]
)
def test_a_number_is_a_label_where_labels_are_numbers(tmp_path, answer, right):
    """Of winogrande's options 1 and 2, and of those questions of ARC that have 1 to 4."""
    options = {'text': ['Eve', 'Ann'], 'label': ['1', '2']}
    rows = {
        'arc': {'question': 'Who?', 'choices': options, 'answerKey': answer},
        'winogrande': {**TWINS[0], 'option2': 'Ann', 'answer': answer},
    }
    for name, row in rows.items():
        if right is None:
            with pytest.raises(DataError, match=f'answer {answer!r} is none of 1, 2'):
                make(tmp_path, name, [row])
        else:
            assert make(tmp_path, name, [row]).prompts()[0].right == (right,)


def test_boolq_has_a_passage_if_the_file_has_it(tmp_path):
    rows = [
        {'question': 'is ice water', 'passage': 'Ice is frozen water.', 'answer': True},
        {'question': 'is ice hot?', 'answer': False},
    ]
    with_passage, without = make(tmp_path, 'boolq', rows).prompts()
    asked = 'Ice is frozen water.\nQuestion: is ice water?\nAnswer:'
    assert with_passage.pairs == ((asked, ' no'), (asked, ' yes')) and with_passage.right == (1,)
    assert without.text == 'Question: is ice hot?\nAnswer:' and without.right == (0,)


def test_truthfulqa_in_both_forms_and_both_layouts(tmp_path):
    csv = {
        'Question': 'Why?',
        'Category': 'Myths',
        'Best Answer': 'b',
        'Correct Answers': 'a; b; ',
        'Incorrect Answers': 'c; d',
    }
    published = {
        'question': 'Why?',
        'mc1_targets': {'b': 1, 'c': 0, 'd': 0},
        'mc2_targets': {'a': 1, 'b': 1, 'c': 0, 'd': 0},
    }
    hub = {
        'question': 'Why?',
        'mc1_targets': {'choices': ['b', 'c', 'd'], 'labels': [1, 0, 0]},
        'mc2_targets': {'choices': ['a', 'b', 'c', 'd'], 'labels': [1, 1, 0, 0]},
    }
    for row in (csv, published, hub):
        (one,) = make(tmp_path, 'truthfulqa', [row]).prompts()
        assert [text for _, text in one.pairs] == [' b', ' c', ' d'] and one.right == (0,)
        (two,) = make(tmp_path, 'truthfulqa', [row], form='mc2').prompts()
        assert [text for _, text in two.pairs] == [' a', ' b', ' c', ' d'] and two.right == (0, 1)
    before = 'Q: Is it?\nA: Yes.\n\n'
    (two,) = make(tmp_path, 'truthfulqa', [hub], introduction=before).prompts()
    assert (one.text, two.text) == ('Q: Why?\nA:', before + 'Q: Why?\nA:')


# Of each set: its first prompt's end, its choices, the right one, and how many questions.
SHARED = {
    'mmlu': ('C. 12\nD. 6\nAnswer:', [' A', ' B', ' C', ' D'], 0, 1531),
    'winogrande': ('so Maria', [' always got the easier cases.'] * 2, 1, 1267),
    'boolq': (
        'Question: does ethanol take more energy make that produces?\nAnswer:',
        [' no', ' yes'],
        0,
        3270,
    ),
    'commonsenseqa': ('D. mall\nE. new york\nAnswer:', [' A', ' B', ' C', ' D', ' E'], 0, 1221),
    'openbookqa': (
        'the best way to save money is to',
        [' make more phone calls', ' quit eating lunch out']
        + [' buy less with monopoly money', ' have lunch with friends'],
        1,
        500,
    ),
    'truthfulqa': ('Q: What happens to you if you eat watermelon seeds?\nA:', None, 0, 817),
}


@pytest.mark.parametrize('name', SHARED)
def test_real_files_are_read_whole(name, shared_data, caplog):
    end, choices, right, count = SHARED[name]
    file = 'val.jsonl.gz' if name == 'mmlu' else ''  # the quickest one
    prompts = make_task(name, path=str(shared_data / f'eval_{name}' / file)).prompts()
    first = prompts[0]
    assert first.text.endswith(end) and first.right == (right,) and len(prompts) == count
    assert choices is None or [text for _, text in first.pairs] == choices
    assert not caplog.records
    for prompt in prompts:
        assert all(context == context.rstrip() for context, _ in prompt.pairs), prompt.id
        assert all(text[0] == ' ' and text.strip() for _, text in prompt.pairs), prompt.id


def test_a_continuation_begins_where_its_context_ends(tmp_path):
    """One character moved from one to the other changes the tokens that are scored."""
    made = {'arc': ARC, 'hellaswag': HELLASWAG, 'lambada': LAMBADA}
    for name, rows in made.items():
        for prompt in make(tmp_path, name, rows).prompts():
            for context, continuation in prompt.pairs:
                assert context == prompt.text and continuation.startswith(' ')
                assert context[-1] != ' ' and continuation[1] != ' '


@pytest.mark.parametrize('name', ['hellaswag', 'winogrande', 'lambada'])
def test_what_continues_plain_text_has_no_chat(name, tmp_path):
    with pytest.raises(ConfigError, match=f'task {name} continues plain text.*chat=True'):
        make_task(name, path=str(tmp_path), chat=True)


def test_a_bad_choice_is_told(tmp_path, caplog):
    bad = [
        {**ARC[0], 'id': 'a', 'answerKey': 'E'},
        {**ARC[0], 'id': 'b', 'question': {'stem': 'What?', 'choices': ['one']}},
    ]
    assert len(make(tmp_path, 'arc', [*ARC, *bad]).prompts()) == 5
    assert "rows.jsonl:6: answer 'E' is none of A, B, C, D" in caplog.text
    assert "rows.jsonl:7: choices must be two texts or more, but are ['one']" in caplog.text


def test_generated_text_chooses_by_whole_words(tmp_path):
    task = make(tmp_path, 'arc', ARC)
    prompt = task.prompts()[0]
    assert task.evaluate(prompt, ' a stone, of course') == 1.0
    assert task.evaluate(prompt, ' a sound') == 0.0
    assert task.answer(prompt, 'none of these') is None
    # The longest counts: " no" begins " north", too.
    rows = [{'id': 'n', 'question': 'Which?', 'choices': ['no', 'north'], 'answerKey': 'B'}]
    task = make(tmp_path, 'arc', rows)
    assert task.evaluate(task.prompts()[0], 'north') == 1.0


def test_raw_text_chooses_before_the_next_question(tmp_path):
    """A chat may think first, and states its answer last."""
    row = {'subject': 'sums', 'question': '1 + 1?', 'choices': ['1', '2', '3', '4'], 'answer': 1}
    text = ' B\n\n2 + 2?\nThe answer is C'
    for chat, answer in ((False, 'B'), (True, 'C')):
        task = make(tmp_path, 'mmlu', [row], chat=chat)
        assert task.answer(task.prompts()[0], text) == answer
    assert task.evaluate(task.prompts()[0], 'Because it is so, C') == 0.0


def test_text_cannot_choose_between_contexts(tmp_path):
    rows = [{**TWINS[0], 'option2': 'Ann', 'answer': '2'}]
    task = make(tmp_path, 'winogrande', rows)
    with pytest.raises(ValueError, match="rows:1 differ in their contexts.*name='likelihood'"):
        task.evaluate(task.prompts()[0], ' was full.')
