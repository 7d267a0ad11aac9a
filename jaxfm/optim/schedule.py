"""The learning-rate schedule: linear warm-up, then decay."""

import optax


def make_schedule(config, steps: int):
    """The learning rate as a function of the number of updates applied so far.

    config: an OptimizerConfig. steps: of the phase; the decay ends there unless decay_steps is set.
    """
    peak, final = config.learning_rate, config.learning_rate * config.final_fraction
    decay_steps = max(1, config.decay_steps or steps - config.warmup_steps)
    decay = {
        'cosine': lambda: optax.cosine_decay_schedule(peak, decay_steps, config.final_fraction),
        'linear': lambda: optax.linear_schedule(peak, final, decay_steps),
        'constant': lambda: optax.constant_schedule(peak),
    }[config.schedule]()
    if not config.warmup_steps:
        return decay
    # Start from peak / warmup_steps: at a learning rate of 0 the first step would be wasted.
    warmup = optax.linear_schedule(peak / config.warmup_steps, peak, config.warmup_steps - 1)
    return optax.join_schedules([warmup, decay], [config.warmup_steps])
