"""Ranking held-out pairs, against log-probs that are made one chat at a time."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxfm.chat.render import Chat
from jaxfm.data import ProblemsData
from jaxfm.data.dataset import open_dataset
from jaxfm.errors import DataError
from jaxfm.evals import LossConfig, PreferenceEvaluatorConfig
from jaxfm.evals.loss import HeldOutLoss
from jaxfm.evals.preference import HeldOutPreference
from jaxfm.ops.logprobs import Unembedding
from jaxfm.sharding import make_mesh
from jaxfm.tokenizer import BytesConfig
from jaxfm.tokenizer.build import build_tokenizer

pytestmark = pytest.mark.usefixtures('quick_compilation')
TOKENIZER = build_tokenizer(BytesConfig(), ())
SIZE, DIM = TOKENIZER.vocab_size, 8
MESH = make_mesh(
    {'replica': 1, 'fsdp': 1, 'expert': 1, 'context': 1, 'tensor': 1}, jax.devices()[:1]
)


class Bigrams:
    """A model whose prediction depends on the last token alone."""

    def __init__(self, params):
        self.params = params

    def __call__(self, tokens, positions, segment_ids):
        place = P(('replica', 'fsdp'), None, None)
        return self.params['embed'].at[tokens].get(out_sharding=place), None

    def unembed(self):
        return Unembedding(self.params['head'], SIZE)


@pytest.fixture(scope='module')
def params():
    draw = np.random.default_rng(0)
    made = {name: draw.normal(size=(SIZE, DIM)).astype(np.float32) for name in ('embed', 'head')}
    return jax.device_put(made, NamedSharding(MESH, P()))


def open_data(directory, form='pairs', **options):
    config = ProblemsData(
        form=form,
        kinds=['reverse', 'addition'],
        num_problems=40,
        num_heldout=40,
        sequence_length=512,
        batch_size=4,
        **options,
    )
    return open_dataset(config, TOKENIZER, directory)


def evaluator(dataset, **options):
    context = types.SimpleNamespace(
        dataset=dataset, mesh=MESH, merge=Bigrams, where='config.evals.pairs', name='pairs'
    )
    return HeldOutPreference(PreferenceEvaluatorConfig(**options), context)


def logprobs_of(params, document):
    """[sum and mean for the better answer, for the worse one]."""
    chat, found = Chat(TOKENIZER), []
    given = len(chat.prompt(document.messages[: document.num_given]))
    table = np.asarray(params['embed'], np.float64) @ np.asarray(params['head'], np.float64).T
    table -= np.log(np.exp(table).sum(1, keepdims=True))
    for messages in (document.messages, document.rejected):
        ids, _ = chat.encode(messages)
        each = [table[ids[i - 1], ids[i]] for i in range(given, len(ids))]
        found.append((sum(each), np.mean(each)))
    return np.array(found)


def test_pairs_are_ranked_as_one_chat_at_a_time(params, tmp_path):
    dataset = open_data(tmp_path)
    measured = evaluator(dataset, batch_size=3)
    with jax.set_mesh(MESH):
        values = measured.run(params, 0)
    each = np.array([logprobs_of(params, d) for d in dataset.heldout_documents])
    margins = each[:, 0] - each[:, 1]
    assert values['accuracy'] == pytest.approx((margins[:, 0] > 0).mean())
    assert values['mean_accuracy'] == pytest.approx((margins[:, 1] > 0).mean())
    assert 0.2 < values['accuracy'] < 0.8
    assert values['margin'] == pytest.approx(margins[:, 0].mean(), abs=1e-4)
    assert values['accuracy_low'] < values['accuracy'] < values['accuracy_high']
    assert values['left_out'] == 0


def test_a_model_that_cannot_tell_is_half_right(params, tmp_path):
    measured = evaluator(open_data(tmp_path))
    flat = params | {'head': jnp.zeros_like(params['head'])}
    with jax.set_mesh(MESH):
        values = measured.run(flat, 0)
    # Both answers of a problem have as many tokens.
    assert values['accuracy'] == values['mean_accuracy'] == 0.5


def test_pairs_without_room_are_counted(params, tmp_path):
    dataset = open_data(tmp_path)
    (cache,) = dataset.heldout.values()
    lengths = np.diff(cache.offsets)
    measured = evaluator(dataset, sequence_length=int(np.median(lengths)))
    with jax.set_mesh(MESH):
        values = measured.run(params, 0)
    assert values['left_out'] == pytest.approx((lengths > np.median(lengths)).mean())


@pytest.mark.parametrize(
    'kind, said',
    [
        ('pair', 'a pair of .* with config.evals.pairs.name=preference'),
        ('labelled', 'a chat with a label: which it does not measure; give it another phase'),
    ],
)
def test_the_loss_of_what_is_compared_is_not_measured(tmp_path, kind, said):
    dataset = open_data(tmp_path)
    (cache,) = dataset.heldout.values()
    cache.kind = kind
    context = types.SimpleNamespace(dataset=dataset, mesh=MESH, where='config.evals.pairs')
    with pytest.raises(DataError, match=f'^config.evals.pairs: a held-out document .* is {said}$'):
        HeldOutLoss(LossConfig(), context)


def test_what_is_no_pair_is_refused(tmp_path):
    said = 'config.evals.pairs: preference ranks pairs of .* of problems is a chat$'
    with pytest.raises(DataError, match=said):
        evaluator(open_data(tmp_path, form='chat'))
    with pytest.raises(DataError, match='no held-out pair of problems fits a row of 16'):
        evaluator(open_data(tmp_path), sequence_length=16)
