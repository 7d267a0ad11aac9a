"""A script in another environment that works on request: a line of JSON there, a line back."""

import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

PEERS = Path(__file__).resolve().parents[1] / 'peers'


class Peer:
    """A running script; a context manager that ends it.

    Args:
      python: the interpreter of an environment that has what the script needs.
      script: a file of tools/bench/peers.
      path: for PYTHONPATH; by default the script sees none of our code.
      environment: further variables.

    Attributes:
      about: what the script told when it had started: versions and settings.
    """

    def __init__(self, python: str, script: str | Path, *flags: str, path: str = '', **environment):
        environment = os.environ | {'PYTHONPATH': path} | environment
        if not path:
            environment.pop('GLIBC_TUNABLES', None)  # our settings of malloc
        self._errors = tempfile.TemporaryFile('w+', encoding='utf-8')
        self._process = subprocess.Popen(
            [python, str(PEERS / script), *flags],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            encoding='utf-8',
            env=environment,
        )
        self.about = self._read()

    def ask(self, job: Any) -> dict[str, Any]:
        """Sends a job and waits for the answer."""
        self._process.stdin.write(json.dumps(job) + '\n')
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._errors.seek(0)
            said = self._errors.read()[-2000:]
            self.close()
            raise SystemExit(f'{self._process.args} ended with {code}:\n{said}')
        return json.loads(line)

    def close(self) -> None:
        """Lets the script end."""
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()
        self._errors.close()

    def __enter__(self) -> 'Peer':
        return self

    def __exit__(self, *_) -> None:
        self.close()
