"""Episodes on the real engine: the batch holds what was sampled and observed, each in its place."""

import collections
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxfm import state
from jaxfm.environments import EnvironmentConfig
from jaxfm.environments.base import Environment, Observation
from jaxfm.models import BlockConfig, TransformerConfig
from jaxfm.models.transformer import Transformer
from jaxfm.ops.logprobs import token_logprobs
from jaxfm.rollout.batch import Sample, make_batch
from jaxfm.sampling import SamplingConfig
from jaxfm.sampling.engine import Sampler
from jaxfm.sampling.request import Request
from jaxfm.tasks.base import Prompt
from tests.environments.test_episode import Player
from tests.sampling.conftest import one_device as one_device
from tests.sampling.trained import trainer

V, ROWS, LENGTH, LONGEST = 60, 8, 80, 72
CONFIG = dict(
    vocab_size=V,
    vocab_multiple=16,
    embed_dim=16,
    num_layers=1,
    block=BlockConfig(num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=24),
)


class Letters:
    """Twelve ids for each of five letters: text that is encoded again has other ids."""

    invalid_byte_id, vocab_size = None, V

    def decode(self, ids):
        return ''.join('abcde'[i % 5] for i in ids)

    def encode_after(self, text):
        return ['abcde'.index(letter) + 50 for letter in text]


class Echo(Environment):
    """Answers what ends with an a or with 'bc', up to five times, at length or with nothing."""

    class Config(EnvironmentConfig):
        """No keys of its own."""

    stop = ('a', 'bc')
    said = ('dede', '', 'e' * 23, 'b', 'cab')

    def __init__(self, config):
        pass

    def reset(self, prompt):
        return iter(self.said)

    def step(self, state, text, ids):
        said = next(state, None)
        return Observation(done=True) if said is None else Observation(said)


class Listening(Sampler):
    """Keeps what its events have told: {(id, sample index): [(id, log-prob), ...]}."""

    def step(self):
        events = super().step()
        for event in events:
            pairs = zip(event.tokens, event.logprobs, strict=True)
            self.heard[event.id, event.sample_index] += pairs
        return events


def build(mesh, **changes):
    config = TransformerConfig(**CONFIG, **changes)
    parts = state.split(lambda key: Transformer(config, nnx.Rngs(key)))
    random, params = np.random.default_rng(0), {}
    for path, leaf in parts.shapes.items():
        centre = 0.4 if path.endswith('scale') else 0.0
        params[path] = jax.numpy.asarray(centre + 0.2 * random.normal(size=leaf.shape), leaf.dtype)
    sizes = dict(slots=4, max_length=LONGEST, decode_steps=3, page_size=4, prefill_tokens=32)
    sampler = Listening(parts.merge, config, SamplingConfig(**sizes), mesh, Letters())
    sampler.heard = collections.defaultdict(list)
    return sampler, parts, params


def play(sampler, params):
    """12 episodes -> {(id, sample index): (prompt, episode)}."""
    random = np.random.default_rng(1)
    config = Echo.Config(name='tests.environments.test_on_the_engine:Echo', max_turns=6)
    context = types.SimpleNamespace(tokenizer=Letters())
    player = Player(config, context, 'here', lambda function, given: function(*given))
    requests = [
        Request(
            f'p{length}',
            random.integers(0, V, length).tolist(),
            max_tokens=14,
            seed=length,
            n=4,
            stop=player.stop,
            stop_ids=frozenset([7]),
        )
        for length in (3, 9, 17)
    ]
    prompts = {request.id: Prompt(request.id, 'text') for request in requests}
    found = player.play(sampler, requests, prompts, params, 0, LONGEST)
    return {
        (request.id, episode.sample_index): (request.tokens, episode)
        for request in requests
        for episode in found[request.id]
    }


def samples_of(played) -> list[Sample]:
    return [
        Sample(prompt, *episode.trail, advantage=1.0 + number)
        for number, (prompt, episode) in enumerate(played.values())
    ]


def expected_of(prompt, episode, heard):
    """(ids, {position of a sampled id: its log-prob}) from what the engine's events told."""
    ids, told, heard = list(prompt), {}, list(heard)
    for index, turn in enumerate(episode.turns):
        for _ in turn.tokens:
            token, logprob = heard.pop(0)
            told[len(ids)] = logprob
            ids.append(token)
        if index < len(episode.observations):
            ids += Letters().encode_after(Echo.said[index])
    assert not heard
    return ids, told


