"""Compares two evaluations question by question: difference, 95 % interval, McNemar's test, verdict.

    python -m tools.compare_evals A B

A and B are files of samples that evaluators wrote, or directories with several of them, of which
those with the same name are compared. Questions are joined by their id, and each counts by the mean
score of its samples, so the two may have different numbers of samples. The verdict is 'A better' or
'B better' if the interval of the paired difference does not contain 0 (and, for scores of 0 and 1,
McNemar's test gives p < 0.05), else 'tied'.

Losses on text (`perplexity`) are compared in bits per byte, document by document, so the two models
may have different tokenizers.

`--metric score_per_byte` compares another score of a `likelihood` evaluation, `--cluster_by_group`
takes the questions of a group as one cluster, `--output FILE` also writes the figures as JSON lines.
"""  # noqa: E501

import argparse
import dataclasses
import logging
import math
import re
import sys
from pathlib import Path

from jaxfm import process
from jaxfm.command_line import Parser
from jaxfm.errors import DataError, MissingInputError, RunError
from jaxfm.evals.samples import differences, read_samples
from jaxfm.evals.statistics import Estimate, mcnemar, mean, paired_difference, ratio, share
from jaxfm.modes.output import write_lines

# Parts of a header that may differ: they are what is compared, or are told with the result.
_TOLD = ('weights', 'options', 'task', 'seed', 'subject')


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two evaluations of the same questions."""

    name: str
    unit: str  # 'questions', or what a loss is averaged over
    num_questions: int  # or documents or windows
    left_out: int  # those that only one of them has
    first: Estimate
    second: Estimate
    difference: Estimate  # first - second
    only_first: int  # questions that only the first solves
    only_second: int
    is_binary: bool  # all scores are 0 or 1
    differences: list[tuple[str, object, object]]  # of the headers

    @property
    def verdict(self) -> str:
        """'A better', 'B better' or 'tied'.

        If all scores are 0 or 1, McNemar's test must agree at 5 %: it is exact for few questions,
        where the interval may be too narrow.
        """
        if self.is_binary and self.p_value >= 0.05:
            return 'tied'
        if self.difference.low > 0:
            return 'A better'
        return 'B better' if self.difference.high < 0 else 'tied'

    @property
    def p_value(self) -> float:
        """Of McNemar's test: how often so unequal a split happens between equal models."""
        return mcnemar(self.only_first, self.only_second)

    @property
    def is_solved(self) -> bool:
        """Whether scores are shares, so that a question can be solved; log-probs are none."""
        return self.first.value >= 0

    def lines(self) -> list[str]:
        """The comparison as text."""
        lost = f' ({self.left_out} {self.unit} are in one of them only)' if self.left_out else ''
        lines = [
            f'{self.name}: {self.num_questions} {self.unit}{lost}',
            f'  A           {_shown(self.first)}',
            f'  B           {_shown(self.second)}',
            f'  A - B       {_shown(self.difference, "+")}',
        ]
        if self.is_solved:
            lines.append(
                f'  McNemar     p = {self.p_value:.4g}: {self.only_first} questions solved by A '
                f'only, {self.only_second} by B only'
            )
        lines.append(f'  verdict     {self.verdict}')
        return lines + [f'  differs     {name}: {a!r}, {b!r}' for name, a, b in self.differences]


def _shown(estimate: Estimate, sign: str = '') -> str:
    value, low, high = (f'{x:{sign}.4f}' for x in (estimate.value, estimate.low, estimate.high))
    return f'{value}  [{low}, {high}]'


