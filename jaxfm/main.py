"""`python -m jaxfm.main --config configs/<run>.py`: flags, all built from the config, one mode run.

Errors that a person must read are `RunError`s: each is printed as one message and becomes an exit
code. Generated text alone goes to stdout, all else to stderr and the log.
"""

import argparse
import errno
import glob
import os
import sys
import traceback
from pathlib import Path

from jaxfm import distributed, modes
from jaxfm.command_line import Parser, number
from jaxfm.config.load import load_config, read_config, split_arguments, workdir_for
from jaxfm.config.resume import Change, check_resume
from jaxfm.data import SOURCES
from jaxfm.errors import (
    ConfigError,
    MissingInputError,
    NumericsError,
    Preempted,
    RunError,
    UsageError,
)
from jaxfm.modes.output import check_absent
from jaxfm.storage import open_storage

# glibc gives back and maps anew the large temporaries of every step unless told not to, and uses
# small pages; on CPU that costs 14 % of the speed. It reads this when a process starts.
HUGE_PAGES = (
    'glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=4294967296'
    ':glibc.malloc.trim_threshold=8589934592'
)


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Command line -> (flags, overrides of the config).

    Raises:
      UsageError: a flag that does not exist or lacks its value.
    """
    parser = Parser(
        prog='python -m jaxfm.main',
        description='Trains, evaluates, samples and talks to foundation models.',
        epilog='Any value of the config can be given as --config.group.key=value.',
        allow_abbrev=False,
    )
    parser.add_argument('--config', metavar='FILE[:ARG]', help='a file of configs/')
    parser.add_argument('--mode', choices=tuple(modes.MODES), default='train')
    parser.add_argument('--workdir', type=Path, help='default: runs/<config>[-<arg>]')
    parser.add_argument(
        '--allow_change',
        default='',
        metavar='GROUPS',
        help='what of the config may differ from the run in workdir, e.g. optimizer,data',
    )
    sampling = parser.add_argument_group('sampling (--mode sample, chat)')
    sampling.add_argument(
        '--prompt', action='append', help='text to continue, or said in a chat; may be repeated'
    )
    sampling.add_argument('--temperature', type=number(float, 0), help='0 is greedy')
    sampling.add_argument('--max_tokens', type=number(int, 1))
    sampling.add_argument('--seed', type=number(int, 0, 2**32), default=0, help='of the noise')
    parser.add_argument(
        '--output',
        type=Path,
        help='a file for samples, scores or chats, as JSON lines; of export the directory',
    )
    argument, overrides, rest = split_arguments(argv)
    flags = parser.parse_args(rest)
    flags.config = argument
    if argument is None:
        raise UsageError('which run? --config=configs/quickstart.py is a good first one')
    flags.workdir = flags.workdir or workdir_for(argument)
    flags.allow_change = [name for name in flags.allow_change.split(',') if name]
    return flags, overrides


def main(argv: list[str]) -> int:
    """Runs one command line; returns its exit code."""
    try:
        flags, overrides = parse(argv)
        config = load_config(flags.config, overrides, workdir=flags.workdir)
        _check_mode(flags, config)
        changes = _check_workdir(flags, config)
        if flags.mode in ('train', 'eval'):
            _check_files(config)
        if config.checkpoint.directory:
            open_storage(config.checkpoint.directory).check_readable()
        run_mode = modes.load(flags.mode)  # jax only now: a mistake costs no start-up time
        return run_mode(flags, config, changes)
    except RunError as error:
        return _report(error)
    except MemoryError as error:
        return _report(NumericsError(f'out of memory on the host: {error}'))
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:  # which any path of a command line may be
            raise
        return _report(MissingInputError(f'{error.filename}: {error.strerror}'))
    except Exception as error:
        if 'RESOURCE_EXHAUSTED' not in str(error):
            raise
        first = str(error).splitlines()[0]
        return _report(NumericsError(f'{first}\ncheapest remedies: {REMEDIES}'))


REMEDIES = (
    'config.optimizer.accumulate x 2 (half the activations), config.model.remat=full, '
    'or more devices in config.mesh.fsdp'
)


def _check_files(config) -> None:
    """Raises unless the files are there that all phases read; a cache needs none."""
    for phase in (phase for phase in config.all_phases if not phase.data.cache):
        for source in phase.data.all_sources.values():
            SOURCES.load(source.name)(source).files()


def _check_mode(flags, config) -> None:
    """Raises unless the config has what the mode needs."""
    if flags.mode in ('train', 'eval') and not config.all_phases:
        raise ConfigError(
            f'this config uses a model as it is; to {flags.mode} it needs config.steps, '
            'config.data and config.optimizer, as configs/sft.py has'
        )
    if flags.mode == 'train' and config.model.lora and not config.init_from:
        raise ConfigError(
            'config.model.lora adapts a trained model, which config.init_from must name'
        )
    if flags.mode == 'export':
        if flags.output is None:
            raise UsageError('where to? --mode export needs --output=DIRECTORY')
        check_absent(flags.output)


def _check_workdir(flags, config) -> list[Change]:
    """Raises unless the run in the work directory, if any, may go on with this config.

    Returns:
      What differs.
    """
    known = flags.workdir / 'config.json'
    if known.exists():
        return check_resume(read_config(known), config, flags.allow_change)
    if flags.mode != 'train' and not config.init_from:
        raise MissingInputError(
            f'{flags.workdir} holds no run to {flags.mode}; train one first, or give its --workdir '
            'or a model by --config.init_from'
        )
    return []


def _report(error: RunError) -> int:
    # The log may not be set up yet, or be gone; stderr is always there.
    print(f'error: {error}', file=sys.stderr, flush=True)
    return error.exit_code


def _run(argv: list[str]) -> int:
    """`main` of a process of its own: one that fails among several does not wait for the others."""
    try:
        code = main(argv)
    except Exception:
        traceback.print_exc()
        code = 1
    if code not in (0, Preempted.exit_code):
        distributed.end_after_error(code)
    return code


def _start_with_huge_pages(argv: list[str]) -> None:
    """Starts this process over with HUGE_PAGES, once, where computing happens on CPU."""
    platform = os.environ.get('JAX_PLATFORMS', '').split(',')[0]
    on_gpu = platform != 'cpu' if platform else bool(glob.glob('/dev/nvidia[0-9]*'))
    if not sys.platform.startswith('linux') or on_gpu or 'GLIBC_TUNABLES' in os.environ:
        return
    os.environ['GLIBC_TUNABLES'] = HUGE_PAGES
    print('on CPU: started over with huge pages for malloc', file=sys.stderr, flush=True)
    os.execv(sys.executable, [sys.executable, '-m', 'jaxfm.main', *argv])


if __name__ == '__main__':
    if not {'-h', '--help'} & set(sys.argv):
        _start_with_huge_pages(sys.argv[1:])
    sys.exit(_run(sys.argv[1:]))
