"""All 25 kinds of instructions: what follows one, and what does not."""

import sys

import pytest

from jaxfm.errors import DataError, MissingInputError
from jaxfm.tasks.instructions import KINDS, variants
from tests.tasks.rows import make_task, write_rows

GERMAN = 'Das ist ein langer deutscher Satz über das Wetter in den Bergen.'
ENGLISH = 'this is a long sentence about the weather in the mountains today.'

# kind -> (arguments, responses that follow it, responses that do not)
CASES = {
    'keywords:existence': (
        {'keywords': ['sun', 'sea']},
        ['The Sun and the SEA', 'seasun'],
        ['sun', ''],
    ),
    'keywords:frequency': (
        {'keyword': 'sun', 'frequency': 2, 'relation': 'at least'},
        ['sun Sun', 'sunny sundays sun'],
        ['sun', 'moon'],
    ),
    'keywords:forbidden_words': (
        {'forbidden_words': ['rock', 'c++']},
        ['rocks', 'stone'],
        ['a Rock.', 'rock'],
    ),
    'keywords:letter_frequency': (
        {'letter': 'q', 'let_frequency': 2, 'let_relation': 'less than'},
        ['Q', 'none'],
        ['Qq', 'q q q'],
    ),
    'language:response_language': ({'language': 'de'}, [GERMAN, '123'], [ENGLISH]),
    'length_constraints:number_sentences': (
        {'num_sentences': 3, 'relation': 'less than'},
        ['One. Two!', 'One?', 'It costs 3.50 dollars. Yes.'],
        ['One. Two. Three.', 'One. Two. "Three." Four'],
    ),
    'length_constraints:number_paragraphs': (
        {'num_paragraphs': 2},
        ['a\n***\nb', '***\na\n***\nb\n***'],
        ['a', 'a\n***\n\n***\nb', 'a *** b *** c'],
    ),
    'length_constraints:number_words': (
        {'num_words': 3, 'relation': 'at least'},
        ['one, two - three', "it's two"],
        ['one two', ''],
    ),
    'length_constraints:nth_paragraph_first_word': (
        {'num_paragraphs': 2, 'nth_paragraph': 2, 'first_word': 'Night'},
        ['day\n\nnight, then', 'day\n\n"Night" it is'],
        ['night\n\nday', 'night', 'day\n\nnight\n\nday', 'day\n\nnightly'],
    ),
    'detectable_content:number_placeholders': (
        {'num_placeholders': 2},
        ['[name] and [address]', '[a][b][c]'],
        ['[name]', '(name) (address)'],
    ),
    'detectable_content:postscript': (
        {'postscript_marker': 'P.P.S'},
        ['Bye.\nP.P.S. more', 'p. p. s more'],
        ['P.S. more', 'Bye.'],
    ),
    'detectable_format:number_bullet_lists': (
        {'num_bullets': 2},
        ['* a\n* b', 'x\n- a\n  * b'],
        ['* a', '* a\n* b\n- c', '**bold**\n* a'],
    ),
    'detectable_format:constrained_response': (
        {},
        ['My answer is yes.', 'Well. My answer is maybe.'],
        ['Yes.', 'my answer is yes'],
    ),
    'detectable_format:number_highlighted_sections': (
        {'num_highlights': 2},
        ['*a* and *b*', '*a*, **b**'],
        ['*a*', '* *, *a*', 'none'],
    ),
    'detectable_format:multiple_sections': (
        {'section_spliter': 'SECTION', 'num_sections': 2},
        ['SECTION 1 a SECTION 2 b', 'SECTION 1\na\nSECTION 2\nb\nSECTION 3'],
        ['SECTION 1', 'Section 1 Section 2', 'SECTION SECTION'],
    ),
    'detectable_format:json_format': (
        {},
        ['{"a": 1}', '```json\n[1]\n```', ' ```\n2\n``` '],
        ['{a: 1}', 'here: {"a": 1}', ''],
    ),
    'detectable_format:title': ({}, ['<<A title>>\ntext'], ['<< >>', 'A title', '<<a\nb>>']),
    'combination:two_responses': (
        {},
        ['a\n******\nb', '******a******b'],
        ['a', 'a******a', 'a******b******c', 'a************b'],
    ),
    'combination:repeat_prompt': (
        {'prompt_to_repeat': 'Say hi. '},
        ['say HI. Hi!', ' Say hi.'],
        ['Hi! Say hi.', ''],
    ),
    'startend:end_checker': (
        {'end_phrase': 'The end.'},
        ['Well, the END.', '"So it is the end."\n'],
        ['The end. Bye', ''],
    ),
    'startend:quotation': ({}, ['"all of it"', ' "a"\n'], ['"', 'a "b"', '"a" b', '']),
    'change_case:capital_word_frequency': (
        {'capital_frequency': 2, 'capital_relation': 'at least'},
        ['NO and YES', 'A WELL-KNOWN I'],
        ['NO', 'No Yes'],
    ),
    'change_case:english_capital': ({}, [ENGLISH.upper()], [ENGLISH, GERMAN.upper()]),
    'change_case:english_lowercase': ({}, [ENGLISH], [ENGLISH.title(), GERMAN.lower()]),
    'punctuation:no_comma': ({}, ['a; b', 'none'], ['a, b']),
}


