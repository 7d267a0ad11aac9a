"""The command line: modes, what they leave, and one clear line for every mistake."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from jaxfm import main, process
from jaxfm.checkpoint import CheckpointConfig
from jaxfm.checkpoint.reader import Reader
from jaxfm.errors import DataError, Preempted
from jaxfm.metrics.writers import read_records
from jaxfm.modes import sample, train
from tests.conftest import NO_SAMPLES
from tests.hf_directories import write_model
from tests.runs import PATIENCE

pytestmark = pytest.mark.usefixtures('compilation_cache_as_before')

# Mistakes that are found without jax: (arguments after those of the tiny run, code, words).
FIRST_STAGE = {
    'a typo': (['--config.model.embed_dmi=64'], 78, ['embed_dmi', 'did you mean embed_dim?']),
    'a typo in a flag': (['--wrokdir=x'], 64, ['--wrokdir=x; did you mean --workdir?']),
    'a typo in a number': (['--resume_stp', '3'], 64, ['3; did you mean --resume_step?']),
    'a prompt to train with': (
        ['--prompt=x'],
        64,
        ['--prompt is a flag of --mode sample, chat, not of train'],
    ),
    'a default value that is not used': (['--mode=export', '--seed=0'], 64, ['--seed', 'export']),
    'an output of training': (['--output=x'], 64, ['--mode eval, sample, chat, export']),
    'a flag without its value': (['--prompt'], 64, ['--prompt']),
    'an unknown mode': (['--mode=trian'], 64, ['trian', 'train']),
    'a wrong type': (['--config.steps=ten'], 78, ['config.steps', "'ten'"]),
    'a wrong name': (['--config.optimizer.name=adam'], 78, ['adam', 'adamw']),
    'several mistakes': (
        ['--config.steps=ten', '--config.model.embed_dmi=64', '--config.data.batch_size=0'],
        78,
        ['config.steps', 'embed_dim', 'batch_size'],
    ),
    'rows that no mesh splits': (['--config.mesh.fsdp=3'], 78, ['8 = 2 x 3 + 2']),
    'heads that no mesh splits': (['--config.mesh.tensor=4'], 78, ['num_kv_heads 2', '2 = 0 x 4']),
    'an axis that splits nothing yet': (['--config.mesh.expert=2'], 78, ['mesh.expert']),
    'a tokenizer larger than the model': (
        ['--config.tokenizer.name=bpe', '--config.tokenizer.vocab_size=400'],
        78,
        ['400', '300', '100 tokens would have no embedding'],
    ),
    'an unknown group to change': (['--allow_change=optimiser'], 64, ['optimizer']),
    'no tokens wanted': (['--mode=sample', '--max_tokens=0'], 64, ['--max_tokens', '0']),
    'a temperature below zero': (['--mode=sample', '--temperature=-1'], 64, ['-1']),
    'a probability of none': (
        ['--mode=sample', '--top_p=0'],
        64,
        ['config.sampling.top_p: must be more than 0, got 0.0 (given by --top_p)'],
    ),
    'no number': (['--mode=chat', '--min_p=nan'], 64, ['min_p: must be a finite number, got nan']),
    'a typo in an option of sampling': (['--mode=chat', '--topk=3'], 64, ['did you mean --top_k?']),
    'an option of sampling to train with': (
        ['--ignore_eos'],
        64,
        ['--ignore_eos is a flag of --mode sample, chat, not of train'],
    ),
    'nothing to stop at': (['--mode=sample', '--stop='], 64, ['at least 1 characters', '--stop)']),
    'a stop that is no text': (['--mode=sample', '--stop=\udcff'], 64, ['--stop: must be UTF-8']),
    'an end before the least end': (
        ['--mode=sample', '--min_tokens=9', '--config.sampling.max_tokens=8'],
        64,
        ['min_tokens 9 is more than max_tokens 8 (given by --min_tokens)'],
    ),
    'more tokens than there is room for': (
        ['--mode=sample', '--max_tokens=64'],
        64,
        ['sampling.max_tokens 64 must be less than sampling.max_length 64', '--max_tokens)'],
    ),
    'ids that do not exist': (
        ['--mode=sample', '--config.sampling.logit_bias={3: 1, 300: -1}'],
        78,
        ['sampling.logit_bias: token id 300 does not exist', 'model.vocab_size is 300'],
    ),
    'several answers in a chat': (['--mode=chat', '--n=2'], 64, ['--n is a flag of --mode sample']),
    'several answers in a chat by config': (
        ['--mode=chat', '--config.sampling.n=2'],
        78,
        ['config.sampling.n is 2', '--mode chat', '--config.sampling.n=1'],
    ),
    'log-probs of a chat': (
        ['--mode=chat', '--logprobs'],
        64,
        ['--logprobs', 'sample, not of chat'],
    ),
    'log-probs for nobody': (['--mode=sample', '--logprobs'], 64, ['--logprobs', '--output=PATH']),
    'nothing to sample from': (['--mode=sample'], 66, ['holds no run to sample']),
    'nobody to talk to': (['--mode=chat'], 66, ['holds no run to chat']),
    'nothing to evaluate': (['--mode=eval'], 66, ['holds no run to eval']),
    'data that is not random access': (
        ['--config.data.name=json:JSONDecoder'],
        78,
        ['json:JSONDecoder is not random access', '__len__', '__getitem__'],
    ),
    'data of a module that is not there': (
        ['--config.data.name=nowhere:Source'],
        78,
        ['there is no module nowhere'],
    ),
    'a work directory of too long a name': (
        [f'--workdir={"a" * 300}'],
        66,
        ['config.json: File name too long'],
    ),
}


@pytest.fixture(scope='module')
def first_stage(tiny, tmp_path_factory):
    """Every mistake of FIRST_STAGE and of the file itself, tried in one process."""
    root = tmp_path_factory.mktemp('first')
    arguments = {
        name: tiny.arguments(root / 'run', *more) for name, (more, *_) in FIRST_STAGE.items()
    }
    arguments['no such file'] = ['--config', str(tiny.root / 'tinny.py'), '--workdir', 'run']
    arguments['no config'] = ['--workdir', 'run']
    # A group to change is looked at when there is a run.
    (root / 'other').mkdir()
    shutil.copy(_config_json(tiny, root), root / 'other' / 'config.json')
    arguments['an unknown group to change'][3] = str(root / 'other')
    program = """
