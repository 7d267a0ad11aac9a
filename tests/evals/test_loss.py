"""Held-out loss against a plain sum over all held-out targets."""

import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfm import sharding
from jaxfm.errors import DataError
from jaxfm.evals import LossConfig
from jaxfm.evals.base import Context
from jaxfm.evals.loss import HeldOutLoss, xz_bits_per_byte
from jaxfm.ops.logprobs import Unembedding

V, D = 12, 6
LENGTHS = (9, 2, 17, 5)


class Bigram:
    """Predicts from the current token only, so its loss does not depend on how rows are cut."""

    def __init__(self, params):
        self.params = params

    def __call__(self, tokens, positions, segment_ids):
        return self.params['in'].at[tokens].get(
            out_sharding=sharding.activation('batch', 'position', 'embed')
        ), {}

    def unembed(self):
        return Unembedding(self.params['out'], V)


class Hesitant(Bigram):
    """Knows nothing before the third token of what it sees of a document."""

    def __call__(self, tokens, positions, segment_ids):
        hidden, extras = super().__call__(tokens, positions, segment_ids)
        return jnp.where(positions[..., None] < 2, 0.0, hidden), extras


class Heldout:
    """An in-memory stand-in for a token cache."""

    path, fingerprint, vocab_size, mask = 'heldout', 'texts', V, None
    kind, is_chat = 'text', False
    num_documents, num_bytes = len(LENGTHS), 131
    offsets = np.concatenate([[0], np.cumsum(LENGTHS)])
    num_tokens = int(offsets[-1])
    tokens = np.random.default_rng(0).integers(0, V, num_tokens).astype(np.uint16)


@pytest.fixture
def params():
    random = np.random.default_rng(1)
    return {name: jnp.asarray(random.normal(size=(V, D)), jnp.float32) for name in ('in', 'out')}


@pytest.fixture(params=[1, 4])
def mesh(request):
    sizes = {axis: 1 for axis in sharding.MESH_AXES} | {'fsdp': request.param}
    mesh = sharding.make_mesh(sizes, jax.devices()[: request.param])
    with jax.set_mesh(mesh):
        yield mesh


def evaluator(mesh, model=Bigram, heldout=Heldout, **changes):
    dataset = types.SimpleNamespace(
        heldout={'web': heldout()} | ({} if heldout is Heldout else {'text': Heldout()}),
        heldout_documents=[types.SimpleNamespace(text='x' * 999)],
        sequence_length=8,
    )
    context = Context(
        name='heldout',
        merge=model,
        dataset=dataset,
        tokenizer=None,
        chat=None,
        sampler=None,
        mesh=mesh,
        seed=0,
        flops=None,
        weights=None,
        samples_directory=None,
    )
    return HeldOutLoss(LossConfig(**{'batch_size': 2, **changes}), context)


def test_it_is_due_when_its_config_says_so(mesh):
    loss = evaluator(mesh, every=3, at_start=False)
    assert [step for step in range(8) if loss.is_due(step, last=7)] == [3, 6, 7]


def by_hand(params):
    """-> nats over all targets of all documents, number of targets."""
    logits = np.asarray(params['in'], np.float64) @ np.asarray(params['out'], np.float64).T
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nats = count = 0
    for ids in np.split(Heldout.tokens.astype(int), Heldout.offsets[1:-1]):
        nats -= logprobs[ids[:-1], ids[1:]].sum()
        count += len(ids) - 1
    return nats, count


@pytest.mark.parametrize(
    'cut',
    [
        {},
        dict(sequence_length=64),
        dict(stride=3),
        dict(stride=1, batch_size=16),
        dict(sequence_length=5, stride=2, batch_size=3),
    ],
    ids=str,
)
def test_every_target_counts_once_however_rows_are_cut(params, mesh, cut):
    values = evaluator(mesh, **cut).run(params, 0)
    nats, count = by_hand(params)
    assert set(values) == {'loss', 'bits_per_byte'}
    assert values['loss'] == pytest.approx(nats / count, rel=1e-5)
    assert values['bits_per_byte'] == pytest.approx(nats / math.log(2) / 131, rel=1e-5)


def test_a_stride_gives_context_to_the_tokens_that_begin_a_row(params, mesh):
    """Rows of 8 advance by 5: an input that counts sees 3 before it, if its document has them."""
    strided = evaluator(mesh, Hesitant, stride=5).run(params, 0)
    whole = evaluator(mesh, Hesitant, sequence_length=64).run(params, 0)
    cut = evaluator(mesh, Hesitant).run(params, 0)
    assert strided['loss'] == pytest.approx(whole['loss'], rel=1e-5)
    assert cut['loss'] != pytest.approx(whole['loss'], rel=1e-2)


