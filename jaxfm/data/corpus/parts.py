"""A part of a corpus: what one shard of its source becomes.

A part is a directory that gets its name once it is complete, so the parts that a killed build has
finished are there for the next one.
"""

import contextlib
import functools
import json
from collections.abc import Callable
from pathlib import Path

from jaxfm.data import SOURCES
from jaxfm.data.corpus import token_cache
from jaxfm.data.corpus.encode import encode_documents, read_chunks
from jaxfm.data.documents import Document
from jaxfm.data.sources.files import TooManyBadRecords
from jaxfm.errors import DataError
from jaxfm.storage import whole
from jaxfm.tokenizer.build import Tokenizer

Progress = Callable[[int, int], None]  # bytes and tokens that were added


class TooManyInShard(Exception):
    """A single shard has more bad records than are allowed."""

    def __init__(self, summary: dict):
        super().__init__(summary)
        self.summary = summary


def make_part(config, shard, tokenizer: Tokenizer, part: Path, progress: Progress) -> dict:
    """Writes the part of one shard and returns its summary."""
    with whole.write_directory(part) as temporary:
        summary = _write_part(config, shard, tokenizer, temporary, progress)
        with open(temporary / 'part.json', 'w', encoding='utf-8') as file:
            json.dump(summary, file)
            whole.sync(file)
    return summary


def _write_part(config, shard, tokenizer: Tokenizer, directory: Path, progress: Progress) -> dict:
    source = SOURCES.load(config.name)(config)
    summary = {'kinds': {}, 'bad': []}  # {kind: the first document of that kind}
    has_digest = getattr(shard, 'has_whole_files', False)
    refuse = functools.partial(_refuse, source, shard)
    try:
        with contextlib.ExitStack() as stack:
            writers = [
                stack.enter_context(token_cache.Writer(directory, side, tokenizer.vocab_size))
                for side in token_cache.SIDES
            ]
            for chunk in read_chunks(source.read(shard)):
                num_tokens = 0
                for heldout, document, ids, mask in encode_documents(chunk, tokenizer, refuse):
                    writers[heldout].add(document, ids, mask, has_digest)
                    summary['kinds'].setdefault(document.kind, document.name)
                    num_tokens += len(ids)
                progress(sum(document.num_bytes for _, document in chunk), num_tokens)
    except TooManyBadRecords as error:
        raise TooManyInShard(summary | {'bad': _pack_bad_records(source)}) from error
    return summary | {'bad': _pack_bad_records(source)}


def _pack_bad_records(source) -> list:
    bad = getattr(source, 'bad_records', {}).values()
    return [one if isinstance(one, str) else one.pack() for one in bad]


def _refuse(source, shard, document: Document, error: DataError) -> None:
    if not hasattr(source, 'leave_out'):
        raise DataError(f'{document.name}: {error}') from error
    source.leave_out(shard, document, str(error))
