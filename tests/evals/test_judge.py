"""What a judge shows a task when the marks of thoughts are special tokens, which have no text."""

import types

import pytest

from jaxfm.errors import ConfigError
from jaxfm.evals import ThinkingConfig
from jaxfm.evals.judge import Judge
from jaxfm.sampling.request import Completion
from jaxfm.sampling.strategies import RewardCheckerConfig, RewardConfig
from jaxfm.sampling.strategies.base import judged_text
from jaxfm.sampling.strategies.scorers import Reward, RewardChecker
from jaxfm.tasks.base import Prompt
from jaxfm.tokenizer import BytesConfig
from jaxfm.tokenizer.build import Bytes

PROMPT = Prompt('a', 'asked')


class Seen:
    """Gives back what it is shown."""

    def evaluate(self, prompt, completion):
        return float(completion == 'ok')

    def answer(self, prompt, completion):
        return completion

    def stop(self, prompt, completion):
        return completion.endswith('ok')

    reward = evaluate


def judge_of(*special, **thinking):
    tokenizer = Bytes(BytesConfig(special_tokens=list(special)), texts=[])
    return tokenizer, Judge(Seen(), ThinkingConfig(**thinking), 10, tokenizer)


def sample_of(tokenizer, text):
    [ids] = tokenizer.encode_parts([text])
    return Completion('a', 0, tokens=ids, text=tokenizer.decode(ids))


@pytest.mark.parametrize(
    'text, begun, shown',
    [
        ('<think>maybe 7</think> ok', False, 'ok'),
        ('maybe 7</think>ok', True, 'ok'),
        ('<think>é 7</think>no<think>8</think>ok', False, 'ok'),
        ('7</think>no<think>ok', False, None),
        ('<think>ok', False, None),
        ('ok', True, None),
        ('ok', False, 'ok'),
        ('<think></think>', False, ''),
    ],
)
@pytest.mark.parametrize('special', [('<think>', '</think>'), ('</think>',), ()], ids=str)
def test_thoughts_are_not_judged_whether_or_not_their_marks_have_text(special, text, begun, shown):
    tokenizer, judge = judge_of(*special, begun=begun)
    sample = sample_of(tokenizer, text)
    verdict = judge.judge(PROMPT, sample)
    assert verdict.is_unclosed == (shown is None)
    assert (verdict.answer, verdict.score) == (shown, float(shown == 'ok'))
    assert judge.stops(PROMPT, judge.marked_text(sample)) == (shown == 'ok')


def test_scorers_and_checkers_of_a_strategy_see_what_the_judge_sees():
    tokenizer, judge = judge_of('<think>', '</think>')
    reward = lambda prompt, text: float(judge.visible(text) == 'ok')  # noqa: E731
    made = types.SimpleNamespace(reward=reward, marked_text=judge.marked_text)
    sample = sample_of(tokenizer, '<think>maybe 7</think> ok')
    assert Reward(RewardConfig(), made)(PROMPT, sample) == 1.0
    assert RewardChecker(RewardCheckerConfig(), made)(PROMPT, sample) is None
    assert judged_text(Seen(), sample) == sample.text == 'maybe 7 ok'  # a task itself is a judge


def test_a_mark_that_no_text_can_show_is_refused():
    with pytest.raises(ConfigError, match="'<think>.n' is more than the special token '<think>'"):
        judge_of('<think>', start='<think>\n')
    judge_of(start='<think>\n')
