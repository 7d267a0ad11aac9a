"""Real chats and real text train, from the files as they are, in whole runs."""

import pytest

from jaxfm.metrics.writers import read_records
from tests.runs import PATIENCE

COMMON = """
    config.steps = 24
    config.evals = dict(heldout=dict(name='loss', batch_size=2, max_batches=2))
    config.data.sequence_length = 1024
    config.data.batch_size = 2
    config.sampling.num_samples = 0
    config.metrics.log_every = 1
"""
CHATS = {
    'oasst': ('sft_oasst_sample/chat_best_path.jsonl.gz', {}),
    'glaive': ('sft_toolcall_chat/glaive_toolcall.jsonl.gz', {}),
    'self_instruct': (
        'sft_self_instruct/seed_tasks.jsonl.gz',
        {'prompt': 'instruction', 'completion': 'instances.0.output'},
    ),
}
TEXTS = {
    'gutenberg': 'pretrain_gutenberg18/books.jsonl.gz',
    'wikitext2': 'pretrain_wikitext2/*.txt.gz',
}


def run(tiny, name, change, *flags):
    """A run that must end well -> its records."""
    workdir = tiny.root / f'real-{name}'
    process = tiny.start(workdir, *flags, config=tiny.derive(f'real_{name}', COMMON + change))
    process.communicate(timeout=PATIENCE)
    errors = (tiny.root / f'real-{name}.stderr').read_text()
    assert process.returncode == 0, errors[-2000:]
    return list(read_records(workdir / 'metrics.jsonl'))


def falls(records) -> bool:
    losses = [r['train/loss'] for r in records if r['kind'] == 'train']
    return sum(losses[-8:]) < sum(losses[:8])


@pytest.mark.parametrize('name', CHATS)
def test_real_chats_train(tiny, shared_data, name):
    path, fields = CHATS[name]
    change = f"""
    config.data.path = {str(shared_data / path)!r}
    config.data.fields = {fields!r}
    config.data.too_long = 'drop'
"""
    records = run(tiny, name, change)
    assert falls(records)
    data = {k: v for r in records for k, v in r.items() if k.startswith('data/')}
    assert 0 < data['data/train_supervised_tokens'] < data['data/train_tokens']
    assert data['data/packing'] == 'best_fit'
    tokens = [r['train/target_tokens'] for r in records if r['kind'] == 'train']
    assert all(0 < count < 2 * 1024 for count in tokens)


def test_real_texts_train_as_a_mixture(tiny, shared_data):
    sources = {
        name: {'name': 'files', 'path': str(shared_data / path), 'heldout_fraction': 0.2}
        for name, path in TEXTS.items()
    }
    change = f"""
    del config.data['path'], config.data['heldout_fraction']
    weights = dict(gutenberg=3.0, wikitext2=1.0)
    config.data.update(name='mixture', sources={sources!r}, weights=weights)
"""
    records = run(tiny, 'mixture', change)
    assert falls(records)
    last = [r for r in records if r['kind'] == 'perf'][-1]
    assert last['data/gutenberg/rows'] == 3 * last['data/wikitext2/rows'] == 36
    scores = {k: v for r in records if r['kind'] == 'eval' for k, v in r.items()}
    assert {'eval/heldout/loss/gutenberg', 'eval/heldout/loss/wikitext2'} <= scores.keys()
