"""Distillation in real runs: teachers of any family, pinned, refused or gone; both data."""

import shutil

import pytest

from jaxfm.checkpoint.store import Store
from jaxfm.config.load import read_config
from jaxfm.metrics.writers import read_records
from jaxfm.plan.flops import forward_flops, model_flops_per_token
from jaxfm.plan.memory import num_parameters
from jaxfm.run.run import model_maker
from jaxfm.state import split
from jaxfm.storage import open_storage
from tests.hf_directories import LLAMA, random_tensors, write_model
from tests.runs import PATIENCE, assert_same_state, finish, measured, stderr_of

TEACHER = """
    config.steps = 8
    config.evals = {}
    config.sampling.num_samples = 0
    config.checkpoint = dict(every=4, keep=9)
    config.model.update(embed_dim=48, num_layers=3, vocab_size=310, vocab_multiple=32)
    config.model.block.update(head_dim=16, num_kv_heads=4, qk_norm=True)
"""
# With two kinds of batches, and adapters.
STUDENT = """
    rollout = dict(
        name='rollout_mixture',
        on_policy_share=0.5,
        off_policy=config.data.to_dict(),
        task=dict(name='tests.rollout.tasks:Ascii'),
        prompts=4,
        samples=1,
        sequence_length=32,
        batch_size=8,
        max_tokens=12,
        write_every=0,
    )
    del config['data']
    config.evals.heldout.every = 4
    config.update(steps=8, data=rollout)
    config.objective = dict(name='gkd', teacher='teacher')
    config.optimizer.update(warmup_steps=0, accumulate=2)
    config.checkpoint = dict(every=4, keep=9)
    config.sampling = dict(slots=8, max_length=64, decode_steps=4, max_tokens=8, num_samples=0)
    config.metrics.log_every = 1
"""
DISTILL = [
    '--config.steps=4',
    '--config.evals={}',
    '--config.optimizer.warmup_steps=0',
    '--config.checkpoint.every=2',
    '--config.metrics.log_every=1',
    '--config.sampling.num_samples=0',
    '--config.objective.name=distillation',
]


@pytest.fixture(scope='module')
def teacher(tiny):
    """Its work directory: wider, deeper, with other blocks and more padding than the student."""
    finish(tiny.start(tiny.root / 'teacher', config=tiny.derive('teaching', TEACHER)))
    return tiny.root / 'teacher'


def store_of(workdir):
    return Store(open_storage(workdir / 'checkpoints'))


@pytest.fixture(scope='module')
def config(tiny, teacher):
    return tiny.derive('student', STUDENT)


@pytest.fixture(scope='module')
def whole(tiny, config, teacher):
    """A run whose teacher has only got to step 4 when it begins."""
    store = store_of(teacher)
    store.set_aside(newest := store.commits()[8])
    finish(tiny.start(tiny.root / 'mixed', config=config, devices=2))
    store.take_back(newest.directory, newest.epoch)
    return tiny.root / 'mixed'


def train(workdir):
    return [r for r in read_records(workdir / 'metrics.jsonl') if r['kind'] == 'train']


def manifest_of(workdir, step):
    store = store_of(workdir)
    return store.check(store.commits()[step])


def test_samples_and_documents_take_turns_and_the_loss_falls(whole):
    records = train(whole)
    counts = [record['train/target_tokens'] for record in records]
    # A batch of documents is full; four samples of at most 12 tokens are not.
    assert {count == 8 * 32 for count in counts} == {True, False}
    on_policy = [r['train/loss'] for r in records if r['train/target_tokens'] < 8 * 32]
    off_policy = [r['train/loss'] for r in records if r['train/target_tokens'] == 8 * 32]
    assert on_policy[-1] < on_policy[0] and off_policy[-1] < off_policy[0]
    named = [r for r in read_records(whole / 'metrics.jsonl') if 'rollout/reward' in r]
    assert named  # it is recorded, although nothing learns from it


def test_the_plan_counts_the_teacher(whole, teacher):
    said = (whole / 'log.txt').read_text()
    theirs, ours = (read_config(each / 'config.json').model for each in (teacher, whole))
    forward = forward_flops(theirs, 32) / 32
    assert f'{model_flops_per_token(ours, 32) + forward:.3g} a token in training' in said
    assert f'{forward:.3g} of these FLOPs' in said
    count = num_parameters(split(model_maker(theirs)).shapes)
    assert f'teacher, 3 layers, {count:,} parameters, ' in said


def test_a_checkpoint_has_the_name_of_the_teacher_and_not_its_weights(tiny, whole):
    manifest = manifest_of(whole, 8)
    origin = manifest['others']['']
    assert origin['place'] == 'teacher' and origin['step'] == 4
    # 320 rows are those of the teacher's tables, 384 those of the student's.
    sizes = {size for array in manifest['arrays'].values() for size in array['shape']}
    assert 384 in sizes and 320 not in sizes


