import json

import numpy as np
import pytest

from jaxfm.data import FilesData
from jaxfm.data.dataset import open_dataset
from jaxfm.evals import contamination
from jaxfm.evals.contamination import Grams, words_of
from jaxfm.tokenizer import BytesConfig
from jaxfm.tokenizer.build import build_tokenizer

WORDS = [f'w{n}' for n in range(3000)]


@pytest.fixture(scope='module', params=['cached', 'on_the_fly'])
def data(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp('contamination')
    draw = np.random.default_rng(0)
    texts = [' '.join(draw.choice(WORDS, 60)) for _ in range(200)]
    path = directory / 'texts.jsonl'
    path.write_text(''.join(json.dumps({'text': text}) + '\n' for text in texts))
    config = FilesData(path=str(path), sequence_length=64, batch_size=2, tokenize=request.param)
    return open_dataset(config, build_tokenizer(BytesConfig(), ()), directory / 'cache')


def train_texts(data):
    return list(data.train_texts(1 << 30))


def test_prompts_with_thirteen_words_of_the_training_text_are_found(data):
    words = train_texts(data)[7].split()
    prompts = [
        'before ' + ' '.join(words[20:33]) + ' after',
        'Before, ' + ', '.join(words[20:33]).upper() + '!',  # other case and punctuation
        ' '.join([*words[20:32], 'other', *words[33:44]]),  # 12 in a row
        ' '.join(words[:12][::-1]) + ' and more words in the end',
    ]
    result = contamination.measure(data, prompts)
    assert (result['prompts'], result['contaminated']) == (4, 2)
    assert result['contaminated_share'] == 0.5 and result['ngram'] == 13


def test_a_shorter_prompt_is_found_if_all_of_its_words_occur(data):
    words = train_texts(data)[11].split()
    prompts = [' '.join(words[3:8]), ' '.join([*words[3:8], 'absent']), '!?', '']
    assert contamination.measure(data, prompts)['contaminated'] == 1


def test_an_n_gram_does_not_span_two_documents(data):
    first, second = (text.split() for text in train_texts(data)[:2])
    prompt = ' '.join(first[-7:] + second[:7])
    assert contamination.measure(data, [prompt])['contaminated'] == 0


def test_held_out_text_is_not_training_text(data):
    prompts = [document.text for document in data.heldout_documents]
    assert prompts and contamination.measure(data, prompts)['contaminated'] == 0


def test_at_most_max_bytes_are_read_and_the_result_says_how_many(data):
    prompts = [' '.join(text.split()[:13]) for text in train_texts(data)]
    everything = contamination.measure(data, prompts)
    size = sum(len(text) for text in train_texts(data))
    assert everything['contaminated'] == len(prompts) and everything['bytes_read'] == size
    part = contamination.measure(data, prompts, max_bytes=size // 4)
    assert part['bytes_read'] <= size // 4
    assert 0.2 < part['contaminated_share'] < 0.3
    assert part['bytes_total'] in (0, size)


def test_equal_hashes_alone_are_not_a_match(monkeypatch):
    monkeypatch.setattr(contamination, '_FACTOR', np.uint64(1))  # any order has the same hash
    grams = Grams(['a b c d'], 4)
    grams.scan('d c b a'.split())
    assert not grams.found
    grams.scan('x a b c d'.split())
    assert grams.found == {0}


def test_words_are_letters_and_digits_in_lower_case():
    assert words_of('Hello, wörld! 3+4=7') == ['hello', 'wörld', '3', '4', '7']