import contextlib, io, json, sys, time
from jaxfm import main
results = {}
for name, argv in json.load(sys.stdin).items():
    start, out, err = time.process_time(), io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(out):
        code = main.main(argv)
    heavy = [module for module in ('jax', 'numpy', 'tokenizers') if module in sys.modules]
    results[name] = code, out.getvalue(), err.getvalue(), heavy, time.process_time() - start
results["seconds"] = time.process_time()
json.dump(results, sys.stdout)
"""
    process = subprocess.run(
        [sys.executable, '-c', program],
        input=json.dumps(arguments),
        capture_output=True,
        text=True,
        env=os.environ | tiny.environment,
        cwd=root,
    )
    assert process.returncode == 0, process.stderr
    results = json.loads(process.stdout)
    results['left'] = sorted(path.name for path in root.iterdir())
    return results


def _config_json(tiny, directory) -> Path:
    from jaxfm.config.load import load_config, write_config

    path = directory / 'config.json'
    write_config(load_config(str(tiny.config)), path)
    return path


def assert_one_clear_message(error: str, words):
    assert 'Traceback' not in error
    [message] = error.split('error: ')[1:]
    for word in words:
        assert word in message


@pytest.mark.parametrize('name', FIRST_STAGE)
def test_a_mistake_is_told_without_jax_and_nothing_is_written(name, first_stage):
    _, expected, words = FIRST_STAGE[name]
    code, out, error, heavy, seconds = first_stage[name]
    assert (code, out, heavy) == (expected, '', [])
    assert_one_clear_message(error, words)
    assert seconds < 2
    assert first_stage['left'] == ['config.json', 'other']


def test_all_mistakes_at_once_cost_less_than_two_seconds_each(first_stage):
    assert first_stage['seconds'] < 2 * len(FIRST_STAGE)


def test_a_missing_config_file_is_told_with_the_nearest_name(first_stage):
    code, _, error, *_ = first_stage['no such file']
    assert code == 66
    assert_one_clear_message(error, ['tinny.py', 'did you mean tiny.py?'])


def test_a_cache_that_is_given_needs_no_files(tiny):
    from jaxfm import main
    from jaxfm.config.load import load_config
    from jaxfm.errors import MissingInputError

    absent = ['data.path=/nowhere/text.txt']
    with pytest.raises(MissingInputError):
        main._check_files(load_config(str(tiny.config), absent))
    main._check_files(load_config(str(tiny.config), [*absent, 'data.cache=/nowhere']))


def test_a_command_without_config_names_a_good_first_one(first_stage):
    code, _, error, *_ = first_stage['no config']
    assert code == 64
    assert_one_clear_message(error, ['configs/quickstart.py'])


def test_a_name_that_the_locale_does_not_know_is_told(tiny, monkeypatch, capsys):
    def refuse(*arguments, **options):
        raise UnicodeEncodeError(sys.getfilesystemencoding(), '/data/ü.txt', 6, 7, 'no such byte')

    monkeypatch.setattr(main, 'load_config', refuse)
    assert main.main(tiny.arguments(tiny.root / 'run')) == 78
    error = capsys.readouterr().err
    assert_one_clear_message(error, [r"'/data/\xfc.txt'", 'locale', 'PYTHONUTF8=1'])


# The second stage: jax is there, nothing is written yet


@pytest.fixture
def cli(tiny, monkeypatch, capsys):
    """Runs a command line in this process, on its eight devices -> (code, stdout, stderr)."""
    monkeypatch.setenv('XDG_CACHE_HOME', tiny.environment['XDG_CACHE_HOME'])

    def run(workdir, *more):
        capsys.readouterr()
        code = main.main(tiny.arguments(workdir, *more))
        return code, *capsys.readouterr()

    return run


def _source(path):
    return f'--config.data.path={path}'


@pytest.mark.parametrize(
    'more, code, words',
    [
        (
            ['--config.data.batch_size=12', '--config.mesh.replica=3'],
            78,
            ['replica 3 x fsdp -1 = 3, which must divide the number of devices, 8'],
        ),
        (['--config.mesh.fsdp=4'], 78, ['fsdp 4 = 4, which must equal the number of devices, 8']),
        (['--config.mesh.fsdp=1', '--config.mesh.tensor=-1'], 78, ['2 = 0 x 8 + 2', 'mesh.tensor']),
        (['--config.model.vocab_size=200'], 65, ['258 tokens', 'vocab_size is only 200']),
        (['--config.optimizer.frozen=["trunc/*"]'], 78, ['trunc/*', 'final_norm/scale']),
        (['--config.checkpoint.directory=gs://bucket/run'], 78, ['gs://bucket/run']),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else None,
)
def test_a_mistake_of_the_second_stage_leaves_no_work_directory(cli, tmp_path, more, code, words):
    found, out, error = cli(tmp_path / 'new' / 'run', *more)
    assert (found, out) == (code, '')
    assert_one_clear_message(error, words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    'content, code, words',
    [
        (None, 66, ['no file matches', 'text.txt']),
        (b'', 65, ['text.txt', 'is empty']),
        (b'abc\xffdef', 65, ['text.txt', 'not UTF-8', '0xff', 'offset 3']),
    ],
    ids=['missing', 'empty', 'not UTF-8'],
)
def test_bad_text_is_named_and_leaves_no_work_directory(cli, tmp_path, content, code, words):
    path = tmp_path / 'text.txt'
    if content is not None:
        path.write_bytes(content)
    found, out, error = cli(tmp_path / 'run', _source(path))
    assert (found, out) == (code, '')
    assert_one_clear_message(error, words)
    assert not (tmp_path / 'run').exists()


def test_a_work_directory_that_is_a_file_is_told(cli, tmp_path):
    (tmp_path / 'run').write_text('not a directory')
    code, _, error = cli(tmp_path / 'run')
    assert code == 78
    assert_one_clear_message(error, ['run', 'not a directory'])
    assert (tmp_path / 'run').read_text() == 'not a directory'


# A run that has begun needs what it began from no more


@pytest.fixture(scope='module')
def adapter(tiny, tmp_path_factory):
    """A model from outside and an adapter for it -> their directories."""
    root = tmp_path_factory.mktemp('adapter')
    model, adapter = write_model(root / 'model'), root / 'adapter'
    more = [f'--config.init_from={model}', '--config.model.lora.rank=4', '--mode=export']
    more += ['--config.export.adapters=peft', f'--output={adapter}']
    process = tiny.start(root / 'unused', *more)
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, (root / 'unused.stderr').read_text()
    return model, adapter


@pytest.mark.usefixtures('quick_programs')
def test_adapters_go_on_from_the_step_they_began_with_when_its_run_has_trained_on(
    cli, tmp_path, straight
):
    origin, workdir, later = tmp_path / 'origin', tmp_path / 'run', tmp_path / 'later'
    shutil.copytree(straight, origin)
    common = ['--config.sampling.num_samples=0', '--config.checkpoint.keep=9']
    lora = [*common, '--config.model.lora.rank=4', '--config.optimizer.warmup_steps=0']
    from_origin = [*lora, f'--config.init_from={origin}']
    assert cli(workdir, *from_origin, '--config.steps=3')[0] == 0
    assert cli(origin, *common, '--config.steps=41', '--allow_change=steps')[0] == 0
    flags = ['--config.steps=4', '--allow_change=steps']
    code, _, error = cli(workdir, *from_origin, *flags)
    assert code == 0, error
    assert 'resumed at step 3' in (workdir / 'log.txt').read_text()
    # Adapters that go on from these belong to the same weights, and need only them.
    lora += ['--config.steps=1']
    assert cli(later, *lora, f'--config.init_from={workdir}')[0] == 0
    recorded = Reader(CheckpointConfig(), later / 'checkpoints').read_manifest(1)['base']['origin']
    assert (recorded['init_from'], recorded['step']) == (str(origin), 40)
    shutil.rmtree(workdir)
    code, _, error = cli(later, *lora, f'--config.init_from={workdir}', '--mode=eval')
    assert code == 0, error
    moved = origin.rename(tmp_path / 'moved')
    code, _, error = cli(later, *lora, f'--config.init_from={workdir}', '--mode=eval')
    assert code == 66 and f'weights of {origin} at step 40' in error
    assert 'name the new place with --config.init_from=PLACE' in error
    more = [f'--config.init_from={moved}', '--allow_change=init_from,tokenizer', '--mode=eval']
    code, _, error = cli(later, *lora, *more)
    assert code == 0, error


@pytest.mark.usefixtures('quick_programs')
@pytest.mark.parametrize('kind', ['adapter', 'run'])
def test_a_run_goes_on_when_what_it_began_from_is_gone(cli, tmp_path, adapter, straight, kind):
    origin, workdir = tmp_path / 'origin', tmp_path / 'run'
    origin.mkdir()
    shutil.copytree(straight if kind == 'run' else adapter[0], origin / 'model')
    shutil.copytree(adapter[1], origin / 'adapter')
    flags = [f'--config.init_from={origin / "model"}']
    if kind == 'adapter':
        flags += [f'--config.model.lora.path={origin / "adapter"}']
        flags += ['--config.checkpoint.include_frozen=True']
    short = ['--config.optimizer.warmup_steps=0', '--config.sampling.num_samples=0']
    code, _, error = cli(workdir, *flags, *short, '--config.steps=5')
    assert code == 0, error
    shutil.rmtree(origin)
    flags += ['--config.optimizer.warmup_steps=0']
    longer = [*flags, '--config.steps=6']
    code, _, error = cli(workdir, *longer, *short[1:], '--allow_change=steps')
    assert code == 0, error
    assert 'resumed at step 5' in (workdir / 'log.txt').read_text()
    for more in (
        ['--mode=eval'],
        ['--mode=sample', '--prompt=a'],
        ['--mode=export', f'--output={tmp_path / "out"}'],
    ):
        code, _, error = cli(workdir, *longer, *more)
        assert code == 0, error
    code, _, error = cli(workdir, *longer, '--config.tokenizer.path=/nowhere', '--mode=eval')
    assert code == 78  # a difference, as ever
    code, _, error = cli(tmp_path / 'new', *longer)
    assert code == 66
    assert_one_clear_message(error, ['config.init_from: there is no', str(origin / 'model')])
    more = ['--config.tokenizer.path=/nowhere', '--allow_change=tokenizer', '--config.steps=6']
    code, _, error = cli(workdir, *flags, *more)
    assert code == 66
    assert_one_clear_message(error, ['tokenizer.path: /nowhere does not exist'])


# A finished run, and what can be done with it


ASCII = {
    **{'LC_ALL': 'C', 'PYTHONCOERCECLOCALE': '0', 'PYTHONUTF8': '0'},
    **{'PYTHONIOENCODING': 'ascii:strict', 'NO_COLOR': '1', 'TERM': 'dumb', 'COLUMNS': '40'},
}


@pytest.fixture(scope='module')
def finished(tiny, tmp_path_factory):
    """(work directory, stdout, stderr) of a run started by the real command, which restarts itself.

    Its locale only knows ASCII, which must not matter to any test.
    """
    workdir = tmp_path_factory.mktemp('finished') / 'rün'
    environment = {**os.environ, **tiny.environment, **ASCII, 'JAX_NUM_CPU_DEVICES': '8'}
    environment.pop('GLIBC_TUNABLES')
    prompt = '--config.sampling.prompts=["\\xe9t\\xe9 "]'  # Python's escapes: 'été '
    command = [sys.executable, '-m', 'jaxfm.main', *tiny.arguments(workdir), prompt]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return workdir, process.stdout, process.stderr


@pytest.fixture
def run_again(finished, tmp_path):
    """A copy of the finished run to do something to."""
    return shutil.copytree(finished[0], tmp_path / 'run')


def test_a_run_leaves_the_files_it_promises(finished):
    workdir, _, _ = finished
    left = {path.name for path in workdir.iterdir()}
    assert left == {
        'config.json', 'tokenizer', 'metrics.jsonl', 'log.txt', 'report.html',
        'samples', 'checkpoints', 'plots',
    }  # fmt: skip
    left = {path.name for path in (workdir / 'checkpoints').iterdir()}
    assert left == {'35', '40', 'lease'}
    assert list((workdir / 'plots').glob('*.png'))
    assert list((workdir / 'samples').glob('*.jsonl'))
    assert json.loads((workdir / 'config.json').read_text())['model']['embed_dim'] == 32


def test_records_are_flat_and_in_order_and_the_loss_falls(finished):
    records = list(read_records(finished[0] / 'metrics.jsonl'))
    assert {record['kind'] for record in records} == {'event', 'train', 'eval', 'perf'}
    steps = [record['step'] for record in records]
    assert steps == sorted(steps)
    losses = {r['step']: r['train/loss'] for r in records if r['kind'] == 'train'}
    assert list(losses) == [1, *range(2, 41, 2)]
    assert losses[40] < losses[1] - 1
    scores = {r['step']: r['eval/heldout/bits_per_byte'] for r in records if r['kind'] == 'eval'}
    assert list(scores) == [*range(0, 40, 6), 40]
    assert scores[40] < scores[0]
    data = [r for r in records if r['kind'] == 'event' and 'data/train_tokens' in r]
    assert [r['step'] for r in data] == [0]


def test_the_console_shows_the_start_the_way_and_no_traceback(finished):
    _, _, error = finished
    for words in ('parameters', 'fsdp 8', 'compiled', 'eta'):
        assert words in error
    assert 'Traceback' not in error and 'Warning' not in error
    log = (finished[0] / 'log.txt').read_text('utf-8')
    assert log.count('step 40/40') == 2  # train and eval
    for words in ('parameters', 'fsdp', 'cut documents', 'xla: the kernel', 'trunk/'):
        assert words in log


def test_the_first_progress_comes_within_fifteen_lines_and_nothing_is_said_twice(finished):
    start = finished[2].partition('step 0/40')[0].splitlines()
    assert len(start) < 15, start
    assert len(set(start)) == len(start)
    place = str(finished[0].parent)
    assert all(len(line) <= 80 for line in start if place not in line), start


def test_documents_that_do_not_stand_in_one_row_are_counted(finished):
    lines = (finished[0] / 'log.txt').read_text('utf-8').splitlines()
    [line] = [line for line in lines if 'cut documents' in line]
    assert int(line.split()[-1]) > 30  # nearly every one of the 40 has more than 32 tokens


def test_stdout_is_generated_text_alone(finished):
    workdir, out, _ = finished
    [record] = map(json.loads, (workdir / 'samples' / 'final.jsonl').read_text().splitlines())
    assert record['prompt'] == 'été '
    text = record['prompt'] + record['completion'] + '\n'
    assert out == text.encode('ascii', 'replace').decode()


def test_a_finished_run_says_so_and_how_to_go_on(cli, finished):
    workdir = finished[0]
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob('*') if path.is_file()}
    code, out, error = cli(workdir)
    assert (code, out) == (0, '')
    assert 'finished at step 40' in error
    assert '--config.steps=80 --allow_change=steps' in error
    after = {path: path.stat().st_mtime_ns for path in workdir.rglob('*') if path.is_file()}
    assert after == before


def test_another_config_in_the_work_directory_is_refused_with_the_difference(cli, finished):
    workdir = finished[0]
    code, _, error = cli(workdir, '--config.seed=7', '--config.optimizer.learning_rate=0.5')
    assert code == 78
    words = ['config.seed: 0 -> 7', 'learning_rate: 0.01 -> 0.5', '--allow_change=optimizer,seed']
    assert_one_clear_message(error, words)
    code, _, error = cli(workdir, '--config.model.num_layers=3')
    assert code == 78
    assert_one_clear_message(error, ['num_layers: 2 -> 3', 'another --workdir'])


def test_more_steps_go_on_from_the_checkpoint(cli, run_again):
    more = ['--config.steps=44', '--allow_change=steps']
    *before, end = read_records(run_again / 'metrics.jsonl')
    assert 'goodput/ratio' in end  # of the run with its last save and samples
    while 'checkpoint/step' in before[-1]:  # told after the checkpoint that it goes on from
        before.pop()
    code, _, error = cli(run_again, *more)
    assert code == 0
    assert 'config.steps: 40 -> 44' in error and 'resumed at step 40' in error
    assert 'are repeated' not in error
    records = list(read_records(run_again / 'metrics.jsonl'))
    # Cut back to the checkpoint, nothing twice; the last evaluation of the 40 belongs to step 40.
    assert records[: len(before)] == before
    later = [record['step'] for record in records[len(before) :] if record['kind'] == 'train']
    assert later == [42, 44]
    assert json.loads((run_again / 'config.json').read_text())['steps'] == 44


def test_ctrl_c_while_the_last_samples_are_printed_ends_the_run(cli, run_again, tiny, monkeypatch):
    monkeypatch.setattr(process, '_interrupts', [])
    monkeypatch.setattr(process, 'print_text', lambda text: signal.raise_signal(signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # as of a new process
    try:
        code, _, error = cli(run_again, '--config.steps=41', '--allow_change=steps')
    finally:
        signal.signal(signal.SIGINT, before)
    assert code == 130 and process._interrupts == ['told']
    assert 'Traceback' not in error and 'SIGINT' not in error
    assert tiny.committed(run_again)[-1] == 41, 'it is saved before anything is printed'
    assert cli(run_again, '--config.steps=41', '--allow_change=steps')[0] == 0  # nobody has a lease


def test_a_signal_after_the_last_step_ends_the_run_as_saved(cli, run_again, monkeypatch):
    def run_phases(*arguments, original=train._run_phases):
        state = original(*arguments)
        [loop] = arguments[2]
        signal.raise_signal(signal.SIGTERM)
        deadline = time.monotonic() + PATIENCE
        while not loop.preemption.should_stop(41):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        return state

    monkeypatch.setattr(train, '_run_phases', run_phases)
    code, out, error = cli(run_again, '--config.steps=41', '--allow_change=steps')
    assert (code, out) == (75, '')
    assert_one_clear_message(error, ['after the last step (41), which is saved'])


ENDS = {65: DataError('bad'), 75: Preempted('signal'), 130: KeyboardInterrupt(), 0: None}


@pytest.mark.parametrize('expected, error', ENDS.items(), ids=map(str, ENDS))
def test_no_thread_of_the_data_outlives_the_run(cli, run_again, monkeypatch, expected, error):
    def threads():
        return [each for each in threading.enumerate() if 'prefetch' in each.name]

    def end(loop, state, step, done):
        loop.source.next(state.params, step)
        assert len(threads()) == 1
        if error is not None:
            raise error
        return state

    monkeypatch.setattr(train, 'train', end)
    code, _, message = cli(run_again, '--config.steps=41', '--allow_change=steps', NO_SAMPLES)
    assert code == expected, message
    assert not threads()


def test_samples_that_nobody_reads_are_written_to_their_file(finished, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', tiny.environment['XDG_CACHE_HOME'])
    output = tmp_path / 'samples.jsonl'
    more = ['--mode=sample', '--prompt=a', '--prompt=b', '--max_tokens=2', f'--output={output}']
    reader, writer = os.pipe()
    os.close(reader)  # as `| head -1` does
    with open(writer, 'w') as closed, contextlib.redirect_stdout(closed):
        assert main.main(tiny.arguments(finished[0], *more)) == 0
    assert len(output.read_text('utf-8').splitlines()) == 2


def test_a_resume_that_is_refused_changes_no_file(cli, run_again):
    def contents():
        files = (path for path in run_again.rglob('*') if path.is_file())
        # The lease is nothing of the run: whoever may write there has had it.
        return {path: path.read_bytes() for path in files if path.parent.name != 'lease'}

    before = contents()
    # Allowed by name, but the position in the data belongs to the old order.
    more = ['--config.steps=44', '--config.seed=1', '--allow_change=steps,seed']
    code, _, error = cli(run_again, *more)
    assert code == 78
    assert_one_clear_message(error, ['the data changed since the checkpoint: seed'])
    assert contents() == before


def test_weights_ruined_by_an_update_cost_no_good_checkpoint(cli, run_again, tiny):
    more = [NO_SAMPLES, '--config.steps=80', '--config.checkpoint.every=1']
    ruin = ['--config.optimizer.learning_rate=1e37', '--config.optimizer.schedule=constant']
    allow = '--allow_change=steps,optimizer'
    for _ in range(2):  # the same command resumes where the first one did
        code, out, error = cli(run_again, *more, *ruin, allow)
        assert (code, out) == (70, '')
        told = (
            'no update could be applied from step 41 to 61, because the loss or the gradient was '
            'not finite; checkpoint 41 is set aside; lower the learning rate with '
            '--allow_change=optimizer; run it again to resume at step 40'
        )
        assert told in error and told in (run_again / 'log.txt').read_text()
        assert tiny.committed(run_again) == [40]
        # The second copy of the same ruined weights takes the place of the first.
        assert len(list((run_again / 'checkpoints' / '41').glob('set_aside.*.json'))) == 1
        assert len([p for p in (run_again / 'checkpoints' / '41').iterdir() if p.is_dir()]) == 1

    code, _, error = cli(run_again, NO_SAMPLES, '--config.steps=50', allow)
    assert code == 0, error
    assert 'resumed at step 40' in (run_again / 'log.txt').read_text()
    assert tiny.committed(run_again) == [45, 50]


def test_a_run_goes_back_to_an_earlier_checkpoint(cli, run_again, tiny):
    """The rest of the finished run is repeated, and what came before stays beside it."""
    before = (run_again / 'metrics.jsonl').read_bytes()
    code, _, error = cli(run_again, NO_SAMPLES, '--resume_step=35')
    assert code == 0, error
    assert 'back at step 35; checkpoints set aside: 40' in error
    [copy] = run_again.glob('metrics.set_aside_*.jsonl')
    assert copy.read_bytes() == before
    assert tiny.committed(run_again) == [35, 40]
    assert len(list((run_again / 'checkpoints' / '40').glob('set_aside.*.json'))) == 1
    assert_same_records(run_again / 'metrics.jsonl', copy)


@pytest.mark.parametrize(
    'more, code, words',
    [
        (['--resume_step=36'], 66, ['no checkpoint 36', 'available steps: 35, 40']),
        (['--resume_step=35', '--mode=eval'], 64, ['--resume_step is a flag of --mode train']),
        (['--resume_step=40'], 78, ['--resume_step=40 is the end of the run', '--config.steps=80']),
        (['--resume_step=0'], 64, ['--resume_step']),
    ],
)
def test_going_back_where_there_is_nothing_changes_nothing(cli, run_again, tiny, more, code, words):
    before = (run_again / 'metrics.jsonl').read_bytes()
    found, out, error = cli(run_again, *more)
    assert (found, out) == (code, '')
    assert_one_clear_message(error, words)
    assert tiny.committed(run_again) == [35, 40]
    assert (run_again / 'metrics.jsonl').read_bytes() == before


def assert_same_records(one, other):
    """The losses of two metrics files are equal at every step."""

    def losses(path):
        return {
            (record['step'], name): value
            for record in read_records(path)
            for name, value in record.items()
            if name in ('train/loss', 'eval/heldout/loss')
        }

    assert losses(one) == losses(other)


def test_evaluation_gives_the_numbers_of_the_training_run(cli, finished, tmp_path):
    output = tmp_path / 'scores.json'
    code, out, _ = cli(finished[0], '--mode=eval', '--output', str(output))
    assert (code, out) == (0, '')
    scores = json.loads(output.read_text())
    records = read_records(finished[0] / 'metrics.jsonl')
    last = [record for record in records if record['kind'] == 'eval'][-1]
    assert scores == {'step': 40} | {k: v for k, v in last.items() if k.startswith('eval/')}


def test_sampling_prints_prompt_and_completion_and_repeats_itself(cli, finished, tmp_path):
    output = tmp_path / 'deep' / 'samples.jsonl'
    greedy = ['--mode=sample', '--prompt=a1 b', '--temperature=0', '--max_tokens=5']
    code, out, _ = cli(finished[0], *greedy, '--output', str(output))
    assert code == 0
    [record] = map(json.loads, output.read_text().splitlines())
    assert record['prompt'] == 'a1 b'
    assert out == 'a1 b' + record['completion'] + '\n'
    assert len(record['completion'].encode()) <= 5
    assert cli(finished[0], *greedy)[:2] == (0, out)

    hot = ['--mode=sample', '--prompt=a1 b', '--temperature=1', '--max_tokens=20']
    assert cli(finished[0], *hot)[1] == cli(finished[0], *hot)[1]
    assert cli(finished[0], *hot)[1] != cli(finished[0], *hot, '--seed=1')[1]


def test_options_of_sampling_are_honoured_and_every_sample_is_recorded(cli, finished, tmp_path):
    output = tmp_path / 'samples.jsonl'
    given = ['--mode=sample', '--prompt=a1 b', '--n=3', '--top_k=2', '--max_tokens=30']
    given += ['--ignore_eos', '--config.sampling.allowed_ids=[97, 98, 99]', '--stop=ca', '--stop=b']
    code, out, error = cli(finished[0], *given, '--logprobs', '--output', str(output))
    assert code == 0, error
    records = [json.loads(line) for line in output.read_text('utf-8').splitlines()]
    assert out == ''.join(f'{record["prompt"]}{record["completion"]}\n' for record in records)
    assert [record['sample_index'] for record in records] == [0, 1, 2]
    for record in records:
        assert set(record['completion']) <= {'a', 'c'} and 'ca' not in record['completion']
        assert record['finish_reason'] == ('length' if len(record['tokens']) == 30 else 'stop')
        assert set(record['tokens']) <= {97, 98, 99}
        assert len(record['logprobs']) == len(record['tokens'])


def test_samples_of_weights_that_are_no_numbers_fail(cli, finished, monkeypatch):
    def ruined(run, original=sample.current_params):
        params, step = original(run)
        return {path: x * float('nan') for path, x in params.items()}, step

    monkeypatch.setattr(sample, 'current_params', ruined)
    code, out, error = cli(finished[0], '--mode=sample', '--prompt=a1', '--prompt=b')
    assert (code, out) == (70, 'a1\nb\n')
    assert_one_clear_message(error, ['2 of 2 samples failed', "'b'", 'the model gives NaN'])


@pytest.mark.parametrize(
    'prompt, words',
    [('abc ' * 20, ['81 prompt + 8 new tokens = 89', '64']), ('a\udcff', ['surrogate'])],
    ids=['longer than the context', 'not UTF-8'],
)
def test_a_prompt_that_cannot_be_continued_is_bad_data(cli, finished, prompt, words):
    code, out, error = cli(finished[0], '--mode=sample', f'--prompt={prompt}')
    assert (code, out) == (65, '')
    assert_one_clear_message(error, words)


@pytest.mark.parametrize('mode', ['eval', 'sample'])
def test_an_output_that_cannot_be_written_is_told(cli, finished, tmp_path, mode):
    (tmp_path / 'file').write_text('')
    output = tmp_path / 'file' / 'output.jsonl'
    code, _, error = cli(finished[0], f'--mode={mode}', '--output', str(output))
    assert code == 74
    assert_one_clear_message(error, [str(output)])


def test_zero_steps_only_evaluate(cli, tmp_path):
    code, _, _ = cli(tmp_path / 'run', '--config.steps=0', '--config.optimizer.warmup_steps=0')
    assert code == 0
    records = list(read_records(tmp_path / 'run' / 'metrics.jsonl'))
    kinds = [record['kind'] for record in records]
    assert kinds == ['event', 'event', 'perf', 'eval', 'event', 'event']
    assert {r['step'] for r in records} == {0}


# Storage that refuses, for real: file systems mounted for one process and gone with it


@pytest.fixture(scope='module')
def mounting():
    """The command that gives a process its own mounts; skips where nobody may mount."""
    command = ['unshare', '--mount', *([] if os.geteuid() == 0 else ['--map-root-user'])]
    probe = 'mount -t tmpfs tmpfs /mnt'
    if shutil.which('unshare') is None:
        pytest.skip('needs unshare (util-linux)')
    if subprocess.run([*command, 'sh', '-c', probe], capture_output=True).returncode:
        pytest.skip('needs the right to mount a file system in a namespace of its own')
    return command


def run_on_mount(mounting, tiny, place, options, fill):
    """Trains in `place`/new/run on a tmpfs -> (code, stdout, stderr, what is left on it)."""
    place.mkdir()
    arguments = tiny.arguments(place / 'new' / 'run')
    script = f"""
