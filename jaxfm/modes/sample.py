"""--mode sample: completes prompts with the weights of the newest checkpoint."""

import contextlib
import logging

from jaxfm.config.run import RunConfig
from jaxfm.metrics.console import Console
from jaxfm.modes.generation import requests_for, write_samples
from jaxfm.run.data import open_tokenizer
from jaxfm.run.run import start_run
from jaxfm.run.weights import current_params
from jaxfm.sampling.engine import complete

log = logging.getLogger('jaxfm')


def sample(flags, config: RunConfig, changes) -> int:
    """Completes the prompts with the newest weights; the text goes to stdout."""
    with start_run(config, flags.workdir) as run, contextlib.ExitStack() as stack:
        console = Console(enabled=run.primary)
        stack.callback(console.close)
        tokenizer = open_tokenizer(config, run.workdir)
        params, step = current_params(run)
        prompts = flags.prompt or list(config.sampling.prompts) or ['']
        sampler = run.sampler(slots=len(prompts))
        requests = requests_for(config, tokenizer, prompts, flags)
        if step is not None:
            log.info('sampling with the weights of step %d', step)
        events = complete(sampler, requests, params, step or 0)
        write_samples(run, tokenizer, prompts, requests, events, flags.output)
    return 0
