"""Tokenizers in .gguf files: a real file, and real tokenizers written into one."""

import gzip
import json
import random
import shutil

import pytest
from tokenizers import pre_tokenizers

from jaxfm.chat.render import Chat
from jaxfm.errors import ConfigError, DataError, MissingInputError
from jaxfm.pretrained.gguf.tokenizer import PRE_NAMES
from jaxfm.tokenizer.build import load_tokenizer
from tests import gguf_files
from tests.tokenizer.test_real_tokenizers import random_texts

GOLDEN = 'models_installable/smollm2_135m_instruct_q4_1.golden.json'
TEXTS = [
    "It's 12345 o'clock,  isn't IT?\n\n  naïve 漢字 🦙 don't\tx = f(y)\r\n",
    'def f(x):\n    return x + 0.5  # "half"',
    ' leading, trailing ',
    'HTTPServer/path/to\n\n\nthe end\u00a0of e\u0301',
]


@pytest.fixture
def path(tmp_path):
    return tmp_path / 'model.gguf'


@pytest.fixture(scope='module')
def real(smollm2_gguf):
    return load_tokenizer(smollm2_gguf)


@pytest.fixture(scope='module')
def golden(shared_data):
    return json.loads((shared_data / GOLDEN).read_text())['cases']


def write(path, keys, architecture='llama', **changed):
    """A file with only a tokenizer; `changed` sets keys of tokenizer.ggml (None removes one)."""
    keys = keys | {f'tokenizer.ggml.{key}': value for key, value in changed.items()}
    keys = {key: value for key, value in keys.items() if value is not None}
    return gguf_files.write(path, architecture, keys, {})


def unpacked(path) -> dict:
    with gzip.open(path, 'rt', encoding='utf-8') as file:
        return json.load(file)


def qwen3_keys(shared_data, **changed) -> dict:
    directory = shared_data / 'tok_qwen3'
    config = json.loads((directory / 'tokenizer_config.json').read_text())
    return gguf_files.byte_level_keys(unpacked(directory / 'tokenizer.json.gz'), 'qwen2', config)


