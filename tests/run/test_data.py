"""The data of a run on several hosts: what differs is found before training."""

import os

import jax
import pydantic
import pytest

from jaxfm import code
from jaxfm.data import DATA
from jaxfm.data.dataset import open_dataset
from jaxfm.distributed import agree
from jaxfm.errors import DataError
from jaxfm.registry import OneOf
from jaxfm.run.data import _check_tokens
from jaxfm.tokenizer import BytesConfig
from jaxfm.tokenizer.build import Bytes

LINES = """
from pathlib import Path


class Lines:
    def __init__(self, path):
        self.lines = Path(path).read_text(encoding='utf-8').splitlines()

    def __len__(self):
        return len(self.lines)

    def __getitem__(self, index):
        return self.lines[index]
"""


@pytest.fixture(scope='module')
def lines_lab(tmp_path_factory):
    directory = tmp_path_factory.mktemp('lab')
    (directory / 'lines_lab.py').write_text(LINES, 'utf-8')
    code.search_beside(directory)


@pytest.fixture
def check(lines_lab, tmp_path, monkeypatch):
    """Opens the data of two hosts that differ in what they have as data.txt, and checks it."""
    monkeypatch.setattr(jax, 'process_count', lambda: 2)

    def run(name, contents, tokenize):
        values = {'arguments': {'path': 'data.txt'}} if ':' in name else {'path': 'data.txt'}
        values |= dict(name=name, sequence_length=8, batch_size=8, tokenize=tokenize)
        told = []

        def exchange(_, value):
            told.append(value)
            return {0: told[0], len(told) - 1: value}

        monkeypatch.setattr(agree, 'exchange', exchange)
        for host, content in enumerate(contents):
            directory = tmp_path / str(host)
            directory.mkdir()
            (directory / 'data.txt').write_text(content, 'utf-8')
            os.utime(directory / 'data.txt', ns=(host, host))  # as if copied without the time
            monkeypatch.chdir(directory)
            config = pydantic.TypeAdapter(OneOf(DATA).find_schema(name)).validate_python(values)
            _check_tokens([open_dataset(config, Bytes(BytesConfig(), ()), directory / 'cache')])

    return run


def lines(count, word='text'):
    return ''.join(f'{word} {number}\n' for number in range(count))


@pytest.mark.parametrize('tokenize', ['cached', 'on_the_fly'])
@pytest.mark.parametrize(
    ('name', 'others'),
    [
        ('lines_lab:Lines', lines(150)),
        ('lines_lab:Lines', lines(200, 'next')),
        ('files', lines(200, 'next')),  # as many bytes
    ],
)
def test_hosts_with_other_data_are_noticed(check, name, others, tokenize):
    with pytest.raises(DataError, match='config.data: processes 0 and 1 have different tokens'):
        check(name, [lines(200), others], tokenize)


@pytest.mark.parametrize('tokenize', ['cached', 'on_the_fly'])
@pytest.mark.parametrize('name', ['lines_lab:Lines', 'files'])
def test_hosts_may_have_the_same_data_in_other_places_and_of_other_times(check, name, tokenize):
    check(name, [lines(200), lines(200)], tokenize)
