"""What --mode does: functions (flags, config, changes) -> exit code, which build a run and use it.

`changes` is what of the config differs from the run that the work directory holds.
"""

from jaxfm.registry import load_target

MODES = {
    'train': 'jaxfm.modes.train:run_training',
    'eval': 'jaxfm.modes.evaluate:evaluate',
    'sample': 'jaxfm.modes.sample:sample',
    'chat': 'jaxfm.modes.chat:chat',
    'export': 'jaxfm.modes.export:export',
}


def load(mode: str):
    """Imports and returns the function of a mode; only now is jax imported."""
    return load_target(MODES[mode])
