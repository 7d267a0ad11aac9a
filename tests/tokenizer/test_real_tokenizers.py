"""Real tokenizers: GPT-2, Qwen3, DeepSeek-V3, tiktoken's encodings, and a Llama's in two forms."""

import base64
import gzip
import json
import pickle
import random
import shutil
import sys
import unicodedata

import numpy as np
import pytest
import tokenizers

from jaxfm.errors import ConfigError, DataError, MissingInputError
from jaxfm.tokenizer import TokenizerFileConfig
from jaxfm.tokenizer.build import Tokenizer, load_tokenizer, load_tokenizer_file
from jaxfm.tokenizer.files import ENCODINGS

CL100K = 'tok_tiktoken_ranks/cl100k_base.tiktoken.gz'
KINDS = {
    'gpt2': ('tok_gpt2', ''),
    'qwen3': ('tok_qwen3', ''),
    'deepseek_v3': ('tok_deepseek_v3', ''),
    'cl100k': (CL100K, 'cl100k_base'),
    'o200k': ('tok_tiktoken_ranks/o200k_base.tiktoken.gz', 'o200k_base'),
    'stories': ('stories260k_hf', ''),
    'sentencepiece': ('stories260k_hf/tokenizer.model', ''),
}


@pytest.fixture(scope='module')
def real(shared_data):
    pytest.importorskip('sentencepiece')
    pytest.importorskip('tiktoken')
    return {name: read(shared_data / path, pattern) for name, (path, pattern) in KINDS.items()}


def read(path, pattern='', **given) -> Tokenizer:
    return load_tokenizer_file(TokenizerFileConfig(path=str(path), pattern=pattern, **given))


def random_texts(number: int) -> list[str]:
    draw = random.Random(0)
    pools = [' \t\n\r', 'abcdef ABC_().,', "0123456789'", '\x00\x1c\u2028\u00a0\ufeff', 'éü漢字']
    texts = ['', ' ', '\n\n', 'a  b', "it's 12345 <|endoftext|></s><think>"]
    for _ in range(number):
        text = ''
        for _ in range(draw.randrange(40)):
            code = draw.randrange(sys.maxunicode + 1)
            anything = '' if 0xD800 <= code < 0xE000 else chr(code)
            text += draw.choice([draw.choice(draw.choice(pools)), anything])
        texts.append(text)
    return texts


def test_byte_level_tokenizers_are_lossless(real):
    texts = random_texts(300)
    for name in ('gpt2', 'deepseek_v3', 'cl100k', 'o200k'):
        encoded = real[name].encode_batch(texts)
        assert [real[name].decode(ids) for ids in encoded] == texts
    encoded = real['qwen3'].encode_batch(texts)  # its file normalises to NFC
    composed = [unicodedata.normalize('NFC', text) for text in texts]
    assert [unicodedata.normalize('NFC', real['qwen3'].decode(ids)) for ids in encoded] == composed


def test_sentencepiece_is_lossless_up_to_normalisation(real):
    for name in ('sentencepiece', 'stories'):
        for text in ('Once upon a time', 'naïve 漢字 \U0001f600', 'line\nline', "it's 3 </s> <s>"):
            assert real[name].decode(real[name].encode(text)) == text


def test_both_forms_of_one_vocabulary_agree(real):
    for text in ('Once upon a time, there was a girl.', 'She said: "Hi!"', 'x = 3'):
        assert real['stories'].encode(text) == real['sentencepiece'].encode(text)


def test_text_never_becomes_a_special_token(real):
    for coder in real.values():
        for token in list(coder.special_tokens)[:40]:
            ids = coder.encode(f'a{token} b{token}')
            assert not set(ids) & set(coder.special_tokens.values())
            assert token in coder.decode(ids)


def test_special_tokens_have_the_ids_that_the_models_know(real):
    qwen, deepseek = real['qwen3'], real['deepseek_v3']
    assert (qwen.bos_id, qwen.eos_id, qwen.vocab_size) == (None, 151645, 151669)
    assert (deepseek.bos_id, deepseek.eos_id) == (0, 1)
    assert deepseek.special_tokens['<｜User｜>'] == 128803
    assert (real['gpt2'].bos_id, real['gpt2'].eos_id) == (None, 50256)
    assert (real['cl100k'].eos_id, real['cl100k'].vocab_size) == (100257, 100277)
    assert (real['o200k'].eos_id, real['o200k'].vocab_size) == (199999, 200019)
    assert {(real[name].bos_id, real[name].eos_id) for name in ('stories', 'sentencepiece')} == {
        (1, 2)
    }
    assert 'im_start' in qwen.chat_template and 'Assistant' in deepseek.chat_template


