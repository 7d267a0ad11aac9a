"""Part `kernels`: GPU tests, numerics over a grid, speed against peers and the roofline.

Kernels that pass their tests and numerics can be recorded as proven, with their speed over XLA;
`ops` chooses among proven kernels. If time runs out, complete the record with another call and
--only STAGE: timing, numerics, speed or tests.
"""

import importlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from tempfile import TemporaryFile

from pallas_kernels._tables import short_kind, source_digest
from tools.bench.gpu import numerics, speed
from tools.bench.gpu.numerics import OPS
from tools.bench.gpu.record import Record, all_passed, bar, outcome, show_bars
from tools.bench.gpu.stages import ENVIRONMENT, ROOT, Runner, passes, quick
from tools.bench.gpu.timing import floor_microseconds

PROVEN = ROOT / 'pallas_kernels' / 'proven.json'
LEAST_SECONDS = 60  # for an op's numerics or a test file; if that is not enough, it has failed
NUMERICS = 0.6  # share of the time: compiling flash attention takes about 200 s of it


def run(record: Record, runner: Runner) -> None:
    """Numerics come first: without them speed is worth nothing. Tests get the remaining time."""
    runner.run('timing', limit=90, patience=quick(90))  # also records the device
    _run_numerics(runner)
    for group, share in zip(speed.GROUPS, (0.6, 0.6, 0.5)):
        # Ours come first: a proof needs them, while rows of others may be missing.
        _run(runner, 'speed', share * runner.left, implementations=list(group))
    _run_tests(record, runner)


def _run(runner: Runner, stage: str, limit: float, **options) -> None:
    """Runs a stage of tasks that take seconds; starts no process if --only matches none."""
    tasks = importlib.import_module(f'tools.bench.gpu.{stage}').tasks(runner.smoke, **options)
    if any(passes(runner.only, stage, task.name) for task in tasks):
        limit = max(0.0, min(limit, runner.left))
        runner.run(stage, limit=limit, patience=quick(limit), **options)


def _run_numerics(runner: Runner) -> None:
    """Splits the time by number of cases; ops with few cases go first and pass on unused time."""
    rest = 0.0 if runner.only else (1 - NUMERICS) * runner.left
    ops = sorted(OPS, key=lambda op: len(numerics.names(op)))
    for index, op in enumerate(ops):
        cases = [len(numerics.names(each)) for each in ops[index:]]
        share = (runner.left - rest) * cases[0] / sum(cases)
        _run(runner, 'numerics', max(LEAST_SECONDS, share), op=op)


def _run_tests(record: Record, runner: Runner) -> None:
    """Runs file by file, each with an equal share of the remaining time."""
    files = [file for file in test_files() if passes(runner.only, 'tests', file)]
    if runner.smoke and files:
        record.set(collected=run_tests(files, runner.left, collect_only=True))
        return
    for index, file in enumerate(files):
        seconds = runner.left / (len(files) - index)
        if seconds >= LEAST_SECONDS:
            found = run_tests([file], seconds) | {'source': _source(file)}
        else:
            found = {'not_run': 'out of time'}
        record.set(tests=record.values.get('tests', {}) | {file: found})
        print(f'{"tests":12} {file:58} {_verdict(found)}', flush=True)


def test_files(op: str = '') -> list[str]:
    """Files with tests marked `gpu`, of an op or of all ops (those with few cases first)."""
    found = [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / 'tests').glob('*/**/test_*.py'))
        if '@pytest.mark.gpu' in path.read_text('utf-8')
    ]
    if op:
        return [file for file in found if _op(file) == op]
    return sorted(found, key=lambda file: len(numerics.names(_op(file))))


def _op(file: str) -> str:
    """The op that a test file tests, from the file's name; '' if none."""
    tested = Path(file).stem.removeprefix('test_')
    return next((op for op in OPS if tested.startswith(op)), '')


def _source(file: str) -> str:
    return source_digest(_op(file)) if _op(file) else ''