def main(argv: list[str]) -> int:
    """Runs one command line; returns its exit code."""
    process.replace_unprintable()
    logging.basicConfig(level=logging.INFO, format='%(message)s', stream=sys.stderr)
    try:
        flags = parse(argv)
        found = [
            compare(name, *paths, flags.metric, flags.cluster_by_group)
            for name, paths in pair(flags.a, flags.b).items()
        ]
        for comparison in found:
            print('\n'.join(comparison.lines()))
        if flags.output:
            write_lines(flags.output, [_record(comparison) for comparison in found])
    except RunError as error:
        print(f'error: {error}', file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return process.report_interrupt()
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    """Command line -> flags."""
    parser = Parser(prog='python -m tools.compare_evals', description=__doc__.partition('\n')[0])
    parser.add_argument('a', metavar='A', type=Path, help='a file of samples, or a directory')
    parser.add_argument('b', metavar='B', type=Path, help='the same of another evaluation')
    parser.add_argument('--metric', default='score', metavar='KEY', help='of the samples')
    parser.add_argument('--cluster_by_group', action='store_true', help='a group is one cluster')
    parser.add_argument('--output', type=Path, metavar='FILE', help='also as JSON lines')
    return parser.parse_args(argv)


def pair(a: Path, b: Path) -> dict[str, tuple[Path, Path]]:
    """{name: the two files}; of directories those with the same evaluator, whatever the step.

    Raises:
      MissingInputError: nothing is there, or nothing in common.
      DataError: a directory has several steps of an evaluator.
    """
    if not a.is_dir() and not b.is_dir():
        return {_evaluator_of(a): (a, b)}
    first, second = _files(a), _files(b)
    common = first.keys() & second.keys()
    if not common:
        raise MissingInputError(
            f'{a} and {b} have no evaluator in common: {", ".join(first) or "none"}; '
            f'{", ".join(second) or "none"}'
        )
    for name in sorted(first.keys() ^ second.keys()):
        print(f'{name}: only in {a if name in first else b}, left out', file=sys.stderr)
    return {name: (first[name], second[name]) for name in sorted(common)}


def _files(path: Path) -> dict[str, Path]:
    """{evaluator: its file of samples}."""
    if not path.is_dir():
        return {_evaluator_of(path): path}
    found = {}
    for file in sorted(path.glob('*.jsonl')):
        name = _evaluator_of(file)
        if name in found:
            raise DataError(
                f'{path} has {found[name].name} and {file.name}, two evaluations of {name}: name '
                'one of the files'
            )
        found[name] = file
    return found


def _evaluator_of(path: Path) -> str:
    """'gsm8k-000040.jsonl' -> 'gsm8k'."""
    return re.sub(r'-\d+$', '', path.stem)


def compare(
    name: str, a: Path, b: Path, metric: str = 'score', by_group: bool = False
) -> Comparison:
    """Compares two files of samples.

    Raises:
      DataError: they hold different tasks or kinds of evaluation, no question in common, or no such
        metric.
    """
    (first, ours), (second, theirs) = read_samples(a), read_samples(b)
    for key in ('evaluator', 'task.name'):
        left, right = (_inside(header, key) for header in (first, second))
        if left != right:
            raise DataError(
                f'{a} holds samples of {left}, but {b} of {right}: only evaluations of the same '
                'task can be compared'
            )
    told = {key: first.get(key) for key in _TOLD}, {key: second.get(key) for key in _TOLD}
    if first['evaluator'] == 'perplexity':
        if metric != 'score':
            raise DataError(f'losses on text are compared in bits per byte: leave out {metric!r}')
        return _compare_losses(name, (a, ours), (b, theirs), differences(*told))
    x, y = (_scores(path, each, metric) for path, each in ((a, ours), (b, theirs)))
    ids = [id for id in x if id in y]
    if not ids:
        raise DataError(f'{a} and {b} have no question in common')
    groups = {record['id']: record['group'] for record in ours}
    clusters = [(groups[id], '' if groups[id] else id) for id in ids] if by_group else None
    one, other = [x[id] for id in ids], [y[id] for id in ids]
    pairs = list(zip(one, other))
    # Log-probs are no shares.
    estimate = share if all(0 <= value <= 1 for value in one + other) else mean
    return Comparison(
        name=name,
        unit='questions',
        num_questions=len(ids),
        left_out=len(x.keys() ^ y.keys()),
        first=estimate(one, clusters),
        second=estimate(other, clusters),
        difference=paired_difference(one, other, clusters),
        # With several samples, a question counts as solved if most of them do.
        only_first=sum(p >= 0.5 > q for p, q in pairs),
        only_second=sum(q >= 0.5 > p for p, q in pairs),
        is_binary=set(one + other) <= {0.0, 1.0},
        differences=differences(*told),
    )


@dataclasses.dataclass
class _Document:
    """The windows of a document that were scored."""

    bytes: int
    tokens: int
    windows: dict[str, tuple[float, int]]  # {id: nats, tokens}

    @property
    def is_whole(self) -> bool:
        return sum(tokens for _, tokens in self.windows.values()) == self.tokens

    @property
    def nats(self) -> float:
        return sum(nats for nats, _ in self.windows.values())


def _compare_losses(
    name: str,
    first: tuple[Path, list[dict]],
    second: tuple[Path, list[dict]],
    differ: list[tuple[str, object, object]],
) -> Comparison:
    """Compares losses in bits per byte, which do not depend on the tokens; negative, as scores.

    The windows of a document are no independent pieces, so the unit is the document. Windows are it
    where there is a single document, as in the evaluation, and only if its tokens are the same.
    """
    x, y = _documents(*first), _documents(*second)
    common = [id for id in x if id in y]
    for id in common:
        if x[id].bytes != y[id].bytes:
            raise DataError(
                f'document {id} has {x[id].bytes} bytes in {first[0]}, but {y[id].bytes} in '
                f'{second[0]}: only losses on the same text can be compared'
            )
    if not common:
        raise DataError(f'{first[0]} and {second[0]} have no whole document in common')
    unit, left_out = 'documents', len(x.keys() ^ y.keys())
    num_bytes = [float(x[id].bytes) for id in common]
    one, other = [x[id].nats for id in common], [y[id].nats for id in common]
    if len(common) == 1:
        [(a, b)] = [(x[id], y[id]) for id in common]
        sizes = {id: tokens for id, (_, tokens) in a.windows.items()}
        if 'subject' in {key for key, *_ in differ} or len(sizes) == 1:
            raise DataError(
                f'{first[0]} and {second[0]} have one document in common, with other tokens or a '
                'single window, so there is no interval: evaluate several documents'
            )
        unit = 'windows'
        num_bytes = [a.bytes * tokens / a.tokens for tokens in sizes.values()]
        one, other = ([each.windows[id][0] for id in sizes] for each in (a, b))
    bits = math.log(2)
    return Comparison(
        name=name,
        unit=unit,
        num_questions=len(one),
        left_out=left_out,
        first=ratio([-nats / bits for nats in one], num_bytes),
        second=ratio([-nats / bits for nats in other], num_bytes),
        difference=ratio([(q - p) / bits for p, q in zip(one, other)], num_bytes),
        only_first=0,
        only_second=0,
        is_binary=False,
        differences=differ,
    )


def _documents(path: Path, records: list[dict]) -> dict[str, _Document]:
    """{id: document} of those of which every window was scored."""
    found: dict[str, _Document] = {}
    for record in records:
        if 'document_bytes' not in record:
            raise DataError(
                f'{path}: sample {record["id"]} has no document_bytes, because an earlier version '
                'wrote it: evaluate again'
            )
        sizes = record['document_bytes'], record['document_tokens']
        document = found.setdefault(record['group'], _Document(*sizes, {}))
        if not record['error']:
            document.windows[record['id']] = record['nats'], record['num_tokens']
    return {id: document for id, document in found.items() if document.is_whole}


def _inside(header: dict, key: str):
    value = header
    for part in key.split('.'):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _scores(path: Path, records: list[dict], metric: str) -> dict[str, float]:
    """{id: mean of the metric over the samples of the question}."""
    found: dict[str, list[float]] = {}
    for record in records:
        value = record.get(metric)
        if value is None and record.get('error'):
            continue  # a window that failed
        if not isinstance(value, int | float):
            keys = [key for key, each in record.items() if isinstance(each, float)]
            raise DataError(
                f'{path}: sample {record["id"]} has no number {metric}; numbers: {", ".join(keys)}'
            )
        found.setdefault(record['id'], []).append(float(value))
    return {id: sum(values) / len(values) for id, values in found.items()}


def _record(comparison: Comparison) -> dict:
    return dataclasses.asdict(comparison) | {
        'p_value': comparison.p_value,
        'verdict': comparison.verdict,
    }


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
