"""The word encoder gives the same ids as the library, or leaves a text to it."""

import json
import random

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from jaxfm.tokenizer import BPEConfig, TokenizerFileConfig, word_encoder
from jaxfm.tokenizer.build import PATTERNS, build_tokenizer
from jaxfm.tokenizer.word_encoder import KNOWN, encode_batch, make_word_encoder

TEXT = "It's a test: don't  stop, 1234567 x=3;\n\n\tdef f(a):\r\n    return a  # naïve — “yes”… \n"


def known_characters() -> list[str]:
    return [chr(i) for a, b in KNOWN for i in range(ord(a), ord(b) + 1)]


def compare(opened, texts):
    """Compares ids of both ways; returns how many texts the encoder left to the library."""
    encoder, backend = opened._words, opened._backend
    assert encoder is not None
    wanted = [e.ids for e in backend.encode_batch_fast(texts, add_special_tokens=False)]
    left = 0
    for text, ids in zip(texts, wanted):
        found = encoder.encode(text)
        left += found is None
        assert found is None or found == ids, text
    assert encode_batch(encoder, backend, texts) == wanted
    return left


@pytest.mark.parametrize('class_', [r'\p{L}', r'\p{N}', r'\s'])
def test_both_engines_classify_every_known_character_alike(class_):
    import regex

    cut = pre_tokenizers.Split(tokenizers.Regex(class_), 'isolated')
    matches = regex.compile(class_).fullmatch
    for some in np.array_split(np.array(known_characters()), 400):
        # Between characters of no class, each one that is in the class is a piece of its own.
        pieces = {piece for piece, _ in cut.pre_tokenize_str('+' + '+'.join(some) + '+')}
        assert {c for c in some if matches(c)} == {p for p in pieces if len(p) == 1 and p != '+'}


@pytest.mark.parametrize('pattern', PATTERNS)
def test_texts_of_all_characters_have_the_ids_of_the_library(pattern):
    opened = build_tokenizer(BPEConfig(vocab_size=400, pattern=pattern), [TEXT * 20])
    draw = random.Random(0)
    letters = known_characters()
    texts = [TEXT, '', ' ', '\n', '   x', 'x   ', 'a\n\n\n b', "I'LL we'll 12 345678"]
    for _ in range(400):
        words = (''.join(draw.choices(letters, k=draw.randrange(6))) for _ in range(8))
        texts.append(''.join(word + draw.choice([' ', '  ', '\n', '', '\t']) for word in words))
    assert compare(opened, texts) == 0
    assert compare(opened, texts) == 0  # now with cached words


def test_what_engines_may_classify_differently_is_left_to_the_library():
    opened = build_tokenizer(BPEConfig(vocab_size=300), [TEXT])
    texts = ['a\x1cb', 'a\x85b', 'x\u2028y', 'emoji \U0001fae8', '\u0378', TEXT]
    assert compare(opened, texts) == len(texts) - 1


def test_a_text_that_must_be_normalized_is_left_to_the_library(shared_data):
    opened = build_tokenizer(TokenizerFileConfig(path=str(shared_data / 'tok_qwen3')), ())
    assert compare(opened, ['caf\u00e9 naïve', 'Å', '\u212b']) == 1


@pytest.mark.parametrize('name', ['tok_gpt2', 'tok_qwen3'])
def test_real_tokenizers_and_texts(shared_data, name):
    import gzip

    config = TokenizerFileConfig(path=str(shared_data / name), eos_token='<|endoftext|>')
    opened = build_tokenizer(config, ())
    with gzip.open(shared_data / 'pretrain_wikitext2' / 'valid.txt.gz', 'rt') as file:
        text = file.read()[:300_000]
    pieces = [text[i : i + 3000] for i in range(0, len(text), 3000)]
    assert compare(opened, pieces) < 0.3 * len(pieces)


@pytest.mark.parametrize(
    'change',
    [
        lambda c: c['model'].update(dropout=0.1),
        lambda c: c['model'].update(byte_fallback=True),
        lambda c: c.update(normalizer={'type': 'Lowercase'}),
        lambda c: c['pre_tokenizer']['pretokenizers'].insert(0, {'type': 'Punctuation'}),
        lambda c: c['pre_tokenizer']['pretokenizers'][0].update(behavior='Removed'),
        lambda c: c['pre_tokenizer']['pretokenizers'][0].update(pattern={'Regex': '(a)|(b)'}),
        lambda c: c['pre_tokenizer']['pretokenizers'][1].update(add_prefix_space=True),
    ],
)
def test_a_tokenizer_that_does_more_has_no_word_encoder(change):
    opened = build_tokenizer(BPEConfig(vocab_size=300), [TEXT])
    config = json.loads(opened._backend.to_str())
    assert make_word_encoder(json.dumps(config), opened._backend) is not None
    change(config)
    assert make_word_encoder(json.dumps(config), opened._backend) is None


def test_a_tokenizer_with_added_words_has_no_word_encoder():
    backend = tokenizers.Tokenizer(models.BPE(vocab={'a': 0, 'b': 1}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert make_word_encoder(backend.to_str(), backend) is not None
    backend.add_tokens(['ab'])
    assert make_word_encoder(backend.to_str(), backend) is None


def test_few_words_are_remembered_and_no_long_ones(monkeypatch):
    """Over a whole corpus the table would be larger than the corpus."""
    monkeypatch.setattr(word_encoder, '_REMEMBERED', 3)
    encoder = build_tokenizer(BPEConfig(vocab_size=300), [TEXT])._words
    encoder.encode('a' * 65)
    assert not encoder._ids_of
    encoder.encode('b' * 64 + ' one two three four')
    assert list(encoder._ids_of) == ['b' * 64, ' one', ' two']
