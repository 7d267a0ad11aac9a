"""BIG-Bench Hard (Suzgun et al. 2022) with its published chains of thought as examples."""

import re

from jaxfm.errors import ConfigError
from jaxfm.tasks.benchmark import Benchmark, Example
from jaxfm.tasks.files import BadRow, Row, find_beside, find_files, read_rows

ANSWER = re.compile(r'[Tt]he answer is:?\s*(.+)')
STEPS = "Let's think step by step."


class Bbh(Benchmark):
    """27 groups of problems with short answers, compared as text.

    `shots` (up to 3) come from cot_prompts.jsonl {task, prompt}, or as published from a .txt for
    each group, which also introduces it; as in the harness, a completion ends where the next
    question would begin.
    """

    name = 'bbh'
    files = ('bbh', 'bbh/*.json')
    shot_files = (
        *('cot_prompts', 'cot-prompts'),
        *('cot-prompts/*.txt', '../cot-prompts/*.txt', '*.txt'),
    )
    fields = {'group': ('task',), 'input': ('input',), 'target': ('target',)}
    optional = ('group',)
    ends = ('\n\n', 'Q:')
    shots_by_group = True

    def parse(self, row: Row) -> Example:
        # As published, a group is a file of its own.
        group = row.get('group', row.file)
        question = f'Q: {row.text("input")}\nA: {STEPS}\n'
        intro = self._introductions.get(group, '')
        return Example(question, '', row.text('target'), group=group, introduction=intro)

    def read_examples(self) -> list[Example]:
        """All questions; their introductions are in the file of examples, if there are any."""
        self._introductions, self._examples = {}, []
        if self.config.shots:
            self._read_prompts()
        return super().read_examples()

    def read_shots(self) -> list[Example]:
        """The examples of the published prompts."""
        return self._examples

    def _read_prompts(self) -> None:
        path = self.config.shots_path or find_beside(self.config.path, self.shot_files)
        if not path:
            raise ConfigError(
                'task bbh: shots needs shots_path, the file cot_prompts.jsonl or cot-prompts/*.txt'
            )
        files = find_files(self.name, path, self.shot_files)
        fields = {'group': ('task',), 'prompt': ('prompt', 'text')}
        for group, text in read_rows(self.name, files, fields, ('group',), _parse_prompt):
            intro, *examples = text.split('\n\nQ: ')
            self._introductions[group] = f'{intro}\n\n'
            for example in examples:
                asked, _, worked = example.partition(STEPS)
                self._examples.append(Example(f'Q: {asked}{STEPS}\n', worked.strip(), group=group))

    def answer(self, prompt, completion: str) -> str | None:
        """What follows 'the answer is' the last time, without the full stop."""
        found = ANSWER.findall(self.cut(prompt, completion))
        return found[-1].strip().removesuffix('.').strip() or None if found else None


def _parse_prompt(row: Row) -> tuple[str, str]:
    # A notice for those who collect training data precedes the line of dashes.
    _, _, text = row.text('prompt').partition('-----\n')
    if STEPS not in text:
        raise BadRow(f'prompt has no {STEPS!r} after a line of dashes')
    return row.get('group', row.file), text
