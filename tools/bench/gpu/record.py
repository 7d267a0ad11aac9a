"""The result of a part: JSON that is saved after every row, and a table.

A run that is cut off keeps the rows it had.
"""

import datetime
import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

from jaxfm.process import num_cores
from jaxfm.storage.whole import write_file

PACKAGES = (
    *('jax', 'jaxlib', 'jax-cuda13-plugin', 'flax', 'optax', 'torch', 'triton', 'tokamax'),
    *('flash-attn3-jax', 'nvidia-cudnn-cu13', 'nvidia-cublas', 'pytest'),
)


class Record:
    """One result file of a part; `rows` are the measurements, in order.

    resume: keep the rows of an earlier run of the same day until they are measured again.
    """

    def __init__(self, directory: Path, part: str, smoke: bool, resume: bool = False):
        date = datetime.date.today().isoformat()
        self.path = directory / f'gpu-{part}{"-smoke" if smoke else ""}-{date}.json'
        earlier = json.loads(self.path.read_text('utf-8')) if resume and self.path.exists() else {}
        self.values: dict[str, Any] = earlier | {
            'part': part,
            'date': date,
            'smoke': smoke,
            'python': platform.python_version(),
            'cores': num_cores(),
            'versions': versions(),
            # '*' is a stage that did not even start: no row of this name would ever replace it.
            'rows': [row for row in earlier.get('rows', []) if row['name'] != '*'],
        }
        self.save()

    @property
    def rows(self) -> list[dict]:
        return self.values['rows']

    def stage(self, name: str) -> dict[str, dict]:
        """The rows of one stage that have a result, by name."""
        found = [row for row in self.rows if row['stage'] == name]
        return {row['name']: row for row in found if not outcome(row)}

    @property
    def failed_tests(self) -> list[str]:
        """The test files that were started and did not pass completely."""
        tests = self.values.get('tests', {})
        begun = {file: found for file, found in tests.items() if 'not_run' not in found}
        return [file for file, found in begun.items() if not all_passed(found)]

    def add(self, row: dict) -> None:
        """Adds, saves and prints a row, which replaces one of the same stage and name."""
        same = (row['stage'], row['name'])
        kept = [each for each in self.rows if (each['stage'], each['name']) != same]
        self.values['rows'] = [*kept, row]
        self.save()
        print(f'{row["stage"]:12} {row["name"]:58} {outcome(row) or summary(row)}', flush=True)

    def set_device(self, about: dict) -> None:
        """Records the device; drops what was measured on a different one."""
        if self.values.get('device', about['device']) != about['device']:
            self.set(rows=[], tests={})
        self.set(**about)

    def set(self, **values) -> None:
        self.values |= values
        self.save()

    def save(self) -> None:
        with write_file(self.path) as file:
            file.write((json.dumps(self.values, indent=1) + '\n').encode())


def versions() -> dict[str, str]:
    """Versions of the installed packages."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def outcome(row: dict) -> str:
    """Why a row has no result; '' if it has one."""
    words = {'refused': 'refused', 'failed': 'FAILED', 'not_run': 'not run'}
    return next((f'{words[key]}: {row[key]}' for key in words if key in row), '')


def all_passed(tests: dict) -> bool:
    """Whether all tests of a file ran, and none failed."""
    return tests.get('exit_code') == 0 and set(tests['counts']) == {'PASSED'}


def summary(row: dict) -> str:
    """The figures of a row on one line."""
    shown = []
    for key, value in row.items():
        if isinstance(value, bool):
            shown.append(f'{key} {"yes" if value else "NO"}')
        elif isinstance(value, (int, float)) and key not in ('flops', 'bytes'):
            shown.append(f'{key} {value:.5g}')
    return ', '.join(shown)


def bar(name: str, value: float | None, limit: float, at_least: bool = True) -> dict:
    """A goal and whether it is met; `held` is None without a value."""
    held = None if value is None else bool(value >= limit if at_least else value <= limit)
    return {'name': name, 'value': value, 'limit': limit, 'at_least': at_least, 'held': held}


def show_bars(bars: list[dict]) -> None:
    for each in bars:
        limit = f'{"at least" if each["at_least"] else "at most"} {each["limit"]:g}'
        if each['held'] is None:
            print(f'{each["name"]:58} not measured (bar: {limit})')
        else:
            verdict = 'held' if each['held'] else 'MISSED'
            print(f'{each["name"]:58} {each["value"]:.4g} (bar: {limit}) {verdict}')
