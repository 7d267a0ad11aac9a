"""The learning rate of every update: linear warm-up, then decay."""

import optax


def make_schedule(config, steps: int):
    """Learning rate as a function of the number of updates applied: linear warm-up, then decay."""
    peak, final = config.learning_rate, config.learning_rate * config.final_fraction
    decay_steps = max(1, config.decay_steps or steps - config.warmup_steps)
    decay = {
        'cosine': lambda: optax.cosine_decay_schedule(peak, decay_steps, config.final_fraction),
        'linear': lambda: optax.linear_schedule(peak, final, decay_steps),
        'constant': lambda: optax.constant_schedule(peak),
    }[config.schedule]()
    if not config.warmup_steps:
        return decay
    # From peak / warmup_steps, not from zero: a first step that does nothing is a wasted one.
    warmup = optax.linear_schedule(peak / config.warmup_steps, peak, config.warmup_steps - 1)
    return optax.join_schedules([warmup, decay], [config.warmup_steps])
