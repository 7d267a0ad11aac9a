import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pydantic
import pytest
from pydantic import Field

from jaxfm import errors
from jaxfm.config.checks import reads, run_checks
from jaxfm.config.inherit import write_inherited
from jaxfm.config.load import load_config, read_config, split_arguments, workdir_for, write_config
from jaxfm.config.run import check_on_mesh
from jaxfm.registry import Entry, Registry, one_of
from jaxfm.schema import Group, Problem

ROOT = Path(__file__).resolve().parents[2]


class SmallConfig(Group):
    name: Literal['small'] = 'small'
    width: int = Field(8, ge=1, multiple_of=2)
    heads: int = Field(2, ge=1)

    @pydantic.model_validator(mode='after')
    def _check(self):
        if self.width % self.heads:
            raise ValueError(f'width {self.width} is not a multiple of heads {self.heads}')
        return self


class LargeConfig(Group):
    name: Literal['large'] = 'large'
    width: int = 1024
    activation: Literal['silu', 'gelu'] = 'silu'


MODELS = Registry({'small': Entry('m:Small', SmallConfig), 'large': Entry('m:Large', LargeConfig)})


class ScheduleConfig(Group):
    steps: int = Field(ge=0)
    rate: float = Field(1e-3, gt=0, le=1)
    note: str = ''
    tags: list[str] = []
    nesterov: bool = True


@reads('steps')
def steps_are_even(run, prefix):
    if run.steps % 2:
        yield Problem((('steps',),), f'steps {run.steps} is odd')


@reads('steps', 'model')
def width_fits(run, prefix):
    if run.model.width > run.steps:
        sentence = f'model.width {run.model.width} > steps {run.steps}'
        yield Problem((('model', 'width'), ('steps',)), sentence)


class StandInConfig(Group):
    steps: int = 100
    model: one_of(MODELS) = SmallConfig(width=12)
    phases: list[ScheduleConfig] = []
    evals: dict[str, one_of(MODELS)] = {}
    limit: ScheduleConfig | None = None
    shape: tuple[int, ...] = (1, 2)

    @classmethod
    def find_conflicts(cls, parts):
        return run_checks((steps_are_even, width_fits), parts)


@pytest.fixture
def config_file(tmp_path, monkeypatch):
    """Writes a config file with the given body of get_config and returns its name, 'run.py'."""
    monkeypatch.chdir(tmp_path)

    def write(body, signature='', name='run.py'):
        lines = '\n'.join(f'    {line}' for line in body.splitlines())
        text = f'from ml_collections import ConfigDict\n\ndef get_config({signature}):\n{lines}\n'
        Path(name).write_text(text)
        return name

    return write


@pytest.fixture
def load(config_file):
    """Loads a config file with the given keys, and overrides, against the stand-in schema."""

    def load_keys(*overrides, **keys):
        name = config_file(f'return ConfigDict({keys!r})')
        return load_config(name, overrides, StandInConfig)

    return load_keys


@pytest.fixture
def refusal(load):
    """The lines of the ConfigError that loading raises."""

    def lines(*overrides, **keys):
        with pytest.raises(errors.ConfigError) as caught:
            load(*overrides, **keys)
        return str(caught.value).splitlines()

    return lines


PHASES = [{'steps': 3}, {'steps': 4, 'rate': 0.5}]


# The command line


def test_config_flags_are_separated_from_a_command_line_in_both_spellings():
    argv = [
        '--mode', 'eval', '--config=a.py:smoke', '--config.x.y=1=2', '--config.z', '-3', '--seed=4',
    ]  # fmt: skip
    assert split_arguments(argv) == (
        'a.py:smoke',
        ['x.y=1=2', 'z=-3'],
        ['--mode', 'eval', '--seed=4'],
    )
    assert split_arguments(['--config', 'a.py', 'b']) == ('a.py', [], ['b'])
    assert split_arguments(['--config_x=3', '--config.note=']) == (
        None,
        ['note='],
        ['--config_x=3'],
    )


@pytest.mark.parametrize(
    'argv',
    [
        ['--config'],
        ['--config='],
        ['--config', '--mode'],
        ['--config.steps'],
        ['--config.steps', '--seed'],
        ['--config=a.py', '--config=b.py'],
    ],
)
def test_a_config_flag_without_value_or_given_twice_is_a_usage_error(argv):
    with pytest.raises(errors.UsageError, match='--config'):
        split_arguments(argv)


