"""`python -m jaxfm.main --config configs/<run>.py`: reads the command line and runs one mode.

A `RunError` is a mistake that the user can mend: it is printed as one message and becomes an exit
code. stdout carries only generated text; everything else goes to stderr and log.txt.
"""

import os
import sys

from jaxfm import process

if __name__ == '__main__':  # before the imports below, which Ctrl-C may interrupt
    process.begin()
    if not {'-h', '--help'} & set(sys.argv):
        process.use_huge_pages()

import argparse
import errno
import functools
import traceback
from pathlib import Path

from jaxfm import distributed, modes
from jaxfm.command_line import Parser, number
from jaxfm.config.load import load_config, read_config, split_arguments, workdir_for
from jaxfm.config.resume import Change, check_resume
from jaxfm.config.sampling_flags import FLAGS, add_flags, apply_flags
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


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Command line -> (flags, overrides of the config).

    Raises:
      UsageError: an unknown flag, a flag without its value, or no --config.
    """
    argument, overrides, rest = split_arguments(argv)
    flags = _make_parser().parse_args(rest)
    flags.config = argument
    if argument is None:
        raise UsageError(
            'no run was named: give --config=FILE; configs/quickstart.py is a good first one'
        )
    flags.workdir = flags.workdir or workdir_for(argument)
    # Arguments arrive in the encoding of the locale; text is UTF-8 in every locale.
    flags.prompt = [_as_utf8(prompt) for prompt in flags.prompt or ()]
    # Also a flag that is given its default value counts as given.
    flags.given = {argument.partition('=')[0].removeprefix('--') for argument in rest}
    flags.allow_change = [name for name in flags.allow_change.split(',') if name]
    return flags, overrides


def _make_parser() -> Parser:
    parser = Parser(
        prog='python -m jaxfm.main',
        usage='%(prog)s --config FILE[:ARG] [--mode MODE] [options]',
        description='Trains, evaluates, samples, exports or chats with a model.',
        epilog='Any value of the config can be changed with --config.GROUP.KEY=VALUE, '
        'for example --config.optimizer.learning_rate=3e-4.',
        allow_abbrev=False,
        formatter_class=functools.partial(argparse.HelpFormatter, max_help_position=26),
    )
    parser.add_argument(
        '--config', metavar='FILE[:ARG]', help='the run, for example configs/quickstart.py:smoke'
    )
    parser.add_argument(
        '--mode',
        metavar='MODE',
        choices=tuple(modes.MODES),
        default='train',
        help=f'{", ".join(modes.MODES)} (default: train)',
    )
    parser.add_argument(
        '--workdir',
        type=Path,
        metavar='DIR',
        help='directory of the run (default: runs/<config>[-<arg>])',
    )
    parser.add_argument(
        '--allow_change',
        default='',
        metavar='GROUPS',
        help='groups of the config that may differ from the run in --workdir, '
        'for example optimizer,data',
    )
    parser.add_argument(
        '--resume_step',
        type=number(int, 1),
        metavar='N',
        help='train: go back to the checkpoint of step N; later ones are set aside. Not for job '
        'scripts, because every start would go back',
    )
    parser.add_argument(
        '--output',
        type=Path,
        metavar='PATH',
        help='eval, sample, chat: file for the results, as JSON lines; eval: samples go beside it; '
        'export: directory to write',
    )
    sampling = parser.add_argument_group(
        'options of --mode sample and chat',
        'By default, options of sampling have the values of config.sampling.',
    )
    sampling.add_argument(
        '--prompt',
        action='append',
        metavar='TEXT',
        help='text to continue, or a message in a chat; may be repeated',
    )
    sampling.add_argument(
        '--seed',
        type=number(int, 0, 2**32),
        default=0,
        metavar='N',
        help='seed of the sampling noise (default: 0)',
    )
    add_flags(sampling)
    sampling.add_argument(
        '--logprobs',
        action='store_true',
        help='sample: tokens and their log-probs go to --output, too',
    )
    return parser


def _as_utf8(argument: str) -> str:
    """Bytes that are not UTF-8 stay surrogates, which the tokenizer refuses."""
    return os.fsencode(argument).decode('utf-8', 'surrogateescape')


def main(argv: list[str]) -> int:
    """Runs one command line; returns its exit code."""
    try:
        flags, overrides = parse(argv)
        config = load_config(flags.config, overrides, workdir=flags.workdir)
        _check_mode(flags, config)
        config = apply_flags(config, flags)
        changes = _check_workdir(flags, config)
        if flags.mode in ('train', 'eval'):
            _check_files(config)
        if config.checkpoint.directory:
            open_storage(config.checkpoint.directory).check_readable()
        run_mode = modes.load(flags.mode)  # imports jax: mistakes are reported before that
        return run_mode(flags, config, changes)
    except RunError as error:
        return _report(error)
    except MemoryError as error:
        return _report(NumericsError(f'out of memory on the host: {error}'))
    except KeyboardInterrupt:
        return process.report_interrupt()
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:  # any path of a command line may be too long
            raise
        return _report(MissingInputError(f'{error.filename}: {error.strerror}'))
    except UnicodeEncodeError as error:
        if error.encoding != sys.getfilesystemencoding():
            raise
        return _report(
            ConfigError(
                f'{error.object!a} cannot be the name of a file in this locale, whose encoding is '
                f'{error.encoding}: set PYTHONUTF8=1'
            )
        )
    except Exception as error:
        if 'RESOURCE_EXHAUSTED' not in str(error):
            raise
        first = str(error).splitlines()[0]
        return _report(NumericsError(f'{first}\ncheapest remedies: {REMEDIES}'))


REMEDIES = (
    'double --config.optimizer.accumulate (halves the activations), give '
    '--config.model.remat=full, or use more devices with --config.mesh.fsdp'
)


def _check_files(config) -> None:
    """Raises unless the files that the phases read exist; a token cache needs none."""
    for phase in (phase for phase in config.all_phases if not phase.data.cache):
        for source in phase.data.all_sources.values():
            SOURCES.load(source.name)(source).files()


_TALKING = ('sample', 'chat')
MODES_OF_FLAGS = {  # all others are flags of every mode
    'resume_step': ('train',),
    'output': ('eval', 'sample', 'chat', 'export'),
    **dict.fromkeys(('prompt', 'seed', *FLAGS), _TALKING),
    **dict.fromkeys(('n', 'logprobs'), ('sample',)),
}


def _check_mode(flags, config) -> None:
    """Raises unless the flags suit the mode, and the config has the groups that it needs."""
    for name, wanted in MODES_OF_FLAGS.items():
        if name in flags.given and flags.mode not in wanted:
            raise UsageError(
                f'--{name} is a flag of --mode {", ".join(wanted)}, not of {flags.mode}'
            )
    if flags.mode == 'train' and not config.all_phases:
        raise ConfigError(
            f'this config has no training; --mode {flags.mode} needs config.steps, config.data '
            'and config.optimizer, as in configs/sft.py'
        )
    if flags.mode == 'eval' and not config.evals:
        raise ConfigError(
            'this config has no evaluators: add one, such as --config.evals.mine.name=perplexity '
            '--config.evals.mine.path=FILE'
        )
    if flags.mode == 'train' and config.model.lora and not config.init_from:
        raise ConfigError('config.model.lora adapts a trained model: name it in config.init_from')
    if flags.mode == 'chat' and config.sampling.n > 1:
        raise ConfigError(
            f'config.sampling.n is {config.sampling.n}, but --mode chat gives one answer: add '
            '--config.sampling.n=1'
        )
    if flags.logprobs and flags.output is None:
        raise UsageError('--logprobs needs a file for them: give --output=PATH')
    if flags.mode == 'export':
        if flags.output is None:
            raise UsageError('--mode export needs a directory to write: give --output=DIR')
        check_absent(flags.output)


def _check_workdir(flags, config) -> list[Change]:
    """Raises unless the run in the work directory, if any, may go on with this config.

    Returns:
      The differences between the two configs.
    """
    known = flags.workdir / 'config.json'
    if known.exists():
        return check_resume(read_config(known), config, flags.allow_change)
    if flags.mode != 'train' and not config.init_from:
        raise MissingInputError(
            f'{flags.workdir} holds no run to {flags.mode}: train one first, name the --workdir of '
            'another run, or name a model with --config.init_from'
        )
    return []


def _report(error: RunError) -> int:
    process.print_line(f'error: {error}')  # the log may not be open yet, or closed again
    return error.exit_code


def _run(argv: list[str]) -> int:
    """Runs `main` as the whole of this process.

    A process that fails does not wait for the other processes of the run.
    """
    try:
        code = main(argv)
    except (Exception, KeyboardInterrupt):
        code = 1
        if not process.is_interrupted():
            process.print_line(traceback.format_exc().rstrip())
    finally:  # also after --help, which exits
        process.end_on_interrupt()
        process.flush()
    if process.is_interrupted():  # also if a library made another error of it
        code = process.report_interrupt()
    if code not in (0, Preempted.exit_code):
        distributed.end_after_error(code)
    return code


if __name__ == '__main__':
    sys.exit(_run(sys.argv[1:]))