def test_ids_are_those_of_the_libraries(real, shared_data):
    texts = ['Hello world, it is 12345\n\n  naïve 漢字', ' def f(x):\n\treturn x']
    with gzip.open(shared_data / 'tok_qwen3/tokenizer.json.gz', 'rt', encoding='utf-8') as file:
        plain = tokenizers.Tokenizer.from_str(file.read())
    for text in texts:
        assert real['qwen3'].encode(text) == plain.encode(text).ids
    assert real['gpt2'].encode('Hello world') == [15496, 995]
    assert real['cl100k'].encode('Hello world') == [9906, 1917]
    rendered = '<|im_start|>user\nHello<|im_end|>\n<think>\n'
    assert real['qwen3'].encode_parts([rendered]) == [plain.encode(rendered).ids]


def test_the_patterns_are_those_of_tiktoken(monkeypatch):
    pytest.importorskip('tiktoken')
    from tiktoken_ext import openai_public

    monkeypatch.setattr(openai_public, 'load_tiktoken_bpe', lambda *_, **__: {})
    for name, (pattern, special) in ENCODINGS.items():
        known = getattr(openai_public, name)()
        assert (known['pat_str'], known['special_tokens']) == (pattern, special)


def test_a_saved_tokenizer_is_the_same_after_loading(real, tmp_path):
    text = random_texts(5)[-1] + "it's <|endoftext|> </think>"
    for name, coder in real.items():
        coder.save(tmp_path / name / 'tokenizer')
        for again in (load_tokenizer(tmp_path / name), pickle.loads(pickle.dumps(coder))):
            assert again.fingerprint == coder.fingerprint
            assert again.encode(text) == coder.encode(text)
            assert (again.bos_id, again.eos_id) == (coder.bos_id, coder.eos_id)
            assert again.chat_template == coder.chat_template
            assert again.special_tokens == coder.special_tokens
    assert len({coder.fingerprint for coder in real.values()}) == len(real)


def test_the_config_overrides_the_files_and_changes_the_fingerprint(real, shared_data):
    other = read(shared_data / 'tok_qwen3', eos_token='<|endoftext|>', bos_token='<|im_start|>')
    assert (other.bos_id, other.eos_id) == (151644, 151643)
    templated = read(shared_data / 'tok_qwen3', chat_template='plain')
    assert templated.chat_template != real['qwen3'].chat_template
    prints = {other.fingerprint, templated.fingerprint, real['qwen3'].fingerprint}
    assert len(prints) == 3


def test_unknown_ids_decode_to_nothing(real):
    for coder in real.values():
        ids = [*coder.encode('word'), coder.vocab_size + 7]
        assert coder.decode(np.array(ids)) == 'word'
    assert real['cl100k'].decode([100256]) == ''  # between the ranks and the special tokens


def test_continued_text_gets_no_leading_space(real):
    for name in ('sentencepiece', 'stories'):
        first, second = real[name].encode_parts(['Once upon', ' a time'])
        assert real[name].decode(first + second) == 'Once upon a time'
        first, second = real[name].encode_parts(['The grand', 'mother'])
        assert real[name].decode(first + second) == 'The grandmother'


def test_a_bad_rank_is_named_with_its_line(tmp_path):
    pytest.importorskip('tiktoken')
    good = b''.join(base64.b64encode(bytes([b])) + b' %d\n' % b for b in range(256))
    path = tmp_path / 'mine.tiktoken'
    for bad in (b'a-b 256\n', b'YWI=\n', b'YWI= x\n'):
        path.write_bytes(good + bad)
        with pytest.raises(DataError, match=r'mine.tiktoken: ranks.tiktoken:257 is damaged'):
            read(path, r'\w+|\W', eos_token='<end>')
    path.write_bytes(good)
    coder = read(path, r'\w+|\W', eos_token='<end>')
    assert coder.eos_id == 256 and coder.encode('ab') == [97, 98]
    with pytest.raises(DataError, match='set config.tokenizer.eos_token'):
        read(path, r'\w+|\W')


def test_ranks_need_a_pattern(shared_data):
    for pattern, message in (
        ('', 'set config.tokenizer.pattern to cl100k_base or o200k_base'),
        ('cl100k', 'cl100k is not a known encoding; use cl100k_base'),
    ):
        with pytest.raises(ConfigError, match=message):
            read(shared_data / CL100K, pattern)


def test_what_is_missing_is_named(tmp_path, shared_data):
    with pytest.raises(MissingInputError, match='tok_qwen does not exist; do you mean tok_qwen3'):
        read(shared_data / 'tok_qwen')
    with pytest.raises(MissingInputError, match='has no tokenizer'):
        read(tmp_path)
    with pytest.raises(ConfigError, match='several tokenizers'):
        read(shared_data / 'tok_tiktoken_ranks')
    (tmp_path / 'notes.txt').write_text('x')
    with pytest.raises(ConfigError, match='notes.txt is not a tokenizer file; give a .json'):
        read(tmp_path / 'notes.txt')
    shutil.copy(shared_data / 'tok_gpt2/encoder.json.gz', tmp_path)
    with pytest.raises(MissingInputError, match='half of a tokenizer: .* is missing'):
        read(tmp_path / 'encoder.json.gz')


