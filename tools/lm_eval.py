"""Runs lm-eval's tasks, from local files, on a model of ours.

    python -m tools.lm_eval --config configs/pretrained.py --config.init_from=PATH --tasks DIR --output FILE

--tasks names one or more files in lm-eval's YAML, or directories with them, of which all tasks are
run; their `data_files` are found from the current directory. The model is that of `--mode eval`:
the newest checkpoint in --workdir or, if no run has begun there, what `init_from` names. lm-eval's
table goes to stderr, its results to FILE as JSON and its samples to FILE.samples/TASK.jsonl.
Needs the extra `lmeval`, which brings no torch.

In a program of your own, `open_model` gives the model for `lm_eval.simple_evaluate`; set
DISABLE_MULTIPROC=1 in its environment, as here.
"""  # noqa: E501

import argparse
import contextlib
import functools
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from jaxfm import process
from jaxfm.command_line import Parser, number
from jaxfm.config.load import load_config, read_config, split_arguments, workdir_for
from jaxfm.config.resume import check_resume
from jaxfm.config.run import RunConfig
from jaxfm.errors import DataError, MissingInputError, RunError, UsageError
from jaxfm.evals.lm_eval import LmEval
from jaxfm.metrics.console import Console
from jaxfm.modes.evaluate import describe_weights
from jaxfm.modes.output import write_lines
from jaxfm.run.data import open_tokenizer
from jaxfm.run.run import start_run
from jaxfm.run.weights import current_params
from jaxfm.storage.files import explain_write


@contextlib.contextmanager
def open_model(config: RunConfig, workdir: Path) -> Iterator:
    """Context: the newest weights of a run, or those of `init_from`, as a model of lm-eval.

    Raises:
      MissingInputError: lm-eval is not installed, or there are no weights.
    """
    wrap = functools.partial(as_model, _import_lm_eval().api.model.LM)
    with start_run(config, workdir) as run, contextlib.ExitStack() as stack:
        console = Console(enabled=run.primary)
        stack.callback(console.close)
        tokenizer = open_tokenizer(config, workdir)
        context = run.context(
            tokenizer, run.sampler(tokenizer), weights=lambda step: describe_weights(run, step)
        )
        params, step = current_params(run)
        yield wrap(LmEval(context, params, step or 0), run.primary)


def as_model(base: type, answers: LmEval, is_primary: bool = True):
    """An instance of a subclass of `base`, lm-eval's LM, that gives these answers."""

    class Jaxfm(base):
        def loglikelihood(self, requests, disable_tqdm: bool = False):
            return self._ask('loglikelihood', requests, lambda pair: pair)

        def loglikelihood_rolling(self, requests, disable_tqdm: bool = False):
            return self._ask('loglikelihood_rolling', requests, lambda texts: texts[0])

        def generate_until(self, requests, disable_tqdm: bool = False):
            return self._ask('generate_until', requests, lambda pair: pair)

        def _ask(self, kind: str, requests: Sequence, read: Callable) -> list:
            def keep(index: int, answer) -> None:  # for simple_evaluate(use_cache=...)
                self.cache_hook.add_partial(kind, requests[index].args, answer)

            return getattr(answers, kind)([read(one.args) for one in requests], keep)

        def apply_chat_template(self, chat_history, add_generation_prompt: bool = True) -> str:
            return answers.apply_chat_template(chat_history, add_generation_prompt)

        def chat_template(self, chat_template: bool | str = False) -> str:
            if isinstance(chat_template, str):
                raise DataError(
                    f'chat template {chat_template!r}: a model has one template, without a name; '
                    'set another one in config.tokenizer.chat_template'
                )
            return answers.chat_template if chat_template else ''

        @property
        def tokenizer_name(self) -> str:
            return answers.tokenizer_name

        @property
        def is_primary(self) -> bool:
            """Whether this process writes files; all of them compute."""
            return is_primary

        def get_model_info(self) -> dict:
            return {'weights': answers.weights}

    return Jaxfm()


