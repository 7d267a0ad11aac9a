"""Names of a config: entries of registries, and classes of one's own by their dotted path."""

import json
import math
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from jaxfm.code import find_code, find_digest, search_beside
from jaxfm.config.load import format_config, load_config, read_config, write_config
from jaxfm.config.resume import check_resume
from jaxfm.config.run import OriginConfig
from jaxfm.data import DATA, SOURCES, BatchConfig
from jaxfm.data.corpus import heldout
from jaxfm.distributed import agree
from jaxfm.errors import ConfigError
from jaxfm.metrics.writers import read_records
from jaxfm.models import MODELS
from jaxfm.objectives import OBJECTIVES, NextTokenConfig
from jaxfm.optim import OPTIMIZERS
from jaxfm.run import run as run_module
from jaxfm.tokenizer import BytesConfig
from jaxfm.tokenizer.build import Bytes
from tests.runs import PATIENCE

ROOT = Path(__file__).resolve().parent.parent

LAB = '''
"""Everything of one's own that a run can use."""

import json

import jax
import jax.numpy as jnp

from jaxfm.data.documents import Document
from jaxfm.evals import EvaluatorConfig
from jaxfm.evals.base import Periodic
from jaxfm.objectives import NextTokenConfig
from jaxfm.objectives.next_token import NextToken
from jaxfm.optim import AdamWConfig
from jaxfm.optim.adamw import AdamW
from jaxfm.schema import Group
from jaxfm.tasks.base import Prompt


class ScaledConfig(NextTokenConfig):
    scale: float = 1.0


class Scaled(NextToken):
    Config = ScaledConfig

    def __init__(self, config):
        super().__init__(config)
        self.coefficients = {name: config.scale for name in self.coefficients}


class SlowConfig(AdamWConfig):
    slower: int = 1


class Slow(AdamW):
    Config = SlowConfig

    def __init__(self, config, steps, axes):
        rate = config.learning_rate / config.slower
        super().__init__(config.model_copy(update={'learning_rate': rate}), steps, axes)


class CountingConfig(Group):
    documents: int = 40


class Counting:
    Config = CountingConfig

    def __init__(self, config):
        self._count = config.documents

    def files(self):
        return None

    def fingerprint(self):
        return self._count

    def shards(self):
        return [0, 1]

    def read(self, shard):
        for number in range(shard, self._count, 2):
            text = ' '.join(str(number + i) for i in range(60))
            yield number % 5 == 0, Document(f'numbers/{number}', text)


class EchoConfig(Group):
    prompts: int = 2


class Echo:
    Config = EchoConfig

    def __init__(self, config, documents):
        self._prompts = [Prompt(str(i), f'{i} {i + 1}') for i in range(config.prompts)]

    def prompts(self):
        return self._prompts

    def evaluate(self, prompt, completion):
        return 1.0

    reward = evaluate

    def stop(self, prompt, completion):
        return len(completion) > 3


class NormConfig(EvaluatorConfig):
    power: int = 2


class Norm(Periodic):
    Config = NormConfig

    def __init__(self, config, context):
        super().__init__(config.every, config.at_start)
        self._power = config.power

    def run(self, params, step):
        leaves = jax.tree.leaves(params)
        return {'norm': float(sum(jnp.sum(jnp.abs(x) ** self._power) for x in leaves))}


class LinesConfig(Group):
    file: str = 'lines.txt'


class Lines:
    Config = LinesConfig

    def __init__(self, config, workdir):
        self._file = open(workdir / config.file, 'w')

    def write(self, record):
        self._file.write(json.dumps(record['kind']) + chr(10))

    def close(self):
        self._file.close()
'''

CHANGE = """
    config.objective = dict(name='my_lab:Scaled', scale=2.0)
    config.optimizer = dict(name='my_lab:Slow', learning_rate=1e-2, warmup_steps=2, slower=2)
    config.data = dict(name='my_lab:Counting', documents=60, sequence_length=32, batch_size=8)
    task = dict(name='my_lab:Echo', prompts=3)
    config.evals = dict(
        echo=dict(name='generate', task=task, max_tokens=4),
        norm=dict(name='my_lab:Norm', power=1),
    )
    config.metrics = dict(log_every=2, sinks=dict(mine=dict(name='my_lab:Lines')))
    config.steps = 4
"""


@pytest.fixture(scope='module')
def config_file(tiny) -> Path:
    (tiny.root / 'my_lab.py').write_text(LAB)
    return tiny.derive('own', CHANGE)


