import fcntl
import gzip
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from jaxfm.chat.render import Chat
from jaxfm.data import FilesConfig
from jaxfm.data.corpus import build, encode, ledger, token_cache, workers
from jaxfm.data.corpus.bpe import make_tokenizer, read_training_texts
from jaxfm.data.corpus.build import INDEX, make_corpus, open_corpus, verify_corpus
from jaxfm.data.corpus.ledger import Ledger
from jaxfm.data.sources import files, formats
from jaxfm.data.sources.files import Files
from jaxfm.errors import (
    DataError,
    MissingInputError,
    PermissionDeniedError,
    RunError,
    StorageError,
)
from jaxfm.storage import find, whole
from jaxfm.tokenizer import TOKENIZERS, BPEConfig, BytesConfig
from tests.runs import PATIENCE

BYTES = make_tokenizer(BytesConfig(), None, None)


@pytest.fixture
def built(source_config, bpe, tmp_path):
    """(config, directory of caches, the one cache in it)."""
    return source_config, tmp_path, open_corpus(source_config, bpe, tmp_path).directory


def write_lines(path, texts):
    path.write_text(''.join(json.dumps({'text': text}) + '\n' for text in texts))


def records(tmp_path, count=300, **options):
    """The config of a .jsonl of `count` texts, which `many_shards` splits into many shards."""
    write_lines(tmp_path / 'a.jsonl', [f'text {i} ' * (1 + i % 9) for i in range(count)])
    return FilesConfig(path=str(tmp_path / 'a.jsonl'), heldout_fraction=0.2, **options)


@pytest.fixture
def many_shards(monkeypatch):
    monkeypatch.setattr(formats, 'SHARD_BYTES', 2500)


def same(one, other):
    for side in token_cache.SIDES:
        a, b = getattr(one, side), getattr(other, side)
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_array_equal(a.offsets, b.offsets)
        np.testing.assert_array_equal(a.document_bytes, b.document_bytes)
    assert one.fingerprint == other.fingerprint and one.statistics == other.statistics
    assert one.heldout_documents == other.heldout_documents


# What is in a cache.


def test_the_stream_is_every_document_between_its_special_tokens(small_corpus):
    tokenizer, cache = small_corpus.tokenizer, small_corpus.heldout
    assert cache.num_documents == len(small_corpus.heldout_documents) > 3
    assert cache.mask is None and not cache.is_chat
    for i, document in enumerate(small_corpus.heldout_documents):
        ids = cache.tokens[cache.offsets[i] : cache.offsets[i + 1]].tolist()
        assert ids == [tokenizer.bos_id, *tokenizer.encode(document.text), tokenizer.eos_id]
        assert cache.document_bytes[i] == document.num_bytes


def test_a_tokenizer_without_bos_puts_nothing_in_front(tmp_path, shared_data):
    for name in ('encoder.json', 'vocab.bpe'):
        content = gzip.decompress((shared_data / 'tok_gpt2' / f'{name}.gz').read_bytes())
        (tmp_path / name).write_bytes(content)
    (tmp_path / 'tokenizer_config.json').write_text('{"eos_token": "<|endoftext|>"}')
    gpt2 = make_tokenizer(TOKENIZERS['file'].schema(path=str(tmp_path)), None, tmp_path)
    made = open_corpus(records(tmp_path, 40), gpt2, tmp_path / 'cache')
    cache = made.heldout
    for i, document in enumerate(made.heldout_documents):
        ids = cache.tokens[cache.offsets[i] : cache.offsets[i + 1]].tolist()
        assert ids == [*gpt2.encode(document.text), gpt2.eos_id]


def test_chats_have_the_ids_and_the_mask_of_their_template(tmp_path):
    chats = [
        {'messages': [{'role': 'user', 'content': f'{i}'}, {'role': 'assistant', 'content': 'ok'}]}
        for i in range(40)
    ]
    (tmp_path / 'a.jsonl').write_text(''.join(json.dumps(chat) + '\n' for chat in chats))
    config = FilesConfig(path=str(tmp_path / 'a.jsonl'), heldout_fraction=0.3)
    made = open_corpus(config, BYTES, tmp_path / 'cache')
    assert made.kind == made.train.kind == 'chat'
    chat, supervised = Chat(BYTES), 0
    for i, document in enumerate(made.heldout_documents):
        ids, mask = chat.encode(document.messages)
        start, stop = made.heldout.offsets[i : i + 2]
        np.testing.assert_array_equal(made.heldout.tokens[start:stop], ids)
        np.testing.assert_array_equal(made.heldout.mask[start:stop], mask)
        supervised += mask.sum()
    assert made.statistics['heldout_supervised_tokens'] == supervised > 0


