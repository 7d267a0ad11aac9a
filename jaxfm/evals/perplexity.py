"""The loss on files of text: nats per token and per word, bits per byte, with a sliding window."""

import dataclasses
import functools
import logging
import math
from collections.abc import Iterator

from jaxfm.errors import ConfigError, DataError, listed
from jaxfm.evals import PerplexityConfig, statistics
from jaxfm.evals.base import Context, Periodic
from jaxfm.evals.prompts import begin_ids, read_logprob
from jaxfm.evals.samples import Samples
from jaxfm.sampling.complete import complete_each
from jaxfm.sampling.request import Request
from jaxfm.storage import find
from jaxfm.tasks.files import Row, merge_fields, read_rows

log = logging.getLogger('jaxfm')

_RECORDS = ('.jsonl', '.ndjson', '.json')


@dataclasses.dataclass(frozen=True)
class Text:
    """A document of a file."""

    id: str
    text: str

    @functools.cached_property
    def num_bytes(self) -> int:
        """Of the text in UTF-8."""
        return len(self.text.encode())


class Perplexity(Periodic):
    """The loss on all documents of the files.

    A document begins with BOS if the tokenizer has one; without, nothing predicts its first token,
    which does not count. Words are what white space separates; bytes and words are those of the
    whole text. Intervals are over documents, or over the windows of a single one.

    Raises:
      ConfigError: window and stride do not fit together.
      MissingInputError, DataError: no file, or no document that can be used.
    """

    def __init__(self, config: PerplexityConfig, context: Context):
        super().__init__(config.every, config.at_start)
        self._config, self._context, self._sampler = config, context, context.sampler
        self._length = config.window or context.sampler.config.max_length
        self._stride = config.stride or self._length - 1
        if self._stride >= self._length:
            raise ConfigError(
                f'{context.where}.stride {self._stride} must be less than the window '
                f'{self._length}, because the first token of a window needs one before it'
            )
        texts = read_texts(config, context.name)
        self._texts = {text.id: text for text in texts[: config.max_documents or None]}
        self._requests = [
            request for text in self._texts.values() for request in self._windows(text)
        ]
        self._sizes = self._count_predicted()
        self._tell_unpredicted()
        for request in self._requests:
            self._sampler.check(request)

    def _tell_unpredicted(self) -> None:
        """Raises DataError if no document has a token that another one predicts."""
        without = [id for id in self._texts if id not in self._sizes]
        where = self._context.where
        what = f'{listed(without)} has a single token, and no BOS before it that would predict it'
        if len(without) == len(self._texts):
            raise DataError(f'{where}: no document can be used: {what}')
        if without:
            log.warning('%s: left out: %s', where, what)

    def _windows(self, text: Text) -> Iterator[Request]:
        """Requests that together score every token of a document once."""
        ids = [*begin_ids(self._context.tokenizer), *self._context.tokenizer.encode(text.text)]
        for start, first, end in windows(len(ids), self._length, self._stride):
            yield Request(
                id=f'{text.id}[{first}]',
                tokens=ids[start:end],
                max_tokens=0,
                prompt_logprobs=True,
                prompt_logprobs_from=first - start,
            )

    def open(self, step: int) -> Samples:
        """The file of the windows at a step."""
        subject = ((request.id, list(request.tokens)) for request in self._requests)
        length = {'window': self._length, 'stride': self._stride}
        return self._context.open_samples(self._config, step, subject, **length)

    def run(self, params, step: int) -> dict[str, float]:
        """Scores all windows -> {metric: value}; {} on a process that has not all of them."""
        with self.open(step) as samples:
            missing = [one for one in self._requests if (one.id, 0) not in samples.kept]
            requests = {request.id: request for request in missing}
            for sample in complete_each(
                self._sampler, missing, params, step, most=self._context.most
            ):
                tokens = len(requests[sample.id].tokens)
                start = requests[sample.id].prompt_logprobs_from
                logprob, error = read_logprob(sample)
                group = _document_of(sample.id)
                samples.add(
                    {
                        'task': self._context.name,
                        'step': step,
                        'id': sample.id,
                        'group': group,
                        'sample_index': 0,
                        'nats': None if error else -logprob,
                        # Per token; higher is better, as for every score.
                        'score': None if error else logprob / (tokens - start),
                        'num_tokens': tokens - start,
                        'prompt_tokens': start,
                        # Of the whole document: models with different tokens compare by it.
                        'document_bytes': self._texts[group].num_bytes,
                        'document_tokens': self._sizes[group],
                        'error': error,
                    }
                )
            records = {one['id']: one for one in samples.records}
        if not all(request.id in records for request in self._requests):
            return {}
        return self._summarize([records[request.id] for request in self._requests])

    def _count_predicted(self) -> dict[str, int]:
        """The predicted tokens of each document that has any."""
        sizes: dict[str, int] = {}
        for request in self._requests:
            document = _document_of(request.id)
            predicted = len(request.tokens) - request.prompt_logprobs_from
            sizes[document] = sizes.get(document, 0) + predicted
        return sizes

    def _summarize(self, records: list[dict]) -> dict[str, float]:
        failed = [one for one in records if one['error']]
        if failed:
            log.warning(
                '%s: %d of %d windows failed and are left out, with the bytes of their documents; '
                'the first (%s): %s',
                *(self._context.name, len(failed), len(records)),
                *(failed[0]['id'], failed[0]['error']),
            )
        bad = {one['group'] for one in failed}
        sound = [one for one in records if one['group'] not in bad]
        values = {
            'documents': float(len({one['group'] for one in sound})),
            'tokens': float(sum(one['num_tokens'] for one in sound)),
            'samples/failed': len(failed) / len(records),
            'cost/flops': self._flops(),
        }
        return (_losses(sound, self._texts) if sound else {}) | values

    def _flops(self) -> float:
        return sum(self._context.flops(len(request.tokens)) for request in self._requests)