@pytest.fixture(scope='module')
def run(tiny, config_file) -> Path:
    """The work directory of a run of which every part that can be is one's own."""
    workdir = tiny.root / 'own'
    process = tiny.start(workdir, '--config.sampling.num_samples=0', config=config_file)
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, Path(f'{workdir}.stderr').read_text()
    return workdir


def records_of(run, kind):
    return [record for record in read_records(run / 'metrics.jsonl') if record['kind'] == kind]


def test_an_objective_of_ones_own_is_minimised(run):
    # Fresh weights know nothing of 300 tokens, and the loss is scaled by two.
    first = records_of(run, 'train')[0]
    assert first['train/loss'] == pytest.approx(2 * math.log(300), rel=0.1)


def test_an_optimizer_of_ones_own_moves_the_weights(run):
    # After the warm-up of two steps the rate is the half of what the config says.
    assert records_of(run, 'train')[1]['train/learning_rate'] == pytest.approx(5e-3)


def test_a_source_of_ones_own_is_read(run):
    data = next(r for r in records_of(run, 'event') if 'data/train_documents' in r)
    assert (data['data/train_documents'], data['data/heldout_documents']) == (48, 12)


def test_a_task_of_ones_own_judges(run):
    scores = [r['eval/echo/pass@1'] for r in records_of(run, 'eval') if 'eval/echo/pass@1' in r]
    assert scores and set(scores) == {1.0}


def test_an_evaluator_of_ones_own_measures(run):
    norms = [r['eval/norm/norm'] for r in records_of(run, 'eval') if 'eval/norm/norm' in r]
    assert len(norms) == 2 and norms[0] != norms[1] > 0


def test_a_sink_of_ones_own_hears_every_record(run):
    kinds = [json.loads(line) for line in (run / 'lines.txt').read_text().splitlines()]
    assert kinds == [r['kind'] for r in read_records(run / 'metrics.jsonl')][-len(kinds) :]
    assert {'train', 'perf', 'eval', 'event'} <= set(kinds)


def test_what_a_run_has_used_is_recorded(run):
    config = read_config(run / 'config.json')
    names = ('Counting', 'Echo', 'Lines', 'Norm', 'Scaled', 'Slow')
    assert list(config.code) == [f'my_lab:{name}' for name in names]
    [path] = {found.path for found in config.code.values()}
    assert Path(path).read_text() == LAB
    assert config.objective.scale == 2.0


def test_a_run_whose_code_has_changed_says_so(run, tiny, config_file):
    path, errors = tiny.root / 'my_lab.py', Path(f'{run}.stderr')
    before = len(errors.read_text())
    path.write_text(LAB + '# changed\n')
    try:
        given = ('--mode', 'eval', '--config.sampling.num_samples=0')
        process = tiny.start(run, *given, config=config_file)
        process.communicate(timeout=PATIENCE)
    finally:
        path.write_text(LAB)
    said = errors.read_text()[before:]
    assert process.returncode == 78
    assert 'config.code.my_lab:Scaled.sha256: ' in said and '--allow_change=code' in said