def read_tasks(paths: Sequence[Path]) -> list:
    """The tasks of YAML files and directories, with their data.

    Raises:
      MissingInputError: lm-eval, a path or a file of data is missing.
      DataError: a directory has no task, or a task is not valid.
    """
    manager_of = _import_lm_eval().tasks.TaskManager
    found = []
    for path in paths:
        if not path.exists():
            raise MissingInputError(f'--tasks: there is no {path}')
        directory = path if path.is_dir() else path.parent
        manager = manager_of(include_path=str(directory), include_defaults=False)
        names = manager.all_subtasks if path.is_dir() else [str(path)]
        if not names:
            raise DataError(f'--tasks: {path} has no .yaml file with a task')
        try:
            loaded = manager.load(list(names))
        except FileNotFoundError as error:
            raise MissingInputError(f'--tasks: {path}: {error}') from error
        except (KeyError, ValueError, TypeError) as error:
            raise DataError(f'--tasks: {path}: {error}') from error
        # The file of a group gives the group first, then those in it.
        found += list(loaded.get('groups', {}).values())[:1] or loaded['tasks'].values()
    return found


def _import_lm_eval():
    try:
        import lm_eval
        import lm_eval.api.model
        import lm_eval.tasks
        import lm_eval.utils
    except ImportError as error:
        raise MissingInputError(
            f"lm-eval cannot be imported ({error}): pip install 'jaxfm[lmeval]'"
        ) from error
    return lm_eval


def write_results(results: dict, path: Path) -> None:
    """Writes what lm-eval found, and the samples of each task to a file of their own."""
    plain = functools.partial(
        json.dumps, default=_import_lm_eval().utils.handle_non_serializable, ensure_ascii=False
    )
    for name, samples in results.get('samples', {}).items():
        write_lines(Path(f'{path}.samples') / f'{name}.jsonl', json.loads(plain(samples)))
    with explain_write(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        rest = {name: value for name, value in results.items() if name != 'samples'}
        path.write_text(plain(rest, indent=1) + '\n', 'utf-8')


def main(argv: list[str]) -> int:
    """Runs one command line; returns its exit code."""
    process.replace_unprintable()
    try:
        flags, overrides = parse(argv)
        config = load_config(flags.config, overrides, workdir=flags.workdir)
        known = flags.workdir / 'config.json'
        if known.exists():
            check_resume(read_config(known), config, [])
        tasks = read_tasks(flags.tasks)  # mistakes in them are told before the weights are read
        lm_eval = _import_lm_eval()
        # It would fork for standard errors, and a fork of a process with JAX's threads may hang.
        os.environ['DISABLE_MULTIPROC'] = '1'
        with open_model(config, flags.workdir) as model:
            results = lm_eval.simple_evaluate(
                model=model,
                tasks=tasks,
                # Only names are looked up in a manager; the default one reads thousands of files.
                task_manager=lm_eval.tasks.TaskManager(include_defaults=False),
                num_fewshot=flags.num_fewshot,
                limit=flags.limit,
                apply_chat_template=flags.apply_chat_template,
            )
            is_primary = model.is_primary
        if is_primary:
            process.print_line(lm_eval.utils.make_table(results))
            if flags.output:
                write_results(results, flags.output)
    except RunError as error:
        process.print_line(f'error: {error}')
        return error.exit_code
    except KeyboardInterrupt:
        return process.report_interrupt()
    return 0


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Command line -> (flags, overrides of the config)."""
    argument, overrides, rest = split_arguments(argv)
    parser = Parser(
        prog='python -m tools.lm_eval',
        description=__doc__.partition('\n')[0],
        allow_abbrev=False,
    )
    parser.add_argument(
        '--tasks', metavar='PATH', type=Path, nargs='+', required=True, help='YAML, or directories'
    )
    parser.add_argument('--output', metavar='FILE', type=Path, help='for the results, as JSON')
    parser.add_argument('--workdir', metavar='DIR', type=Path, help='of a run to evaluate')
    parser.add_argument(
        '--num_fewshot',
        metavar='N',
        type=number(int, 0),
        help='examples (default: the task has it)',
    )
    parser.add_argument(
        '--limit', metavar='N', type=number(int, 1), help='only so many questions of each task'
    )
    parser.add_argument(
        '--apply_chat_template', action='store_true', help='the questions are messages of a chat'
    )
    flags = parser.parse_args(rest)
    flags.config = argument
    if argument is None:
        raise UsageError('no run was named: give --config=FILE, such as configs/pretrained.py')
    flags.workdir = flags.workdir or workdir_for(argument)
    return flags, overrides


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
