"""Flags for options of sampling: `--top_k=40` is short for `--config.sampling.top_k=40`."""

import argparse
import os

from jaxfm.config.run import RunConfig
from jaxfm.config.validation import format_path, validate
from jaxfm.errors import UsageError
from jaxfm.sampling import SamplingConfig
from jaxfm.schema import Problem

# {key of config.sampling: (the value's name, what it means)}.
FLAGS = {
    'temperature': ('T', '0 is greedy decoding'),
    'max_tokens': ('N', 'longest completion, in tokens'),
    'n': ('N', 'sample: completions of each prompt'),
    'top_k': ('K', 'sample from the K likeliest tokens; 0 is off'),
    'top_p': ('P', 'sample from the likeliest tokens that together have probability P'),
    'min_p': ('P', 'sample from tokens with at least P times the probability of the likeliest'),
    'repetition_penalty': ('X', 'above 1: tokens of prompt and completion become less likely'),
    'presence_penalty': ('X', 'is subtracted from the logits of tokens of the completion'),
    'frequency_penalty': ('X', 'the same, times how often the token occurs'),
    'stop': ('TEXT', 'ends a completion before this text; may be repeated'),
    'min_tokens': ('N', 'nothing ends a completion with fewer tokens'),
    'ignore_eos': (None, 'the end tokens of tokenizer and chat template end nothing'),
}


def add_flags(group) -> None:
    """Adds the flags to a group of a parser. A flag that is not given is None.

    Ranges are checked by `apply_flags`.
    """
    for name, (metavar, meaning) in FLAGS.items():
        kind = SamplingConfig.model_fields[name].annotation
        if kind is bool:
            options = dict(action='store_true', default=None)
        elif name == 'stop':
            options = dict(action='append', type=_read_text, metavar=metavar)
        else:
            options = dict(type=kind, metavar=metavar)
        group.add_argument(f'--{name}', help=meaning, **options)


def _read_text(argument: str) -> str:
    """Arguments arrive in the encoding of the locale; text is UTF-8 in every locale."""
    try:
        return os.fsencode(argument).decode()
    except UnicodeDecodeError as error:
        raise argparse.ArgumentTypeError(f'must be UTF-8, got {argument!a}') from error


def apply_flags(config: RunConfig, flags: argparse.Namespace) -> RunConfig:
    """The config with the values of the flags that were given.

    Raises:
      UsageError: a value is out of range, or does not go with another one.
    """
    given = {name: getattr(flags, name) for name in FLAGS if getattr(flags, name) is not None}
    sampling, problems = validate(SamplingConfig, config.sampling.model_dump() | given)
    problems = [problem.under(('sampling',)) for problem in problems]
    if sampling is not None:
        config = config.model_copy(update={'sampling': sampling})
        problems = config.find_conflicts(dict(config))
    if problems:
        raise UsageError('\n'.join(_format(problem, given) for problem in problems))
    return config


def _format(problem: Problem, given: dict) -> str:
    paths = {path[:2] for path in problem.paths}
    flags = ', '.join(f'--{name}' for name in given if ('sampling', name) in paths)
    place = format_path(('config', *problem.place))
    return f'{place}: {problem.sentence} (given by {flags})'