def _document_of(window: str) -> str:
    """'file[17]' -> 'file'."""
    return window.rpartition('[')[0]


def windows(num_tokens: int, length: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Windows that together score every token but the first once -> (start, first scored, end).

    The first window is full of new tokens; the others score `stride` of them.
    """
    scored = 1  # tokens before this one are scored, or cannot be
    while scored < num_tokens:
        end = min(num_tokens, length if scored == 1 else scored + stride)
        yield max(0, end - length), scored, end
        scored = end


def _losses(records: list[dict], texts: dict[str, Text]) -> dict[str, float]:
    nats: dict[str, float] = {}
    tokens: dict[str, int] = {}
    for one in records:
        nats[one['group']] = nats.get(one['group'], 0.0) + one['nats']
        tokens[one['group']] = tokens.get(one['group'], 0) + one['num_tokens']
    each = list(nats.values())
    num_bytes = [texts[id].num_bytes for id in nats]
    words = [len(texts[id].text.split()) for id in nats]
    if len(nats) > 1:
        loss = statistics.ratio(each, list(tokens.values()))
    else:
        windows = [one['nats'] for one in records]
        loss = statistics.ratio(windows, [one['num_tokens'] for one in records])
    values = loss.values('loss') | {'perplexity': statistics.exp(loss.value)}
    if sum(words):
        values |= {'nats_per_word': sum(each) / sum(words)}
        values |= {'word_perplexity': statistics.exp(values['nats_per_word'])}
    bits = [x / math.log(2) for x in each]
    return values | statistics.ratio(bits, num_bytes).values('bits_per_byte')


def read_texts(config: PerplexityConfig, name: str) -> list[Text]:
    """The documents of all files. Bad lines and files are told and left out.

    Raises:
      MissingInputError: there is no file.
      DataError: no document can be used.
      ConfigError: `fields` names what is not read, or there are no records to have it.
    """
    fields = merge_fields(name, {'text': ('text',)}, config.fields)
    files = find.find(config.path, f'config.evals.{name}.path')
    records = [file for file in files if file.suffix in _RECORDS]
    if config.fields and not records:
        raise ConfigError(
            f'config.evals.{name}.fields is for records ({", ".join(_RECORDS)}), but path has only '
            f'files that are documents, such as {files[0].path}'
        )
    texts, bad = [], []
    for file in (file for file in files if file.suffix not in _RECORDS):
        with file.open() as stream:
            content = stream.read()
        try:
            text = content.decode()
        except UnicodeDecodeError as error:
            bad.append(f'{file.path}: not UTF-8: {error}')
            continue
        if text.strip():
            texts.append(Text(file.name, text))
        else:
            bad.append(f'{file.path}: is empty')
    if bad:
        log.warning('config.evals.%s: left out: %s', name, '; '.join(bad[:3]))
    if records:
        texts += read_rows(name, records, fields, (), _text_of_row)
    if not texts:
        raise DataError(f'config.evals.{name}: no document can be used: {"; ".join(bad[:3])}')
    return texts


def _text_of_row(row: Row) -> Text:
    return Text(row.id, row.text('text'))