@pytest.mark.parametrize('kind', KINDS)
def test_an_instruction_is_followed_or_not(kind):
    if 'language' in kind or 'english' in kind:
        pytest.importorskip('langdetect', reason="needs the extra 'ifeval'")
    arguments, followed, ignored = CASES[kind]
    for text in followed:
        assert KINDS[kind](text, **arguments), text
    for text in ignored:
        assert not KINDS[kind](text, **arguments), text


def test_there_are_25_kinds():
    assert len(KINDS) == 25 and set(KINDS) == set(CASES)


def row(*kinds, key=1):
    arguments = [{**CASES[kind][0], 'unused': None} for kind in kinds]
    return {'key': key, 'prompt': 'Do.', 'instruction_id_list': list(kinds), 'kwargs': arguments}


def make(tmp_path, *rows, **values):
    return make_task('ifeval', path=str(write_rows(tmp_path / 'input_data.jsonl', rows)), **values)


TWO = ('punctuation:no_comma', 'detectable_format:constrained_response')


def test_all_instructions_of_a_prompt_must_be_followed(tmp_path):
    task = make(tmp_path, row(*TWO))
    (prompt,) = task.prompts()
    assert (prompt.id, prompt.text) == ('1', 'Do.')
    assert task.evaluate(prompt, 'My answer is no.') == 1.0
    assert task.evaluate(prompt, 'Well, my dear. My answer is no.') == 0.0
    assert task.evaluate(prompt, 'no comma') == 0.0
    assert task.evaluate(prompt, '  ') == 0.0
    assert task.answer(prompt, 'My answer is no.') is None


def test_the_loose_score_accepts_a_greeting_and_stars(tmp_path):
    strict, loose = make(tmp_path, row(*TWO)), make(tmp_path, row(*TWO), form='loose')
    (prompt,) = strict.prompts()
    for text in (
        'Sure, here:\nMy answer is no.',
        'My answer is no.\nBye, bye!',
        'My **answer** is no.',
    ):
        assert (strict.evaluate(prompt, text), loose.evaluate(prompt, text)) == (0.0, 1.0)
    assert loose.evaluate(prompt, 'a, b\nMy answer is no.\nc, d\nMore.') == 0.0
    assert loose.evaluate(prompt, '') == 0.0
    assert variants('a\n*b*\nc')[3] == '*b*' and variants('a\n*b*\nc')[-1] == 'b'


def test_what_the_file_asks_wrongly_is_told(tmp_path, caplog):
    unknown = row('punctuation:no_comma', key=2) | {'instruction_id_list': ['punctuation:no_coma']}
    wrong = row('keywords:existence', key=3) | {'kwargs': [{'keyword': 'sun'}]}
    missing = row(*TWO, key=4) | {'kwargs': [{}]}
    assert len(make(tmp_path, row(*TWO), unknown, wrong, missing).prompts()) == 1
    for told in (
        "2: unknown instruction 'punctuation:no_coma'; did you mean punctuation:no_comma?",
        '3: keywords:existence takes keywords; kwargs has: keyword',
        '4: 2 instructions, but 1 kwargs',
    ):
        assert told in caplog.text


def test_a_prompt_about_languages_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'langdetect', None)
    assert make(tmp_path, row(*TWO)).prompts()
    with pytest.raises(MissingInputError, match=r"langdetect: pip install 'jaxfm\[ifeval\]'"):
        make(tmp_path, row('language:response_language'))


def test_real_prompts_are_read_whole(shared_data, caplog):
    pytest.importorskip('langdetect', reason="needs the extra 'ifeval'")
    task = make_task('ifeval', path=str(shared_data / 'eval_ifeval'))
    assert len(task.prompts()) == 541 and not caplog.records
    assert {kind for prompt in task.prompts() for kind, _ in prompt.gold} == set(KINDS)
    assert 0 < sum(task.evaluate(prompt, 'A short answer.') for prompt in task.prompts()) < 100


def test_a_file_without_a_usable_prompt_is_an_error(tmp_path):
    with pytest.raises(DataError, match='none of 1 records can be used'):
        make(tmp_path, row(*TWO) | {'instruction_id_list': []})