def check_batch(batch, played, sampler):
    """Each segment of the batch is an episode as the engine's events have told it."""
    found = 0
    for number, (key, (prompt, episode)) in enumerate(played.items()):
        ids, told = expected_of(prompt, episode, sampler.heard[key])
        row, columns = np.nonzero(batch['advantages'] == 1.0 + number)
        row, segment = row[0], batch['segment_ids'][row[0], columns[0]]
        inside = batch['segment_ids'][row] == segment
        of = {name: array[row][inside] for name, array in batch.items()}
        assert [*of['tokens'], of['targets'][-1]] == ids
        assert [*of['tokens'][:1], *of['targets']] == ids
        mask = np.zeros(len(ids))
        mask[list(told)] = 1
        np.testing.assert_array_equal(of['loss_mask'], mask[1:])
        logprobs = np.zeros(len(ids), np.float32)
        logprobs[list(told)] = list(told.values())
        np.testing.assert_array_equal(of['sampler_logprobs'], logprobs[1:])
        np.testing.assert_array_equal(of['lengths'], len(told) * mask[1:])
        np.testing.assert_array_equal(of['advantages'], (1.0 + number) * mask[1:])
        found += len(told)
    assert found == batch['loss_mask'].sum()


def check_logprobs(batch, played, trained, most: float):
    """The log-probs in the batch are those of the train step on its own tokens."""
    texts = [[*prompt, *episode.trail[0]] for prompt, episode in played.values()]
    for number, logprobs in enumerate(trained(texts)):
        places = batch['advantages'] == 1.0 + number
        is_sampled = [x is not None for x in list(played.values())[number][1].trail[1]]
        ours = logprobs[len(logprobs) - len(is_sampled) :][is_sampled]
        assert np.abs(batch['sampler_logprobs'][places] - ours).max() <= most


@pytest.fixture(scope='module')
def exact(one_device):
    """A model that is batch_invariant, compiled with all optimizations, and its episodes."""
    sampler, parts, params = build(one_device, batch_invariant=True)
    with jax.set_mesh(one_device):
        return sampler, parts, params, play(sampler, params)


def batch_of(played, **words):
    return make_batch(samples_of(played), 12, LONGEST, **words)


def test_episodes_have_all_that_they_may_have(exact):
    """Or the others would test little."""
    _, _, _, played = exact
    turns = [len(episode.turns) for _, episode in played.values()]
    reasons = {episode.finish_reason for _, episode in played.values()}
    stops = {turn.stop for _, episode in played.values() for turn in episode.turns}
    assert max(turns) == 6 and reasons == {'stop', 'length'} and stops >= {'a', 'bc', 7}
    texts = [t for _, e in played.values() for t in (turn.text for turn in e.turns)]
    assert any(text.endswith('bc') for text in texts)


@pytest.mark.parametrize('one_each', [False, True])
def test_the_batch_holds_prompt_turns_and_observations_with_a_mask_on_turns(exact, one_each):
    sampler, _, _, played = exact
    check_batch(batch_of(played, one_each=one_each), played, sampler)


def test_log_probs_of_turns_are_those_of_the_train_step_to_the_bit(exact, one_device):
    sampler, parts, params, played = exact
    trained = trainer(parts, params, one_device, ROWS, LENGTH)
    check_logprobs(batch_of(played), played, trained, 0.0)


def test_turns_share_the_pages_of_those_before(exact):
    """Of all tokens that turns are asked behind, most need not be computed again."""
    sampler, _, _, played = exact
    assert sampler.counters.shared_tokens > 2 * sampler.counters.prefill_tokens


def test_the_same_episodes_come_again(exact, one_device):
    sampler, _, params, played = exact
    again = Listening.__new__(Listening)
    again.__dict__ = sampler.__dict__ | {'heard': collections.defaultdict(list)}
    with jax.set_mesh(one_device):
        repeated = play(again, params)
    for (_, one), (_, other) in zip(played.values(), repeated.values()):
        assert one.trail[0] == other.trail[0] and one.finish_reason == other.finish_reason


def test_log_probs_of_another_model_are_those_of_a_full_forward(quick_compilation, one_device):
    sampler, parts, params = build(one_device)
    with jax.set_mesh(one_device):
        played = play(sampler, params)
    check_batch(batch_of(played), played, sampler)

    @jax.jit
    def forward(tokens):
        model, positions = parts.merge(params), jnp.arange(LENGTH)[None]
        hidden, _ = model(tokens, positions, jnp.ones_like(tokens))
        return token_logprobs(hidden, model.unembed(), jnp.roll(tokens, -1))[0]

    def trained(texts):
        padded = (np.pad(text, (0, LENGTH - len(text))) for text in texts)
        for text, one in zip(texts, padded):
            yield np.asarray(forward(one[None]))[0, : len(text) - 1]

    check_logprobs(batch_of(played), played, trained, 1e-4)
