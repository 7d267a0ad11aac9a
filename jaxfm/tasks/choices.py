"""Multiple choice by log-likelihood, and LAMBADA's last word, a choice of one.

Prompts are worded as in the lm-evaluation-harness, so that scores can be compared.
"""

import functools
import re
from pathlib import Path
from typing import Any

from jaxfm.tasks.benchmark import Benchmark, Example, index_of, options_of
from jaxfm.tasks.files import BadRow, Row

# Fields of questions published by AllenAI as {question: {stem, choices}, answerKey}, and flat.
ALLENAI = {
    'question': ('question.stem', 'question_stem', 'question'),
    'choices': ('question.choices', 'choices'),
    'answer': ('answerKey', 'answer'),
}


def with_letters(question: str, options: Any, answer: Any, **given) -> Example:
    """An example that lists its options as A, B, C; the letters are the choices."""
    texts, labels = options_of(options)
    right = index_of(answer, labels)
    letters = [chr(ord('A') + i) for i in range(len(texts))]
    lines = ''.join(f'\n{letter}. {text}' for letter, text in zip(letters, texts))
    return choice(f'{question.strip()}{lines}\nAnswer:', letters, right, **given)


def choice(question: str, texts: list[str], *right: int, **given) -> Example:
    """An example whose choices are the texts, after a space."""
    choices = tuple(f' {text}' for text in texts)
    return Example(question, choices[right[0]], choices=choices, right=right, **given)


class Mmlu(Benchmark):
    """MMLU (Hendrycks et al. 2021): the letter of the right option; examples of one subject.

    As published, a subject is a .csv without a header in test/, and its examples in dev/.
    """

    name = 'mmlu'
    files = ('test', 'test/*_test.csv', '*_test.csv')
    shot_files = ('dev', 'dev/*_dev.csv', '../dev/*_dev.csv', '*_dev.csv')
    columns = ('question', *'ABCD', 'answer')
    fields = {name: (name,) for name in ('subject', 'choices', *columns)}
    optional = ('subject', 'choices', *'ABCD')
    shots_by_group = True

    def parse(self, row: Row) -> Example:
        subject = row.text('subject') if row.get('subject') else self._subject_of(row.file)
        words = subject.replace('_', ' ')
        about = f'The following are multiple choice questions (with answers) about {words}.\n\n'
        options = row.get('choices', [row.get(letter) for letter in 'ABCD'])
        given = dict(group=subject, introduction=about)
        return with_letters(row.text('question'), options, row['answer'], **given)

    @staticmethod
    def _subject_of(file: str) -> str:
        subject, _, split = file.rpartition('_')
        if split not in ('dev', 'val', 'test') or not subject:
            raise BadRow(f'no field subject, and {file} is not named as a subject, such as x_test')
        return subject


class Arc(Benchmark):
    """ARC easy or challenge (Clark et al. 2018): the text of the right option."""

    name = 'arc'
    files = ('test', 'ARC-Challenge-Test', 'ARC-Easy-Test')
    shot_files = ('train', 'ARC-Challenge-Train', 'ARC-Easy-Train')
    fields = ALLENAI | {'id': ('id',)}
    optional = ('id',)

    def parse(self, row: Row) -> Example:
        texts, labels = options_of(row['choices'])
        question = f'Question: {row.text("question")}\nAnswer:'
        return choice(question, texts, index_of(row['answer'], labels))


class HellaSwag(Benchmark):
    """HellaSwag (Zellers et al. 2019): the right ending of a description."""

    name = 'hellaswag'
    files, shot_files = ('hellaswag_val', 'val', 'validation'), ('hellaswag_train', 'train')
    fields = {
        'activity': ('activity_label',),
        'first': ('ctx_a',),
        'second': ('ctx_b',),
        'endings': ('endings',),
        'answer': ('label',),
    }
    has_chat_form = False
    unconditional = ''

    def parse(self, row: Row) -> Example:
        texts, labels = options_of(row['endings'])
        begun = f'{row.get("activity")}: {row.get("first")} {str(row.get("second")).capitalize()}'
        right = index_of(str(row['answer']), labels)
        return choice(self._clean(begun), [self._clean(text) for text in texts], right)

    @staticmethod
    def _clean(text: str) -> str:
        """Without the marks of WikiHow's headings and of cuts."""
        text = text.strip().replace(' [title]', '. ')
        return re.sub(r'\[.*?\]', '', text).replace('  ', ' ')


class WinoGrande(Benchmark):
    """WinoGrande (Sakaguchi et al. 2019) by partial evaluation: the option is in the context.

    Compared is how likely the rest of the sentence is after either option (Trinh and Le 2018).
    """

    name = 'winogrande'
    files = ('dev', 'valid', 'validation')
    shot_files = ('train', 'train_xl', 'train_l', 'train_m', 'train_s', 'train_xs')
    fields = {
        'question': ('sentence', 'question'),
        'choices': ('choices',),
        'option1': ('option1',),
        'option2': ('option2',),
        'answer': ('answer',),
        'id': ('qID',),
    }
    optional = ('choices', 'option1', 'option2', 'id')
    has_chat_form = False
    unconditional = ''

    def parse(self, row: Row) -> Example:
        before, blank, rest = row.text('question').partition('_')
        if not blank or not rest.strip():
            raise BadRow("question needs a '_' for the option, and text after it")
        options = [row.get('option1'), row.get('option2')]
        texts, labels = options_of(row.get('choices', options))
        # As published, options and answers are called 1 and 2; a list has an index.
        right = index_of(row['answer'], labels if row.get('choices') else ['1', '2'])
        contexts, rest = tuple(before + text for text in texts), f' {rest.strip()}'
        return Example(
            contexts[right], rest, choices=(rest,) * 2, right=(right,), contexts=contexts
        )