def test_a_tokenizer_without_an_eos_token_asks_for_one(tmp_path, shared_data):
    shutil.copy(shared_data / 'stories260k_hf/tokenizer.json', tmp_path)
    with pytest.raises(
        DataError, match='set config.tokenizer.eos_token; its special tokens: <unk>, <s>'
    ):
        read(tmp_path)
    with pytest.raises(DataError, match="vocabulary has no '</t>'; do you mean </s>"):
        read(tmp_path, eos_token='</t>')
    assert read(tmp_path, eos_token='</s>').bos_id is None


def test_damaged_files_are_named(tmp_path, shared_data):
    pytest.importorskip('sentencepiece')
    whole = (shared_data / 'tok_qwen3/tokenizer.json.gz').read_bytes()
    (tmp_path / 'tokenizer.json.gz').write_bytes(whole[:-900])
    with pytest.raises(DataError, match='tokenizer.json.gz is damaged'):
        read(tmp_path)
    (tmp_path / 'tokenizer.json.gz').unlink()
    (tmp_path / 'tokenizer.json').write_bytes(gzip.decompress(whole)[:5000])
    with pytest.raises(DataError, match='tokenizer.json is not a tokenizer'):
        read(tmp_path)
    (tmp_path / 'tokenizer_config.json').write_text('{"eos_token": ')
    with pytest.raises(DataError, match='tokenizer_config.json is damaged'):
        read(tmp_path)
    model = (shared_data / 'stories260k_hf/tokenizer.model').read_bytes()
    (tmp_path / 'x').mkdir()
    (tmp_path / 'x/tokenizer.model').write_bytes(model[:3000])
    with pytest.raises(DataError, match='tokenizer.model is damaged'):
        read(tmp_path / 'x')


def test_an_absent_library_is_named(real, monkeypatch):
    for package, name in (('sentencepiece', 'sentencepiece'), ('tiktoken', 'cl100k')):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(MissingInputError, match=rf"{package}: pip install 'jaxfm\[data\]'"):
            pickle.loads(pickle.dumps(real[name]))


def test_a_chat_template_is_found_where_hugging_face_puts_it(tmp_path, shared_data):
    shutil.copy(shared_data / 'stories260k_hf/tokenizer.json', tmp_path)
    config = tmp_path / 'tokenizer_config.json'
    said = {'eos_token': {'content': '</s>'}, 'chat_template': '{{ 1 }}'}
    config.write_text(json.dumps(said))
    assert read(tmp_path).chat_template == '{{ 1 }}'
    named = [{'name': name, 'template': name} for name in ('tool_use', 'default')]
    config.write_text(json.dumps(said | {'chat_template': named}))
    assert read(tmp_path).chat_template == 'default'
    (tmp_path / 'chat_template.jinja').write_text('{{ 2 }}')
    assert read(tmp_path).chat_template == '{{ 2 }}'


def test_white_space_that_a_token_absorbs_leaves_no_ids(tmp_path):
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({'a': 0, '\n': 1, ' ': 2}, []))
    end = tokenizers.AddedToken('<|end|>', special=True, rstrip=True)
    mask = tokenizers.AddedToken('<|mask|>', special=True, lstrip=True)
    backend.add_special_tokens([end, mask])
    backend.save(str(tmp_path / 'tokenizer.json'))
    coder = read(tmp_path, eos_token='<|end|>')
    text = 'a<|end|>\n a \n<|mask|> a'
    assert sum(coder.encode_parts([text]), []) == backend.encode(text).ids
    assert sum(coder.encode_parts([text[:8], text[8:]]), []) == backend.encode(text).ids


def test_markup_stays_text_in_continued_text(tmp_path, shared_data):
    backend = tokenizers.Tokenizer.from_file(str(shared_data / 'stories260k_hf/tokenizer.json'))
    backend.add_tokens(['<think>'])
    backend.save(str(tmp_path / 'tokenizer.json'))
    coder = read(tmp_path, eos_token='</s>')
    filled = coder.guard('b<think>', '\U00014400')
    first, second = coder.encode_parts(['a<think>', filled], '\U00014400')
    assert coder.special_tokens['<think>'] in first
    assert coder.special_tokens['<think>'] not in second
    assert coder.decode(second) == 'b<think>'


def test_text_never_becomes_a_special_token_of_a_unigram_model(tmp_path):
    words = {'<unk>': 0, '</s>': 1, '<': 2, '/': 3, 's': 4, '>': 5, 'a': 6}
    backend = tokenizers.Tokenizer(
        tokenizers.models.Unigram([(word, -1.0) for word in words], unk_id=0)
    )
    backend.add_special_tokens(['<unk>', '</s>'])
    backend.save(str(tmp_path / 'tokenizer.json'))
    coder = read(tmp_path, eos_token='</s>')
    assert coder.encode('a</s>a') == [6, 2, 3, 4, 5, 6]


def test_text_after_a_prompt_keeps_its_leading_space(shared_data):
    stories = load_tokenizer(shared_data / 'stories260k_hf')
    before, ids = stories.encode('Once upon'), stories.encode('a time')
    assert stories.decode(ids) == 'a time'
    assert stories.decode_after([1, *before], ids) == ' a time'
    assert stories.decode_after([], ids) == 'a time'
