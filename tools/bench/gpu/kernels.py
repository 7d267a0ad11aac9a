"""Part `kernels`: GPU tests, numerics over the grid, speed against the others and the roofline.

What passes its numerics may be written down as proven, which makes it a choice of `ops`.
"""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from tempfile import TemporaryFile

from pallas_kernels._tables import short_kind
from tools.bench.gpu.numerics import OPS
from tools.bench.gpu.record import Record, bar, outcome, show_bars
from tools.bench.gpu.stages import ROOT, Runner
from tools.bench.gpu.timing import floor_microseconds

PROVEN = ROOT / 'pallas_kernels' / 'proven.json'
TEST_SECONDS = 150


def run(record: Record, runner: Runner) -> None:
    runner.run('timing', limit=60)
    if runner.only:
        _run_ops(runner)
        return
    record.set(tests=run_tests(min(TEST_SECONDS, runner.left), runner.smoke))
    _run_ops(runner)


def _run_ops(runner: Runner) -> None:
    """Numerics of every op come first: without them its speed is worth nothing."""
    for stage, share in (('numerics', 0.55), ('speed', 1.0)):
        for index, op in enumerate(OPS):
            # What an op does not need of its share is there for those behind it.
            runner.run(stage, limit=runner.left * share / (len(OPS) - index), op=op)


def run_tests(seconds: float, smoke: bool) -> dict:
    """The tests marked `gpu`, in a process of their own -> counts, failures, pytest's last line.

    In smoke they are only collected.
    """
    command = [sys.executable, '-m', 'pytest', '-v', '--tb=line', '-m', 'gpu']
    command += ['-p', 'no:cacheprovider', 'tests/pallas_kernels', 'tests/ops']
    command += ['--collect-only'] if smoke else []
    with TemporaryFile('w+') as output:
        try:
            code = subprocess.run(
                command, cwd=ROOT, stdout=output, stderr=output, timeout=seconds
            ).returncode
            found = {'exit_code': code}
        except subprocess.TimeoutExpired:
            found = {'failed': f'pytest was not done after {seconds:.0f} s'}
        output.seek(0)
        said = output.read().strip().splitlines() or ['']
    verdicts = re.findall(r'^(\S+::\S.*) (PASSED|FAILED|ERROR|SKIPPED)\b', '\n'.join(said), re.M)
    counts = Counter(verdict for _, verdict in verdicts)
    failed = [name for name, verdict in verdicts if verdict in ('FAILED', 'ERROR')]
    found |= {'said': said[-1], 'counts': counts, 'failed_tests': failed}
    # Without pytest, or with one that cannot read the configuration, there is nothing to count.
    return found if counts and not failed else found | {'output': said[-40:]}


def proven(record: Record) -> list[str]:
    """The ops whose whole grid of numerics ran here and is held."""
    if record.values.get('platform') != 'gpu' or record.values['smoke']:
        return []
    rows = [row for row in record.rows if row['stage'] == 'numerics']
    found = []
    for op in OPS:
        own = [row for row in rows if row['name'].split()[0] == op]
        if own and all(row.get('held') for row in own):
            found.append(op)
    return found


def record_proven(record: Record, path: Path = PROVEN) -> list[dict]:
    """Writes down what is proven on this device; what fails there now is struck off."""
    values, kind = record.values, short_kind(record.values['device'])
    if values['platform'] != 'gpu' or values['smoke']:
        raise SystemExit('nothing is proven without a GPU')
    tested = {row['name'].split()[0] for row in record.rows if row['stage'] == 'numerics'}
    entries = [
        entry
        for entry in json.loads(path.read_text())
        if entry['device'] != kind or entry['op'] not in tested
    ]
    about = {'device': kind, 'date': values['date'], 'versions': values['versions']}
    entries += [{'op': op, **about} for op in proven(record)]
    entries.sort(key=lambda entry: (entry['device'], entry['op']))
    path.write_text(json.dumps(entries, indent=1) + '\n')
    return entries


def bars(record: Record) -> list[dict]:
    """The goals, measured on ours."""
    speed, ceilings = record.stage('speed'), record.stage('timing')

    def value(name: str, key: str):
        return speed.get(f'{name} / mosaic', {}).get(key)

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
        ratio = _times_faster(speed, f'{packed} {way}', ('xla', 'fa3', 'tokamax'))
        found.append(bar(f'packed attention {way}, times the best other', ratio, 1.0))
    names = [name.rpartition(' / ')[0] for name in speed if name.endswith(' / mosaic')]
    ratios = [_times_faster(speed, name, ('xla',)) for name in names]
    slowest = min((ratio for ratio in ratios if ratio), default=None)
    found.append(bar('slowest shape, times XLA', slowest, 1.0))
    return found


def _times_faster(speed: dict, name: str, others) -> float | None:
    ours = speed.get(f'{name} / mosaic')
    theirs = [
        speed[key]['microseconds'] for other in others if (key := f'{name} / {other}') in speed
    ]
    return (
        min(theirs) / ours['microseconds'] if ours and ours.get('microseconds') and theirs else None
    )


def show(record: Record) -> None:
    """The table."""
    ceilings = record.stage('timing')
    for name in ('matmul', 'copy', 'launch'):
        if row := ceilings.get(name):
            rate = row.get('tflops') or row.get('gigabytes_per_second') or row['microseconds']
            unit = {'matmul': 'TFLOP/s', 'copy': 'GB/s', 'launch': 'us'}[name]
            print(f'{name}: {rate:.4g} {unit}')
    tests = record.values.get('tests')
    if tests:
        counts = ', '.join(f'{n} {verdict.lower()}' for verdict, n in tests['counts'].items())
        print(f'GPU tests: {tests.get("failed", "")} {counts or tests["said"]}')
        for name in tests['failed_tests']:
            print(f'    {name}')
    numerics = [row for row in record.rows if row['stage'] == 'numerics']
    for op in OPS:
        own = [row for row in numerics if re.split(r'\s', row['name'])[0] == op]
        held = sum(bool(row.get('held')) for row in own)
        verdict = 'PROVEN' if op in proven(record) else 'not proven'
        print(f'{op}: {held} of {len(own)} cases held; {verdict}')
        for row in own:
            if not row.get('held'):
                said = outcome(row) or f'error {row["error"]:.2g}, of XLA {row["of_xla"]:.2g}'
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
