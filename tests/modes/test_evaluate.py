"""--mode eval of a model from outside: a random one in Hugging Face's layout, and small files."""

import json
import shutil
import types
from pathlib import Path

import pytest
from safetensors.numpy import save_file

from jaxfm import main
from jaxfm.evals.samples import Samples, read_samples
from jaxfm.modes.evaluate import describe_weights, format_table
from jaxfm.pretrained.orbax.load import Foreign
from jaxfm.run import weights
from jaxfm.sampling.engine import Sampler
from tests.conftest import ROOT
from tests.hf_directories import LLAMA, random_tensors, write_model

pytestmark = pytest.mark.usefixtures('compilation_cache_as_before', 'quick_compilation')

SUMS = [{'question': f'{i} + 1?', 'answer': f'{i} plus 1.\n#### {i + 1}'} for i in range(3)]
QUIZ = [
    {
        'subject': 'sums',
        'question': f'Is {i} odd?',
        'choices': ['no', 'yes', 'so', 'up'],
        'answer': i % 2,
    }
    for i in range(4)
]


@pytest.fixture(scope='module')
def desk(tmp_path_factory):
    """A directory with a model and files."""
    root = tmp_path_factory.mktemp('desk')
    write_model(root / 'model', max_position_embeddings=256)
    for name, rows in {'sums': SUMS, 'quiz': QUIZ}.items():
        lines = [json.dumps(row) for row in rows]
        (root / f'{name}.jsonl').write_text('\n'.join(lines), encoding='utf-8')
    (root / 'text.txt').write_text('Some words of text, and then some more.', encoding='utf-8')
    return root


@pytest.fixture
def cli(desk, tiny, monkeypatch, capsys):
    """Runs an evaluation in this process -> (code, stderr)."""
    monkeypatch.setenv('XDG_CACHE_HOME', tiny.environment['XDG_CACHE_HOME'])
    given = {
        'init_from': desk / 'model',
        'sampling.max_length': 128,
        'sampling.max_tokens': 64,
        'sampling.slots': 2,
        'sampling.prefill_tokens': 64,
        'sampling.decode_steps': 4,
        'evals.sums.name': 'generate',
        'evals.sums.task.name': 'gsm8k',
        'evals.sums.task.path': desk / 'sums.jsonl',
        'evals.sums.n': 2,
        'evals.sums.temperature': 1.0,
        'evals.sums.max_tokens': 5,
        'evals.quiz.name': 'likelihood',
        'evals.quiz.task.name': 'mmlu',
        'evals.quiz.task.path': desk / 'quiz.jsonl',
        'evals.text.name': 'perplexity',
        'evals.text.path': desk / 'text.txt',
        'evals.text.window': 20,
    }

    def run(workdir, *more, **changes):
        values = given | {key.replace('__', '.'): value for key, value in changes.items()}
        arguments = [f'--config.{key}={value}' for key, value in values.items()]
        start = ['--config', str(ROOT / 'configs' / 'pretrained.py'), '--mode=eval']
        code = main.main([*start, f'--workdir={workdir}', *arguments, *more])
        return code, capsys.readouterr().err

    return run


def samples_of(directory: Path) -> dict[str, list[dict]]:
    found = {path.stem: read_samples(path)[1] for path in sorted(directory.iterdir())}
    for records in found.values():
        records.sort(key=lambda one: (one['id'], one['sample_index']))
    return found


def test_several_tasks_are_evaluated_and_go_on_after_an_interrupt(cli, tmp_path, monkeypatch):
    """Without steps, data and optimizer. What was sampled before is not sampled again."""
    whole = tmp_path / 'whole.jsonl'
    code, error = cli(tmp_path / 'run', '--output', str(whole))
    assert code == 0, error
    scores = json.loads(whole.read_text('utf-8'))
    assert scores['step'] == 0 and scores['eval/sums/prompts'] == 3
    assert 0 <= scores['eval/quiz/accuracy_low'] <= scores['eval/quiz/accuracy'] <= 1
    assert scores['eval/text/tokens'] >= 38 and scores['eval/text/loss'] > 1
    samples = samples_of(Path(f'{whole}.samples'))
    assert {name: len(each) for name, each in samples.items()} == {
        'quiz-000000': 4,
        'sums-000000': 6,
        'text-000000': 3,
    }
    assert not (tmp_path / 'run').exists()

    added, asked = [], []

    def die(self, record, add=Samples.add):
        add(self, record)
        added.append(record)
        if len(added) == 3:
            raise KeyboardInterrupt

    def noted(self, request, add=Sampler.add):
        asked.append(request)
        add(self, request)

    with monkeypatch.context() as patch:
        patch.setattr(Samples, 'add', die)
        assert cli(tmp_path / 'run')[0] == 130
    kept = samples_of(tmp_path / 'run' / 'evals')
    assert {name: len(each) for name, each in kept.items()} == {
        'quiz-000000': 0,
        'sums-000000': 3,
        'text-000000': 0,
    }
    monkeypatch.setattr(Sampler, 'add', noted)
    assert cli(tmp_path / 'run')[0] == 0
    assert sum(request.n for request in asked if request.max_tokens) == 3
    assert samples_of(tmp_path / 'run' / 'evals') == samples
    asked.clear()
    assert cli(tmp_path / 'run')[0] == 0 and not asked
    code, error = cli(tmp_path / 'run', evals__sums__max_tokens=6)
    assert code == 65 and 'options.max_tokens is 5 there, but 6 now' in error
    code, error = cli(tmp_path / 'run', model__compute_dtype='bfloat16')
    assert code == 65 and "compute_dtype is 'auto' there, but 'bfloat16' now" in error
    assert not asked  # also not for evaluators before the one whose file is refused


