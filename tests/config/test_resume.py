import pytest

from jaxfm import errors
from jaxfm.config.resume import ABSENT, check_resume, find_changes
from jaxfm.config.run import RunConfig


def run(**changes):
    block = {'num_heads': 4, 'num_kv_heads': 2, 'head_dim': 16, 'mlp_dim': 128}
    model = {'vocab_size': 2048, 'embed_dim': 64, 'num_layers': 2, 'block': block}
    keys = {
        'steps': 100,
        'model': model | changes.pop('model', {}),
        'data': {'name': 'python_stdlib', 'sequence_length': 64, 'batch_size': 8},
        'optimizer': {'name': 'adamw', 'learning_rate': 1e-3},
    }
    return RunConfig(**(keys | changes))


MUON = {'name': 'muon', 'learning_rate': 1e-3}


def test_the_same_config_resumes():
    assert check_resume(run(), run()) == []


def test_the_difference_lists_values_and_absent_keys():
    new = run(
        optimizer={'name': 'muon', 'learning_rate': 1e-3, 'momentum': 0.5},
        model={'segments': [{'pattern': [run().model.block], 'repeats': 2}]},
    )
    changes = find_changes(run(), new)
    assert ('optimizer.name', 'adamw', 'muon') in changes
    assert ('optimizer.momentum', ABSENT, 0.5) in changes
    assert ('model.segments', [], ABSENT) in changes
    assert ('model.segments[0].repeats', ABSENT, 2) in changes


@pytest.mark.parametrize(
    'changes',
    [
        {'mesh': {'fsdp': 2, 'tensor': 2}},
        {'evals': {'heldout': {'name': 'loss', 'every': 10}}},
        {'checkpoint': {'every': 5, 'keep': 9}},
        {'metrics': {'log_every': 1}},
        {'model': {'remat': 'full'}},
    ],
)
def test_values_that_do_not_affect_learning_may_change(changes):
    new = run(**changes)
    assert check_resume(run(), new) == find_changes(run(), new) != []


@pytest.mark.parametrize(
    'group, changes',
    [
        ('steps', {'steps': 200}),
        ('seed', {'seed': 1}),
        ('data', {'data': {'name': 'python_stdlib', 'sequence_length': 64, 'batch_size': 16}}),
        ('optimizer', {'optimizer': MUON}),
        ('objective', {'objective': {'name': 'next_token', 'z_loss': 1e-4}}),
        ('checkpoint', {'checkpoint': {'directory': 'elsewhere'}}),
    ],
)
def test_values_that_affect_learning_change_only_if_allowed_by_name(group, changes):
    with pytest.raises(errors.ConfigError, match=f'--allow_change={group};'):
        check_resume(run(), run(**changes))
    assert check_resume(run(), run(**changes), {group})


def test_the_refusal_shows_what_is_not_allowed_and_the_whole_flag():
    new = run(steps=200, optimizer=MUON, mesh={'fsdp': 2})
    with pytest.raises(errors.ConfigError) as caught:
        check_resume(run(), new, {'optimizer'})
    lines = str(caught.value).splitlines()
    assert lines[1:-1] == ['  config.steps: 100 -> 200']
    assert '--allow_change=optimizer,steps' in lines[-1]


def test_the_model_of_a_run_never_changes():
    with pytest.raises(errors.ConfigError) as caught:
        check_resume(run(), run(model={'num_layers': 4}, steps=3), {'steps'})
    assert 'config.model.num_layers: 2 -> 4' in str(caught.value)
    assert '--allow_change' not in str(caught.value)
    with pytest.raises(errors.UsageError, match='the model of a run cannot change'):
        check_resume(run(), run(), {'model'})


def test_an_unknown_group_cannot_be_allowed():
    with pytest.raises(errors.UsageError, match='did you mean optimizer'):
        check_resume(run(), run(), {'optimiser'})
