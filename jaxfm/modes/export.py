"""--mode export: writes the newest weights to a directory that other libraries can read."""

import contextlib
import logging
import time

from jaxfm.config.run import RunConfig
from jaxfm.errors import human_bytes
from jaxfm.metrics.console import Console
from jaxfm.run.data import open_tokenizer
from jaxfm.run.run import start_run
from jaxfm.run.weights import current_params, make_exporter

log = logging.getLogger('jaxfm')


def export(flags, config: RunConfig, changes) -> int:
    """Writes the newest weights of the run, or those of `init_from`, to --output."""
    with start_run(config, flags.workdir) as run, contextlib.ExitStack() as stack:
        console = Console(enabled=run.primary)
        stack.callback(console.close)
        exporter = make_exporter(run, open_tokenizer(config, run.workdir))
        params, step = current_params(run)
        start = time.monotonic()
        exporter.write(params, flags.output)
        of_step = '' if step is None else f' of step {step}'
        size = human_bytes(exporter.num_bytes, 1000, 3, 'GB')
        seconds = time.monotonic() - start
        log.info('exported weights%s to %s: %s in %.1f s', of_step, flags.output, size, seconds)
    return 0
