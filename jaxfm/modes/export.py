"""--mode export: the newest weights as a directory that other libraries read."""

import contextlib
import logging
import time

from jaxfm.config.run import RunConfig
from jaxfm.metrics.console import Console
from jaxfm.run.run import started

log = logging.getLogger('jaxfm')


def export(flags, config: RunConfig) -> int:
    """Writes the newest weights of the run, or those of `init_from`, to --output."""
    with started(flags, config) as run, contextlib.ExitStack() as stack:
        console = Console(enabled=run.primary)
        stack.callback(console.close)
        run.open_tokenizer()
        exporter = run.exporter()
        params, step = run.current_params()
        start = time.monotonic()
        exporter.write(params, flags.output)
        of_step = '' if step is None else f' of step {step}'
        size, seconds = exporter.num_bytes / 1e9, time.monotonic() - start
        log.info('weights%s in %s: %.3g GB in %.1f s', of_step, flags.output, size, seconds)
    return 0