class Piqa(Benchmark):
    """PIQA (Bisk et al. 2020): the right way to reach a goal.

    The labels are in the records, or in the published file beside them (valid-labels.lst).
    """

    name = 'piqa'
    files, shot_files = ('valid', 'dev', 'validation'), ('train',)
    fields = {name: (name,) for name in ('goal', 'sol1', 'sol2', 'label')}
    optional = ('label',)

    def parse(self, row: Row) -> Example:
        label = row.get('label')
        if label is None:
            label = self._labels(row.path, row.file).get(row.number)
        if label is None:
            raise BadRow(f'no field label, and {row.file}-labels.lst beside it has no such line')
        question = f'Question: {row.text("goal")}\nAnswer:'
        return choice(question, [row.text('sol1'), row.text('sol2')], index_of(label, ['0', '1']))

    @staticmethod
    @functools.lru_cache(maxsize=2)
    def _labels(path: str, name: str) -> dict[int, str]:
        """{line number: label} of the file of labels beside a file."""
        labels = Path(path).with_name(f'{name}-labels.lst')
        lines = labels.read_text(encoding='utf-8').split('\n') if labels.is_file() else []
        return {number: line.strip() for number, line in enumerate(lines, 1) if line.strip()}


class BoolQ(Benchmark):
    """BoolQ (Clark et al. 2019): yes or no, after a passage if the record has one."""

    name = 'boolq'
    files, shot_files = ('dev', 'val', 'valid', 'validation'), ('train',)
    fields = {name: (name,) for name in ('question', 'passage', 'answer')}
    optional = ('passage',)

    def parse(self, row: Row) -> Example:
        if not isinstance(row['answer'], bool):
            raise BadRow(f'answer must be true or false, but is {row["answer"]!r:.40}')
        passage = f'{row["passage"]}\n' if row.get('passage') else ''
        question = f'{passage}Question: {row.text("question").rstrip("?")}?\nAnswer:'
        return choice(question, ['no', 'yes'], int(row['answer']))


class CommonsenseQA(Benchmark):
    """CommonsenseQA (Talmor et al. 2019): the letter of the right option."""

    name = 'commonsenseqa'
    files, shot_files = ('dev_rand_split', 'dev', 'validation'), ('train_rand_split', 'train')
    fields = ALLENAI | {'id': ('id',)}
    optional = ('id',)

    def parse(self, row: Row) -> Example:
        question = f'Question: {row.text("question").strip()}'
        return with_letters(question, row['choices'], row['answer'])


class OpenBookQA(Benchmark):
    """OpenBookQA (Mihaylov et al. 2018): the text of the right option continues the question."""

    name = 'openbookqa'
    files, shot_files = ('test',), ('train',)
    fields = ALLENAI
    unconditional = ''

    def parse(self, row: Row) -> Example:
        texts, labels = options_of(row['choices'])
        return choice(row.text('question').strip(), texts, index_of(row['answer'], labels))


class TruthfulQA(Benchmark):
    """TruthfulQA (Lin et al. 2022) as multiple choice.

    `mc1` has one right choice, the best answer; `mc2` has all right and wrong ones, and its score
    is the probability of the right ones among them. Published scores have six fixed examples before
    each question (figure 21 of the paper): give them as `introduction` to compare with those.
    """

    name = 'truthfulqa'
    files = ('mc_task', 'TruthfulQA', 'truthfulqa', 'validation', 'TruthfulQA.csv')
    fields = {
        'question': ('question', 'Question'),
        'group': ('Category', 'category'),
        'mc1': ('mc1_targets',),
        'mc2': ('mc2_targets',),
        'best': ('Best Answer',),
        'correct': ('Correct Answers',),
        'incorrect': ('Incorrect Answers',),
    }
    optional = ('group', 'mc1', 'mc2', 'best', 'correct', 'incorrect')
    unconditional = 'A:'

    def parse(self, row: Row) -> Example:
        right, wrong = self._answers(row)
        if not right or not wrong:
            raise BadRow('there must be a right answer and a wrong one')
        question = f'Q: {row.text("question").strip()}\nA:'
        texts, group = right + wrong, str(row.get('group', ''))
        intro = self.config.introduction
        return choice(question, texts, *range(len(right)), group=group, introduction=intro)

    def _answers(self, row: Row) -> tuple[list[str], list[str]]:
        """(right, wrong) answers, from the published multiple-choice file or from the CSV's."""
        targets = row.get(self.config.form)
        if isinstance(targets, dict):
            if 'choices' in targets:
                targets = dict(zip(targets['choices'], targets['labels']))
            right = [text for text, label in targets.items() if label]
            return right, [text for text, label in targets.items() if not label]
        right = [row.text('best')] if self.config.form == 'mc1' else _split(row.text('correct'))
        return right, _split(row.text('incorrect'))


def _split(answers: str) -> list[str]:
    parts = (part.strip() for part in answers.split(';'))
    return list(dict.fromkeys(part for part in parts if part))


class Lambada(Benchmark):
    """LAMBADA (Paperno et al. 2016): the last word of a passage."""

    name = 'lambada'
    files = ('lambada_test', 'lambada_test_en', 'test')
    fields = {'text': ('text',)}
    has_chat_form = False
    unconditional = ''

    def parse(self, row: Row) -> Example:
        before, space, word = row.text('text').strip().rpartition(' ')
        if not space:
            raise BadRow('text must have two words or more')
        return choice(before, [word], 0)
