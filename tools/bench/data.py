"""Measures data throughput: from text to cached tokens, and from cached tokens to batch rows.

    python -m tools.bench.data --out tools/bench/results

The text is 18 books of Project Gutenberg and the articles of WikiText-2 if shared/data has them,
otherwise the source of this Python's standard library; it is repeated to fill --megabytes. The
tokenizers are GPT-2 and Qwen3 from shared/data, otherwise a BPE trained on the spot. Everything is
measured --repeats times, and the median is shown: tokens a second, and tokens a CPU-second, which
other work on the machine disturbs less. `--rows_only` leaves out the tokenising.
"""

import argparse
import dataclasses
import gzip
import hashlib
import json
import multiprocessing
import re
import resource
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from jaxfm.data import FilesConfig, FilesData
from jaxfm.data.corpus.bpe import make_tokenizer
from jaxfm.data.corpus.build import Corpus, open_corpus
from jaxfm.data.dataset import open_dataset
from jaxfm.data.loader import PackedBatches
from jaxfm.data.packing.rows import BestFit, Concat, OneEach
from jaxfm.tokenizer import BPEConfig, TokenizerFileConfig
from jaxfm.tokenizer.build import Tokenizer, build_tokenizer
from tools.bench import machine

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ('numpy', 'tokenizers', 'grain')
# {name: (packing of a source, its weight)}
MIXTURES = {
    'concat': ((Concat, 1.0),),
    'best_fit': ((BestFit, 1.0),),
    'none': ((OneEach, 1.0),),
    'mixture of concat and best_fit': ((Concat, 0.7), (BestFit, 0.3)),
}
BATCH_TOKENS = 1 << 18
ROW_LENGTHS = (2048, 8192)


@dataclasses.dataclass(frozen=True)
class Result:
    """One measurement: its name, tokens per repeat, and the speed and CPU time of every repeat."""

    name: str
    tokens: int
    tokens_per_second: list[float]
    cpu_seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.tokens_per_second)

    @property
    def median_per_cpu_second(self) -> float:
        return self.tokens / statistics.median(self.cpu_seconds)