# The file


def test_defaults_fill_what_the_file_does_not_set(load):
    assert load(steps=20) == StandInConfig(steps=20)


def test_the_argument_reaches_get_config(config_file):
    name = config_file('return ConfigDict(dict(steps=int(arg)))', 'arg=2')
    assert load_config(f'{name}:30', [], StandInConfig).steps == 30
    with pytest.raises(errors.ConfigError, match='steps 2'):
        load_config(name, [], StandInConfig)


def test_lists_and_tuples_and_nested_config_dicts_are_plain_values(config_file):
    name = config_file(
        'c = ConfigDict(dict(phases=[ConfigDict(dict(steps=1, tags=("a", "b")))]))\n'
        'c.shape = (4, 5)\nreturn c'
    )
    loaded = load_config(name, [], StandInConfig)
    assert loaded.phases[0].tags == ['a', 'b']
    assert loaded.shape == (4, 5)


def test_the_message_about_a_missing_file_names_the_closest_one(config_file):
    config_file('return {}', name='quickstart.py')
    with pytest.raises(errors.MissingInputError, match='did you mean quickstart.py'):
        load_config('quikstart.py:smoke')
    with pytest.raises(errors.MissingInputError, match='there is no directory nowhere'):
        load_config('nowhere/quickstart.py')


@pytest.mark.parametrize(
    'body, signature, argument, expected',
    [
        ('return {}', '', ':smoke', "takes no argument, got 'smoke'; use --config=run.py"),
        ('return {}', 'arg', '', 'needs an argument; use --config=run.py:ARG'),
        ('x = 1\nreturn {"a": y}', '', '', "run.py:5: NameError: name 'y' is not defined"),
        ('return (', '', '', "run.py:4: SyntaxError: '(' was never closed"),
        ('import nothere', '', '', "run.py:4: ModuleNotFoundError: No module named 'nothere'"),
        ('return 3', '', '', 'run.py: get_config must return a ConfigDict, it returned 3'),
        (
            'raise ValueError(f"no size {arg}; there is tiny")',
            'arg=""',
            ':huge',
            "run.py:4: ValueError: no size huge; there is tiny (with the argument 'huge')",
        ),
    ],
)
def test_an_error_inside_the_file_is_reported_in_one_line(
    config_file, body, signature, argument, expected
):
    name = config_file(body, signature)
    with pytest.raises(errors.ConfigError) as caught:
        load_config(name + argument, [], StandInConfig)
    assert str(caught.value).endswith(expected)
    assert '\n' not in str(caught.value)


def test_a_file_without_get_config_says_so(tmp_path):
    path = tmp_path / 'run.py'
    path.write_text('config = {}\n')
    with pytest.raises(errors.ConfigError, match='must define get_config'):
        load_config(str(path))


# Overrides


def test_an_override_is_parsed_by_the_type_of_its_key(load):
    loaded = load(
        'steps=2_000',
        'phases[1].rate=3e-4',
        'phases[1].nesterov=FALSE',
        'phases[0].note=12',
        "phases[0].tags=['a', 'b']",
        'shape=3,4',
        'model.name=large',
        'model.activation=gelu',
        'limit={"steps": 7}',
        phases=PHASES,
        model={'name': 'small'},
    )
    assert loaded.steps == 2000
    assert loaded.phases[1] == ScheduleConfig(steps=4, rate=3e-4, nesterov=False)
    assert loaded.phases[0] == ScheduleConfig(steps=3, note='12', tags=['a', 'b'])
    assert loaded.shape == (3, 4)
    assert loaded.model == LargeConfig(activation='gelu')
    assert loaded.limit == ScheduleConfig(steps=7)


def test_an_override_reaches_keys_of_dicts_and_groups_the_file_does_not_set(load):
    loaded = load('evals.first.name=small', "evals['a.b']={'name': 'large'}", 'limit.steps=3')
    assert loaded.evals == {'first': SmallConfig(), 'a.b': LargeConfig()}
    assert loaded.limit == ScheduleConfig(steps=3)


def test_overriding_one_key_keeps_the_other_defaults_of_its_group(load):
    assert load('model.heads=3').model == SmallConfig(width=12, heads=3)


