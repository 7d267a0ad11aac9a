"""The environment of docs/environments.md plays."""

import re

from jaxfm import code
from tests import doc_examples
from tests.environments.scripted import Writer
from tests.environments.test_episode import play, player_of, tell


def test_the_environment_of_the_page_plays(tmp_path):
    def search(text, index):
        """Halves what is left of the numbers from 0 to 7."""
        low, high = 0, 8
        for guess, said in re.findall(r'(\d)\? (higher|lower)', text):
            low, high = (int(guess) + 1, high) if said == 'higher' else (low, int(guess))
        return f'{(low + high) // 2}?' if index else 'no$'

    with doc_examples.written(tmp_path):
        code.search_beside(tmp_path / 'mine')
        found = play(player_of('guessing:Guessing', most=8, max_turns=5), Writer(search), n=2)
    first, second = found['p:']
    assert (first.finish_reason, first.reward) == ('stop', 0.0)
    assert (second.finish_reason, second.reward) == ('stop', 1.0)
    assert tell(second).startswith('m:4?|e: ')