def test_statistics_agree_with_the_files(small_corpus, text_directory):
    statistics = small_corpus.statistics
    paths = sorted(text_directory.iterdir())
    total = statistics['train_documents'] + statistics['heldout_documents']
    assert total == len(paths)
    size = statistics['train_bytes'] + statistics['heldout_bytes']
    assert size == sum(path.stat().st_size for path in paths)
    lengths = np.diff(small_corpus.train.offsets)
    assert statistics['train_tokens'] == lengths.sum() == len(small_corpus.train.tokens)
    assert statistics['train_longest_document'] == lengths.max()
    prefix = 'train_length_histogram/'
    histogram = {int(k[len(prefix) :]): n for k, n in statistics.items() if k.startswith(prefix)}
    for bound, count in histogram.items():
        assert count == ((lengths <= bound) & (lengths > bound // 2)).sum()
    assert sum(histogram.values()) == len(lengths)
    assert statistics['bad_records'] == statistics['duplicates_dropped'] == 0


def test_documents_in_pieces_lose_nothing(source_config, bpe, tmp_path, monkeypatch):
    monkeypatch.setattr(encode, 'PIECE_CHARACTERS', 100)
    monkeypatch.setattr(encode, 'CHUNK_BYTES', 500)
    made = open_corpus(source_config, bpe, tmp_path)
    cache = made.heldout
    for i, document in enumerate(made.heldout_documents):
        ids = cache.tokens[cache.offsets[i] : cache.offsets[i + 1]]
        assert made.tokenizer.decode(ids) == document.text


def test_one_of_equal_files_is_kept_the_heldout_one_first(tmp_path, many_shards):
    for name, text in {'a': 'one', 'b': 'two', 'c': 'one', 'd': 'three', 'h': 'two'}.items():
        (tmp_path / f'{name}.txt').write_text(text * 400)
    config = FilesConfig(path=f'{tmp_path}/*.txt', heldout_path=f'{tmp_path}/h.txt')
    made = open_corpus(config, BYTES, tmp_path / 'cache')
    assert made.statistics['duplicates_dropped'] == 2
    assert [document.name for document in made.heldout_documents] == ['h.txt']
    cache = made.train
    texts = [BYTES.decode(cache.tokens[a:b]) for a, b in zip(cache.offsets, cache.offsets[1:])]
    assert texts == ['one' * 400, 'three' * 400]


def test_only_the_first_of_very_many_heldout_documents_are_kept(tmp_path, monkeypatch, many_shards):
    config = records(tmp_path)
    whole = open_corpus(config, BYTES, tmp_path / 'one').heldout_documents
    monkeypatch.setattr(token_cache, 'HELDOUT_TEXT_BYTES', 2000)
    made = open_corpus(config, BYTES, tmp_path / 'other')
    assert 5 < len(made.heldout_documents) < len(whole) == made.heldout.num_documents
    assert made.heldout_documents == whole[: len(made.heldout_documents)]


def test_one_of_few_records_is_held_out_for_any_fraction(tmp_path):
    write_lines(tmp_path / 'a.jsonl', ['one', 'two', 'three'])
    config = FilesConfig(path=str(tmp_path / 'a.jsonl'), heldout_fraction=1e-6)
    made = open_corpus(config, BYTES, tmp_path / 'cache')
    assert (made.train.num_documents, made.heldout.num_documents) == (2, 1)


def test_a_side_without_documents_is_an_error_that_names_the_options(tmp_path, monkeypatch):
    monkeypatch.setattr(files, 'FEW_BYTES', 0)
    write_lines(tmp_path / 'a.jsonl', ['one', 'two'])
    config = FilesConfig(path=str(tmp_path / 'a.jsonl'), heldout_fraction=1e-6)
    with pytest.raises(DataError, match='none of 2 documents is held out; raise heldout_fraction'):
        open_corpus(config, BYTES, tmp_path / 'cache')
    config = FilesConfig(path=str(tmp_path / 'a.jsonl'), heldout_fraction=1 - 1e-6)
    with pytest.raises(DataError, match='none of 2 documents is left to train on'):
        open_corpus(config, BYTES, tmp_path / 'cache')


def test_texts_and_chats_in_one_source_are_an_error(tmp_path):
    chat = {'messages': [{'role': 'assistant', 'content': 'x'}]}
    (tmp_path / 'a.jsonl').write_text('{"text": "x"}\n' + json.dumps(chat))
    with pytest.raises(DataError, match='a.jsonl:2 is a chat, a.jsonl:1 is a text'):
        open_corpus(FilesConfig(path=str(tmp_path / 'a.jsonl')), BYTES, tmp_path / 'cache')


# Opening a cache, and what is refused.


def test_a_second_build_opens_the_first_one_and_reads_no_contents(built, bpe, monkeypatch):
    config, cache_dir, _ = built
    monkeypatch.setattr(build, '_build', None)
    monkeypatch.setattr(find.File, 'open', None)
    assert open_corpus(config, bpe, cache_dir).train.num_tokens > 0


def test_another_text_tokenizer_or_fraction_is_another_corpus(
    source_config, bpe, text_directory, tmp_path
):
    shutil.copytree(text_directory, tmp_path / 'texts')
    (tmp_path / 'texts' / '00.txt').write_text('changed')
    changed = source_config.model_copy(update={'path': f'{tmp_path}/texts/*.txt'})
    share = source_config.model_copy(update={'heldout_fraction': 0.4})
    pairs = [(source_config, bpe), (changed, bpe), (share, bpe), (source_config, BYTES)]
    fingerprints = {open_corpus(*pair, tmp_path / 'cache').fingerprint for pair in pairs}
    assert len(fingerprints) == len(pairs)


def test_the_fingerprint_depends_on_the_tokens_and_not_on_their_origin(small_corpus, bpe, tmp_path):
    shutil.copytree(small_corpus.index['recipe']['source']['path'][:-6], tmp_path / 'texts')
    for path in (tmp_path / 'texts').iterdir():
        os.utime(path, ns=(1, 1))
    config = FilesConfig(path=f'{tmp_path}/texts/*.txt', heldout_fraction=0.2)
    made = open_corpus(config, bpe, tmp_path / 'cache')
    assert made.directory.name != small_corpus.directory.name
    assert made.fingerprint == small_corpus.fingerprint


FILES = ['train.tokens', 'heldout.offsets.npy', 'tokenizer/tokenizer.json']


@pytest.mark.parametrize('name', FILES)
def test_a_truncated_file_is_named(built, bpe, name):
    config, cache_dir, directory = built
    content = (directory / name).read_bytes()
    (directory / name).write_bytes(content[:-2])
    with pytest.raises(DataError, match=rf'{name} has {len(content) - 2} bytes'):
        open_corpus(config, bpe, cache_dir)


@pytest.mark.parametrize('name', FILES)
def test_verify_notices_one_changed_byte(built, name):
    directory = built[-1]
    verify_corpus(directory)
    content = bytearray((directory / name).read_bytes())
    content[len(content) // 2] ^= 1
    (directory / name).write_bytes(content)
    with pytest.raises(DataError, match=f'{name}: digest mismatch'):
        verify_corpus(directory)


@pytest.mark.parametrize('content', ['', '[]', '{"train.tokens": 3}', '{"train', '{"files": {}}'])
def test_a_damaged_index_is_named(built, bpe, content):
    config, cache_dir, directory = built
    (directory / INDEX).write_text(content)
    with pytest.raises(DataError, match='index.json is damaged'):
        open_corpus(config, bpe, cache_dir)


def test_a_missing_file_is_named(built, bpe):
    config, cache_dir, directory = built
    (directory / 'train.tokens').unlink()
    with pytest.raises(DataError, match='train.tokens is missing'):
        open_corpus(config, bpe, cache_dir)


# A cache in a directory of the user's choice.


def test_the_error_for_a_missing_cache_gives_the_command_that_makes_it(source_config, tmp_path):
    with pytest.raises(
        MissingInputError, match='tools.corpus build --config FILE --output .*/mine'
    ):
        open_corpus(source_config, BYTES, tmp_path, str(tmp_path / 'mine'))
    with pytest.raises(MissingInputError, match='mine/web does not exist; .*--output .*/mine`$'):
        open_corpus(source_config, BYTES, tmp_path, str(tmp_path / 'mine'), 'web')
    assert not list(tmp_path.iterdir())


def test_a_chosen_cache_is_used_if_the_files_are_the_same_or_absent(source_config, tmp_path):
    shutil.copytree(source_config.path[:-6], tmp_path / 'texts', copy_function=shutil.copy2)
    config = source_config.model_copy(update={'path': f'{tmp_path}/texts/*.txt'})
    mine = tmp_path / 'mine'
    made = make_corpus(config, BYTES, mine)
    same(open_corpus(config, BYTES, tmp_path, str(mine)), made)
    (tmp_path / 'texts').rename(tmp_path / 'moved')
    moved = config.model_copy(update={'path': f'{tmp_path}/moved/*.txt'})
    same(open_corpus(moved, BYTES, tmp_path, str(mine)), made)
    # Without the files, the config must equal the one that made the cache.
    same(open_corpus(config, BYTES, tmp_path, str(mine)), made)
    elsewhere = config.model_copy(update={'path': '/nowhere/*.txt'})
    with pytest.raises(DataError, match="config.data.path was '.*' and is '/nowhere/"):
        open_corpus(elsewhere, BYTES, tmp_path, str(mine))


def test_a_chosen_cache_that_is_older_than_a_key_of_its_config_is_used(tmp_path):
    config, mine = records(tmp_path, 40), tmp_path / 'mine'
    made = make_corpus(config, BYTES, mine)
    index = json.loads((mine / INDEX).read_text('utf-8'))
    assert index.pop('kind') == 'text'
    assert index['recipe']['source']['fields'].pop('chosen') == ''
    (mine / INDEX).write_text(json.dumps(index), 'utf-8')
    same(open_corpus(config, BYTES, tmp_path, str(mine)), made)
    fields = config.fields.model_copy(update={'chosen': 'best'})
    with pytest.raises(DataError, match="config.data.fields was .*'chosen': ''.* and is .*'best'"):
        open_corpus(config.model_copy(update={'fields': fields}), BYTES, tmp_path, str(mine))


@pytest.mark.parametrize('what', ['files', 'config', 'tokenizer'])
def test_a_chosen_cache_of_other_data_is_refused_and_rebuilt_only_on_request(tmp_path, bpe, what):
    config, tokenizer = records(tmp_path, 40), BYTES
    mine = tmp_path / 'mine'
    make_corpus(config, tokenizer, mine)
    if what == 'files':
        config, said = records(tmp_path, 41), "the source's files differ"
    if what == 'config':
        config = config.model_copy(update={'max_bad_records': 7})
        said = 'config.data.max_bad_records was 0 and is 7'
    if what == 'tokenizer':
        tokenizer, said = bpe, 'the tokenizer differs'
    for open_it in (
        lambda: open_corpus(config, tokenizer, tmp_path, str(mine)),
        lambda: make_corpus(config, tokenizer, mine),
    ):
        with pytest.raises(DataError, match=rf'{said}.*tools.corpus build .* --rebuild'):
            open_it()
    made = make_corpus(config, tokenizer, mine, rebuild=True)
    same(open_corpus(config, tokenizer, tmp_path, str(mine)), made)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['a.jsonl', 'mine']


def test_parts_of_another_recipe_are_not_resumed(tmp_path, many_shards, monkeypatch):
    mine, config = tmp_path / 'mine', records(tmp_path)
    monkeypatch.setattr(token_cache, 'join', _no_room)
    with pytest.raises(StorageError):
        make_corpus(config, BYTES, mine)
    monkeypatch.undo()
    assert (tmp_path / 'mine.partial').exists()
    other = config.model_copy(update={'heldout_fraction': 0.5})
    same(make_corpus(other, BYTES, mine), open_corpus(other, BYTES, tmp_path / 'cache'))


# Building: parts, worker processes, kills.


def _no_room(*_, **__):
    raise OSError(28, 'No space left on device')


def test_a_full_disk_is_a_storage_error_and_the_next_build_resumes(
    tmp_path, monkeypatch, many_shards
):
    config, cache_dir = records(tmp_path), tmp_path / 'cache'
    expected = open_corpus(config, BYTES, tmp_path / 'expected')
    calls, sync = [], whole.sync

    def sometimes(file):
        calls.append(file)
        return sync(file) if len(calls) < 30 else _no_room()

    monkeypatch.setattr(whole, 'sync', sometimes)
    with pytest.raises(StorageError, match='No space left'):
        open_corpus(config, BYTES, cache_dir)
    monkeypatch.undo()
    monkeypatch.setattr(formats, 'SHARD_BYTES', 2500)
    done = len(list(cache_dir.glob('*.partial/parts/*')))
    made, make_part = [], workers.make_part
    monkeypatch.setattr(workers, 'make_part', lambda *a: made.append(a) or make_part(*a))
    same(open_corpus(config, BYTES, cache_dir), expected)
    shards = len(Files(config).shards())
    assert 0 < done < shards and len(made) == shards - done
    assert len(list(cache_dir.iterdir())) == 1


def test_a_directory_that_cannot_be_written_is_a_permission_error(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, 'Permission denied')

    monkeypatch.setattr(whole, 'sync', refuse)
    with pytest.raises(PermissionDeniedError, match='cache cannot be written'):
        open_corpus(records(tmp_path), BYTES, tmp_path / 'cache')


@pytest.mark.parametrize('bad', [(), (37, 200, 210)])
def test_several_processes_make_the_same_corpus_as_one(
    tmp_path, bpe, monkeypatch, many_shards, bad, caplog
):
    config = records(tmp_path, max_bad_records=len(bad))
    _spoil(tmp_path / 'a.jsonl', bad)
    expected = open_corpus(config, bpe, tmp_path / 'one')
    assert expected.statistics['bad_records'] == len(bad)
    monkeypatch.setattr(workers, 'PARALLEL_BYTES', 0)
    monkeypatch.setattr(os, 'sched_getaffinity', lambda _: range(3))
    # Workers do not see the patched SHARD_BYTES, but a shard says where it begins and ends.
    with caplog.at_level('INFO', logger='jaxfm'):
        same(open_corpus(config, bpe, tmp_path / 'three'), expected)
    assert 'tokenising in 3 processes' in caplog.text


def _spoil(path, numbers):
    lines = path.read_text().splitlines()
    for number in numbers:
        lines[number - 1] = '{'
    path.write_text('\n'.join(lines) + '\n')


@pytest.mark.parametrize('allowed, said', [(0, 'a.jsonl:37'), (2, 'a.jsonl:210')])
def test_the_error_is_the_same_for_any_number_of_processes(
    tmp_path, monkeypatch, many_shards, allowed, said
):
    config = records(tmp_path, max_bad_records=allowed)
    _spoil(tmp_path / 'a.jsonl', (37, 200, 210, 211, 212, 213))
    errors = []
    for count in (1, 2):
        if count > 1:
            monkeypatch.setattr(workers, 'PARALLEL_BYTES', 0)
            monkeypatch.setattr(os, 'sched_getaffinity', lambda _: range(2))
        with pytest.raises(DataError, match=said) as error:
            open_corpus(config, BYTES, tmp_path / f'cache{count}')
        errors.append(str(error.value))
        # The data has to change, so no parts are kept to resume from.
        assert not list((tmp_path / f'cache{count}').iterdir())
    assert errors[0] == errors[1]


def test_a_chat_that_its_template_refuses_is_a_bad_record(tmp_path, many_shards):
    good = {'messages': [{'role': 'user', 'content': 'q'}, {'role': 'assistant', 'content': 'a'}]}
    chats = [
        {**good, 'messages': [*good['messages'][:-1], {'role': 'assistant', 'content': f'{i}'}]}
        for i in range(60)
    ]
    chats[40] = {'messages': good['messages'][:1]}
    (tmp_path / 'a.jsonl').write_text(''.join(json.dumps(chat) + '\n' for chat in chats))
    config = FilesConfig(path=str(tmp_path / 'a.jsonl'), heldout_fraction=0.2)
    with pytest.raises(DataError, match='a.jsonl:41: '):
        open_corpus(config, BYTES, tmp_path / 'cache')
    config = config.model_copy(update={'max_bad_records': 1})
    statistics = open_corpus(config, BYTES, tmp_path / 'cache').statistics
    assert statistics['bad_records'] == 1
    assert statistics['train_documents'] + statistics['heldout_documents'] == 59


KILLED = """
import os, signal, sys
import multiprocessing
from jaxfm.data import FilesConfig
from jaxfm.data.corpus import build, workers
from jaxfm.data.corpus.ledger import Ledger
from jaxfm.data.sources import formats
from jaxfm.storage import whole
from jaxfm.tokenizer import BytesConfig
from jaxfm.tokenizer.build import build_tokenizer

if __name__ == '__main__':
    formats.SHARD_BYTES = 2500
    if sys.argv[3] == 'publishing':
        finish = build._finish
        build._finish = lambda *a: finish(*a) or os.kill(os.getpid(), signal.SIGKILL)
    if sys.argv[3] == 'parts':
        done, publish = [], whole.publish
        def publish_some(*a):
            publish(*a)
            done.append(a)
            if len(done) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
        whole.publish = publish_some
    if sys.argv[3] == 'processes':
        workers.PARALLEL_BYTES = 0
        os.sched_getaffinity = lambda _: range(2)
        report = Ledger.add
        def add(self, index, result):
            if index == 3:
                print([child.pid for child in multiprocessing.active_children()])
                sys.stdout.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            report(self, index, result)
        Ledger.add = add
    tokenizer = build_tokenizer(BytesConfig(), ())
    build.open_corpus(FilesConfig.model_validate_json(sys.argv[1]), tokenizer, sys.argv[2])
"""


@pytest.mark.parametrize('when', ['parts', 'publishing', 'processes'])
def test_a_killed_build_is_resumed_and_never_mistaken_for_a_cache(
    tmp_path, when, many_shards, monkeypatch
):
    config, cache_dir = records(tmp_path), tmp_path / 'cache'
    (tmp_path / 'killed.py').write_text(KILLED)
    arguments = [tmp_path / 'killed.py', config.model_dump_json(), cache_dir, when]
    killed = subprocess.run(
        [sys.executable, *map(str, arguments)], timeout=PATIENCE, stdout=-1, text=True
    )
    assert killed.returncode == -9
    assert [path.suffix for path in cache_dir.iterdir()] == ['.partial']
    shards = Files(config).shards()
    parts = [path for path in cache_dir.glob('*.partial/parts/*') if not path.suffix]
    assert parts and (len(parts) == len(shards)) == (when == 'publishing')
    made, make_part = [], workers.make_part
    monkeypatch.setattr(workers, 'make_part', lambda *a: made.append(a) or make_part(*a))
    resumed = open_corpus(config, BYTES, cache_dir)
    assert len(made) <= len(shards) - len(parts)
    same(resumed, open_corpus(config, BYTES, tmp_path / 'expected'))
    if when == 'processes':
        _await_the_end_of(eval(killed.stdout))


def _await_the_end_of(pids):
    assert len(pids) == 2
    deadline = time.monotonic() + PATIENCE
    while any(_is_alive(pid) for pid in pids):
        assert time.monotonic() < deadline, 'processes outlive the build that started them'
        time.sleep(0.05)


def _is_alive(pid):
    try:
        return Path(f'/proc/{pid}/stat').read_text().split()[2] != 'Z'
    except OSError:
        return False


@pytest.mark.parametrize('are_gone', [False, True], ids=['soon', 'before they get more to do'])
def test_a_dead_worker_is_an_error_that_says_how_to_resume(
    tmp_path, monkeypatch, many_shards, are_gone
):
    monkeypatch.setattr(workers, 'PARALLEL_BYTES', 0)
    monkeypatch.setattr(os, 'sched_getaffinity', lambda _: range(2))
    add = Ledger.add

    def kill_one(self, index, result):
        children = multiprocessing.active_children()
        for process in children if are_gone else children[:1]:
            os.kill(process.pid, signal.SIGKILL)
            if are_gone:
                process.join()
        add(self, index, result)

    monkeypatch.setattr(Ledger, 'add', kill_one)
    config, cache_dir = records(tmp_path), tmp_path / 'cache'
    with pytest.raises(StorageError, match='process died.*run the same command again'):
        open_corpus(config, BYTES, cache_dir)
    assert not multiprocessing.active_children()
    monkeypatch.undo()
    monkeypatch.setattr(formats, 'SHARD_BYTES', 2500)
    assert open_corpus(config, BYTES, cache_dir).train.num_tokens > 0


def test_builds_at_the_same_time_agree(tmp_path, many_shards):
    config, cache_dir = records(tmp_path), tmp_path / 'cache'
    with ThreadPoolExecutor(4) as pool:
        built = list(pool.map(lambda _: open_corpus(config, BYTES, cache_dir), range(4)))
    assert len({one.fingerprint for one in built}) == 1
    assert len(list(cache_dir.iterdir())) == 1


def test_builds_at_the_same_time_agree_where_files_cannot_be_locked(
    tmp_path, many_shards, monkeypatch
):
    def refuse(*_):
        raise OSError(37, 'No locks available')

    monkeypatch.setattr(fcntl, 'flock', refuse)
    config, cache_dir = records(tmp_path), tmp_path / 'cache'
    with ThreadPoolExecutor(4) as pool:
        built = list(pool.map(lambda _: open_corpus(config, BYTES, cache_dir), range(4)))
    assert len({one.fingerprint for one in built}) == 1
    same(built[0], open_corpus(config, BYTES, tmp_path / 'alone'))


def test_progress_is_in_the_log(tmp_path, many_shards, monkeypatch, caplog):
    monkeypatch.setattr(ledger, 'LOG_SECONDS', 0)
    with caplog.at_level('INFO', logger='jaxfm'):
        open_corpus(records(tmp_path), BYTES, tmp_path / 'cache')
    assert 'tokenising: 3 of ' in caplog.text and 'tokens/s' in caplog.text
    assert 'tokenised 300 documents in' in caplog.text


# Tokenizers.


def test_a_trained_tokenizer_is_trained_once_on_train_documents(tmp_path, monkeypatch):
    write_lines(tmp_path / 'train.jsonl', ['mmmm ' * 50, 'nnnn ' * 50])
    write_lines(tmp_path / 'held.jsonl', ['zzzz ' * 50])
    config = FilesConfig(path=f'{tmp_path}/*.jsonl', heldout_path=f'{tmp_path}/held.jsonl')
    made = make_tokenizer(BPEConfig(vocab_size=270), config, tmp_path / 'cache')
    assert len(made.encode('mmmm')) < 4 and len(made.encode('zzzz')) == 4
    monkeypatch.setattr('jaxfm.data.corpus.bpe.read_training_texts', None)
    again = make_tokenizer(BPEConfig(vocab_size=270), config, tmp_path / 'cache')
    assert again.fingerprint == made.fingerprint
    with pytest.raises(TypeError):
        make_tokenizer(BPEConfig(vocab_size=280), config, tmp_path / 'cache')


def test_a_tokenizer_is_trained_on_always_the_same_part_of_much_text(tmp_path, many_shards):
    config = records(tmp_path)
    everything = list(read_training_texts(config, 1 << 20))
    some = list(read_training_texts(config, 3000))
    assert some == list(read_training_texts(config, 3000))
    assert sum(map(len, some)) == 3000 and set(some[:-1]) < set(everything)


def test_a_tokenizer_for_chats_is_trained_on_their_contents(tmp_path):
    turns = [{'role': 'user', 'content': 'mmmm'}, {'role': 'assistant', 'content': 'nnnn'}]
    (tmp_path / 'a.jsonl').write_text(json.dumps({'messages': turns}) + '\n{')
    config = FilesConfig(path=str(tmp_path / 'a.jsonl'), heldout_fraction=1e-6)
    assert list(read_training_texts(config, 100)) == ['mmmm', 'nnnn']


def test_every_error_of_a_build_is_one_that_main_explains(tmp_path):
    (tmp_path / 'a.parquet').write_bytes(b'PAR1')
    with pytest.raises(RunError):
        open_corpus(FilesConfig(path=str(tmp_path / 'a.parquet')), BYTES, tmp_path / 'cache')