def test_a_group_is_removed_with_none(load):
    assert load('limit=None', limit={'steps': 3}).limit is None


@pytest.mark.parametrize(
    'override, expected',
    [
        ('phases[2].steps=9', 'config.phases[2]: the list has entries 0 to 1'),
        ('phases.steps=9', 'config.phases is a list of 2 entries; write config.phases[0].steps'),
        ('steps.x=9', 'config.steps is 100, which has no keys'),
        ('model[0]=9', 'config.model is a group of keys, not a list; there is no [0]'),
        ('steps[=9', "config.steps[: malformed path; write a.b, a[0].b or a['b.c']"),
    ],
)
def test_an_override_whose_path_leads_nowhere_says_what_is_there(refusal, override, expected):
    assert refusal(override, phases=PHASES, steps=100) == [
        f'{expected} (given by --config.{override})'
    ]


# Mistakes


@pytest.mark.parametrize(
    'override, expected',
    [
        ('stps=3', 'config.stps: unknown key; did you mean steps?'),
        ('model.wdth=3', 'config.model.wdth: unknown key; did you mean width?'),
        ('model.zzz=3', 'config.model.zzz: unknown key; small has name, width, heads'),
        ('evals.e.wdth=3', 'config.evals.e.wdth: unknown key; did you mean width?'),
        ('phases[1].stps=3', 'config.phases[1].stps: unknown key; did you mean steps?'),
        ('steps=many', "config.steps: must be a whole number, got 'many'"),
        ('steps=2.5', 'config.steps: must be a whole number, got 2.5'),
        ('steps=true', 'config.steps: must be a whole number, got True'),
        ('phases[0].rate=fast', "config.phases[0].rate: must be a number, got 'fast'"),
        ('phases[0].rate=-1', 'config.phases[0].rate: must be more than 0, got -1'),
        ('phases[0].rate=1e999', 'config.phases[0].rate: must be a finite number, got inf'),
        ('phases[0].nesterov=1', 'config.phases[0].nesterov: must be true or false, got 1'),
        ('phases[0].tags=a', "config.phases[0].tags: must be a list, got 'a'"),
        ('phases[0].tags=[1]', 'config.phases[0].tags[0]: must be text, got 1'),
        ('phases=3', 'config.phases: must be a list, got 3'),
        ('limit=3', 'config.limit: must be a group of keys, got 3'),
        ('model.width=7', 'config.model.width: must be a multiple of 2, got 7'),
        ('model.width=0', 'config.model.width: must be at least 1, got 0'),
        ('model.heads=5', 'config.model: width 8 is not a multiple of heads 5'),
        ('steps=101', 'config: steps 101 is odd'),
        (
            'evals.e.name=smal',
            "config.evals.e.name: must be one of 'small', 'large', got 'smal'; did you mean small?",
        ),
        (
            "model={'name': 'large', 'activation': 'glu'}",
            "config.model.activation: must be one of 'silu', 'gelu', got 'glu'; did you mean gelu?",
        ),
        (
            'limit={1, 2}',
            'config.limit: must be a number, text, true or false, a list or a group, '
            'got {1, 2} (set)',
        ),
    ],
)
def test_a_mistake_on_the_command_line_is_one_sentence(refusal, override, expected):
    keys = {'model': {'name': 'small'}, 'evals': {'e': {'name': 'small'}}, 'phases': PHASES}
    assert refusal(override, **keys) == [f'{expected} (given by --config.{override})']


def test_a_mistake_in_the_file_names_the_file(refusal):
    assert refusal(evals={'e': {}}, phases=[{}]) == [
        'config.phases[0].steps: is required and not given (in run.py)',
        "config.evals.e.name: is required and not given; choose one of 'small', 'large' "
        '(in run.py)',
    ]


def test_an_override_replaces_a_value_that_is_wrong_in_the_file(load):
    assert load('steps=4', 'model.width=2', steps='many', model={'name': 'small'}).steps == 4


