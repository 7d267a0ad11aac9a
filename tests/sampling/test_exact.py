"""With model.batch_invariant, the engine tells exactly what the train step computes."""

import collections

import jax
import numpy as np
import pytest
from flax import nnx

from jaxfm import sharding, state
from jaxfm.models import BlockConfig, LoraConfig, SegmentConfig, TransformerConfig
from jaxfm.models.transformer import Transformer
from jaxfm.sampling import SamplingConfig
from jaxfm.sampling.engine import Sampler
from jaxfm.sampling.request import Event, Request
from tests.sampling.conftest import pages_in_use
from tests.sampling.trained import trainer

V, ROWS, LENGTH = 60, 8, 150
BLOCK = dict(num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=24)
SOFT = dict(attention_softcap=3.0, qk_norm=True, qkv_bias=True)
CONFIG = TransformerConfig(
    vocab_size=V,
    vocab_multiple=16,
    embed_dim=16,
    num_layers=2,
    block=BlockConfig(**BLOCK),
    segments=[
        SegmentConfig(
            pattern=[BlockConfig(**BLOCK, **SOFT, window=21), BlockConfig(**BLOCK)], repeats=1
        )
    ],
    tie_embeddings=True,
    embedding_scale=1.7,
    logits_softcap=5.0,
    lora=LoraConfig(rank=2, alpha=2.0, targets=['all']),
    batch_invariant=True,
)
PARTS = state.split(lambda key: Transformer(CONFIG, nnx.Rngs(key)))


@pytest.fixture(scope='module', autouse=True)
def _compile_quickly():
    """Not here: with little optimization, other programs would have equal bits, too."""


def random_params(parts) -> dict:
    random, params = np.random.default_rng(0), {}
    for path, leaf in parts.shapes.items():
        centre = 0.4 if path.endswith('scale') else 0.0
        params[path] = jax.numpy.asarray(centre + 0.2 * random.normal(size=leaf.shape), leaf.dtype)
    return params


@pytest.fixture(scope='module')
def params():
    return random_params(PARTS)


@pytest.fixture(scope='module')
def trained(params, one_device):
    return trainer(PARTS, params, one_device, ROWS, LENGTH)


# Every letter may begin one, so that nearly always some tokens are held back.
STOPS = 'ab', 'cde', 'dbea', 'ecd', 'beda'


class Letters:
    """A tokenizer with twelve ids for each of five letters, so that stop strings do occur."""

    invalid_byte_id = None

    def decode(self, ids):
        return ''.join('abcde'[i % 5] for i in ids)


def engine(params, mesh, **words) -> Sampler:
    defaults = dict(slots=4, max_length=61, decode_steps=3, page_size=5, prefill_tokens=32)
    config = SamplingConfig(**(defaults | words))
    sampler = Sampler(PARTS.merge, CONFIG, config, mesh, Letters())
    sampler.lend(params, 0)
    return sampler


class Story:
    """All that events have told of a sample: its text, and the log-probs of tokens in it."""

    def __init__(self, prompt, first_scored: int = 0):
        self.tokens, self.logprobs = list(prompt), [None] * len(prompt)
        self.first_scored = first_scored  # of the prompt
        self.inserted = {}  # {position: ids that `extend` or `fork` put there}

    def copy(self):
        copied = Story(self.tokens)
        copied.logprobs, copied.inserted = list(self.logprobs), dict(self.inserted)
        return copied

    def add(self, event: Event) -> None:
        for index, logprob in enumerate(event.prompt_logprobs or []):
            self.logprobs[self.first_scored + index] = logprob
        tops = event.top_logprobs or [()] * len(event.tokens)
        for token, logprob, top in zip(event.tokens, event.logprobs, tops, strict=True):
            assert dict(top).get(token, logprob) == logprob
            self.tokens, self.logprobs = [*self.tokens, token], [*self.logprobs, logprob]
            self.close()

    def close(self) -> None:
        """Adds the ids that follow what has been told."""
        while ids := self.inserted.pop(len(self.tokens), None):
            self.tokens, self.logprobs = self.tokens + ids, self.logprobs + [None] * len(ids)


def some_requests(seed: int, count: int, options=({},)) -> list[Request]:
    """Prompts of mixed lengths, half of which begin alike, and some with several samples."""
    random = np.random.default_rng(seed)
    start, requests = random.integers(0, V, 23).tolist(), []
    for index in range(count):
        common = start[: random.integers(24)] if random.random() < 0.5 else []
        prompt = common + random.integers(0, V, 1 + random.integers(1, 20)).tolist()
        words = dict(options[index % len(options)])
        if index % 3 == 1:
            first = int(random.integers(len(prompt))) if index % 2 else 0
            words |= dict(prompt_logprobs=True, prompt_logprobs_from=first)
        if index % 6 == 4:
            most = 0  # it only scores the prompt
        else:
            most, words['n'] = 1 + int(random.integers(16)), 3 if index % 5 == 2 else 1
        words['stop'] = STOPS if index % 4 else ()
        words['stop_ids'] = frozenset(random.integers(0, V, 3).tolist())
        words['top_logprobs'] = 20 * (index % 6 == 3)
        requests.append(Request(f'{index}', prompt, most, seed=index, **words))
    return requests