def test_a_run_goes_on_with_the_same_bits_and_the_same_teacher(tiny, config, whole, teacher):
    """Although the teacher's run has gone on meanwhile."""
    again = tiny.root / 'again'
    shutil.copytree(whole, again)
    assert 8 in tiny.committed(teacher)
    finish(tiny.start(again, '--resume_step=4', config=config, devices=2))
    assert measured(again) == measured(whole)
    assert_same_state(tiny.saved_state(again, 8), tiny.saved_state(whole, 8))
    assert manifest_of(again, 8)['others']['']['step'] == 4


def test_a_run_whose_teacher_is_gone_cannot_go_on_but_is_evaluated(tiny, config, whole, teacher):
    without = tiny.root / 'without'
    shutil.copytree(whole, without)
    aside = tiny.root / 'aside'
    store = store_of(teacher)
    store.set_aside(gone := store.commits()[4])
    finish(tiny.start(without, '--resume_step=4', config=config, devices=2), 66)
    assert 'has no checkpoint 4 any more, with which this run began' in stderr_of(without)
    store.take_back(gone.directory, gone.epoch)
    shutil.move(teacher, aside)
    output = f'--output={tiny.root / "scores.jsonl"}'
    finish(tiny.start(without, '--mode=sample', '--prompt=a', config=config, devices=2))
    finish(tiny.start(without, '--mode=eval', output, config=config, devices=2))
    shutil.move(aside, teacher)


def test_adapters_are_taught_and_teach(tiny, whole, teacher):
    workdir = tiny.root / 'adapted'
    lora = [f'--config.init_from={whole}', '--config.model.lora.rank=2']
    lora += [f'--config.objective.teacher={teacher}', '--config.optimizer.learning_rate=3e-2']
    finish(tiny.start(workdir, *DISTILL, *lora))
    losses = [record['train/loss'] for record in train(workdir)]
    assert losses[-1] < losses[0]
    assert manifest_of(workdir, 4)['others']['']['step'] == 8
    # Of a run with adapters, the teacher is the model with these.
    finish(tiny.start(tiny.root / 'taught', *DISTILL, f'--config.objective.teacher={workdir}'))
    assert train(tiny.root / 'taught')[-1]['train/loss'] > 0


def test_a_model_of_another_family_teaches_and_must_stay_as_it_is(tiny, teacher):
    model, workdir = write_model(tiny.root / 'llama'), tiny.root / 'of_llama'
    arguments = [*DISTILL, f'--config.objective.teacher={model}', '--config.objective.top_k=4']
    finish(tiny.start(workdir, *arguments))
    assert 0 < train(workdir)[-1]['train/teacher_mass'] < 1
    shutil.rmtree(model)
    write_model(model, tensors=random_tensors(LLAMA, seed=1))
    finish(tiny.start(workdir, *arguments, '--resume_step=2'), 65)
    told = stderr_of(workdir)
    assert f'{model} has other weights than when this run began: put back what was there' in told
    assert len(train(workdir)) == 4  # and nothing has changed
    arguments += [f'--config.objective.teacher={teacher}', '--allow_change=objective']
    finish(tiny.start(workdir, *arguments, '--resume_step=2'))
    assert manifest_of(workdir, 4)['others']['']['place'] == str(teacher)


REFUSED = {
    'nowhere': (66, 'config.objective.teacher: there is no nowhere: train it first'),
    'empty': (66, 'holds no checkpoint yet: train it first'),
    'other_words': (65, "another tokenizer than this run: token 0 is '<|bos|>' here, but"),
    'wordless': (66, 'comes without a tokenizer'),
    'refused/new': (78, 'is this run itself'),
}


@pytest.mark.parametrize('name', REFUSED)
def test_a_teacher_that_cannot_teach_is_refused_by_one_line(tiny, teacher, name):
    place, workdir = tiny.root / name, tiny.root / 'refused' / 'new'
    workdir.parent.mkdir(exist_ok=True)
    if name == 'empty':
        shutil.copytree(teacher, place, ignore=shutil.ignore_patterns('checkpoints'))
    elif name == 'other_words':
        write_model(place)
        file = place / 'tokenizer.json'
        text = file.read_text().replace('<|bos|>', '<|start|>')
        file.write_text(text)
        settings = place / 'tokenizer_config.json'
        settings.write_text(settings.read_text().replace('<|bos|>', '<|start|>'))
    elif name == 'wordless':
        write_model(place, tokenizer=False)
    code, words = REFUSED[name]
    arguments = [*DISTILL, f'--config.objective.teacher={name}']
    process = tiny.start(workdir, *arguments)
    process.communicate(timeout=PATIENCE)
    told = stderr_of(workdir)
    workdir.with_name('new.stderr').unlink()
    assert process.returncode == code, told
    assert words in told and not workdir.exists()
    assert 'Traceback' not in told
