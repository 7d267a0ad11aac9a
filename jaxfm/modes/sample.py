"""--mode sample: prompts, continued by the weights of the newest checkpoint."""

import contextlib
import logging

from jaxfm.config.run import RunConfig
from jaxfm.metrics.console import Console
from jaxfm.modes.generation import requests_for, write_samples
from jaxfm.run.run import started

log = logging.getLogger('jaxfm')


def sample(flags, config: RunConfig) -> int:
    """Continues the prompts with the weights of the newest checkpoint; text goes to stdout."""
    with started(flags, config) as run, contextlib.ExitStack() as stack:
        console = Console(enabled=run.primary)
        stack.callback(console.close)
        run.open_tokenizer()
        params, step = run.current_params()
        prompts = flags.prompt or list(config.sampling.prompts) or ['']
        sampler = run.sampler(params, slots=len(prompts))
        requests = requests_for(config, run.tokenizer, prompts, flags)
        if step is not None:
            log.info('sampling from step %d', step)
        write_samples(run, sampler, run.tokenizer, prompts, requests, flags.output)
    return 0