def test_every_mistake_is_reported_at_once(refusal):
    lines = refusal(
        'phases[7].steps=1',
        'steps=7',
        'limit.rate=2',
        limit={'steps': 1.5},
        modle=3,
        evals={'e': {'name': 'small', 'heads': 3}},
        model={'name': 'small', 'width': 8, 'heads': 3, 'hidden': 4},
    )
    assert lines == [
        'config.phases[7]: the list has no entries (given by --config.phases[7].steps=1)',
        'config.model.hidden: unknown key; small has name, width, heads (in run.py)',
        'config.evals.e: width 8 is not a multiple of heads 3 (in run.py)',
        'config.limit.steps: must be a whole number, got 1.5 (in run.py)',
        'config.limit.rate: must be at most 1, got 2 (given by --config.limit.rate=2)',
        'config.modle: unknown key; did you mean model? (in run.py)',
        'config.model: width 8 is not a multiple of heads 3 (in run.py)',
        'config: steps 7 is odd (given by --config.steps=7)',
    ]


def test_checks_between_groups_run_on_the_valid_groups(refusal):
    lines = refusal('phases=3', 'model.width=200', model={'name': 'small'})
    assert lines == [
        'config.phases: must be a list, got 3 (given by --config.phases=3)',
        'config: model.width 200 > steps 100 (given by --config.model.width=200)',
    ]


# Which overrides a message names


@pytest.mark.parametrize(
    'overrides, blamed',
    [
        (['steps=4', 'model.width=6'], [0, 1]),
        (['model.heads=3', 'model.width=6', 'steps=4'], [1, 2]),  # heads is not involved
        (['steps=3', 'steps=4', 'model.width=6'], [1, 2]),  # the last one counts
        (['model.width=6', "model={'name':'small','width':10}", 'steps=4'], [1, 2]),
        (["model={'name':'small'}", 'steps=2', 'model.width=10'], [1, 2]),
        (["model={'name':'small','width':10}", 'model.heads=1', 'steps=4'], [0, 2]),
    ],
)
def test_a_conflict_names_the_overrides_that_set_its_values(refusal, overrides, blamed):
    (line,) = refusal(*overrides, model={'name': 'small'})
    flags = ', '.join(f'--config.{overrides[index]}' for index in blamed)
    assert line.endswith(f' (given by {flags})')
    assert line.startswith('config: model.width ')


def test_a_conflict_without_paths_names_every_override_inside_its_group(refusal):
    (line,) = refusal('model.heads=5', 'model.width=8', 'steps=20', model={'name': 'small'})
    assert line.endswith('(given by --config.model.heads=5, --config.model.width=8)')


def test_an_override_of_an_entry_does_not_count_as_one_of_its_list(load_phases):
    with pytest.raises(errors.ConfigError) as caught:
        load_phases('steps=7', 'phases[0].steps=5')
    assert str(caught.value).endswith('(given by --config.steps=7)')
    with pytest.raises(errors.ConfigError) as caught:
        load_phases('steps=7', phases := f'phases={phased_keys()["phases"]}')
    assert str(caught.value).endswith(f'(given by --config.steps=7, --config.{phases})')


def test_a_duplicate_phase_name_names_only_the_overrides_of_phase_names(monkeypatch):
    """Neither overrides of another `.name`, nor those that refer to a phase."""
    monkeypatch.chdir(ROOT)
    names = ['phases[1].name=pretrain', 'tokenizer.name=bytes', 'evals.problems.phase=pretrain']
    with pytest.raises(errors.ConfigError) as caught:
        load_config('configs/lifecycle.py:smoke', names)
    assert str(caught.value) == (
        'config: phases: more than one phase is named pretrain '
        '(given by --config.phases[1].name=pretrain)'
    )


# The run's own schema


def run_keys(**changes):
    block = {'num_heads': 4, 'num_kv_heads': 2, 'head_dim': 16, 'mlp_dim': 128}
    model = {'vocab_size': 2048, 'embed_dim': 64, 'num_layers': 2, 'block': block}
    keys = {
        'steps': 100,
        'model': model,
        'data': {'name': 'python_stdlib', 'sequence_length': 64, 'batch_size': 8},
        'optimizer': {'name': 'adamw', 'learning_rate': 1e-3},
    }
    return keys | changes


@pytest.fixture
def load_run(config_file):
    return lambda *overrides: load_config(config_file(f'return {run_keys()!r}'), overrides)