def test_it_evaluates_the_weights_it_is_given(params, mesh):
    heldout = evaluator(mesh)
    heldout.run(params, 0)
    uniform = heldout.run(dict(params, out=jnp.zeros((V, D))), 1)
    assert uniform['loss'] == pytest.approx(math.log(V), rel=1e-6)


def test_a_part_of_the_text_has_a_loss_but_no_bits_per_byte(params, mesh):
    first_row = evaluator(mesh, max_batches=1, batch_size=4, sequence_length=11, stride=11)
    values = first_row.run(params, 0)
    assert set(values) == {'loss'}
    assert values['loss'] == pytest.approx(
        np.divide(*by_hand(params)), rel=1e-5
    )  # covers all four rows
    part = evaluator(mesh, max_batches=1, batch_size=4, sequence_length=4).run(params, 0)
    assert part['loss'] != pytest.approx(values['loss'], rel=1e-3)


class Other(Heldout):
    """Another source of a mixture, with other tokens."""

    tokens = np.random.default_rng(5).integers(0, V, Heldout.num_tokens).astype(np.uint16)


class Masked(Heldout):
    """Chats in which every other token is the assistant's."""

    is_chat = True
    mask = (np.arange(Heldout.num_tokens) % 2).astype(np.uint8)

    def __init__(self, directory):
        self.path, self.fingerprint = directory / 'heldout.tokens', 'chats'


def test_sources_of_a_mixture_are_measured_separately_and_together(params, mesh):
    values = evaluator(mesh, heldout=Other).run(params, 0)
    assert set(values) == {'loss', 'loss/web', 'loss/text', 'bits_per_byte'}
    assert values['loss/text'] == pytest.approx(np.divide(*by_hand(params)), rel=1e-5)
    assert values['loss/web'] == evaluator(mesh, heldout=Other).run(params, 0)['loss/web']
    assert values['loss'] == pytest.approx((values['loss/web'] + values['loss/text']) / 2, rel=1e-5)
    assert values['loss/web'] != pytest.approx(values['loss/text'], rel=1e-3)


def test_in_chats_only_assistant_tokens_count(params, mesh, tmp_path):
    values = evaluator(mesh, heldout=lambda: Masked(tmp_path), sequence_length=32).run(params, 0)
    tokens, offsets = Heldout.tokens.astype(int), Heldout.offsets
    logits = np.asarray(params['in'], np.float64) @ np.asarray(params['out'], np.float64).T
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    inside = [i for i in range(1, len(tokens)) if i not in offsets and Masked.mask[i]]
    wanted = -np.mean([logprobs[tokens[i - 1], tokens[i]] for i in inside])
    assert values['loss/web'] == pytest.approx(wanted, rel=1e-5)
    assert 'bits_per_byte' not in values


def test_the_xz_baseline_is_recorded(params, mesh):
    values = evaluator(mesh, xz_baseline=True).run(params, 0)
    assert 0 < values['xz_bits_per_byte'] < 1.5  # 999 times the same letter


def test_xz_needs_little_for_repetition_and_eight_bits_for_noise():
    assert xz_bits_per_byte(['abc' * 10_000]) < 0.1
    noise = np.random.default_rng(0).integers(0, 128, 20_000).astype(np.uint8).tobytes().decode()
    assert 6.9 < xz_bits_per_byte([noise[:9_000], noise[9_000:]]) < 7.5


def test_held_out_chats_without_a_target_are_refused_before_training(mesh, tmp_path):
    class Silent(Masked):
        mask = np.zeros_like(Masked.mask)

    with pytest.raises(DataError) as raised:
        evaluator(mesh, heldout=lambda: Silent(tmp_path))
    assert str(raised.value) == (
        f'config.evals.heldout: no token in {Heldout.num_tokens} tokens of the held-out data of '
        'web counts in the loss, where only what the assistant says counts; raise the '
        'heldout_fraction of the data, or remove config.evals.heldout'
    )
    with pytest.raises(
        DataError,
        match=r'in the batches that are read \(max_batches 1\) of .*; raise .*max_batches or the',
    ):
        evaluator(mesh, heldout=lambda: Silent(tmp_path), max_batches=1)