def run_tests(files: list[str], seconds: float, collect_only: bool = False) -> dict:
    """Runs the tests marked `gpu` in a process of their own.

    Returns counts, failures and pytest's last line.
    """
    command = [sys.executable, '-m', 'pytest', '-v', '--tb=line', '-m', 'gpu']
    command += ['-p', 'no:cacheprovider', *files, *(['--collect-only'] if collect_only else [])]
    with TemporaryFile('w+') as output:
        try:
            code = subprocess.run(
                command,
                cwd=ROOT,
                env={**ENVIRONMENT, 'PYTHONUNBUFFERED': '1', **os.environ},
                stdout=output,
                stderr=output,
                timeout=seconds,
            ).returncode
            found = {'exit_code': code}
        except subprocess.TimeoutExpired:
            found = {'failed': f'not done after {seconds:.0f} s'}
        output.seek(0)
        said = output.read().strip().splitlines() or ['']
    verdicts = re.findall(r'^(\S+::\S.*) (PASSED|FAILED|ERROR|SKIPPED)\b', '\n'.join(said), re.M)
    counts = Counter(verdict for _, verdict in verdicts)
    failed = [name for name, verdict in verdicts if verdict in ('FAILED', 'ERROR')]
    found |= {'said': said[-1], 'counts': counts, 'failed_tests': failed}
    # If pytest is missing or cannot read the configuration, there is nothing to count.
    return found if counts and not failed else found | {'output': said[-40:]}


def _verdict(found: dict) -> str:
    if 'not_run' in found:
        return f'not run: {found["not_run"]}'
    counts = ', '.join(f'{n} {verdict.lower()}' for verdict, n in found['counts'].items())
    failed = f'FAILED: {found["failed"]}; ' if 'failed' in found else ''
    return failed + (counts or found['said'])


def explain_unproven(record: Record, op: str) -> str:
    """Why an op is not proven, or '': all numerics cases must hold and all tests must pass."""
    if record.values.get('platform') != 'gpu' or record.values['smoke']:
        return 'that needs a GPU'
    rows, tests = record.stage('numerics'), record.values.get('tests', {})
    names, files, source = numerics.names(op), test_files(op), source_digest(op)
    if lacking := [name for name in names if not rows.get(name, {}).get('held')]:
        return f'{len(lacking)} of {len(names)} cases do not hold: run --only numerics'
    if lacking := [file for file in files if not all_passed(tests.get(file, {}))]:
        return f'{", ".join(lacking)}: not all passed: run --only tests'
    measured = [rows[name] for name in names] + [tests[file] for file in files]
    if any(found['source'] != source for found in measured):
        return 'its source has changed since it was measured'
    return ''


def list_proven(record: Record) -> list[str]:
    """The ops whose numerics all hold in this record, and whose tests all passed."""
    return [op for op in OPS if not explain_unproven(record, op)]


def _has_failed(record: Record, op: str) -> bool:
    """Whether an op failed somewhere, as opposed to not being measured."""
    rows = [row for row in record.rows if row['stage'] == 'numerics']
    return any(_op(file) == op for file in record.failed_tests) or any(
        row['name'].split()[0] == op and ('failed' in row or row.get('held') is False)
        for row in rows
    )


def record_proven(record: Record, path: Path = PROVEN) -> list[dict]:
    """Records what is proven on this device, and removes entries of ops that now fail there."""
    values, kind = record.values, short_kind(record.values['device'])
    if values['platform'] != 'gpu' or values['smoke']:
        raise SystemExit('nothing can be proven without a GPU')
    judged = {*list_proven(record), *(op for op in OPS if _has_failed(record, op))}
    entries = [
        entry
        for entry in json.loads(path.read_text('utf-8'))
        if entry['device'] != kind or entry['op'] not in judged
    ]
    about = {'device': kind, 'date': values['date'], 'versions': values['versions']}
    entries += [
        {
            'op': op,
            **about,
            'source': source_digest(op),
            'speed_over_xla': speed_over_xla(record, op),
        }
        for op in list_proven(record)
    ]
    entries.sort(key=lambda entry: (entry['device'], entry['op']))
    path.write_text(json.dumps(entries, indent=1) + '\n', 'utf-8')
    return entries


def speed_over_xla(record: Record, op: str) -> float | None:
    """The lowest ratio of XLA's time to ours over all shapes; None unless all were measured.

    Shapes for which XLA runs out of memory do not count.
    """
    rows = {row['name']: row for row in record.rows if row['stage'] == 'speed'}
    calls = [
        f'{shape.name} {part}' for shape in speed.SHAPES if shape.op == op for part in shape.parts
    ]
    ratios = []
    for call in calls:
        ours, theirs = (rows.get(f'{call} / {name}', {}) for name in ('mosaic', 'xla'))
        if 'microseconds' not in ours or ours['source'] != source_digest(op):
            return None
        if theirs.get('failed') == 'out of memory':
            continue
        if 'microseconds' not in theirs:
            return None
        ratios.append(theirs['microseconds'] / ours['microseconds'])
    return min(ratios, default=None)