@pytest.mark.parametrize(
    'overrides, expected',
    [
        (
            ['tokenizer.vocab_size=4096'],
            'tokenizer.vocab_size 4096 is more than model.vocab_size 2048: 2048 tokens',
        ),
        (
            ['optimizer.accumulate=3'],
            'data.batch_size 8 is not a multiple of optimizer.accumulate 3: 8 = 2 x 3 + 2',
        ),
        (
            ['mesh.fsdp=4', 'mesh.replica=2', 'optimizer.accumulate=2'],
            '= 4 rows cannot be split over mesh.replica x mesh.fsdp x mesh.expert = 8: 4 = 0 x 8',
        ),
        (['mesh.tensor=3'], 'num_heads 4 cannot be split over mesh.tensor 3: 4 = 1 x 3 + 1'),
        (['optimizer.warmup_steps=101'], 'optimizer.warmup_steps 101 is more than steps 100'),
        (
            [
                "evals.code={'name': 'generate', 'task': {'name': 'python_functions'}, "
                "'max_tokens': 512}"
            ],
            'evals.code.max_tokens 512 must be less than sampling.max_length 512',
        ),
        (
            ["evals.export={'name': 'loss'}", 'export.every=10'],
            'evals.export: with export.every 10 this name is taken',
        ),
        (['mesh.context=2'], 'config.mesh.context: must be 1, because nothing is sharded'),
        (['mesh.expert=-1'], 'config.mesh.expert: must be 1, because nothing is sharded'),
        (['mesh.fsdp=0'], 'config.mesh.fsdp: must be at least 1, or -1 for all remaining'),
        (['mesh.tensor=-1'], 'config.mesh: fsdp and tensor are -1'),
        (['optimizer.name=adam'], 'did you mean adamw?'),
        (["model.lora.targets=['attention/qq']"], 'did you mean attention/q?'),
        (['model.lora.targets=[]'], 'config.model.lora.targets: must have at least 1 entries'),
        (['model.lora.rank=0'], 'config.model.lora.rank: must be at least 1'),
        (['model.lora.ranks=4'], 'did you mean rank?'),
    ],
)
def test_a_run_that_cannot_work_shows_the_arithmetic(load_run, overrides, expected):
    with pytest.raises(errors.ConfigError) as caught:
        load_run(*overrides)
    assert expected in str(caught.value)
    assert f'given by --config.{overrides[0]}' in str(caught.value)


def test_the_checks_run_again_with_the_real_mesh(load_run):
    run = load_run()
    check_on_mesh(run, {'fsdp': 8})
    with pytest.raises(errors.ConfigError, match='8 rows .* = 16: 8 = 0 x 16'):
        check_on_mesh(run, {'fsdp': 16})


# Phases, and runs that start from other runs


def phased_keys(*changes, **more):
    """A run with two phases; `changes` apply to each of them."""
    own = run_keys()
    shared = {key: own.pop(key) for key in ('data', 'optimizer', 'steps')}
    changes = changes or ({}, {})
    names = ('first', 'second')
    return own | {'phases': [{'name': n} | shared | c for n, c in zip(names, changes)]} | more


@pytest.fixture
def load_phases(config_file):
    def load(*overrides, **more):
        return load_config(config_file(f'return {phased_keys(**more)!r}'), overrides)

    return load


def test_a_run_without_a_list_of_phases_is_one_phase(load_run):
    run = load_run()
    (phase,) = run.all_phases
    assert (phase.name, phase.steps, run.total_steps) == ('', 100, 100)
    assert phase.data == run.data and phase.optimizer == run.optimizer


def test_a_value_inside_a_phase_can_be_given(load_phases):
    run = load_phases('phases[1].steps=7', 'phases[0].optimizer.learning_rate=0.5')
    assert run.total_steps == 107
    assert [phase.optimizer.learning_rate for phase in run.all_phases] == [0.5, 1e-3]


