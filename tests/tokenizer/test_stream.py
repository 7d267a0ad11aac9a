"""The incremental detokenizer returns whole characters, and in sum what decoding all ids gives."""

import random

import pytest

from jaxfm.tokenizer import BytesConfig, TokenizerFileConfig
from jaxfm.tokenizer.build import build_tokenizer, load_tokenizer, load_tokenizer_file
from jaxfm.tokenizer.stream import TextStream

KINDS = {
    'gpt2': ('tok_gpt2', ''),
    'qwen3': ('tok_qwen3', ''),
    'deepseek_v3': ('tok_deepseek_v3', ''),
    'cl100k': ('tok_tiktoken_ranks/cl100k_base.tiktoken.gz', 'cl100k_base'),
    'stories': ('stories260k_hf', ''),
    'sentencepiece': ('stories260k_hf/tokenizer.model', ''),
}
TEXTS = [
    'Once upon a time, there was  a girl.\n\n  She said: "Hi!" ',
    ' a space before, two after  ',
    'naïve — 漢字かな交じり文 \U0001f600\U0001f469\u200d\U0001f469\u200d\U0001f467 e\u0301 \ufffd!',
    '\n\n\tdef f(x):\n        return x  # 3.14\n',
]


@pytest.fixture(scope='module', params=['bytes', *KINDS])
def coder(request, shared_data):
    if request.param == 'bytes':
        return build_tokenizer(BytesConfig(), ())
    path, pattern = KINDS[request.param]
    pytest.importorskip('sentencepiece')
    pytest.importorskip('tiktoken')
    return load_tokenizer_file(TokenizerFileConfig(path=str(shared_data / path), pattern=pattern))


def streamed(coder, ids, sizes=1, **options) -> list[str]:
    """The pieces of text if ids arrive `sizes` at a time; `sizes` is a number or a function."""
    stream, pieces = TextStream(coder, **options), []
    while ids:
        size = sizes() if callable(sizes) else sizes
        pieces.append(stream.push(ids[:size]))
        ids = ids[size:]
    return [*pieces, stream.finish()]


@pytest.mark.parametrize('text', TEXTS)
def test_the_pieces_are_the_text(coder, text):
    ids = coder.encode(text)
    pieces = streamed(coder, ids)
    assert ''.join(pieces) == coder.decode(ids)
    if '\ufffd' not in text:
        assert not any('\ufffd' in piece for piece in pieces)


def test_any_ids_in_any_steps_give_the_same_text_as_decode(coder):
    draw = random.Random(0)
    byte = coder.invalid_byte_id
    # Ids of text, of broken text and of nothing, as a model samples them at a high temperature.
    common = [i for text in TEXTS for i in coder.encode(text)]
    common += [] if byte is None else range(byte - 255, byte + 1)
    for _ in range(300):
        ids = [
            draw.choice(common) if draw.random() < 0.8 else draw.randrange(coder.vocab_size)
            for _ in range(draw.randrange(60))
        ]
        pieces = streamed(coder, ids, lambda: draw.randint(1, 5), window=draw.choice([1, 3, 64]))
        assert ''.join(pieces) == coder.decode(ids)


def test_a_space_after_many_ids_without_text_is_not_lost(coder):
    one = coder.encode('one')
    other = coder.encode('one other')[len(one) :]
    for between in (coder.encode(20 * ' '), 20 * [coder.eos_id]):
        ids = [*one, *between, *other]
        assert ''.join(streamed(coder, ids, window=3)) == coder.decode(ids)


def test_words_are_returned_at_once(coder):
    ids = coder.encode('Once upon a time there was a girl')
    stream, known = TextStream(coder), ''
    for count, one in enumerate(ids, 1):
        known += stream.push([one])
        assert known == coder.decode(ids[:count])


def test_a_character_is_returned_with_its_last_byte():
    coder = build_tokenizer(BytesConfig(), ())
    ids = coder.encode('é\U0001f600')
    assert streamed(coder, ids) == ['', 'é', '', '', '', '\U0001f600', '']
    assert streamed(coder, ids[:-1])[-1] == '\ufffd'


def test_a_run_of_byte_tokens_is_returned_when_it_ends(shared_data):
    coder = load_tokenizer(shared_data / 'stories260k_hf')
    ids = coder.encode('a漢字b')
    assert coder.decode([*ids[:-1], coder.invalid_byte_id]) == 'a' + 7 * '\ufffd'
    assert [piece for piece in streamed(coder, ids) if piece] == ['a', '漢字b']


def test_a_long_text_is_not_decoded_from_its_start_for_every_id(coder, monkeypatch):
    ids = coder.encode('Once upon a time there was a girl. ' * 40)
    longest, decode = 0, coder.decode

    def watched(some):
        nonlocal longest
        longest = max(longest, len(some))
        return decode(some)

    monkeypatch.setattr(coder, 'decode', watched)
    assert ''.join(streamed(coder, ids, window=8)) == decode(ids)
    assert longest < 20
