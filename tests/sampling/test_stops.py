"""Stop strings: text and ids are released in step, and never past the first stop string."""

import random

import pytest

from jaxfm.sampling.stops import Stops
from jaxfm.tokenizer import BytesConfig, TokenizerFileConfig
from jaxfm.tokenizer.build import build_tokenizer, load_tokenizer_file


@pytest.fixture(scope='module')
def coder():
    return build_tokenizer(BytesConfig(), ())


class Words:
    """A tokenizer whose ids are pieces of text, some of which end or begin inside a character."""

    invalid_byte_id = None
    pieces = (b'', b'a', b'b', b'ab', b'ba', b'aab', b'abcab', b'c', b'a\xc3', b'\xa9', b'\xa9b')
    pieces += (b'\xe2\x82', b'\xac', b'\xacab', b'c\xe2', b'\xc3', b' ')

    def decode(self, ids):
        return b''.join(self.pieces[i] for i in ids).decode('utf-8', 'replace')


def run(coder, ids, strings, sizes, **options):
    """-> ids released, text released, stop; before and after `finish`."""
    stops, count, text, stop = Stops(coder, strings, **options), 0, '', None
    start = 0
    while start < len(ids) and stop is None:
        size = sizes()
        released = stops.push(ids[start : start + size])
        start += size
        count, text, stop = count + released.count, text + released.text, released.stop
        assert 0 <= released.count and count <= start
    before = count, text
    if stop is None:
        released = stops.finish()
        count, text, stop = count + released.count, text + released.text, released.stop
    return before, (count, text, stop)


def expect(text, strings):
    """-> (the text before the first stop string that is complete, that string)."""
    found = []
    for string in strings:
        if (start := text.find(string)) >= 0:
            found.append((start + len(string), start, string))
    if not found:
        return text, None
    _, start, string = min(found)
    return text[:start], string


def find_count(coder, ids, text, stop):
    """How many ids it takes until the text has the stop string."""
    return next(n for n in range(len(ids) + 1) if coder.decode(ids[:n]).startswith(text + stop))


def expect_early(coder, ids, strings):
    """-> (count of ids, text) that are released as long as further ids may come."""
    text = coder.decode(ids).rstrip('\ufffd')  # it may be a character that is not complete
    lengths = range(len(text) + 1)
    begun = [n for n in lengths if any(x.startswith(text[len(text) - n :]) for x in strings if n)]
    text = text[: len(text) - max(begun, default=0)]
    texts = {n: coder.decode(ids[:n]) for n in range(len(ids) + 1)}
    released = [n for n, x in texts.items() if len(x) <= len(text) and not x.endswith('\ufffd')]
    return max(released), text


STRINGS = ['ab', 'b', 'abcabcab', 'aa', 'é', '€', 'a€', 'bé', 'caba', ' ', 'abca', '\ufffd\ufffd']


def test_any_ids_in_any_portions_end_at_the_earliest_stop():
    draw, coder, ended = random.Random(0), Words(), 0
    for _ in range(3000):
        ids = draw.choices(range(len(coder.pieces)), k=draw.randrange(14))
        strings = draw.sample(STRINGS, draw.randrange(4))
        text, stop = expect(coder.decode(ids), strings)
        (early, early_text), (count, released, ended_by) = run(
            coder, ids, strings, lambda: draw.randint(1, 5)
        )
        assert (released, ended_by) == (text, stop), (ids, strings)
        assert not any(string in released for string in strings)
        if stop is None:
            assert count == len(ids)
            assert (early, early_text) == expect_early(coder, ids, strings)
        elif '\ufffd' not in text + stop:
            ended += 1
            assert count == find_count(coder, ids, text, stop)
    assert ended > 300


@pytest.mark.parametrize('name', ['tok_gpt2', 'stories260k_hf', 'stories260k_hf/tokenizer.model'])
def test_real_tokenizers_in_any_portions(shared_data, name):
    pytest.importorskip('sentencepiece')
    coder = load_tokenizer_file(TokenizerFileConfig(path=str(shared_data / name), pattern=''))
    draw = random.Random(1)
    text = 'Once upon a time, there was é漢字 \U0001f600 a girl.\n\nShe said: "Hi!" a漢 END now'
    for strings in (
        [],
        ['END'],
        ['\n\n', 'girl'],
        ['漢字'],
        ['字 \U0001f600'],
        ['re wa', 'EN'],
        [' '],
    ):
        ids = coder.encode(text)
        expected, stop = expect(coder.decode(ids), strings)
        for _ in range(10):
            _, (count, released, ended_by) = run(coder, ids, strings, lambda: draw.randint(1, 9))
            assert (released, ended_by) == (expected, stop)
            assert coder.decode(ids[:count]).startswith(expected + (stop or ''))
            assert count == len(ids) or stop