@pytest.mark.parametrize(
    'overrides, expected',
    [
        (['steps=7'], 'config: steps must be set in each phase'),
        (['phases[1].name=first'], 'more than one phase is named first'),
        (
            ['phases[1].optimizer.warmup_steps=101'],
            'phases[1].optimizer.warmup_steps 101 is more than phases[1].steps 100',
        ),
        (['phases[1].optimizer.accumulate=3'], 'phases[1].data.batch_size 8 is not a multiple'),
        (['phases[0].keep_optimizer=true'], 'phases[0].keep_optimizer: the first phase has no'),
        (
            ["phases[1].optimizer.frozen=['trunk*']", 'phases[1].keep_optimizer=true'],
            "optimizer.frozen is ['trunk*'] and phases[0].optimizer.frozen is []",
        ),
        (["evals.loss={'name': 'loss'}"], 'evals.loss.phase is required: it names'),
        (
            ["evals.loss={'name': 'loss', 'phase': 'secnod'}"],
            'evals.loss.phase: there is no phase secnod; did you mean second?',
        ),
        (['phases[1].setps=3'], 'config.phases[1].setps: unknown key; did you mean steps?'),
    ],
)
def test_phases_that_cannot_work_are_refused(load_phases, overrides, expected):
    with pytest.raises(errors.ConfigError) as caught:
        load_phases(*overrides)
    assert expected in str(caught.value)
    assert f'given by --config.{overrides[0]}' in str(caught.value)


@pytest.mark.parametrize('name', ['steps', 'data', 'optimizer'])
def test_a_value_that_neither_the_run_nor_a_phase_sets_is_required(config_file, name):
    keys = {key: value for key, value in run_keys().items() if key != name}
    with pytest.raises(errors.ConfigError, match=f'config: {name} is required and not given'):
        load_config(config_file(f'return {keys!r}'))


def test_model_and_tokenizer_come_from_the_run_it_starts_from(tmp_path, config_file, load_run):
    earlier = tmp_path / 'earlier'
    earlier.mkdir()
    write_config(load_run('model.embed_dim=32'), earlier / 'config.json')
    keys = run_keys(init_from=str(earlier))
    del keys['model']
    run = load_config(config_file(f'return {keys!r}'), ['model.remat=full'])
    assert (run.model.embed_dim, run.model.remat) == (32, 'full')
    assert (run.tokenizer.name, run.tokenizer.path) == ('file', str(earlier))


def test_any_config_can_start_from_any_model(tmp_path, config_file, load_run):
    """The architecture comes from the model; training settings and overrides stay as given."""
    write_config(load_run('model.embed_dim=32'), tmp_path / 'config.json')
    keys = run_keys(init_from=str(tmp_path))
    keys['model'] |= dict(embed_dim=64, scan=False)
    run = load_config(config_file(f'return {keys!r}'), ['model.block.window=4'])
    assert (run.model.embed_dim, run.model.scan) == (32, False)
    assert run.model.block == load_run('model.block.window=4').model.block
    assert run.tokenizer.name == 'file'


@pytest.mark.parametrize(
    'overrides, name, path',
    [
        (['tokenizer.chat_template=qa'], 'file', 'EARLIER'),
        (['tokenizer.path=other'], 'file', 'other'),
        (['tokenizer.name=file', 'tokenizer.path=other'], 'file', 'other'),
        (['tokenizer.name=bytes'], 'bytes', None),
        (['init_from=', 'tokenizer.chat_template=qa'], 'bpe', None),
    ],
)
def test_an_override_of_the_tokenizer_applies_to_the_inherited_one(
    overrides, name, path, tmp_path, config_file, load_run
):
    write_config(load_run(), tmp_path / 'config.json')
    keys = run_keys(init_from=str(tmp_path))
    tokenizer = load_config(config_file(f'return {keys!r}'), overrides).tokenizer
    assert tokenizer.name == name
    assert getattr(tokenizer, 'path', None) == (str(tmp_path) if path == 'EARLIER' else path)


@pytest.fixture
def load_after(tmp_path, config_file, load_run):
    """(overrides of a run, overrides of a run that starts from it) -> the second run's config."""

    def load(earlier, *overrides):
        write_config(load_run(*earlier), tmp_path / 'config.json')
        keys = run_keys(init_from=str(tmp_path))
        del keys['model']
        return load_config(config_file(f'return {keys!r}'), overrides)

    return load


def test_one_value_of_lora_is_enough_to_add_adapters(load_run, load_after):
    assert load_run().model.lora is None
    assert load_run('model.lora.rank=8').model.lora.matrices == ('attention/q', 'attention/v')
    assert load_run("model.lora.targets=['all']").model.lora.rank == 16
    run = load_after([], 'model.lora.rank=8', 'model.lora.alpha=4')
    assert (run.model.lora.rank, run.model.lora.alpha, run.model.embed_dim) == (8, 4.0, 64)
    assert run.model.lora.scale == 0.5


