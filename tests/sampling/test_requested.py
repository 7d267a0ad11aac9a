"""What a request asks for beside its tokens: text, stops, log-probs of others and of the prompt."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxfm.errors import DataError
from jaxfm.sampling.complete import complete
from jaxfm.sampling.request import Completion, Request
from tests.sampling.conftest import VOCAB, new_sampler, pages_in_use

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2]


class Letters:
    """A tokenizer whose ids are letters."""

    invalid_byte_id = None

    def decode(self, ids):
        return ''.join(chr(ord('A') + i) for i in ids)


@pytest.fixture(scope='module')
def lettered(params, one_device):
    return new_sampler(params, one_device, tokenizer=Letters())


@pytest.fixture
def ask(lettered, one_device):
    """options -> the completion of PROMPT, or of other tokens."""
    names = iter(range(1000))

    def ask(**options):
        request = Request(**{'id': str(next(names)), 'tokens': PROMPT, 'max_tokens': 9, **options})
        with jax.set_mesh(one_device):
            [[one]] = complete(lettered, [request], lettered._params, 0).values()
        return one

    return ask


def test_text_comes_with_the_tokens(ask):
    one = ask(seed=3)
    assert one.text == Letters().decode(one.tokens) and one.finish_reason == 'length'


def test_a_stop_string_ends_the_text_before_it_and_the_tokens_with_it(ask):
    free = ask(seed=3)
    for start, stop in [(0, 1), (2, 4), (3, 6), (8, 9)]:
        string = free.text[start:stop]
        end = free.text.index(string)
        one = ask(seed=3, stop=('never seen', string))
        assert one.text == free.text[:end] and one.tokens == free.tokens[: end + len(string)]
        assert (one.finish_reason, one.stop) == ('stop', string)
        assert len(one.logprobs) == len(one.tokens)


def test_what_may_become_a_stop_string_is_held_back(lettered, one_device, ask):
    free = ask(seed=3)
    string = free.text[2:5] + '?'  # looks like the text for three letters
    with jax.set_mesh(one_device):
        lettered.add(Request('held', PROMPT, 9, seed=3, stop=(string,)))
        one = Completion('held', 0)
        while lettered.has_work:
            for event in lettered.step():
                one.add(event)
                assert one.text == Letters().decode(one.tokens)
                assert len(one.tokens) != 3 and len(one.tokens) != 4
    assert one.text == free.text


def test_what_is_held_when_a_request_ends_is_told(ask):
    free = ask(seed=3)
    one = ask(seed=3, stop=(free.text[-2:] + '?',))
    assert (one.text, one.tokens, one.finish_reason) == (free.text, free.tokens, 'length')


@pytest.mark.parametrize('min_tokens', [5, 6])
def test_no_stop_string_ends_a_request_before_min_tokens(ask, min_tokens):
    free = ask(seed=3)
    assert free.text.count(free.text[4]) == 1
    one = ask(seed=3, stop=(free.text[4],), min_tokens=min_tokens)
    assert one.text == (free.text[:4] if min_tokens == 5 else free.text)


def test_a_stop_id_is_told_but_not_shown(ask):
    free = ask(seed=3)
    end = free.tokens.index(free.tokens[4])
    one = ask(seed=3, stop_ids=frozenset([free.tokens[4]]))
    assert (one.tokens, one.text) == (free.tokens[: end + 1], free.text[:end])
    assert (one.finish_reason, one.stop) == ('stop', free.tokens[4])


def test_no_stop_id_comes_before_min_tokens(ask):
    likely = ask(temperature=0.0).tokens[0]
    options = dict(temperature=0.0, stop_ids=frozenset([likely]), logit_bias={likely: 50.0})
    assert ask(**options).tokens == [likely]
    late = ask(min_tokens=5, **options)
    assert len(late.tokens) == 6 and late.tokens[-1] == likely and likely not in late.tokens[:5]


def test_only_allowed_ids_are_sampled(ask):
    one = ask(allowed_ids=frozenset([4, 7]), temperature=5.0)
    assert set(one.tokens) <= {4, 7}
    assert max(one.logprobs) < -0.1  # of the raw logits, under the whole vocabulary


def test_logprobs_of_the_prompt_are_those_of_the_forward(ask, score):
    with_prompt = ask(prompt_logprobs=True, top_logprobs=2)
    plain, _, greedy = score(PROMPT[:1], PROMPT[1:] + with_prompt.tokens)
    assert with_prompt.prompt_logprobs[0] is None
    np.testing.assert_allclose(
        with_prompt.prompt_logprobs[1:] + with_prompt.logprobs, plain, rtol=0, atol=1e-4
    )
    # Not even when the prompt is known already.
    again = ask(prompt_logprobs=True)
    np.testing.assert_allclose(
        again.prompt_logprobs[1:], with_prompt.prompt_logprobs[1:], rtol=0, atol=1e-4
    )
    assert ask(prompt_logprobs=True, tokens=[5]).prompt_logprobs == [None]
    assert ask().prompt_logprobs is None


def test_top_logprobs_are_the_likeliest_ids(ask):
    greedy = ask(temperature=0.0, top_logprobs=3)
    assert [top[0][0] for top in greedy.top_logprobs] == greedy.tokens
    np.testing.assert_allclose([t[0][1] for t in greedy.top_logprobs], greedy.logprobs, atol=1e-6)
    assert all(len(t) == 3 and t[0][1] >= t[1][1] >= t[2][1] for t in greedy.top_logprobs)
    assert not ask().top_logprobs


@pytest.mark.parametrize(
    'changes, message',
    [
        (dict(tokens=[]), 'empty'),
        (dict(tokens=[1, VOCAB]), '60'),
        (dict(n=0), 'n is 0'),
        (dict(temperature=float('nan')), 'temperature is nan'),
        (dict(stop=tuple(map(str, range(1000)))), '64'),
        (dict(min_tokens=10), 'min_tokens is 10, but must be at most max_tokens 9'),
        (dict(allowed_ids=()), 'allowed_ids'),
        (dict(max_tokens=24), 'exceed sampling.max_length 40'),
    ],
    ids=str,
)
def test_a_bad_request_is_refused_and_the_others_go_on(lettered, one_device, changes, message):
    good = Request('good', PROMPT, 5)
    with jax.set_mesh(one_device):
        lettered.add(good)
        with pytest.raises(DataError, match=f'request bad: .*{message}'):
            lettered.add(dataclasses.replace(Request('bad', PROMPT, 9), **changes))
        events = []
        while lettered.has_work:
            events += lettered.step()
    assert {event.id for event in events} == {'good'} and events[-1].finish_reason == 'length'


def test_stop_strings_need_a_tokenizer(sampler):
    with pytest.raises(DataError, match='tokenizer'):
        sampler.add(Request('a', PROMPT, 5, stop=('x',)))


@pytest.fixture
def ask_all(lettered, params, one_device):
    """requests -> {id: completion}, and the counters, which start with no known prefix."""

    def ask_all(requests):
        with jax.set_mesh(one_device):
            lettered.lend(params, lettered.version + 1)
            before = lettered.counters
            found = complete(lettered, requests, params, lettered.version)
        after = lettered.counters
        return found, {
            name: getattr(after, name) - getattr(before, name) for name in dataclasses.asdict(after)
        }

    return ask_all


@pytest.mark.parametrize('first', [0, 1, 2, 9, 16])
def test_a_prompt_is_scored_from_any_position_without_sampling(ask_all, score, first):
    request = Request(
        'a', PROMPT, 0, prompt_logprobs=True, prompt_logprobs_from=first, top_logprobs=1
    )
    [[one]], spent = ask_all([request])[0].values(), ask_all([request])[1]
    plain, _, greedy = score(PROMPT[:1], PROMPT[1:])
    plain, greedy = [None, *plain][first:], [None, *greedy][first:]
    assert (one.tokens, one.finish_reason) == ([], 'length')
    assert (one.prompt_logprobs[0] is None) == (first == 0)
    start = int(first == 0)
    np.testing.assert_allclose(one.prompt_logprobs[start:], plain[start:], rtol=0, atol=1e-4)
    assert [top[0][0] for top in one.prompt_top_logprobs[start:]] == greedy[start:]
    assert spent['decode_steps'] == spent['decoded_tokens'] == 0


def test_scored_continuations_share_their_context(ask_all, score):
    """Choices of a question: the context is computed once, and every score is as if alone."""
    choices = [[7], [8, 1], [9, 9, 9], [2, 4, 6, 8], [7, 7]]
    requests = [
        Request(f'{i}', PROMPT + choice, 0, prompt_logprobs=True, prompt_logprobs_from=len(PROMPT))
        for i, choice in enumerate(choices)
    ]
    found, spent = ask_all(requests)
    for i, choice in enumerate(choices):
        plain, _, _ = score(PROMPT, choice)
        np.testing.assert_allclose(found[f'{i}'][0].prompt_logprobs, plain, rtol=0, atol=1e-4)
    # Pages of 4 tokens: the context's 16 whole ones once, then what follows in each request.
    assert spent['prefill_tokens'] <= 16 + sum(map(len, choices))
    assert spent['shared_tokens'] >= 16 * (len(choices) - 1)


def test_a_prompt_is_scored_in_chunks_of_one_row(params, one_device, score):
    """The smallest `prefill_tokens`: no request could be served."""
    with jax.set_mesh(one_device):
        narrow = new_sampler(params, one_device, prefill_tokens=16)
        request = Request('a', PROMPT * 2, 2, prompt_logprobs=True)
        [[one]] = complete(narrow, [request], params, 0).values()
    plain, _, _ = score(PROMPT[:1], [*(PROMPT * 2)[1:], *one.tokens])
    told = one.prompt_logprobs[1:] + one.logprobs
    np.testing.assert_allclose(told, plain, rtol=0, atol=1e-4)


def test_scoring_goes_on_after_giving_way(params, one_device, score):
    """Pages for one request and a bit: requests that score and that sample push each other out."""
    with jax.set_mesh(one_device):
        tight = new_sampler(params, one_device, pages=11)
        requests = [
            Request(f'{i}', PROMPT + [i] * 5, 12 * (i % 2), prompt_logprobs=True, seed=i)
            for i in range(5)
        ]
        found = complete(tight, requests, params, 0)
        assert tight.counters.preemptions > 0
    for i, request in enumerate(requests):
        one = found[f'{i}'][0]
        plain, _, _ = score(PROMPT[:1], [*request.tokens[1:], *one.tokens])
        told = one.prompt_logprobs[1:] + one.logprobs
        np.testing.assert_allclose(told, plain, rtol=0, atol=1e-4)


def test_a_chunk_that_is_scored_again_counts_once(params, one_device, score):
    """An older request takes the pages of a prompt when two of its three chunks are scored."""
    with jax.set_mesh(one_device):
        tight = new_sampler(params, one_device, pages=12, prefill_tokens=16)
        tight.add(Request('old', PROMPT[:5], 20))
        tight.step()
        tight.add(Request('long', PROMPT * 2, 1, prompt_logprobs=True, top_logprobs=1))
        while not tight.counters.preemptions:
            tight.step()
        assert tight.counters.prefill_tokens == 4 + 2 * 16
        long = drain(tight)['long']
    plain, _, greedy = score(PROMPT[:1], [*(PROMPT * 2)[1:], *long.tokens])
    told = long.prompt_logprobs[1:] + long.logprobs
    np.testing.assert_allclose(told, plain, rtol=0, atol=1e-4)
    top = long.prompt_top_logprobs[1:] + long.top_logprobs
    assert [likeliest for [(likeliest, _)] in top] == greedy.tolist()


def test_only_the_first_of_several_samples_tells_the_prompts_log_probs(lettered, one_device):
    with jax.set_mesh(one_device):
        request = Request('a', PROMPT, 3, n=3, sample_index=4, prompt_logprobs=True)
        samples = complete(lettered, [request], lettered._params, 0)['a']
    assert [one.prompt_logprobs is not None for one in samples] == [True, False, False]


def test_a_prompt_that_is_only_scored_fails_if_the_model_gives_nan(params, one_device):
    """Token 59 has a NaN embedding. Nothing is sampled that would tell."""
    broken = dict(params)
    broken['embedding/table'] = jax.numpy.asarray(params['embedding/table']).at[59].set(np.nan)
    with jax.set_mesh(one_device):
        sampler = new_sampler(broken, one_device)
        for name, prompt in {'bad': [*PROMPT[:4], 59, *PROMPT], 'good': PROMPT}.items():
            sampler.add(Request(name, prompt, 0, prompt_logprobs=True))
        found = drain(sampler)
        assert not pages_in_use(sampler)
    assert found['bad'].finish_reason == 'error' and 'NaN' in found['bad'].error
    assert np.isnan(found['bad'].prompt_logprobs[5])
    assert found['good'].finish_reason == 'length'
    assert np.isfinite(found['good'].prompt_logprobs[1:]).all()


def test_a_prompt_with_nan_scores_fails_before_it_is_sampled_from(
    lettered, params, one_device, monkeypatch
):
    store = lettered._programs.store

    def store_nan(*arguments):
        cache, (logprobs, *top) = store(*arguments)
        return cache, (logprobs * np.nan, *top)

    monkeypatch.setattr(lettered._programs, 'store', store_nan)
    with jax.set_mesh(one_device):
        lettered.lend(params, lettered.version + 1)
        lettered.add(Request('bad', PROMPT, 4, prompt_logprobs=True))
        lettered.add(Request('good', PROMPT[1:], 4))
        found = drain(lettered)
    assert (found['bad'].tokens, found['bad'].finish_reason) == ([], 'error')
    assert len(found['good'].tokens) == 4 and found['good'].error is None


@pytest.mark.parametrize('pushed_out', [False, True])
def test_a_prompt_of_one_token_has_no_log_probs_and_goes_on(
    lettered, params, one_device, pushed_out
):
    """It once broke the engine for all others, when it had to be stored again."""
    with jax.set_mesh(one_device):
        sampler = new_sampler(params, one_device, pages=11) if pushed_out else lettered
        if pushed_out:
            sampler.add(Request('long', PROMPT, 20))
        sampler.add(Request('short', [5], 20, prompt_logprobs=True))
        one = Completion('short', 0)
        for _ in range(30):
            for event in sampler.step():
                if event.id == 'short':
                    one.add(event)
            if len(one.tokens) == 6 and not pushed_out:
                sampler.extend('short', [1, 2])
        assert not sampler.has_work and sampler.counters.preemptions >= pushed_out
    assert (len(one.tokens), one.prompt_logprobs) == (20, [None])


@pytest.fixture
def begin(lettered, params, one_device):
    """options -> (the sampler after the first step of request 'a', its completion so far)."""

    def begin(**options):
        lettered.lend(params, lettered.version + 1)
        lettered.add(Request('a', PROMPT, 9, **options))
        one = Completion('a', 0)
        for event in lettered.step():
            one.add(event)
        return lettered, one

    with jax.set_mesh(one_device):
        yield begin
        for sequence in lettered._scheduler.sequences:
            lettered.cancel(sequence.request.id)


def drain(sampler, **completions):
    while sampler.has_work:
        for event in sampler.step():
            completions.setdefault(event.id, Completion(event.id, 0)).add(event)
    return completions


def test_a_fork_tells_what_the_original_holds_back(begin, ask):
    free = ask(seed=3)
    sampler, one = begin(seed=3, stop=(free.text[2:5] + '?',))  # the third letter may begin it
    assert one.text == free.text[:2]
    sampler.fork('a', 'same', sample_index=0)
    sampler.fork('a', 'other', sample_index=0, tokens=[50, 51])
    found = drain(sampler, a=one)
    assert found['a'].text == free.text and found['a'].tokens == free.tokens
    assert found['same'].text == free.text[2:] and found['same'].tokens == free.tokens[2:]
    assert found['other'].text[0] == free.text[2] and len(found['other'].tokens) == 1 + 6
    assert found['other'].text == Letters().decode(found['other'].tokens)


def test_a_fork_finds_the_stop_string_that_the_original_has_begun(begin, ask):
    free = ask(seed=3)
    sampler, one = begin(seed=3, stop=(free.text[2:5],))
    sampler.fork('a', 'same', sample_index=0)
    for completion in drain(sampler, a=one).values():
        assert (completion.finish_reason, completion.stop) == ('stop', free.text[2:5])


def test_no_stop_string_reaches_across_ids_that_are_appended(begin, ask):
    free = ask(seed=3)
    options = dict(seed=3, stop=(free.text[2:5] + '?',))
    sampler, one = begin(**options)
    sampler.extend('a', [50, 51])
    whole = drain(sampler, a=one)['a']
    assert whole.tokens[:3] == free.tokens[:3] and len(whole.tokens) == 9
    assert whole.text == Letters().decode(whole.tokens)
    # The held letter and the first one sampled behind the appended ids.
    sampler, one = begin(seed=3, stop=(whole.text[2:4],))
    assert one.text == whole.text[:2]
    sampler.extend('a', [50, 51])
    again = drain(sampler, a=one)['a']
    assert again.tokens == whole.tokens or again.stop not in whole.text[2:4] + whole.text[:2]
    assert again.text.startswith(whole.text[:4])


def test_every_token_has_the_version_of_its_weights(begin, ask, params):
    free = ask(seed=3)
    sampler, one = begin(seed=3, stop=(free.text[2:5] + '?',))
    version = sampler.version
    sampler.lend(params, version + 5)
    one = drain(sampler, a=one)['a']
    assert one.versions == [version] * 3 + [version + 5] * 6


def test_appended_ids_do_not_count_as_min_tokens(begin):
    options = dict(temperature=0.0, stop_ids=frozenset([7]), logit_bias={7: 50.0}, min_tokens=6)
    sampler, one = begin(**options)
    sampler.extend('a', [50] * 8)
    one = drain(sampler, a=one)['a']
    assert len(one.tokens) == 7 and 7 not in one.tokens[:6] and one.tokens[-1] == 7


def test_ids_appended_to_a_waiting_prompt_have_no_prompt_logprobs(lettered, params, one_device):
    with jax.set_mesh(one_device):
        lettered.add(Request('a', PROMPT, 2, prompt_logprobs=True, top_logprobs=1))
        lettered.extend('a', [1, 2, 3])
        one = drain(lettered)['a']
    assert len(one.prompt_logprobs) == len(one.prompt_top_logprobs) == len(PROMPT)


def test_requests_with_one_id_give_all_their_samples(lettered, params, one_device):
    two, one = Request('a', PROMPT, 3, n=2), Request('a', PROMPT, 3, sample_index=7)
    with jax.set_mesh(one_device):
        samples = complete(lettered, [one, two], params, 0)['a']
    assert [sample.sample_index for sample in samples] == [7, 0, 1]


@pytest.mark.parametrize('num_prompt', [-1, 0, len(PROMPT) + 1])
def test_a_prompt_has_some_of_the_tokens(lettered, params, one_device, num_prompt):
    with jax.set_mesh(one_device):
        lettered.lend(params, 0)
        message = f'request a: num_prompt is {num_prompt}, but must be from 1 to 17'
        with pytest.raises(DataError, match=message):
            lettered.add(Request('a', PROMPT, 3), num_prompt=num_prompt)
    assert not lettered.has_work


def test_nothing_is_left_behind_when_a_request_is_refused(lettered, params, one_device):
    with jax.set_mesh(one_device):
        with pytest.raises(DataError, match='the prompt is empty'):
            complete(lettered, [Request('0', [1], 3), Request('1', [], 3)], params, 0)
        assert not lettered.has_work
        assert list(complete(lettered, [Request('0', [1], 3)], params, 0)) == ['0']
        lettered.add(Request('others', [1], 3))
        with pytest.raises(RuntimeError, match='has other requests'):
            complete(lettered, [Request('0', [1], 3)], params, 0)
        lettered.cancel('others')
