"""Tokenises a corpus once, and shows what a model will read.

    python -m tools.corpus build --config configs/x.py --output DIR   # then --config.data.cache=DIR
    python -m tools.corpus inspect --config configs/x.py              # or: inspect DIR [--verify]
    python -m tools.corpus decode --config configs/x.py --rows 3      # rows as text

The config is a run's config; overrides like `--config.key=value` work too. `--phase` selects one of
several phases. `build` resumes an interrupted build. `decode` shows rows of one training step,
segment by segment; tokens that count in the loss are bold green, or in [[ ]] without colour. Of a
chat that is compared it tells the side, and the number of the pair in its row.
"""

import argparse
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxfm import process
from jaxfm.command_line import Parser, number
from jaxfm.config.load import load_config, split_arguments
from jaxfm.config.run import PhaseConfig, RunConfig
from jaxfm.data.corpus.bpe import make_tokenizer
from jaxfm.data.corpus.build import Corpus, make_corpus, verify_corpus
from jaxfm.data.dataset import Dataset, open_dataset
from jaxfm.errors import MissingInputError, RunError, UsageError
from jaxfm.rollout import RolloutConfig
from jaxfm.run.cache import cache_directory
from jaxfm.tokenizer.build import Tokenizer

BAR = 40  # columns of the longest bar of a histogram


