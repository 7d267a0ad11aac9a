import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from jaxfm.data import BPEConfig, BytesConfig, corpus, token_cache
from jaxfm.errors import DataError, StorageError


@pytest.fixture
def built(data_config, tmp_path):
    """(config, cache directory, directory of the one cache in it)."""
    corpus.build(data_config, tmp_path)
    (directory,) = tmp_path.iterdir()
    return data_config, tmp_path, directory


def test_the_stream_is_every_document_between_its_special_tokens(small_corpus):
    tokenizer, cache = small_corpus.tokenizer, small_corpus.heldout
    assert cache.num_documents == len(small_corpus.heldout_documents)
    for i, (_, text) in enumerate(small_corpus.heldout_documents):
        ids = cache.tokens[cache.offsets[i] : cache.offsets[i + 1]].tolist()
        assert ids == [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
        assert cache.document_bytes[i] == len(text.encode())


def test_statistics_agree_with_the_files(small_corpus, text_directory):
    statistics = small_corpus.statistics
    files = sorted(text_directory.iterdir())
    total = statistics['train_documents'] + statistics['heldout_documents']
    assert total == len(files)
    size = statistics['train_bytes'] + statistics['heldout_bytes']
    assert size == sum(file.stat().st_size for file in files)
    lengths = np.diff(small_corpus.train.offsets)
    assert statistics['longer_than_context'] == (lengths > 32).sum() > 0
    assert statistics['train_tokens'] == lengths.sum() == len(small_corpus.train.tokens)


def test_a_second_build_opens_the_first_one(built, monkeypatch):
    config, cache_dir, _ = built
    monkeypatch.setattr(corpus, '_build', None)
    assert corpus.build(config, cache_dir).train.num_tokens > 0


def test_another_text_tokenizer_or_vocabulary_is_another_corpus(
    data_config, text_directory, tmp_path
):
    shutil.copytree(text_directory, tmp_path / 'texts')
    (tmp_path / 'texts' / '00.txt').write_text('changed')
    glob = [f'{tmp_path}/texts/*.txt']
    changed = data_config.source.model_copy(update={'files': glob})
    configs = [
        data_config,
        data_config.model_copy(update={'source': changed}),
        data_config.model_copy(update={'tokenizer': BPEConfig(vocab_size=300)}),
        data_config.model_copy(update={'tokenizer': BytesConfig()}),
    ]
    fingerprints = {corpus.build(config, tmp_path / 'cache').fingerprint for config in configs}
    assert len(fingerprints) == len(configs)


def test_documents_in_pieces_lose_nothing(data_config, small_corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(token_cache, 'CHUNK_CHARACTERS', 100)
    pieces = corpus.build(data_config, tmp_path)
    cache = pieces.heldout
    for i, (_, text) in enumerate(pieces.heldout_documents):
        ids = cache.tokens[cache.offsets[i] : cache.offsets[i + 1]]
        assert pieces.tokenizer.decode(ids) == text


@pytest.mark.parametrize('name', ['train.tokens', 'heldout.documents.npy', 'tokenizer.json'])
def test_a_truncated_file_is_named(built, name):
    config, cache_dir, directory = built
    content = (directory / name).read_bytes()
    (directory / name).write_bytes(content[:-2])
    with pytest.raises(DataError, match=rf'{name} has {len(content) - 2} bytes'):
        corpus.build(config, cache_dir)


@pytest.mark.parametrize('name', ['train.tokens', 'heldout.documents.npy', 'tokenizer.json'])
def test_one_changed_byte_is_noticed(built, name):
    config, cache_dir, directory = built
    content = bytearray((directory / name).read_bytes())
    content[len(content) // 2] ^= 1
    (directory / name).write_bytes(content)
    with pytest.raises(DataError, match=f'{name}: digest mismatch'):
        corpus.build(config, cache_dir)


@pytest.mark.parametrize('content', ['', '[]', '{"train.tokens": 3}', '{"train'])
def test_a_damaged_index_is_named(built, content):
    config, cache_dir, directory = built
    (directory / corpus.INDEX).write_text(content)
    with pytest.raises(DataError, match='index.json is damaged'):
        corpus.build(config, cache_dir)


def test_a_missing_file_is_named(built):
    config, cache_dir, directory = built
    (directory / 'train.tokens').unlink()
    with pytest.raises(DataError, match='train.tokens is missing'):
        corpus.build(config, cache_dir)


def test_a_full_disk_leaves_nothing_behind(data_config, tmp_path, monkeypatch):
    def no_room(file):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(token_cache, '_to_disk', no_room)
    with pytest.raises(StorageError, match='No space left'):
        corpus.build(data_config, tmp_path)
    assert not list(tmp_path.iterdir())


BUILD_AND_DIE = """
import os, signal, sys
from jaxfm.data import DataConfig, corpus
corpus._publish = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
corpus.build(DataConfig.model_validate_json(sys.argv[1]), sys.argv[2])
"""


def test_a_killed_build_is_not_taken_for_a_cache(data_config, tmp_path):
    arguments = [data_config.model_dump_json(), str(tmp_path)]
    killed = subprocess.run([sys.executable, '-c', BUILD_AND_DIE, *arguments], timeout=60)
    assert killed.returncode == -9
    assert [path.match('*.partial-*') for path in tmp_path.iterdir()] == [True]
    assert corpus.build(data_config, tmp_path).train.num_tokens > 0


def test_builds_at_the_same_time_agree(data_config, tmp_path):
    with ThreadPoolExecutor(4) as pool:
        built = list(pool.map(lambda _: corpus.build(data_config, tmp_path), range(4)))
    assert len({one.fingerprint for one in built}) == 1
    assert len(list(tmp_path.iterdir())) == 1


def test_xz_needs_little_for_repetition_and_eight_bits_for_noise():
    assert corpus.xz_bits_per_byte(['abc' * 10_000]) < 0.1
    noise = np.random.default_rng(0).integers(0, 128, 20_000).astype(np.uint8).tobytes().decode()
    assert 6.9 < corpus.xz_bits_per_byte([noise[:9_000], noise[9_000:]]) < 7.5
