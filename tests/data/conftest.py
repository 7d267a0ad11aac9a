"""Fixtures: a small corpus of many short, some long and some tiny documents."""

import random
from pathlib import Path

import pytest

from jaxfm.data import FilesConfig
from jaxfm.data.corpus.bpe import make_tokenizer
from jaxfm.data.corpus.build import Corpus, open_corpus
from jaxfm.tokenizer import BPEConfig

WORDS = 'def return self value héllo 漢字 \n \n\n    # ( ) : , 123 "a" <|eos|> \U0001f600'.split(
    ' '
)


@pytest.fixture(scope='session')
def text_directory(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp('texts')
    random_words = random.Random(0)
    for i in range(40):
        length = 1 + int(2 ** random_words.uniform(0, 10))
        text = ' '.join(random_words.choices(WORDS, k=length)) + f' {i}'
        (directory / f'{i:02d}.txt').write_text(text, encoding='utf-8')
    return directory


@pytest.fixture(scope='session')
def source_config(text_directory) -> FilesConfig:
    return FilesConfig(path=f'{text_directory}/*.txt', heldout_fraction=0.2)


@pytest.fixture(scope='session')
def bpe(source_config, tmp_path_factory):
    """A tokenizer of 400 tokens, trained on the small corpus."""
    directory = tmp_path_factory.mktemp('tokenizers')
    return make_tokenizer(BPEConfig(vocab_size=400), source_config, directory)


@pytest.fixture(scope='session')
def small_corpus(source_config, bpe, tmp_path_factory) -> Corpus:
    return open_corpus(source_config, bpe, tmp_path_factory.mktemp('cache'))
