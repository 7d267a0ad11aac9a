"""--mode sample: prompts, continued by the weights of the newest checkpoint."""

import contextlib
import logging

from jaxfm.data import tokenizer as tokenizers
from jaxfm.metrics.console import Console
from jaxfm.modes.generation import requests_for, write_samples
from jaxfm.run import started
from jaxfm.run_config import RunConfig

log = logging.getLogger('jaxfm')


def sample(flags, config: RunConfig) -> int:
    """Continues the prompts with the weights of the newest checkpoint; text goes to stdout."""
    with started(flags, config) as run, contextlib.ExitStack() as stack:
        console = Console(enabled=run.primary)
        stack.callback(console.close)
        tokenizer = tokenizers.load(run.workdir / 'tokenizer')
        checkpoints = run.reader()
        params, step = run.restore_params(checkpoints)
        prompts = flags.prompt or list(config.sampling.prompts) or ['']
        sampler = run.sampler(params, slots=len(prompts))
        requests = requests_for(config, tokenizer, prompts, flags)
        log.info('sampling from step %d', step)
        write_samples(run, sampler, tokenizer, prompts, requests, flags.output)
    return 0
