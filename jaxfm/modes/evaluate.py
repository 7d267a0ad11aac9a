"""--mode eval: runs every evaluator of the config on the newest weights.

They are those of the newest checkpoint or, for a run that has not begun, of the model that
`init_from` names; without steps, data and optimizer, only evaluators that need no held-out
documents are possible.
"""

import contextlib
import functools
import logging
from pathlib import Path

from jaxfm.config.run import RunConfig
from jaxfm.metrics.console import Console
from jaxfm.modes.output import write_lines
from jaxfm.preferences.source import position_in_data
from jaxfm.run.data import RunData, open_data, open_tokenizer
from jaxfm.run.run import Run, start_run
from jaxfm.run.weights import current_params, identify_params

log = logging.getLogger('jaxfm')


def evaluate(flags, config: RunConfig, changes) -> int:
    """Logs a table of each evaluator's values, and writes them to --output.

    Samples go to the directory evals/ of the work directory, or to FILE.samples/ with --output
    FILE. An interrupted evaluation goes on with them.
    """
    with start_run(config, flags.workdir) as run, contextlib.ExitStack() as stack:
        console = Console(enabled=run.primary)
        stack.callback(console.close)
        # Mistakes in tasks and tokenizer are told before the weights are read, which takes longer.
        if run.phases:
            data = open_data(config, run.workdir)
        else:
            data = RunData(open_tokenizer(config, run.workdir), {})
        evaluators = run.evaluators(
            data,
            run.sampler(data.tokenizer),
            _samples_directory(run, flags.output),
            # Once: an earlier run may go on meanwhile.
            weights=functools.cache(functools.partial(describe_weights, run)),
            goes_on=True,
        )
        params, step = current_params(run)
        if step is not None and run.phases:
            position = run.reader().read_manifest(step)['extra']['source']
            phase = run.phase_at(step)
            if not phase.is_rollout:
                phase.batches(data.datasets[phase.name]).set_state(position_in_data(position))
        _check_samples(evaluators, step or 0)
        scores = {}
        for name, evaluator in evaluators.items():
            values = evaluator.run(params, step or 0)
            log.info('%s', format_table(f'{name} at step {step or 0}', values))
            scores |= {f'eval/{name}/{key}': value for key, value in values.items()}
        if run.primary and flags.output:
            write_lines(flags.output, [{'step': step or 0} | scores])
    return 0


def _samples_directory(run: Run, output: Path | None) -> Path | None:
    if not run.primary:
        return None
    return Path(f'{output}.samples') if output else run.workdir / 'evals'


def _check_samples(evaluators: dict, step: int) -> None:
    """Raises DataError if a file holds samples of another evaluation, before any has run."""
    for evaluator in evaluators.values():
        if hasattr(evaluator, 'open'):  # others, such as the loss, keep no samples
            with evaluator.open(step) as samples:
                if samples.records:
                    log.info('%s: keeps %d samples', samples.path, len(samples.records))


def describe_weights(run: Run, step: int) -> dict:
    """Which weights these are; the digest tells them from others of this name and step."""
    name = run.workdir.name if run.has_begun else run.config.init_from
    return {'name': name, 'step': step, 'digest': identify_params(run, step)}


def format_table(title: str, values: dict[str, float]) -> str:
    """A line for each value, with its interval if there is one."""
    lines, width = [], max(map(len, values), default=0)
    for name, value in values.items():
        if name.endswith(('_low', '_high')) and name.rpartition('_')[0] in values:
            continue
        ends = [values.get(f'{name}_{end}') for end in ('low', 'high')]
        interval = '' if None in ends else f'  [{ends[0]:.4g}, {ends[1]:.4g}]'
        lines.append(f'  {name:<{width}} {value:>10.6g}{interval}')
    return '\n'.join([title, *lines])
