"""Evaluation with an environment: the same episodes, scored by the last turn and recorded."""

import pytest

from jaxfm.config.validation import validate
from jaxfm.evals import GenerateConfig, ThinkingConfig, prompts
from jaxfm.evals.generate import Generate
from jaxfm.evals.samples import read_samples
from jaxfm.registry import Registry
from jaxfm.tasks import PythonFunctionsConfig
from jaxfm.tasks.base import Prompt
from tests.environments.scripted import Tokenizer, Writer
from tests.environments.test_episode import DOUBLING, MOODY, next_of
from tests.evals.scoring import context_of, entry


class Exact:
    """Each question has one right answer."""

    answers = {'p:': '6', 'q:': '8', 'r:': '9'}

    def __init__(self, config, documents):
        pass

    def prompts(self):
        return [Prompt(text, text) for text in self.answers]

    def evaluate(self, prompt, completion):
        return float(completion == self.answers[prompt.id])

    def stop(self, prompt, completion):
        raise AssertionError('episodes end by themselves')


@pytest.fixture
def evaluate(monkeypatch, tmp_path):
    monkeypatch.setattr(prompts, 'TASKS', Registry({'python_functions': entry(Exact)}))

    def run(script, environment=DOUBLING, **values):
        engine = Writer(next_of(script))
        context = context_of(engine, tmp_path, tokenizer=Tokenizer())
        values = dict(max_tokens=8, environment=dict(name=environment)) | values
        config = GenerateConfig(task=PythonFunctionsConfig(), **values)
        found = Generate(config, context).run('params', 40)
        [path] = tmp_path.glob('*.jsonl')
        return found, *read_samples(path), engine

    return run


SCRIPT = {'p:': '[3]', '=6;': '6$', 'q:': '[4]', '=8;': '=8$', 'r:': '9$'}


def test_the_last_turn_is_scored_and_all_are_recorded(evaluate):
    values, header, records, _ = evaluate(SCRIPT)
    assert values['pass@1'] == pytest.approx(2 / 3)
    assert header['options']['environment']['name'] == DOUBLING
    by_id = {record['id']: record for record in records}
    assert by_id['p:']['completion'] == '[3]=6;6' and by_id['p:']['score'] == 1
    assert [turn['by'] for turn in by_id['p:']['turns']] == ['model', 'environment', 'model']
    assert by_id['q:']['score'] == 0  # the right number is in the observation alone
    assert len(by_id['r:']['turns']) == 1
    # FLOPs are of all tokens, here their squares: of the prompts, and of what follows.
    lengths = [2 + record['num_tokens'] + record['observed_tokens'] for record in records]
    assert values['cost/flops'] == sum(length**2 for length in lengths)
    assert values['cost/generated_tokens'] == sum(record['num_tokens'] for record in records)


def test_a_fault_scores_0_and_is_told(evaluate, caplog):
    script = SCRIPT | {'p:': 'h[3]', 'q:': 'n[4]'}
    values, _, records, _ = evaluate(script, MOODY, call_seconds=0.2)
    assert values['pass@1'] == pytest.approx(1 / 3) and values['samples/failed'] == 2 / 3
    assert '2 of 3 samples failed and score 0; the first (' in caplog.text
    assert {record['finish_reason'] for record in records} == {'environment', 'stop'}


def test_thoughts_may_go_over_several_turns(evaluate):
    marks = ThinkingConfig(start='(', end=')')
    script = {'p:': '([3]', '=6;': 'a)6$', 'q:': '([4]', '=8;': '8$', 'r:': '(a)9$'}
    values, _, records, _ = evaluate(script, thinking=marks)
    scores = {record['id']: (record['score'], record['is_unclosed']) for record in records}
    assert scores == {'p:': (1.0, False), 'q:': (0.0, True), 'r:': (1.0, False)}


def test_thoughts_that_the_prompt_has_begun_end_in_any_turn(evaluate):
    marks = ThinkingConfig(start='(', end=')', begun=True)
    script = {'p:': 'a)[3]', '=6;': '6$', 'q:': '[4]', '=8;': 'b)8$', 'r:': '9$'}
    _, _, records, _ = evaluate(script, thinking=marks)
    scores = {record['id']: (record['score'], record['is_unclosed']) for record in records}
    assert scores == {'p:': (1.0, False), 'q:': (1.0, False), 'r:': (0.0, True)}


def test_stop_strings_of_the_config_end_an_answer(evaluate):
    script = SCRIPT | {'r:': '9\nand so on'}
    values, _, records, engine = evaluate(script, stop=['\n'])
    assert {record['id']: record['score'] for record in records}['r:'] == 1
    assert set(engine.asked[0][0].stop) == {'\n', ']'}


def test_a_strategy_has_no_environment():
    values = dict(task=dict(name='arithmetic'), environment=dict(name='calculator'))
    strategy = dict(strategy=dict(name='vote'))
    _, problems = validate(GenerateConfig, {'name': 'generate', **values, **strategy})
    assert any('a strategy has no environment' in str(problem) for problem in problems)
