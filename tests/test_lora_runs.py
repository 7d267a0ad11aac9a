"""Adapters in real runs: from a run without them, on from one with them, and back into weights."""

import json

import numpy as np
import pytest

from jaxfm.checkpoint import CheckpointConfig
from jaxfm.checkpoint.reader import Reader
from tests.runs import PATIENCE, assert_same_state, finish, measured, stderr_of, wait_until

LORA = ['--config.model.lora.rank=4', "--config.model.lora.targets=['all']"]
SHORT = ['--config.steps=12', '--config.optimizer.learning_rate=1e-2']
STEPS = 12


def heldout(workdir, step):
    return measured(workdir)[step, 'eval']['eval/heldout/loss']


def params_of(tiny, workdir, step):
    state = tiny.saved_state(workdir, step)
    kinds = ('trainable/', 'frozen/')
    return {n.partition('/')[2]: value for n, value in state.items() if n.startswith(kinds)}


def run(tiny, workdir, *more, code=0):
    process = tiny.start(workdir, *SHORT, '--config.sampling.num_samples=0', *more)
    process.communicate(timeout=PATIENCE)
    assert process.returncode == code, stderr_of(workdir)
    return workdir


@pytest.fixture(scope='module')
def adapted(tiny, straight):
    """The work directory of a run that trains adapters of the model of `straight`."""
    return run(tiny, tiny.root / 'adapted', f'--config.init_from={straight}', *LORA)


def test_a_run_of_adapters_begins_with_the_model_that_it_adapts(tiny, straight, adapted):
    assert heldout(adapted, 0) == heldout(straight, 40)
    assert heldout(adapted, STEPS) < heldout(adapted, 0)
    base, params = params_of(tiny, straight, 40), params_of(tiny, adapted, STEPS)
    for path, value in base.items():
        np.testing.assert_array_equal(params[path], value, path)
    adapters = params.keys() - base.keys()
    assert len(adapters) == 12 and all('_lora/' in path for path in adapters)
    assert all(np.abs(params[path]).max() > 0 for path in adapters)


def test_its_state_has_moments_of_adapters_alone(tiny, adapted):
    state = tiny.saved_state(adapted, STEPS)
    trained = [name for name in state if name.startswith('trainable/')]
    moments = [name for name in state if '/mu/' in name or '/nu/' in name]
    assert len(trained) == 12 and len(moments) == 24
    assert all('_lora/' in name for name in trained + moments)


def test_the_tables_say_what_is_trained(adapted):
    said = (adapted / 'log.txt').read_text()
    assert 'rank 4, alpha 32 on attention/q, attention/k' in said
    assert 'gradients of frozen weights: none are computed' in said


def test_a_run_of_adapters_goes_on_where_it_was_killed(tiny, straight, adapted, start):
    workdir = tiny.root / 'killed_adapters'
    arguments = [f'--config.init_from={straight}', *LORA, *SHORT]
    process = start(workdir, *arguments)
    wait_until(lambda: 5 in tiny.committed(workdir), process)
    process.kill()
    finish(process, -9)
    finish(start(workdir, *arguments))
    assert measured(workdir) == measured(adapted)
    assert_same_state(tiny.saved_state(workdir, STEPS), tiny.saved_state(adapted, STEPS))


def test_a_run_that_starts_from_adapters_goes_on_with_them(tiny, adapted):
    workdir = run(tiny, tiny.root / 'continued', f'--config.init_from={adapted}')
    assert heldout(workdir, 0) == heldout(adapted, STEPS)
    lora = json.loads((workdir / 'config.json').read_text())['model']['lora']
    assert (lora['rank'], lora['targets']) == (4, ['all'])
    trained = [n for n in tiny.saved_state(workdir, STEPS) if n.startswith('trainable/')]
    assert len(trained) == 12


def test_without_adapters_it_starts_from_the_merged_weights(tiny, adapted):
    flags = [f'--config.init_from={adapted}', '--config.model.lora=None']
    workdir = run(tiny, tiny.root / 'merged', *flags)
    np.testing.assert_allclose(heldout(workdir, 0), heldout(adapted, STEPS), rtol=1e-6)
    names = tiny.saved_state(workdir, STEPS)
    assert not [name for name in names if '_lora/' in name or name.startswith('frozen/')]


def test_an_export_has_the_merged_weights(tiny, straight, adapted):
    exported = tiny.root / 'exported'
    flags = [f'--config.init_from={straight}', *LORA, '--mode', 'export', '--output', str(exported)]
    run(tiny, adapted, *flags)
    workdir = run(tiny, tiny.root / 'from_export', f'--config.init_from={exported}')
    np.testing.assert_allclose(heldout(workdir, 0), heldout(adapted, STEPS), rtol=1e-6)
    assert not [name for name in tiny.saved_state(workdir, STEPS) if '_lora/' in name]


def test_adapters_go_out_alone_and_into_another_run(tiny, straight, adapted):
    """`--mode export` of adapters, and `model.lora.path`."""
    exported = tiny.root / 'adapter'
    init = f'--config.init_from={straight}'
    flags = ['--config.export.adapters=peft', '--mode', 'export', '--output', str(exported)]
    run(tiny, adapted, init, *LORA, *flags)
    assert sorted(path.name for path in exported.iterdir()) == [
        'adapter_config.json',
        'adapter_model.safetensors',
    ]
    workdir = run(tiny, tiny.root / 'from_adapter', init, f'--config.model.lora.path={exported}')
    assert heldout(workdir, 0) == heldout(adapted, STEPS)
    before, after = params_of(tiny, adapted, STEPS), params_of(tiny, workdir, STEPS)
    assert before.keys() == after.keys()
    assert all(('_lora/' in path) == (before[path] != after[path]).any() for path in before)


def test_adapters_of_another_kind_are_refused(tiny, adapted):
    flags = [f'--config.init_from={adapted}', '--config.model.lora.rank=8']
    workdir = run(tiny, tiny.root / 'other_rank', *flags, code=78)
    said = stderr_of(workdir)
    for words in (
        'config.model.lora.rank cannot change',
        '(rank 4, alpha 32',
        'to train them further',
    ):
        assert words in said
    assert not workdir.exists()


def test_a_checkpoint_of_adapters_needs_the_model_they_belong_to(tiny, straight, adapted):
    manifest = Reader(CheckpointConfig(), adapted / 'checkpoints').read_manifest(STEPS)
    assert not [name for name in manifest['arrays'] if name.startswith('frozen/')]
    origin = manifest['base']['origin']
    assert (origin['init_from'], origin['step']) == (str(straight), 40)
    hidden = straight.with_name('hidden')
    straight.rename(hidden)
    try:
        output = ['--mode', 'sample', '--prompt', 'a']
        workdir = run(tiny, adapted, f'--config.init_from={straight}', *LORA, *output, code=66)
    finally:
        hidden.rename(straight)
    only = f'holds only adapters, not the weights of {straight} at step 40 that they belong to'
    assert f'{only}: there is no {straight}' in stderr_of(workdir)