def test_code_that_has_moved_is_the_same_run(run, tiny, config_file, tmp_path):
    for path in (config_file, tiny.root / 'my_lab.py'):
        (tmp_path / path.name).write_text(path.read_text())
    program = (
        'import sys; from pathlib import Path; from jaxfm.config.load import *\n'
        'from jaxfm.config.resume import check_resume\n'
        'new, old = load_config(sys.argv[2], sys.argv[3:]), read_config(sys.argv[1])\n'
        'print(*(path for path, *_ in check_resume(old, new)))'
    )
    given = [run / 'config.json', tmp_path / config_file.name, 'sampling.num_samples=0']
    done = subprocess.run(
        [sys.executable, '-c', program, *map(str, given)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    assert set(done.stdout.split()) == {
        f'code.{name}.path' for name in read_config(run / 'config.json').code
    }


# Checked with all else


SMALL = """
from jaxfm.objectives import NextTokenConfig
from jaxfm.schema import Group


class FocalConfig(NextTokenConfig):
    gamma: float = 2.0


class Focal:
    Config = FocalConfig


class Bare:
    pass


class PoemsConfig(Group):
    poets: int = 3


class Poems:
    Config = PoemsConfig


class Greedy:
    class Config(Group):
        batch_size: int = 1


class Plain:
    Config = Group
"""


@pytest.fixture
def beside(tmp_path, monkeypatch):
    """A directory with a module of its own, which no test before has imported."""
    name = f'lab_{abs(hash(tmp_path)) % 10**9}'
    (tmp_path / f'{name}.py').write_text(SMALL)
    monkeypatch.setattr('jaxfm.code._BESIDE', [])
    monkeypatch.setattr('jaxfm.code._RECORDED', [])
    monkeypatch.setattr(sys, 'path', list(sys.path))
    return tmp_path, name


RUN = """
from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.steps = 2
    config.model = dict(
        name='transformer', vocab_size=300, embed_dim=32, num_layers=1,
        block=dict(num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=64),
    )
    config.tokenizer = dict(name='bytes')
    config.data = dict(name='python_stdlib', sequence_length=32, batch_size=8)
    config.optimizer = dict(name='adamw', learning_rate=1e-2)
    return config
"""


def load(beside, *overrides):
    directory, name = beside
    (directory / 'run.py').write_text(RUN)
    given = [text.replace('LAB', name) for text in overrides]
    return load_config(str(directory / 'run.py'), given)


def refusal(beside, *overrides):
    with pytest.raises(ConfigError) as caught:
        load(beside, *overrides)
    return str(caught.value).replace(beside[1], 'LAB').replace(str(beside[0]), 'DIR')


def test_its_group_is_checked_like_any_other(beside):
    config = load(beside, 'objective.name=LAB:Focal', 'objective.gamma=3', 'objective.z_loss=1e-4')
    assert (config.objective.gamma, config.objective.z_loss) == (3, 1e-4)
    assert config.objective.name == f'{beside[1]}:Focal'
    assert isinstance(config.objective, NextTokenConfig)
    said = refusal(beside, 'objective.name=LAB:Focal', 'objective.gama=3', 'steps=x')
    assert said.splitlines() == [
        "config.steps: must be a whole number, got 'x' (given by --config.steps=x)",
        'config.objective.gama: unknown key; did you mean gamma? '
        '(given by --config.objective.gama=3)',
    ]


def test_a_written_config_is_read_again(beside):
    config = load(beside, 'objective.name=LAB:Focal')
    write_config(config, beside[0] / 'config.json')
    assert read_config(beside[0] / 'config.json') == config


@pytest.mark.parametrize(
    ('name', 'said'),
    [
        ('LAB:Fokal', 'DIR/LAB.py has no Fokal; did you mean Focal?'),
        ('no_lab:Focal', 'there is no module no_lab in DIR, and none is installed'),
        ('LAB:Bare', 'LAB:Bare needs an attribute Config, a subclass of jaxfm.schema.Group'),
        ('LAB:', "'LAB:' is not the path of a class: write module:Class"),
        ('sys:path', 'sys is not a Python file'),
        ('json:dumps', 'json:dumps is no class, but a function'),
    ],
)  # fmt: skip
def test_a_path_that_leads_nowhere_says_why(beside, name, said):
    given = f'objective.name={name}'
    line = f'config.objective.name: {said} (given by --config.{given})'
    assert line in refusal(beside, given)


def test_a_module_that_fails_names_its_line(beside):
    (beside[0] / 'bad_lab.py').write_text('\nimport jax\nraise ValueError("too early")\n')
    said = refusal(beside, 'objective.name=bad_lab:Focal')
    assert 'config.objective.name: DIR/bad_lab.py:3: ValueError: too early' in said


def test_a_module_that_misses_another_says_which(beside):
    (beside[0] / 'poor_lab.py').write_text('import no_such_dependency\n')
    said = refusal(beside, 'objective.name=poor_lab:Focal')
    assert "poor_lab:Focal: No module named 'no_such_dependency'" in said


def test_a_module_of_the_same_name_elsewhere_is_not_taken_for_it(beside):
    (beside[0] / 'fractions.py').write_text(SMALL)
    said = refusal(beside, 'objective.name=fractions:Focal')
    assert 'hides the module fractions next to the config: rename yours' in said


def test_a_class_may_have_no_values_of_its_own(beside):
    config = load(beside, 'objective.name=LAB:Plain', 'data.name=LAB:Plain')
    assert config.objective.model_dump() == {'name': f'{beside[1]}:Plain'}
    assert config.data.sequence_length == 32


def test_a_mixture_takes_sources_of_ones_own(beside):
    given = "data={'name': 'mixture', 'sequence_length': 8, 'batch_size': 8, 'weights': {'a': 1}, "
    config = load(beside, given + "'sources': {'a': {'name': 'LAB:Poems', 'poets': 2}}}")
    assert config.data.sources['a'].poets == 2
    assert list(config.code) == [f'{beside[1]}:Poems']


def test_models_and_tokenizers_are_those_that_come_with_jaxfm(beside):
    assert "config.model.name: must be one of 'transformer', got 'LAB:Focal'" in refusal(
        beside, 'model.name=LAB:Focal'
    )


def test_what_is_installed_comes_before_where_an_earlier_run_found_it(beside, tmp_path_factory):
    """Nor is the other place in front of anything that is imported later."""
    directory, name = beside
    elsewhere = tmp_path_factory.mktemp('elsewhere')
    (elsewhere / f'{name}.py').write_text(SMALL.replace('2.0', '3.0'))
    config = load(beside, 'objective.name=LAB:Focal')
    values = json.loads(format_config(config))
    for found in values['code'].values():
        found['path'] = str(elsewhere / f'{name}.py')
    (directory / 'config.json').write_text(json.dumps(values))
    assert read_config(directory / 'config.json').objective.gamma == 2.0
    assert str(elsewhere) not in sys.path


def test_a_module_is_found_where_the_run_found_it(beside):
    """The file of the config is elsewhere now, and another process reads what the run has kept."""
    directory, name = beside
    write_config(load(beside, 'objective.name=LAB:Focal'), directory / 'config.json')
    program = 'import sys; from jaxfm.config.load import read_config\n'
    program += 'print(read_config(sys.argv[1]).objective.gamma)'
    command = [sys.executable, '-c', program, str(directory / 'config.json')]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == '2.0\n'
    (directory / f'{name}.py').unlink()
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert f'config.objective.name: there is no module {name}' in done.stderr


def test_a_recorded_module_that_fails_names_its_line(beside, tmp_path_factory):
    directory, name = beside
    write_config(load(beside, 'objective.name=LAB:Focal'), directory / 'config.json')
    elsewhere = tmp_path_factory.mktemp('elsewhere')
    text = (directory / 'config.json').read_text().replace(str(directory), str(elsewhere))
    (directory / 'config.json').write_text(text.replace(name, f'late_{name}'))
    (elsewhere / f'late_{name}.py').write_text('raise ValueError("too late")')
    with pytest.raises(ConfigError, match=f'{elsewhere}/late_{name}.py:1: ValueError: too late'):
        read_config(directory / 'config.json')


def test_a_module_may_be_a_link(beside, tmp_path_factory):
    directory, name = beside
    kept = tmp_path_factory.mktemp('kept') / 'lab.py'
    kept.write_text(SMALL)
    (directory / f'link_{name}.py').symlink_to(kept)
    assert load(beside, 'objective.name=link_LAB:Focal').objective.gamma == 2.0


def test_weights_are_taken_from_a_run_whose_code_is_gone(beside):
    """Nor is code of a directory of weights ever run."""
    directory, name = beside
    values = json.loads(format_config(load(beside, 'objective.name=LAB:Focal')))
    text = json.dumps(values).replace(name, 'no_such_lab')
    (directory / 'config.json').write_text(text)
    earlier = read_config(directory / 'config.json', OriginConfig)
    assert earlier.model.embed_dim == 32


def test_code_that_is_free_to_change_is_not_bound(beside):
    before = load(beside)
    task = dict(name='generate', task=dict(name=f'{beside[1]}:Plain'))
    after = load(beside, f'evals={dict(mine=task)!r}')
    values = after.model_dump()['evals']['mine']
    thinking = values.pop('thinking')
    assert {path for path, *_ in check_resume(before, after)} == {
        'evals',
        *(f'evals.mine.{key}' for key in values if key != 'task'),
        *(f'evals.mine.thinking.{key}' for key in thinking),
        'evals.mine.task.name',
        *(f'code.{beside[1]}:Plain.{key}' for key in ('path', 'sha256')),
    }


def test_bound_code_may_change_when_it_is_allowed(beside):
    before = load(beside, 'objective.name=LAB:Focal')
    changed = {
        name: found.model_copy(update={'sha256': 'x'}) for name, found in before.code.items()
    }
    after = before.model_copy(update={'code': changed})
    with pytest.raises(ConfigError, match='--allow_change=code'):
        check_resume(before, after)
    assert len(check_resume(before, after, ['code'])) == 1


def test_code_must_be_the_same_on_all_hosts(beside, monkeypatch):
    config = load(beside, 'objective.name=LAB:Focal')
    name, there = f'{beside[1]}:Focal', {}
    monkeypatch.setattr(agree, 'exchange', lambda name, value: {0: value, 3: json.dumps(there)})
    there[name] = config.code[name].sha256
    run_module._check_code(config)
    there[name] = 'other'
    with pytest.raises(ConfigError, match=f'{name} is not the same on the hosts of processes 0'):
        run_module._check_code(config)


def test_a_cache_is_of_the_code_that_made_it(beside):
    group = load(beside, 'data.name=LAB:Poems').data.all_sources
    [digest] = {found['sha256'] for found in find_code({'name': f'{beside[1]}:Poems'}).values()}
    assert [find_digest(source.name) for source in group.values()] == [digest]
    assert find_digest('files') is None


def test_held_out_documents_are_of_the_code_that_made_them(beside, monkeypatch):
    directory, name = beside
    (directory / f'full_{name}.py').write_text(LAB)
    group = load(beside, 'data.name=full_LAB:Counting').data.all_sources[f'full_{name}:Counting']
    first = heldout.open_heldout(group, Bytes(BytesConfig(), ()), directory)
    assert len(first.heldout_documents) == 8
    monkeypatch.setattr(heldout, 'find_digest', lambda name: 'of changed code')
    second = heldout.open_heldout(group, Bytes(BytesConfig(), ()), directory)
    assert second.directory != first.directory and second.fingerprint != first.fingerprint


def test_a_module_that_has_changed_since_it_was_imported_is_refused(beside):
    load(beside, 'objective.name=LAB:Focal')
    (beside[0] / f'{beside[1]}.py').write_text(SMALL + '# changed')
    said = refusal(beside, 'objective.name=LAB:Focal')
    assert 'DIR/LAB.py has changed since this process imported it: start a new one' in said


def test_a_module_may_be_inside_a_directory(beside):
    (beside[0] / f'inner_{beside[1]}').mkdir()
    (beside[0] / f'inner_{beside[1]}' / 'deep.py').write_text(SMALL)
    config = load(beside, 'objective.name=inner_LAB.deep:Focal')
    write_config(config, beside[0] / 'config.json')
    assert read_config(beside[0] / 'config.json').objective.gamma == 2.0


def test_a_group_must_be_of_the_kind_that_its_place_needs(beside):
    said = refusal(beside, 'optimizer.name=LAB:Focal')
    assert 'LAB:Focal needs an attribute Config, a subclass of jaxfm.optim.Op' in said


def test_keys_of_rows_stand_beside_those_of_a_source(beside):
    config = load(beside, 'data.name=LAB:Poems', 'data.poets=5', 'data.packing=none')
    assert (config.data.poets, config.data.packing) == (5, 'none')
    [source] = config.data.all_sources.values()
    assert source.model_dump() == {'poets': 5, 'name': f'{beside[1]}:Poems'}
    said = refusal(beside, 'data.name=LAB:Greedy')
    assert 'LAB:Greedy: rename keys of its Config that jaxfm uses: batch_size' in said


def test_code_is_recorded_not_given(beside):
    sentence = 'config.code: is recorded by the run and cannot be set'
    assert refusal(beside, 'code={}') == f'{sentence} (given by --config.code={{}})'


def test_only_paths_are_code(beside):
    search_beside(beside[0])
    name = f'{beside[1]}:Focal'
    values = {'a': [{'name': name}], 'b': {'name': 'adamw'}, 'c': {'name': 'no_lab:X'}}
    assert list(find_code(values)) == [name]


def test_a_process_that_gets_a_group_makes_it_anew(beside):
    search_beside(beside[0])
    group = DATA.find(f'{beside[1]}:Poems').schema(poets=7, sequence_length=8, batch_size=2)
    assert isinstance(group, BatchConfig)
    packed = pickle.dumps(group)
    program = 'import pickle, sys; print(pickle.loads(sys.stdin.buffer.read()).poets)'
    command = [sys.executable, '-c', program]
    done = subprocess.run(command, input=packed, capture_output=True, cwd=ROOT, check=True)
    assert done.stdout == b'7\n'
    assert pickle.loads(packed) == group


def test_a_name_is_an_entry_of_its_registry():
    assert OBJECTIVES.find('next_token').schema is NextTokenConfig
    assert SOURCES.load('files').__name__ == 'Files'
    for registry, name in ((OPTIMIZERS, 'adamx'), (MODELS, 'jaxfm.models.transformer:Transformer')):
        with pytest.raises(KeyError):
            registry.find(name)