def bars(record: Record) -> list[dict]:
    """The goals for our kernels, with what was measured."""
    rows, ceilings = record.stage('speed'), record.stage('timing')

    def value(name: str, key: str):
        return rows.get(f'{name} / mosaic', {}).get(key)

    def of_copy(name: str):
        reached, copy = value(name, 'gigabytes_per_second'), ceilings.get('copy')
        return reached and copy and reached / copy['gigabytes_per_second']

    causal = 'attention causal B4 S4096 H32/32 D128'
    packed = 'attention packed B4 S4096 H32/8 D128'
    cross_entropy = value('cross-entropy 16384 x 4096 x 131072 loss and gradients', 'microseconds')
    found = [
        bar('flash attention forward, TFLOP/s', value(f'{causal} forward', 'tflops'), 600),
        bar('flash attention backward, TFLOP/s', value(f'{causal} backward', 'tflops'), 450),
        bar('add + RMSNorm, of copying', of_copy('add + rms_norm 16384 x 4096 forward'), 0.85),
        bar(
            'decode attention, of copying',
            of_copy('paged decode B64 L8192 H32/8 D128 forward'),
            0.85,
        ),
        bar('cross-entropy, ms', cross_entropy and cross_entropy / 1e3, 105, at_least=False),
    ]
    for way in ('forward', 'backward'):
        ratio = _times_faster(rows, f'{packed} {way}', ('xla', 'fa3', 'tokamax'))
        found.append(bar(f'packed attention {way}, times the best other', ratio, 1.0))
    names = [name.rpartition(' / ')[0] for name in rows if name.endswith(' / mosaic')]
    ratios = [_times_faster(rows, name, ('xla',)) for name in names]
    slowest = min((ratio for ratio in ratios if ratio), default=None)
    found.append(bar('slowest shape, times XLA', slowest, 1.0))
    return found


def _times_faster(rows: dict, name: str, others) -> float | None:
    ours = rows.get(f'{name} / mosaic')
    theirs = [rows[key]['microseconds'] for other in others if (key := f'{name} / {other}') in rows]
    return (
        min(theirs) / ours['microseconds'] if ours and ours.get('microseconds') and theirs else None
    )


def show(record: Record) -> None:
    """Prints the table."""
    ceilings = record.stage('timing')
    for name in ('matmul', 'copy', 'launch'):
        if row := ceilings.get(name):
            rate = row.get('tflops') or row.get('gigabytes_per_second') or row['microseconds']
            unit = {'matmul': 'TFLOP/s', 'copy': 'GB/s', 'launch': 'us'}[name]
            print(f'{name}: {rate:.4g} {unit}')
    for file, found in record.values.get('tests', {}).items():
        print(f'GPU tests, {file}: {_verdict(found)}')
        for name in found.get('failed_tests', []):
            print(f'    {name}')
    rows = [row for row in record.rows if row['stage'] == 'numerics']
    for op in OPS:
        own = [row for row in rows if row['name'].split()[0] == op]
        held = sum(bool(row.get('held')) for row in own)
        why_not = explain_unproven(record, op)
        verdict = f'not proven: {why_not}' if why_not else 'PROVEN'
        print(f'{op}: {held} of {len(own)} cases hold; {verdict}')
        for row in own:
            if not row.get('held'):
                said = outcome(row) or f'error {row["error"]:.2g}, XLA {row["of_xla"]:.2g}'
                print(f'    {row["name"]}: {said}')
    print(f'{"":74}{"us":>10} {"TFLOP/s":>8} {"GB/s":>7} {"of floor":>8}')
    for row in (row for row in record.rows if row['stage'] == 'speed'):
        if outcome(row) or 'microseconds' not in row:
            print(f'{row["name"]:74}{outcome(row)[:80]}')
            continue
        floor = floor_microseconds(row, ceilings)
        share = f'{floor / row["microseconds"]:8.0%}' if floor else ''
        rates = [
            f'{row[key]:.4g}' if key in row else '' for key in ('tflops', 'gigabytes_per_second')
        ]
        print(f'{row["name"]:74}{row["microseconds"]:10.1f} {rates[0]:>8} {rates[1]:>7} {share}')
    show_bars(record.values['bars'])