def main() -> None:
    arguments = parse()
    with tempfile.TemporaryDirectory() as directory:
        record = measure(
            Path(directory), arguments.repeats, arguments.megabytes, arguments.rows_only
        )
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f'data-{record["date"]}.json'
    path.write_text(json.dumps(record, indent=1) + '\n', 'utf-8')
    print(f'\n{path}\n')
    for result in record['results']:
        rates = result['tokens_per_second']
        print(
            f'{result["name"]:44} {result["median"] / 1e6:8.2f}M tokens/s'
            f'  ({min(rates) / 1e6:.2f} .. {max(rates) / 1e6:.2f})'
            f'  {result["median_per_cpu_second"] / 1e6:8.2f}M tokens/CPU-s'
        )


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line -> flags."""
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--out', type=Path, required=True, help='directory for the results')
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--megabytes', type=int, default=96, help='size of the text')
    parser.add_argument('--rows_only', action='store_true', help='leave out the tokenising')
    return parser.parse_args(argv)


def measure(directory: Path, repeats: int, megabytes: int, rows_only: bool = False) -> dict:
    """Runs everything; `directory` is for temporary files."""
    documents = list(_documents())
    path = directory / 'corpus.jsonl'
    digest, copies = _write(path, documents, megabytes << 20)
    results = []
    for name, opened in _tokenizers(directory, path).items():
        if not rows_only:
            results += _measure_tokenising(name, opened, path, directory, repeats)
        results += _measure_streaming(name, opened, path, directory, repeats)
        results += _measure_reading(name, opened, path, directory, repeats)
    return {
        **machine.about(PACKAGES),
        'corpus_sha256': digest,
        'corpus_bytes': path.stat().st_size if path.exists() else 0,
        'corpus_documents': len(documents),
        'corpus_copies': copies,
        'repeats': repeats,
        'results': [_to_record(result) for result in results],
    }


def _to_record(result: Result) -> dict:
    medians = {'median': result.median, 'median_per_cpu_second': result.median_per_cpu_second}
    return dataclasses.asdict(result) | medians


def _measure_tokenising(
    name: str, opened, path: Path, directory: Path, repeats: int
) -> Iterator[Result]:
    config = FilesConfig(path=str(path), heldout_fraction=0.05)
    count = iter(range(repeats + 1))

    def build() -> int:
        made = open_corpus(config, opened, directory / f'{name}-{next(count)}')
        return made.train.num_tokens + made.heldout.num_tokens

    yield _time(f'tokenise + cache, {name}', build, repeats, warm_up=False)


def _measure_streaming(
    name: str, opened, path: Path, directory: Path, repeats: int
) -> Iterator[Result]:
    data = FilesData(
        path=str(path),
        heldout_fraction=0.05,
        sequence_length=2048,
        batch_size=16,
        tokenize='on_the_fly',
    )
    batches = open_dataset(data, opened, directory / f'{name}-streamed').batches(seed=0)

    def read() -> int:
        return sum(batches.next(None, step)['tokens'].size for step in range(64))

    yield _time(f'rows on the fly, {name}', read, repeats)


def _measure_reading(
    name: str, opened, path: Path, directory: Path, repeats: int
) -> Iterator[Result]:
    config = FilesConfig(path=str(path), heldout_fraction=0.05)
    cache = open_corpus(config, opened, directory / f'{name}-0').directory
    for packing in MIXTURES:
        for length in ROW_LENGTHS:
            for processes in (1, 2):
                title = f'{packing}, rows of {length}, {name}, {processes} process'
                title += 'es' if processes > 1 else ''
                yield _read_in_processes(title, cache, packing, length, processes, repeats)


def _read_in_processes(title, cache, packing, length, processes, repeats) -> Result:
    """Each process makes its rows of the same batches, like the processes of a run."""
    context = multiprocessing.get_context('spawn')
    barrier, queue = context.Barrier(processes), context.Queue()
    arguments = (cache, packing, length, processes, repeats, barrier, queue)
    workers = [context.Process(target=_read_rows, args=(i, *arguments)) for i in range(processes)]
    for worker in workers:
        worker.start()
    parts = [queue.get(timeout=600) for _ in workers]
    for worker in workers:
        worker.join()
    rates = [sum(rate) for rate in zip(*(part[0] for part in parts))]
    seconds = [sum(cpu) for cpu in zip(*(part[1] for part in parts))]
    return Result(title, sum(part[2] for part in parts), rates, seconds)


def _read_rows(index, cache, packing, length, processes, repeats, barrier, queue) -> None:
    opened = Corpus(cache)
    batch_size = BATCH_TOKENS // length
    rows = np.array_split(np.arange(batch_size), processes)[index]
    sources = {str(i): each for i, each in enumerate(MIXTURES[packing])}
    packings = {name: pack(opened.train, length) for name, (pack, _) in sources.items()}
    weights = {name: weight for name, (_, weight) in sources.items()}
    batches = PackedBatches(packings, weights, batch_size, seed=0, rows=rows)

    def read() -> int:
        return sum(batches.next(None, step)['tokens'].size for step in range(100))

    barrier.wait()
    result = _time('', read, repeats)
    queue.put((result.tokens_per_second, result.cpu_seconds, result.tokens))


def _time(name: str, work: Callable[[], int], repeats: int, warm_up: bool = True) -> Result:
    if warm_up:
        work()
    rates, seconds, tokens = [], [], 0
    for _ in range(repeats):
        began, cpu = time.perf_counter(), _cpu_seconds()
        tokens = work()
        rates.append(tokens / (time.perf_counter() - began))
        seconds.append(_cpu_seconds() - cpu)
    if name:
        print(f'{name}: {statistics.median(rates) / 1e6:.2f}M tokens/s', flush=True)
    return Result(name, tokens, rates, seconds)


def _cpu_seconds() -> float:
    """CPU time of this process and of the children that it has waited for."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _shared_data() -> Path | None:
    places = (ROOT / 'shared' / 'data', ROOT.parent / 'shared' / 'data')
    return next((place for place in places if place.is_dir()), None)


def _documents() -> Iterator[str]:
    shared = _shared_data()
    books = shared and shared / 'pretrain_gutenberg18' / 'books.jsonl.gz'
    if books is None or not books.exists():
        for path in sorted(Path(sysconfig.get_path('stdlib')).rglob('*.py')):
            yield path.read_text(encoding='utf-8', errors='ignore')
        return
    with gzip.open(books, 'rt', encoding='utf-8') as file:
        yield from (json.loads(line)['text'] for line in file)
    for path in sorted((shared / 'pretrain_wikitext2').glob('*.txt.gz')):
        with gzip.open(path, 'rt', encoding='utf-8') as file:
            # An article begins with ' = Title = '.
            yield from filter(str.strip, re.split(r'(?m)^(?= = [^=])', file.read()))


def _write(path: Path, documents: list[str], num_bytes: int) -> tuple[str, int]:
    """Writes a .jsonl of about `num_bytes`; returns (sha256 of the documents, number of copies)."""
    once = ''.join(json.dumps({'text': text}, ensure_ascii=False) + '\n' for text in documents)
    content = once.encode()
    copies = max(1, num_bytes // len(content))
    with open(path, 'wb') as file:
        for _ in range(copies):
            file.write(content)
    return hashlib.sha256(content).hexdigest(), copies


def _tokenizers(directory: Path, path: Path) -> dict[str, Tokenizer]:
    shared, found = _shared_data(), {}
    for name in ('gpt2', 'qwen3'):
        if shared and (place := shared / f'tok_{name}').is_dir():
            eos = '<|endoftext|>'
            config = TokenizerFileConfig(path=str(place), eos_token=eos)
            found[name] = build_tokenizer(config, ())
    if not found:
        config, source = BPEConfig(vocab_size=16384), FilesConfig(path=str(path))
        found['bpe16384'] = make_tokenizer(config, source, directory)
    return found


if __name__ == '__main__':
    main()
