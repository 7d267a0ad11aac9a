"""What --mode does: functions (flags, config) -> exit code, each of which builds a run and uses its
parts."""

from jaxfm.schema import load_target

MODES = {
    'train': 'jaxfm.modes.train:train',
    'eval': 'jaxfm.modes.evaluate:evaluate',
    'sample': 'jaxfm.modes.sample:sample',
    'chat': 'jaxfm.modes.chat:chat',
    'export': 'jaxfm.modes.export:export',
}


def load(mode: str):
    """Imports and returns the function of a mode; only now is jax imported."""
    return load_target(MODES[mode])