class Schedule:
    """A client that adds requests as it goes, and forks, extends and cancels some that run.

    Some prompts are the text of a sample that has ended and more, as in a chat.
    """

    def __init__(self, sampler, seed: int):
        self.sampler, self.random = sampler, np.random.default_rng(seed)
        self.stories: dict[tuple[str, int], Story] = {}
        self.touched = set()  # whose text depends on the schedule
        self.done = collections.Counter()

    def run(self, requests) -> None:
        waiting = list(reversed(requests))
        while waiting or self.sampler.has_work:
            for _ in range(min(len(waiting), self.random.integers(4))):
                self.add(waiting.pop())
            for event in self.sampler.step():
                self.note(event)
            if self.sampler.has_work and self.random.random() < 0.6:
                self.disturb()

    def disturb(self) -> None:
        """Forks, extends or cancels a sample, most often one that has got tokens."""
        sequences = self.sampler._scheduler.sequences
        begun = [one for one in sequences if len(one.tokens) > one.num_prompt]
        sequences = begun if begun and self.random.random() < 0.7 else sequences
        one = sequences[self.random.integers(len(sequences))]
        ids = self.random.integers(0, V, self.random.integers(1, 4)).tolist()
        fits = len(one.tokens) + one.max_tokens + len(ids) <= self.sampler.longest
        if fits and one.max_tokens:
            act = self.random.choice([self.fork, self.extend, self.cancel])
            act(one, (one.request.id, one.request.sample_index), ids)

    def add(self, request: Request) -> None:
        self.sampler.add(request)
        for index in range(request.sample_index, request.sample_index + request.n):
            story = Story(request.tokens, request.prompt_logprobs_from)
            self.stories[request.id, index] = story

    def note(self, event: Event) -> None:
        key = event.id, event.sample_index
        self.stories[key].add(event)
        if event.finish_reason:
            self.done[type(event.stop).__name__ if event.stop is not None else 'length'] += 1
            tokens = [*self.stories[key].tokens, 7, 8]
            if self.random.random() < 0.3 and len(tokens) + 9 < self.sampler.longest:
                name = f'turn {len(self.stories)}'
                scored = dict(prompt_logprobs=True, prompt_logprobs_from=len(tokens) - 2)
                self.touched.add((name, 0))
                self.add(Request(name, tokens, 9, seed=5, **scored))

    def fork(self, one, key, ids) -> None:
        ids = ids if self.random.random() < 0.5 else []
        name = f'fork {self.done["fork"]}', 9
        story = self.stories[name] = self.stories[key].copy()
        self.insert(story, one, ids)
        self.sampler.fork(key[0], name[0], sample_index=9, of_sample=key[1], tokens=ids)
        self.touched.add(name)
        self.done['fork'] += 1
        self.done['fork with answer'] += len(one.tokens) > one.num_prompt
        self.done['fork with held tokens'] += len(one.tokens) > len(self.stories[key].tokens)

    def extend(self, one, key, ids) -> None:
        self.insert(self.stories[key], one, ids)
        self.sampler.extend(key[0], ids, key[1])
        self.touched.add(key)
        self.done['extend'] += 1

    def insert(self, story, one, ids) -> None:
        if ids:
            story.inserted[len(one.tokens)] = ids
            story.close()

    def cancel(self, one, key, ids) -> None:
        self.sampler.cancel(*key)
        self.touched.add(key)
        self.done['cancel'] += 1


def check_story(story: Story, expected) -> int:
    """Every log-prob told is that of the train step -> how many there are."""
    told = [i for i, logprob in enumerate(story.logprobs) if logprob is not None]
    found = np.asarray([story.logprobs[i] for i in told], np.float32)
    np.testing.assert_array_equal(found, expected[np.asarray(told, int) - 1])
    return len(told)


def check(sampler, trained, count=24, seed=1, options=({},)) -> dict:
    """Every log-prob that the engine tells is that of the train step for the same text.

    -> {(id, sample index): text} of samples that the schedule leaves alone.
    """
    schedule = Schedule(sampler, seed)
    schedule.run(some_requests(seed, count, options))
    assert not pages_in_use(sampler)
    stories = schedule.stories
    expected = trained([story.tokens for story in stories.values()])
    both = zip(stories.values(), expected, strict=True)
    assert sum(check_story(*one) for one in both) > 8 * count
    wanted = {'int', 'str', 'length', 'fork with answer', 'fork with held tokens', 'extend'}
    missing = [name for name in wanted | {'cancel'} if not schedule.done[name]]
    assert not missing, f'the schedule lacks {missing}: {schedule.done}'
    return {key: story.tokens for key, story in stories.items() if key not in schedule.touched}