def main(argv: list[str]) -> int:
    """Runs one command line; returns its exit code."""
    process.replace_unprintable()
    logging.basicConfig(level=logging.INFO, format='%(message)s', stream=sys.stderr)
    try:
        flags, overrides = parse(argv)
        COMMANDS[flags.command](flags, overrides)
    except RunError as error:
        print(f'error: {error}', file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return process.report_interrupt()
    except BrokenPipeError:  # the reader closed the pipe, for example `head`
        sys.stdout = None
    return 0


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Command line -> (flags, overrides of the config)."""
    argument, overrides, rest = split_arguments(argv)

    parser = Parser(prog='python -m tools.corpus', description=__doc__.partition('\n')[0])
    commands = parser.add_subparsers(dest='command', required=True)
    build_, inspect_, decode_ = (
        commands.add_parser(name, help=function.__doc__.partition('\n')[0])
        for name, function in COMMANDS.items()
    )
    for each in (build_, inspect_, decode_):
        each.add_argument('--phase', default='', help='name of the phase, if there are several')
    build_.add_argument('--output', type=Path, help='default: the cache that runs use')
    build_.add_argument('--rebuild', action='store_true', help='replace the cache in --output')
    inspect_.add_argument('directory', type=Path, nargs='?', help='a cache, instead of --config')
    inspect_.add_argument('--verify', action='store_true', help='check every file')
    decode_.add_argument('--rows', type=number(int, 1), default=4, help='number of rows to show')
    decode_.add_argument('--step', type=number(int, 0), default=0, help='step of the phase to show')
    flags = parser.parse_args(rest)
    flags.config = argument
    if argument is None and not getattr(flags, 'directory', None):
        raise UsageError('no data given: pass --config=FILE, as for a run')
    return flags, overrides


def build(flags, overrides: list[str]) -> None:
    """Tokenises the data of a phase, resuming an earlier build, and prints where the cache is."""
    config, phase, _ = _phase(flags, overrides)
    if flags.output is None:
        if flags.rebuild:
            raise UsageError('--rebuild needs --output: the cache of runs is never out of date')
        _show_statistics(_open(config, phase))
        return
    tokenizer = _tokenizer(config)
    sources = phase.data.all_sources
    for name, source in sources.items():
        directory = flags.output / name if phase.data.name == 'mixture' else flags.output
        make_corpus(source, tokenizer, directory, rebuild=flags.rebuild)
    print(f'use it with --config.data.cache={flags.output}')


def inspect(flags, overrides: list[str]) -> None:
    """Shows statistics: documents, tokens, lengths, packing."""
    if flags.directory is None:
        config, phase, _ = _phase(flags, overrides)
        _show_statistics(_open(config, phase))
        return
    if not flags.directory.is_dir():
        raise MissingInputError(f'{flags.directory}: no such directory')
    opened = Corpus(flags.directory)
    if flags.verify:
        verify_corpus(flags.directory)
    _show(opened.statistics)
    if flags.verify:
        print('every file matches its digest')


def decode(flags, overrides: list[str]) -> None:
    """Shows rows as the model reads them, decoded to text."""
    config, phase, seed = _phase(flags, overrides)
    dataset = _open(config, phase)
    rows = np.arange(min(flags.rows, phase.data.batch_size))
    batches = dataset.batches(seed, rows)
    for _ in range(flags.step + 1):
        batch = batches.next(None, None)
    console = Console(highlight=False, soft_wrap=True)
    for row in rows:
        arrays = {name: values[row] for name, values in batch.items()}
        console.print(Text(_title(row, arrays), style='bold'))
        console.print(row_text(arrays, dataset.tokenizer, colour=console.is_terminal))
        console.print()


COMMANDS = {'build': build, 'inspect': inspect, 'decode': decode}


def row_text(row: dict[str, np.ndarray], tokenizer: Tokenizer, colour: bool) -> Text:
    """One row [T] as text, segment by segment; tokens that count in the loss are marked."""
    text = Text()
    for segment, counts, ids in _spans(row):
        if not segment:
            text.append(f'\n({len(ids)} padding tokens)', style='dim')
            continue
        part = tokenizer.decode(ids, skip_special_tokens=False)
        if segment < 0:
            title = f'segment {-segment}{_side(row, -segment)}'
            text.append(f'\n--- {title} ---\n', style='yellow')
        if counts:
            text.append(part if colour else f'[[{part}]]', style='bold green')
        else:
            text.append(part)
    return text


def _side(row: dict[str, np.ndarray], segment: int) -> str:
    """Of a chat that is compared: the number of its pair, and which side it is."""
    if 'sides' not in row:
        return ''
    where = row['segment_ids'] == segment
    name = 'chosen' if row['sides'][where].sum() > 0 else 'rejected'
    return f', {name} of {row["pair_ids"][where][0]}'


def _spans(row: dict[str, np.ndarray]) -> Iterator[tuple[int, bool, list[int]]]:
    """Yields (segment, whether the loss counts, ids); segment is negated where it begins."""
    segments, tokens = row['segment_ids'], row['tokens']
    is_first = np.diff(segments, prepend=-1) != 0
    # loss_mask[t] belongs to the target of position t, which is token t + 1.
    counts = np.concatenate([[False], row['loss_mask'][:-1] > 0]) & ~is_first
    borders = np.flatnonzero(is_first | (np.diff(counts, prepend=counts[0]) != 0))
    for start, stop in zip(borders, [*borders[1:], len(tokens)]):
        segment = int(segments[start])
        ids = tokens[start:stop].tolist()
        yield -segment if is_first[start] else segment, bool(counts[start]), ids


def _title(number: int, row: dict[str, np.ndarray]) -> str:
    used, length = int((row['segment_ids'] > 0).sum()), len(row['tokens'])
    return (
        f'row {number}: {row["segment_ids"].max()} segments, {used} of {length} tokens used, '
        f'{int(row["loss_mask"].sum())} targets in the loss'
    )


def _phase(flags, overrides: list[str]) -> tuple[RunConfig, PhaseConfig, int]:
    """Returns (config, the requested phase, the seed of its data order)."""
    config = load_config(flags.config, overrides)
    phases = config.all_phases
    names = [phase.name for phase in phases]
    if flags.phase not in names:
        if flags.phase or len(phases) > 1:
            known = f'choose one of {", ".join(names)}'
            known = known if config.phases else 'this run has one phase, leave the option out'
            raise UsageError(f'--phase {flags.phase or "is needed"}: {known}')
    index = names.index(flags.phase)
    if isinstance(phases[index].data, RolloutConfig):
        raise UsageError(
            f'phase {flags.phase or "of this run"} samples its batches: it has no corpus; '
            'samples/ in its work directory has what it trains on'
        )
    return config, phases[index], (config.seed + index) % 2**32


def _tokenizer(config: RunConfig) -> Tokenizer:
    return make_tokenizer(config.tokenizer, config.all_phases[0].data, _cache())


def _open(config: RunConfig, phase: PhaseConfig) -> Dataset:
    return open_dataset(phase.data, _tokenizer(config), _cache())


def _cache() -> Path:
    return cache_directory() / 'corpus'


def _show_statistics(dataset: Dataset) -> None:
    _show(dataset.statistics)
    for name, source in dataset.sources.items():
        print(f'{name}: {getattr(source, "directory", "")}')


def _show(statistics: dict) -> None:
    """Prints a table, with a bar for every bucket of a histogram."""
    table = Table(show_header=False, box=None)
    largest = max((v for k, v in statistics.items() if _is_bucket(k)), default=1)
    for name, value in statistics.items():
        bar = '█' * round(BAR * value / largest) if _is_bucket(name) else ''
        table.add_row(name, f'{value:,}' if isinstance(value, int) else _format(value), bar)
    Console(soft_wrap=True).print(table)


def _is_bucket(name: str) -> bool:
    return '_length_histogram/' in name


def _format(value) -> str:
    return f'{value:.4g}' if isinstance(value, float) else str(value)


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
