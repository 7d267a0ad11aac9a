"""Starts real processes that talk over the loopback interface.

A process under `jax.distributed` survives SIGTERM, so every one of them is ended with SIGKILL.
"""

import contextlib
import os
import socket
import subprocess
import sys
import textwrap


def free_port():
    with socket.create_server(('127.0.0.1', 0)) as server:
        return server.getsockname()[1]


def ranks(count):
    """The environment variables of `count` processes that form one run."""
    address = f'127.0.0.1:{free_port()}'
    return [
        dict(
            JAX_COORDINATOR_ADDRESS=address,
            JAX_NUM_PROCESSES=str(count),
            JAX_PROCESS_ID=str(rank),
        )
        for rank in range(count)
    ]


@contextlib.contextmanager
def start(program, environments=({},)):
    """Processes running `program` (Python source), SIGKILLed at the end."""
    command = [sys.executable, '-u', '-c', textwrap.dedent(program)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    base = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': '1'}
    processes = [subprocess.Popen(command, env={**base, **env}, **pipes) for env in environments]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def read_until(process, word):
    for line in process.stdout:
        if line.startswith(word):
            return line
    raise AssertionError(f'{word!r} never came: {process.stderr.read()}')