def words_keys(pre='gpt-2', **changed) -> dict:
    """A byte-level vocabulary of letters, and a word that its merges cannot produce."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, 'he', 'll', 'hello', '<|end|>', '<think>']
    kinds = [1] * (len(tokens) - 2) + [3, 4]
    keys = {'model': 'gpt2', 'pre': pre, 'tokens': tokens, 'token_type': kinds}
    keys |= {'merges': ['h e', 'l l'], 'eos_token_id': len(tokens) - 2} | changed
    return {f'tokenizer.ggml.{key}': value for key, value in keys.items() if value is not None}


def pieces_keys(pieces: dict[str, float], defined=(), special=('<unk>', '<s>', '</s>')) -> dict:
    """A SentencePiece vocabulary."""
    tokens = [*special, *pieces, *defined]
    kinds = [2, *[3] * (len(special) - 1), *[1] * len(pieces), *[4] * len(defined)]
    scores = [0.0] * len(special) + [float(score) for score in pieces.values()]
    keys = {'model': 'llama', 'tokens': tokens, 'token_type': kinds}
    keys |= {'scores': scores + [0.0] * len(defined), 'unknown_token_id': 0}
    keys |= {'bos_token_id': 1, 'eos_token_id': 2}
    return {f'tokenizer.ggml.{key}': value for key, value in keys.items()}


def test_the_real_tokenizer_makes_the_prompts_of_the_goldens(real, golden):
    chat = Chat(real)
    for case in golden:
        message = {'role': 'user', 'content': case['prompt']}
        ids = chat.prompt([message]) if case['chat'] else real.encode(case['prompt'])
        assert ids == case['prompt_ids']
        assert real.decode(case['output_ids'], skip_special_tokens=False) == case['text']
    assert len(golden) == 5
    assert (real.bos_id, real.eos_id, real.vocab_size) == (None, 2, 49152)
    assert real.template_variables['bos_token'] == '<|im_start|>'


def test_byte_level_text_comes_back(real):
    for text in TEXTS:
        assert real.decode(real.encode(text)) == text


def test_a_directory_with_one_gguf_file_has_its_tokenizer(real, smollm2_gguf, tmp_path):
    (tmp_path / 'model.gguf').symlink_to(smollm2_gguf)
    (tmp_path / 'notes.txt').write_text('x')
    assert load_tokenizer(tmp_path).fingerprint == real.fingerprint
    (tmp_path / 'other.gguf').symlink_to(smollm2_gguf)
    with pytest.raises(ConfigError, match='several tokenizers; .* model.gguf, other.gguf'):
        load_tokenizer(tmp_path)


def test_a_saved_tokenizer_no_longer_needs_the_gguf_file(real, tmp_path):
    real.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.fingerprint == real.fingerprint
    assert again.encode(TEXTS[0]) == real.encode(TEXTS[0])
    assert again.chat_template == real.chat_template


def test_qwen3_in_a_gguf_is_qwen3(path, shared_data):
    write(path, qwen3_keys(shared_data), 'qwen3')
    inside, original = load_tokenizer(path), load_tokenizer(shared_data / 'tok_qwen3')
    for text in [*TEXTS, *random_texts(300)]:
        assert inside.encode(text) == original.encode(text)
    message = [{'role': 'user', 'content': 'Hello <|im_end|> <think>'}]
    assert Chat(inside).prompt(message) == Chat(original).prompt(message)
    assert inside.special_tokens == original.special_tokens
    assert (inside.bos_id, inside.eos_id) == (original.bos_id, original.eos_id)
    assert inside.tags == original.tags


def test_gpt2_in_a_gguf_is_gpt2(path, shared_data):
    original = load_tokenizer(shared_data / 'tok_gpt2')
    saved = original._files
    keys = gguf_files.byte_level_keys(
        json.loads(saved['tokenizer.json']), 'gpt-2', json.loads(saved['tokenizer_config.json'])
    )
    write(path, keys, 'qwen2')
    inside = load_tokenizer(path)
    for text in [*TEXTS, *random_texts(300)]:
        assert inside.encode(text) == original.encode(text)


def test_a_sentencepiece_vocabulary_survives_the_gguf_file(path, shared_data):
    pytest.importorskip('sentencepiece')
    directory = shared_data / 'stories260k_hf'
    gguf_files.stories(path, directory)
    inside, original = load_tokenizer(path), load_tokenizer(directory)
    ours, theirs = (
        json.loads(coder._files['tokenizer.json'])['model'] for coder in (inside, original)
    )
    for name in ('vocab', 'byte_fallback', 'unk_token', 'fuse_unk'):
        assert ours[name] == theirs[name]
    # Two merges that make the same token may come in either order.
    joined = [[''.join(pair) for pair in model['merges']] for model in (ours, theirs)]
    assert joined[0] == joined[1]
    assert set(map(tuple, ours['merges'])) == set(map(tuple, theirs['merges']))
    cases = json.loads((directory / 'golden_greedy.json').read_text())['cases']
    texts = [case['text'] for case in cases] + ['Lily\nsaid "Zoë 漢!"', 'x']
    for text in filter(None, texts):
        assert inside.encode(text) == original.encode(text)
        assert inside.decode(inside.encode(text)) == text
    assert (inside.bos_id, inside.eos_id) == (1, 2)
    assert inside.special_tokens == original.special_tokens
    first, second = inside.encode_parts(['Once upon', ' a time'])
    assert inside.decode(first + second) == 'Once upon a time'


def test_scores_decide_what_merges_first(path):
    letters = {piece: -9.0 for piece in '▁abc'}
    write(path, pieces_keys(letters | {'ab': -1.0, 'bc': -0.5}))
    coder = load_tokenizer(path)
    assert coder.decode(coder.encode('abc')) == 'abc'
    assert [coder._token_id(piece) for piece in ('▁', 'a', 'bc')] == coder.encode('abc')
    write(path, pieces_keys(letters | {'ab': -0.5, 'bc': -1.0}))
    coder = load_tokenizer(path)
    assert [coder._token_id(piece) for piece in ('▁', 'ab', 'c')] == coder.encode('abc')


def test_a_space_is_prepended_unless_the_file_forbids_it(path):
    keys = pieces_keys(dict.fromkeys('▁ab', -1.0))
    coder = load_tokenizer(write(path, keys))
    assert coder.encode('a b') == [3, 4, 3, 5] and coder.decode([3, 4, 3, 5]) == 'a b'
    coder = load_tokenizer(write(path, keys, add_space_prefix=False))
    assert coder.encode('a b') == [4, 3, 5] and coder.decode([3, 4]) == ' a'


def test_gemma_merges_in_token_order_including_runs_of_spaces(path):
    pieces = dict.fromkeys('▁abc', 0.0) | {'ab': -5.0, 'bc': -1.0}
    keys = pieces_keys(pieces, defined=['\n\n', '  '])
    coder = load_tokenizer(write(path, keys, 'gemma2', add_space_prefix=False))
    named = {name: coder._token_id(name) for name in ('ab', 'c', '▁▁', 'a', '\n\n')}
    assert coder.encode('abc  a\n\na') == [
        named[name] for name in ('ab', 'c', '▁▁', 'a', '\n\n', 'a')
    ]
    assert coder.decode([named['▁▁'], named['a']]) == '  a'


def test_phi3_strips_white_space_after_its_special_tokens(path):
    special = ('<unk>', '<s>', '</s>', '<|endoftext|>', '<|end|>')
    keys = pieces_keys(dict.fromkeys('▁a\n', -1.0), special=special)
    coder = load_tokenizer(write(path, keys, 'phi3'))
    a = coder._token_id('a')
    assert coder.encode_parts(['<|end|>\na'])[0][-1:] == [a]
    assert coder._token_id('\n') not in coder.encode_parts(['<|end|>\na'])[0]
    assert coder._token_id('\n') in coder.encode_parts(['<|endoftext|>\na'])[0]
    coder = load_tokenizer(write(path, keys, 'llama'))
    assert coder._token_id('\n') in coder.encode_parts(['<|end|>\na'])[0]


TEXT = "x = 1234; it's HTTPServer\n\n end"
CUTS = {
    'gpt-2': "x| =| 1234|;| it|'s| HTTPServer|\n\n| end",
    'smollm': "x| =| |1|2|3|4|;| it|'s| HTTPServer|\n\n| end",
    'llama-bpe': "x| =| |123|4|;| it|'s| HTTPServer|\n\n| end",
    'qwen2': "x| =| |1|2|3|4|;| it|'s| HTTPServer|\n\n| end",
    'tekken': "x| =| |1|2|3|4|;| it|'s| HTTPServer|\n\n| end",
    'gpt-4o': "x| =| |123|4|;| it's| HTTPServer|\n\n| end",
    'default': "x| |=| |123|4|;| it|'|s| HTTPServer|\n\n| end",
}


@pytest.mark.parametrize('name', CUTS)
def test_a_pre_tokenizer_splits_text_as_the_original_does(name, path):
    coder = load_tokenizer(write(path, words_keys(name)))
    pieces = coder._backend.pre_tokenizer.pre_tokenize_str(TEXT)
    assert '|'.join(TEXT[start:stop] for _, (start, stop) in pieces) == CUTS[name]


def test_digits_are_split_off_before_the_gpt2_pattern_applies(path):
    ours = load_tokenizer(write(path, words_keys('smollm')))._backend.pre_tokenizer
    theirs = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    texts = random_texts(400)
    draw = random.Random(1)
    texts += [''.join(draw.choices("a \n\t1²'s.\u00a0", k=12)) for _ in range(2000)]
    for text in texts:
        assert ours.pre_tokenize_str(text) == theirs.pre_tokenize_str(text), text


@pytest.mark.parametrize('name', PRE_NAMES)
def test_every_pre_tokenizer_round_trips_every_text(name, path):
    coder = load_tokenizer(write(path, words_keys(name)))
    for text in random_texts(40):
        back = coder.decode(coder.encode(text))
        assert back == text or PRE_NAMES[name].nfc


def test_with_ignore_merges_a_piece_that_is_a_token_stays_whole(path):
    coder = load_tokenizer(write(path, words_keys('llama-bpe')))
    assert coder.encode('hello') == [258]
    coder = load_tokenizer(write(path, words_keys('smaug-bpe')))
    assert len(coder.encode('hello')) == 3


def test_documents_begin_with_bos_if_the_file_or_the_kind_says_so(path):
    for pre, said, bos in (
        ('llama-bpe', None, 259),
        ('llama-bpe', False, None),
        ('qwen2', None, None),
        ('qwen2', True, 259),
    ):
        keys = words_keys(pre, bos_token_id=259, add_bos_token=said)
        assert load_tokenizer(write(path, keys)).bos_id == bos


def test_tokens_without_types_are_words_except_those_with_a_role(path):
    coder = load_tokenizer(write(path, words_keys(token_type=None, padding_token_id=260)))
    assert coder.special_tokens == {'<|end|>': 259, '<think>': 260}
    assert 260 not in coder.encode('a<think>')


BAD = {
    'rule': (
        dict(pre='bloom'),
        r"has the pre-tokenizer 'bloom' \(tokenizer.ggml.pre\), which is not supported; supported: "
        'default, gpt-2, smollm, ',
    ),
    'kind': (dict(model='rwkv'), "a tokenizer of kind 'rwkv'; supported: gpt2, llama"),
    'no tokens': (dict(tokens=None), 'has no tokenizer: no tokenizer.ggml.tokens'),
    'numbers': (dict(tokens=[1, 2]), 'tokenizer.ggml.tokens is not a list of strings'),
    'types': (dict(token_type=[1, 1]), 'token_type must have one number for each of 261 tokens'),
    'types of text': (
        dict(token_type=['a'] * 261),
        'tokenizer.ggml.token_type must have one number',
    ),
    'twice': (dict(tokens=['a', 'b', 'a'], token_type=[1] * 3), 'tokens occur twice: a'),
    'merge': (dict(merges=['h e', 'hello']), 'tokenizer.ggml.merges is not a pair of tokens'),
    'unknown merge': (dict(merges=['h zzz']), 'tokens and merges do not match: .*zzz'),
    'eos': (dict(eos_token_id=261), 'tokenizer.ggml.eos_token_id is 261, but there are 261 tokens'),
    'eos in an old file': (
        dict(eos_token_id=[1, 2], token_type=None),
        r'tokenizer.ggml.eos_token_id is \[1, 2\], but there are 261 tokens',
    ),
    'scores': (dict(model='llama'), 'ggml.scores must have one number for each of 261 tokens'),
    'scores of text': (
        dict(model='llama', scores=['high'] * 261),
        'tokenizer.ggml.scores must have one number for each of 261 tokens',
    ),
    'several kinds': (dict(model=['gpt2', 'llama']), 'tokenizer.ggml.model is not a string'),
    'several rules': (dict(pre=['gpt-2']), 'tokenizer.ggml.pre is not a string'),
}


@pytest.mark.parametrize('case', BAD)
def test_a_bad_tokenizer_is_refused_with_the_file(case, path):
    changed, message = BAD[case]
    write(path, words_keys(), **changed)
    with pytest.raises(DataError, match=f'model.gguf .*{message}'):
        load_tokenizer(path)


def test_a_tokenizer_that_does_not_say_what_ends_a_text_asks_for_it(path):
    write(path, words_keys(eos_token_id=None))
    with pytest.raises(
        DataError, match='set config.tokenizer.eos_token; its special tokens: <|end|>'
    ):
        load_tokenizer(path)


def test_a_file_without_a_gguf_header_is_refused(path, tmp_path):
    path.write_bytes(b'{"model": 1}')
    with pytest.raises(DataError, match='model.gguf is not a GGUF file'):
        load_tokenizer(path)
    with pytest.raises(
        MissingInputError, match='other.gguf does not exist; do you mean model.gguf'
    ):
        load_tokenizer(tmp_path / 'other.gguf')
    shutil.move(path, tmp_path / 'model.bin')
    with pytest.raises(MissingInputError, match='no tokenizer.json, no .model, .tiktoken'):
        load_tokenizer(tmp_path)
