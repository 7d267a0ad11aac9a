import json
import random
import sys

import numpy as np
import pytest

from jaxfm.errors import ConfigError, DataError
from jaxfm.tokenizer import BPEConfig, BytesConfig, TokenizerFileConfig
from jaxfm.tokenizer.build import BPE, Bytes, build_tokenizer, load_tokenizer

TEXTS = [
    'def f(self):\n    if self.value:\n        return self.value\n',
    'the quick brown fox, it is\r\nsaid\n\n\tjumps 12345 times <|eos|> over',
] * 5


@pytest.fixture(scope='module', params=['bytes', 'code', 'gpt2'])
def trained(request):
    if request.param == 'bytes':
        return Bytes(BytesConfig(), TEXTS)
    return BPE(BPEConfig(vocab_size=320, pattern=request.param), TEXTS)


def random_text(generator) -> str:
    """Characters of all planes, many of them white space, without surrogates."""
    pools = [' \t\n\r\f\v', 'abcdef_().,', '0123456789', '\x00\x1c\u2028\u00a0\ufeff\u200b']
    characters = []
    for _ in range(generator.randrange(60)):
        pool = generator.randrange(len(pools) + 1)
        if pool < len(pools):
            characters.append(generator.choice(pools[pool]))
        else:
            code = generator.randrange(sys.maxunicode + 1)
            characters.append('?' if 0xD800 <= code < 0xE000 else chr(code))
    return ''.join(characters)


def test_every_text_comes_back_from_its_ids(trained):
    generator = random.Random(1)
    texts = ['', ' ', '\n', *TEXTS] + [random_text(generator) for _ in range(500)]
    encoded = trained.encode_batch(texts)
    assert [trained.decode(ids) for ids in encoded] == texts
    assert trained.encode(texts[-1]) == encoded[-1].tolist()


def test_text_that_spells_a_special_token_stays_text(trained):
    for text in ('<|bos|>', '<|eos|>', 'a<|eos|>b', '<|bos|><|eos|>' * 3):
        ids = trained.encode(text)
        assert trained.bos_id not in ids and trained.eos_id not in ids
        assert trained.decode(ids) == text


def test_decoding_drops_special_tokens(trained):
    assert trained.decode([trained.bos_id, *trained.encode('é'), trained.eos_id]) == 'é'


def test_ids_are_inside_the_vocabulary(trained):
    ids = np.concatenate(trained.encode_batch(TEXTS))
    assert ids.dtype == np.int32
    assert 2 <= ids.min() and ids.max() < trained.vocab_size


def test_a_saved_tokenizer_is_the_same_after_loading(trained, tmp_path):
    trained.save(tmp_path / 'tokenizer')
    loaded = load_tokenizer(tmp_path)
    assert loaded.fingerprint == trained.fingerprint
    assert loaded.vocab_size == trained.vocab_size
    for text in (*TEXTS, '<|eos|>'):
        assert loaded.encode(text) == trained.encode(text)


def test_training_twice_gives_the_same_merges_and_another_text_does_not():
    fingerprints = [
        BPE(BPEConfig(vocab_size=320), texts).fingerprint
        for texts in (TEXTS, list(TEXTS), [*TEXTS, 'xyzzy ' * 9])
    ]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


def test_the_vocabulary_has_the_requested_size():
    assert BPE(BPEConfig(vocab_size=300), TEXTS).vocab_size == 300
    assert Bytes(BytesConfig(), []).vocab_size == 258


def test_bytes_are_ids_two_higher():
    assert Bytes(BytesConfig(), []).encode('aé\n') == [97 + 2, 0xC3 + 2, 0xA9 + 2, 12]


def test_additional_special_tokens_do_not_change_other_ids():
    more = Bytes(BytesConfig(special_tokens=['<|end|>', 'x y']), [])
    assert more.special_tokens == {'<|bos|>': 0, '<|eos|>': 1, '<|end|>': 258, 'x y': 259}
    assert more.vocab_size == 260
    text = 'a<|end|>x y'
    assert more.encode(text) == Bytes(BytesConfig(), []).encode(text)
    assert more.encode_parts(['a<|end|>', 'x y']) == [[99, 258], [259]]
    assert more.decode([99, 258, 100]) == 'ab'
    assert more.decode([99, 258, 100], skip_special_tokens=False) == 'a<|end|>b'


def test_special_tokens_count_towards_the_vocab_size():
    config = BPEConfig(vocab_size=300, special_tokens=['<|end|>'])
    trained = build_tokenizer(config, TEXTS)
    assert (trained.vocab_size, trained.special_tokens['<|end|>']) == (300, 2)
    assert trained.decode(trained.encode('<|end|>')) == '<|end|>'
    with pytest.raises(ConfigError, match=r'258 is less than 256 bytes \+ 3 special tokens = 259'):
        build_tokenizer(BPEConfig(vocab_size=258, special_tokens=['<|end|>']), TEXTS)


@pytest.mark.parametrize('special', [['<|eos|>'], ['ab', 'ab'], ['a'], ['']])
def test_special_tokens_differ_and_are_not_too_short(special):
    with pytest.raises(ConfigError, match='must differ and have at least two characters'):
        Bytes(BytesConfig(special_tokens=special), [])


def test_a_filler_keeps_spellings_text_and_leaves_no_ids():
    coder = Bytes(BytesConfig(), [])
    guarded = coder.guard('a<|eos|>b', '\U00014400')
    assert coder.encode_parts([guarded + '<|eos|>'], '\U00014400') == [
        [*coder.encode('a<|eos|>b'), coder.eos_id]
    ]
    coder = Bytes(BytesConfig(special_tokens=['abc', 'bc', 'cd']), [])
    [ids] = coder.encode_parts([coder.guard('abcd', '\U00014400')], '\U00014400')
    assert ids == coder.encode('abcd')


def test_a_tokenizer_is_found_inside_a_run(trained, tmp_path):
    trained.save(tmp_path / 'tokenizer')
    again = build_tokenizer(TokenizerFileConfig(path=str(tmp_path)), [])
    assert again.fingerprint == trained.fingerprint
    assert (again.bos_id, again.eos_id) == (0, 1)


def test_a_line_break_and_its_indentation_are_one_token_in_code():
    code = BPE(BPEConfig(vocab_size=320, pattern='code'), TEXTS)
    assert [code.decode([i]) for i in code.encode('\n        return')][0] == '\n        '


def test_a_lone_surrogate_is_bad_data(trained):
    with pytest.raises(DataError, match='surrogate'):
        trained.encode('a\udc80')


def test_a_damaged_tokenizer_file_is_named(tmp_path):
    path = tmp_path / 'tokenizer.json'
    path.write_text('{"version": ')
    with pytest.raises(DataError, match='tokenizer.json is not a tokenizer'):
        load_tokenizer(path)


@pytest.mark.parametrize(
    'kind, added, bos_id',
    [
        ('GPT2Tokenizer', {}, None),
        ('LlamaTokenizerFast', {}, 0),
        ('', {}, 0),
        ('GPT2Tokenizer', {'add_bos_token': True}, 0),
    ],
)
def test_bos_is_added_if_the_class_or_the_file_says_so(tmp_path, kind, added, bos_id):
    """Most tokenizers of transformers name a bos and few add it: SmolLM2's does not."""
    build_tokenizer(BytesConfig(), ()).save(tmp_path)
    path = tmp_path / 'tokenizer_config.json'
    said = json.loads(path.read_text()) | added | ({'tokenizer_class': kind} if kind else {})
    path.write_text(json.dumps(said))
    assert load_tokenizer(tmp_path).bos_id == bos_id