def test_text_that_may_become_a_stop_is_held_with_its_ids(coder):
    stops = Stops(coder, ['END', 'NO'])
    assert stops.push(coder.encode('the E')) == (4, 'the ', None)
    assert stops.push(coder.encode('N')) == (0, '', None)
    assert stops.push(coder.encode('E')) == (2, 'EN', None)  # this E may begin END
    assert stops.push(coder.encode('ND and more')) == (3, '', 'END')


def test_held_text_is_released_at_the_end(coder):
    stops = Stops(coder, ['END'])
    assert stops.push(coder.encode('xEN')) == (1, 'x', None)
    assert stops.finish() == (2, 'EN', None)


def test_a_stop_in_the_middle_of_a_token_cuts_its_text_but_not_the_token():
    coder = Words()
    stops = Stops(coder, ['ca'])
    abcab, a = coder.pieces.index(b'abcab'), coder.pieces.index(b'a')
    assert stops.push([a, abcab, a, a]) == (2, 'aab', 'ca')


def test_an_id_whose_text_is_held_in_part_is_held():
    coder = Words()
    stops = Stops(coder, ['cd'])
    assert stops.push([coder.pieces.index(b'ab'), coder.pieces.index(b'c')]) == (1, 'ab', None)
    stops = Stops(coder, ['bc'])
    assert stops.push([coder.pieces.index(b'ab')]) == (0, 'a', None)
    assert stops.push([coder.pieces.index(b'a')]) == (2, 'ba', None)


def test_a_character_is_held_with_its_ids(coder):
    stops = Stops(coder)
    ids = coder.encode('a€b')
    assert [stops.push([i]) for i in ids[:4]] == [
        (1, 'a', None),
        (0, '', None),
        (0, '', None),
        (3, '€', None),
    ]
    words = Words()
    stops = Stops(words)
    assert stops.push([words.pieces.index(b'c\xe2')]) == (0, 'c', None)
    assert stops.finish() == (1, '\ufffd', None)


def test_the_stop_that_is_complete_first_wins_and_of_equals_the_longest(coder):
    ids = coder.encode('xabcd')
    assert Stops(coder, ['abcd', 'bc']).push(ids) == (4, 'xa', 'bc')
    assert Stops(coder, ['c', 'bc', 'zabc']).push(ids) == (4, 'xa', 'bc')


def test_a_stop_that_only_the_end_completes_is_found():
    coder = Words()
    stops = Stops(coder, ['c\ufffd'])
    a, half = coder.pieces.index(b'a'), coder.pieces.index(b'c\xe2')
    assert stops.push([a, half]) == (1, 'a', None)
    assert stops.finish() == (1, '', 'c\ufffd')


def test_no_string_ends_a_sample_before_min_tokens(coder):
    ids = coder.encode('a.b.c.')
    for min_tokens, count in ((0, 2), (2, 2), (3, 4), (4, 4), (5, 6), (6, 6)):
        released = Stops(coder, ['.'], min_tokens=min_tokens).push(ids)
        assert released == (count, 'a.b.c.'[: count - 1], '.')
    stops = Stops(coder, ['.'], min_tokens=7)
    assert stops.push(ids) == (5, 'a.b.c', None)
    assert stops.finish() == (1, '.', None)


def test_without_a_tokenizer_ids_pass_through():
    stops = Stops(None)
    assert stops.push([5, 6]) == (2, '', None)
    assert stops.finish() == (0, '', None)
    with pytest.raises(ValueError, match='stop strings need a tokenizer'):
        Stops(None, ['a'])


def test_the_cost_of_a_token_does_not_grow_with_the_text(coder, monkeypatch):
    longest, decode = 0, coder.decode

    def watched(ids):
        nonlocal longest
        longest = max(longest, len(ids))
        return decode(ids)

    monkeypatch.setattr(coder, 'decode', watched)
    strings = [f'{"a" * 999}{i}' for i in range(10)]
    stops = Stops(coder, strings)
    ids = coder.encode('a' * 3000 + 'b')
    released = [stops.push([i]) for i in ids]
    assert sum(x.count for x in released) == len(ids)
    assert ''.join(x.text for x in released) == 'a' * 3000 + 'b'
    assert longest < 20
    assert len(stops._held) < 1000 and len(stops._boundaries) < 1000


def test_without_stop_strings_ids_are_decoded_together(coder, monkeypatch):
    lengths, decode = [], coder.decode
    monkeypatch.setattr(coder, 'decode', lambda ids: lengths.append(len(ids)) or decode(ids))
    ids, stops = coder.encode('def f(x): return x\n' * 16), Stops(coder)
    released = [stops.push(ids[start : start + 16]) for start in range(0, len(ids), 16)]
    assert [x.count for x in released] == [16] * (len(ids) // 16)
    assert ''.join(x.text for x in released) == coder.decode(ids)
    assert sum(lengths[:-1]) <= 5 * len(ids)