mount -t tmpfs -o {options} tmpfs "$0"
{fill}
"$@"
code=$?
find "$0" -mindepth 1 > "$0.left"
exit $code
"""
    process = subprocess.run(
        [*mounting, 'sh', '-c', script, place, sys.executable, '-m', 'jaxfm.main', *arguments],
        # Without tokens of other tests: it must tokenise, if it comes so far.
        env=os.environ | tiny.environment | {'XDG_CACHE_HOME': f'{place}.cache'},
        capture_output=True,
        text=True,
    )
    left = Path(f'{place}.left').read_text().split()
    return process.returncode, process.stdout, process.stderr, left


@pytest.mark.parametrize(
    'options, fill, code, words',
    [
        ('ro', '', 77, ['checkpoints cannot be written: Read-only']),
        # Less than three checkpoints of half a MiB each.
        ('size=900k', '', 74, ['no room for checkpoints', '(3 of ']),
        # Directories can still be made, but not a byte be written.
        (
            'size=64k',
            'dd if=/dev/zero of="$0/filled" bs=4k 2> /dev/null',
            74,
            ['checkpoints is full: No space left'],
        ),
    ],
    ids=['read-only', 'no room for the checkpoints', 'full'],
)
def test_storage_that_refuses_is_told_at_the_start(
    mounting, tiny, tmp_path, options, fill, code, words
):
    found, out, error, left = run_on_mount(mounting, tiny, tmp_path / 'mount', options, fill)
    assert (found, out) == (code, '')
    assert_one_clear_message(error, words)
    assert 'tokenised' not in error  # which may take hours
    assert [path for path in left if not path.endswith('/filled')] == []