def test_every_logprob_has_the_bits_of_the_train_step(params, one_device, trained):
    """In a random schedule, with shared and copied pages, and too few of them."""
    with jax.set_mesh(one_device):
        tight = engine(params, one_device, pages=15)
        texts = check(tight, trained)
        assert tight.counters.preemptions and tight.counters.shared_tokens > 100
        one_slot = engine(params, one_device, pages=15, slots=1)
        one_slot._programs = tight._programs  # only decoding has another shape
        assert_same(texts, check(one_slot, trained))


def assert_same(some, others) -> None:
    """Samples that no schedule touched have the same tokens in both."""
    both = some.keys() & others.keys()
    assert len(both) > 8 and all(some[key] == others[key] for key in both)


@pytest.mark.slow
@pytest.mark.parametrize(
    'words',
    [
        dict(slots=1, decode_steps=1, max_length=64, page_size=1),
        dict(slots=3, decode_steps=16, page_size=16, prefill_tokens=16),
        dict(slots=8, decode_steps=4, page_size=3, prefill_tokens=512, max_length=97),
    ],
    ids=str,
)
def test_every_engine_gives_the_bits_of_the_train_step(words, params, one_device, trained):
    with jax.set_mesh(one_device):
        sampler = engine(params, one_device, **words)
        if words['slots'] == 8:
            sampler.warm_up()
        first = check(sampler, trained)
        assert_same(first, check(engine(params, one_device), trained))


# All programs that decode, and all orders of sorting and masking in them.
OPTIONS = (
    {},
    dict(temperature=0.0),
    dict(top_p=0.8, temperature=1.4),
    dict(top_k=7, min_p=0.05),
    dict(presence_penalty=1.0, repetition_penalty=1.2),
    dict(logit_bias={3: 2.0, 9: -np.inf}, frequency_penalty=0.5),
)


@pytest.mark.slow
@pytest.mark.parametrize('seed', [2, 3])
def test_a_long_schedule_with_every_option_has_the_bits(seed, params, one_device, trained):
    with jax.set_mesh(one_device):
        tight = engine(params, one_device, pages=24, slots=6)
        check(tight, trained, 300, seed, OPTIONS)
        assert tight.counters.preemptions > 8 and tight.counters.shared_tokens > 1000


@pytest.mark.slow
def test_a_prompt_of_8000_tokens_has_the_bits(one_device):
    """Stored in chunks, between which another request decodes; two samples share it."""
    block = BlockConfig(num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=16)
    config = TransformerConfig(
        vocab_size=V, embed_dim=16, num_layers=1, block=block, batch_invariant=True
    )
    parts = state.split(lambda key: Transformer(config, nnx.Rngs(key)))
    params, random = random_params(parts), np.random.default_rng(0)
    sampling = SamplingConfig(slots=3, max_length=8100, page_size=64, prefill_tokens=1024)
    sampler = Sampler(parts.merge, config, sampling, one_device)
    sampler.lend(params, 0)
    long = Request('long', random.integers(0, V, 8000).tolist(), 40, n=2, prompt_logprobs=True)
    short = Request('short', [1, 2, 3], 90)
    stories = {
        key: Story(r.tokens) for r in (long, short) for key in [(r.id, i) for i in range(r.n)]
    }
    with jax.set_mesh(one_device):
        sampler.add(long)
        sampler.add(short)
        while sampler.has_work:
            for event in sampler.step():
                stories[event.id, event.sample_index].add(event)
    texts = [story.tokens for story in stories.values()]
    expected = trainer(parts, params, one_device, 1, 8100)(texts)
    assert list(map(check_story, stories.values(), expected)) == [8039, 40, 90]


@pytest.mark.slow
@pytest.mark.parametrize('sizes', [dict(fsdp=2), dict(tensor=2), dict(replica=2, context=2)])
def test_a_mesh_gives_the_same_bits(sizes, params, trained):
    sizes = {axis: 1 for axis in sharding.MESH_AXES} | sizes
    mesh = sharding.make_mesh(sizes, jax.devices()[: np.prod(list(sizes.values()))])
    with jax.set_mesh(mesh):
        placed = {
            path: jax.device_put(x, jax.NamedSharding(mesh, sharding.stored_spec(PARTS.axes[path])))
            for path, x in params.items()
        }
        check(engine(placed, mesh), trained)