def outside(path, adapters=''):
    """A run that has not begun, of a model at a path."""
    lora = types.SimpleNamespace(path=str(adapters)) if adapters else None
    model = types.SimpleNamespace(lora=lora)
    return types.SimpleNamespace(
        has_begun=False,
        config=types.SimpleNamespace(init_from=str(path), model=model),
        outside=types.SimpleNamespace(path=path),
    )


def test_a_model_exported_again_into_its_directory_is_another_one(desk, tmp_path):
    """Its files have the same names and sizes; other files beside them do not matter."""
    model = shutil.copytree(desk / 'model', tmp_path / 'model')
    before = describe_weights(outside(model), 0)
    (model / 'scores.jsonl').write_text('{}', encoding='utf-8')
    assert describe_weights(outside(model), 0) == before
    save_file(random_tensors(LLAMA, seed=1), model / 'model.safetensors')
    assert describe_weights(outside(model), 0) != before
    file = tmp_path / 'model.gguf'
    file.write_bytes(b'x')
    before = describe_weights(outside(file), 0)
    file.write_bytes(b'yy')
    assert describe_weights(outside(file), 0) != before
    # Adapters count, too.
    before = describe_weights(outside(file, model), 0)
    save_file(random_tensors(LLAMA, seed=2), model / 'model.safetensors')
    assert describe_weights(outside(file, model), 0) != before


def test_a_checkpoint_of_another_project_is_known_by_all_of_its_files(tmp_path):
    (tmp_path / 'd').mkdir()
    (tmp_path / 'd' / 'chunk').write_bytes(b'x')
    run = outside(tmp_path)
    run.outside = object.__new__(Foreign)
    run.outside.path = str(tmp_path)
    before = describe_weights(run, 0)
    assert describe_weights(run, 0) == before
    (tmp_path / 'd' / 'chunk').write_bytes(b'yy')
    assert describe_weights(run, 0) != before


def test_an_earlier_run_that_has_gone_on_is_another_model(monkeypatch, tmp_path):
    manifest = {'step': 4}
    reader = types.SimpleNamespace(
        newest_whole=lambda read: read(4), read_manifest=lambda step: dict(manifest)
    )
    monkeypatch.setattr(weights, 'Reader', lambda *_: reader)
    monkeypatch.setattr(weights, 'read_config', lambda *_: types.SimpleNamespace(checkpoint=None))
    (tmp_path / 'config.json').write_text('{"model": {}}', encoding='utf-8')
    before = describe_weights(outside(tmp_path), 0)
    assert describe_weights(outside(tmp_path), 0) == before
    manifest['step'] = 8
    assert describe_weights(outside(tmp_path), 0) != before


@pytest.mark.parametrize(
    'changes, code, words',
    [
        ({'evals__sums__name': 'generat'}, 78, ["got 'generat'; did you mean generate?"]),
        ({'evals__sums__task__name': 'gsm8'}, 78, ["got 'gsm8'; did you mean gsm8k?"]),
        ({'evals__sums__task__pth': 'x'}, 78, ['pth: unknown key; did you mean path?']),
        (
            {'evals__sums__task__name': 'exact_answer', 'evals__sums__task__path': None},
            78,
            ['exact_answer needs held-out documents', 'has no data'],
        ),
        ({'evals__held__name': 'loss'}, 78, ['loss needs held-out documents', 'has no data']),
        ({'evals__text__path': '/nowhere/x.txt'}, 66, ['/nowhere/x.txt', 'config.evals.text.path']),
        ({'evals__text__stride': 20}, 78, ['text.stride 20 must be less than the window 20']),
    ],
    ids=['evaluator', 'task', 'key', 'documents', 'loss', 'file', 'stride'],
)
def test_mistakes_are_told_before_the_weights_are_read(cli, tmp_path, changes, code, words):
    found, error = cli(tmp_path / 'run', **changes)
    assert found == code
    for word in words:
        assert word in error
    assert not (tmp_path / 'run').exists()


def test_a_config_without_evaluators_is_refused(tmp_path, desk, capsys):
    config = str(ROOT / 'configs' / 'pretrained.py')
    arguments = ['--config', config, '--mode=eval', f'--config.init_from={desk / "model"}']
    assert main.main([*arguments, f'--workdir={tmp_path / "run"}']) == 78
    assert 'has no evaluators: add one' in capsys.readouterr().err


def test_a_table_shows_intervals_beside_their_values():
    values = {'pass@1': 0.5, 'pass@1_low': 0.25, 'pass@1_high': 0.75, 'prompts': 8.0}
    assert format_table('sums', values).split('\n') == [
        'sums',
        '  pass@1             0.5  [0.25, 0.75]',
        '  prompts              8',
    ]