@pytest.mark.parametrize('given', [[], ['model.lora.rank=8'], ['model.remat=full']])
def test_adapters_of_the_earlier_run_are_kept(load_after, given):
    earlier = ['model.lora.rank=8', 'model.lora.alpha=4', "model.lora.targets=['mlp/down']"]
    lora = load_after(earlier, *given).model.lora
    assert (lora.rank, lora.alpha, lora.targets) == (8, 4.0, ['mlp/down'])


def test_adapters_loaded_from_a_directory_then_belong_to_the_run(tmp_path, load_after):
    load_after(['model.lora.rank=8'])
    values = json.loads((tmp_path / 'config.json').read_text())
    values['model']['lora']['path'] = 'long/gone'
    (tmp_path / 'config.json').write_text(json.dumps(values))
    keys = run_keys(init_from=str(tmp_path))
    del keys['model']
    (tmp_path / 'later.py').write_text(f'def get_config():\n    return {keys!r}\n')
    lora = load_config(str(tmp_path / 'later.py')).model.lora
    assert (lora.path, lora.rank) == ('', 8)


def test_adapters_of_the_earlier_run_can_be_dropped_but_not_changed(load_after):
    assert load_after(['model.lora.rank=8'], 'model.lora=None').model.lora is None
    for given in ('rank=4', 'alpha=3', "targets=['all']"):
        with pytest.raises(errors.ConfigError, match='adapters .rank 8, alpha 32') as caught:
            load_after(['model.lora.rank=8'], f'model.lora.{given}')
        assert f'config.model.lora.{given.partition("=")[0]} cannot change' in str(caught.value)
        assert '--config.model.lora=None' in str(caught.value)


def test_an_override_may_select_another_name_than_the_default(config_file):
    file = config_file(f'return {run_keys()!r}')
    run = load_config(file, ['tokenizer.chat_template=qa', 'tokenizer.name=bytes'])
    assert (run.tokenizer.name, run.tokenizer.chat_template) == ('bytes', 'qa')


def test_an_origin_that_does_not_exist_is_a_missing_input(tmp_path, config_file, load_run):
    (tmp_path / 'earlier').mkdir()
    write_config(load_run(), tmp_path / 'earlier' / 'config.json')
    keys = run_keys(init_from=str(tmp_path / 'earlyer'))
    with pytest.raises(errors.MissingInputError, match='there is no .*earlyer.*mean .*earlier?'):
        load_config(config_file(f'return {keys!r}'))


@pytest.fixture
def begun(tmp_path, load_run):
    """(earlier run, work directory of a run that starts from it, overrides -> its config)."""
    earlier, workdir = tmp_path / 'earlier', tmp_path / 'begun'
    earlier.mkdir()
    workdir.mkdir()
    overrides = ['model.embed_dim=32', 'model.scan=False', 'sampling.stop_ids=[7]']
    write_config(load_run(*overrides, 'export.dtype=bfloat16'), earlier / 'config.json')
    keys = run_keys(init_from=str(earlier))
    del keys['model']
    file = tmp_path / 'later.py'
    file.write_text(f'def get_config():\n    return {keys!r}\n')
    return earlier, workdir, lambda *more: load_config(str(file), more, workdir=workdir)


def begin(run, workdir):
    write_inherited(run, workdir)
    write_config(run, workdir / 'config.json')


@pytest.mark.parametrize('change', ['gone', 'another', 'damaged'])
def test_a_run_that_has_begun_no_longer_reads_its_origin(begun, load_run, change):
    earlier, workdir, load = begun
    run = load('model.lora.rank=8')
    assert (run.model.embed_dim, run.sampling.stop_ids, run.export.dtype) == (32, [7], 'bfloat16')
    begin(run, workdir)
    if change == 'another':
        write_config(load_run('model.embed_dim=128'), earlier / 'config.json')
    elif change == 'damaged':
        (earlier / 'config.json').write_text('{"model": ')
    else:
        shutil.rmtree(earlier)
    assert load('model.lora.rank=8') == run
    begin(run, workdir)  # again, as on every resume
    assert load('model.lora.rank=8') == run


def test_only_inherited_values_are_stored(begun):
    """A value that a run set itself must be set again, or the config differs."""
    _, workdir, load = begun
    plain = load()
    begin(load('model.lora.rank=8', 'model.block.window=4', 'tokenizer.chat_template=qa'), workdir)
    assert load() == plain


