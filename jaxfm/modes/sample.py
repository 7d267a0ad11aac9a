"""--mode sample: completes prompts with the weights of the newest checkpoint."""

import contextlib
import logging

from jaxfm.config.run import RunConfig
from jaxfm.errors import NumericsError
from jaxfm.metrics.console import Console
from jaxfm.modes.generation import describe_failures, requests_for, write_samples
from jaxfm.run.data import open_tokenizer
from jaxfm.run.run import start_run
from jaxfm.run.weights import current_params
from jaxfm.sampling.complete import complete

log = logging.getLogger('jaxfm')


def sample(flags, config: RunConfig, changes) -> int:
    """Completes the prompts with the newest weights; the text goes to stdout.

    Raises:
      DataError: a prompt or an option of it cannot be served; nothing has been sampled.
      NumericsError: samples failed; the others have been written.
    """
    with start_run(config, flags.workdir) as run, contextlib.ExitStack() as stack:
        console = Console(enabled=run.primary)
        stack.callback(console.close)
        tokenizer = open_tokenizer(config, run.workdir)
        prompts = flags.prompt or list(config.sampling.prompts) or ['']
        requests = requests_for(config, tokenizer, prompts, flags.seed)
        sampler = run.sampler(tokenizer, slots=len(prompts) * config.sampling.n)
        for request in requests:  # before the weights are read, which may take minutes
            sampler.check(request)
        params, step = current_params(run)
        if step is not None:
            log.info('sampling with the weights of step %d', step)
        completions = complete(sampler, requests, params, step or 0)
        about = prompts, requests, completions
        write_samples(run, tokenizer, *about, flags.output, flags.logprobs)
        if failures := describe_failures(*about):
            raise NumericsError(failures)
    return 0
