"""--mode eval: runs every evaluator of the config on the newest checkpoint."""

import contextlib
import logging

from jaxfm.config.run import RunConfig
from jaxfm.metrics.console import Console
from jaxfm.modes.output import write_lines
from jaxfm.run.data import open_data
from jaxfm.run.run import start_run
from jaxfm.run.weights import current_params

log = logging.getLogger('jaxfm')


def evaluate(flags, config: RunConfig, changes) -> int:
    """Runs every evaluator on the newest weights and logs its values; writes them to --output."""
    with start_run(config, flags.workdir) as run, contextlib.ExitStack() as stack:
        console = Console(enabled=run.primary)
        stack.callback(console.close)
        params, step = current_params(run)
        data = open_data(config, run.workdir)
        if step is None:
            step = 0
        else:
            position = run.reader().read_manifest(step)['extra']['source']
            phase = run.phase_at(step)
            phase.batches(data.datasets[phase.name]).set_state(position)
        scores = {}
        evaluators = run.evaluators(data, run.sampler(data.tokenizer), write=False)
        for name, evaluator in evaluators.items():
            values = evaluator.run(params, step)
            scores |= {f'eval/{name}/{key}': value for key, value in values.items()}
        for name, value in scores.items():
            log.info('step %d  %s %.6g', step, name, value)
        if run.primary and flags.output:
            write_lines(flags.output, [{'step': step} | scores])
    return 0
