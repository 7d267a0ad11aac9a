"""A local S3 server that checks signatures and permissions."""

import json
import socket
import subprocess
import time
from pathlib import Path


class S3Server:
    """SeaweedFS with all its services in one process, on free ports of the loopback interface."""

    BUCKET = 'bucket'
    PORTS = ['master', 'volume', 'filer', 's3']
    STARTUP_SECONDS = 60

    def __init__(self, directory: Path, weed: str):
        self.directory = directory
        ports = iter(free_ports(2 * len(self.PORTS)))
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
            # Not the files of the user who runs the tests.
            'AWS_CONFIG_FILE': str(directory / 'absent'),
            'AWS_SHARED_CREDENTIALS_FILE': str(directory / 'absent'),
        }
        identities = [
            _identity('all', 'key', 'secret', ['Admin', 'Read', 'Write', 'List']),
            _identity('reader', 'reader', 'secret', ['Read', 'List']),
            _identity('none', 'other', 'secret', ['Read:another']),
        ]
        (directory / 's3.json').write_text(json.dumps({'identities': identities}))
        command = [weed, 'server', '-s3', f'-s3.config={directory}/s3.json', f'-dir={directory}']
        command += ['-ip=127.0.0.1', '-ip.bind=127.0.0.1', '-master.electionTimeout=1s']
        command += ['-master.telemetry=false', '-master.volumeSizeLimitMB=1024', '-volume.max=64']
        command += ['-s3.port.iceberg=0', '-s3.port.lance=0']
        command += [f'-{name}={port}' for name, port in self.ports.items()]
        with open(directory / 'log', 'w') as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, cwd=directory)

    def wait(self) -> None:
        """Waits until the server has stored an object."""
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
        """A file system with all permissions."""
        import s3fs

        return s3fs.S3FileSystem(
            key='key',
            secret='secret',
            endpoint_url=self.endpoint,
            skip_instance_cache=True,
            use_listings_cache=False,
        )

    def stop(self) -> None:
        # Its data is not kept, so it is killed: an orderly stop takes half a minute.
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


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(('127.0.0.1', 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