def test_a_changed_origin_is_read_and_so_is_that_of_a_new_run(begun, load_run, tmp_path):
    earlier, workdir, load = begun
    write_inherited(load(), workdir)
    write_config(load_run('model.embed_dim=128'), earlier / 'config.json')
    assert load().model.embed_dim == 128
    begin(load(), workdir)
    (tmp_path / 'other').mkdir()
    write_config(load_run('model.embed_dim=256'), tmp_path / 'other' / 'config.json')
    assert load(f'init_from={tmp_path / "other"}').model.embed_dim == 256
    assert load().model.embed_dim == 128


def test_a_new_work_directory_needs_the_origin_and_the_message_says_so(begun):
    earlier, _, load = begun
    shutil.rmtree(earlier)
    with pytest.raises(errors.MissingInputError, match='there is no .*earlier') as caught:
        load()
    assert 'work directory' not in str(caught.value)
    with pytest.raises(errors.MissingInputError) as caught:
        load('checkpoint.directory=s3://bucket/run')
    assert 'there is no ' in str(caught.value)
    assert 's3://bucket/run can resume without it only in the work directory' in str(caught.value)


def test_warm_up_does_not_matter_to_a_run_that_only_evaluates(load_run):
    assert load_run('steps=0', 'optimizer.warmup_steps=10').steps == 0


def test_an_optimizer_can_be_exchanged_from_the_command_line(load_run):
    run = load_run('optimizer.momentum=0.9', 'optimizer.name=muon')
    assert (run.optimizer.learning_rate, run.optimizer.momentum) == (1e-3, 0.9)


# The stored config


def test_the_written_config_shows_all_values_and_reads_back_equal(load_run, tmp_path):
    run = load_run()
    write_config(run, tmp_path / 'config.json')
    assert read_config(tmp_path / 'config.json') == run
    values = json.loads((tmp_path / 'config.json').read_text())
    assert values['optimizer']['b2'] == 0.95
    assert values['data']['name'] == 'python_stdlib'
    assert [path.name for path in tmp_path.glob('config.json*')] == ['config.json']


def test_a_config_that_cannot_be_written_leaves_the_old_one(load_run, tmp_path, monkeypatch):
    path = tmp_path / 'config.json'
    write_config(load_run(), path)
    before = path.read_text()

    def full(descriptor):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr('os.fsync', full)
    with pytest.raises(errors.StorageError, match='No space left on device'):
        write_config(load_run('steps=3'), path)
    assert path.read_text() == before
    assert [path.name for path in tmp_path.glob('config.json*')] == ['config.json']


def test_a_stored_config_that_is_missing_damaged_or_of_another_version(tmp_path):
    path = tmp_path / 'config.json'
    with pytest.raises(errors.MissingInputError):
        read_config(path)
    path.write_text('{"steps": ')
    with pytest.raises(errors.DataError, match='not a JSON config'):
        read_config(path)
    path.write_text('[' * 100_000)
    with pytest.raises(errors.DataError, match='not a JSON config: .*recursion'):
        read_config(path)
    path.write_text('[]')
    with pytest.raises(errors.ConfigError, match='must be a group of keys'):
        read_config(path)
    path.write_text(json.dumps(run_keys(old_key=1)))
    with pytest.raises(errors.ConfigError, match=r'config.old_key: unknown key.*config.json'):
        read_config(path)


@pytest.mark.parametrize(
    'argument, expected',
    [
        ('configs/quickstart.py', 'runs/quickstart'),
        ('configs/quickstart.py:smoke', 'runs/quickstart-smoke'),
        ('/x/llama.py:depth=4,../up', 'runs/llama-depth=4_.._up'),
    ],
)
def test_the_work_directory_is_named_after_the_config(argument, expected):
    assert workdir_for(argument) == Path(expected)


def test_a_config_is_checked_in_two_seconds_without_jax(config_file):
    name = Path(config_file(f'return {run_keys()!r}')).resolve()
    program = (
        'import sys; from jaxfm.config.load import load_config; '
        'load_config(sys.argv[1], ["steps=3"]); '
        'print(*(m for m in ("jax", "numpy", "grain", "tokenizers") if m in sys.modules))'
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, '-c', program, name], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.stdout.strip(), done.stderr) == ('', '')
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2  # CPU time
