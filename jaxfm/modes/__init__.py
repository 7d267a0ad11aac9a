"""The modes (--mode): functions (flags, config, changes) -> exit code that build and use a run.

`changes` lists how the config differs from that of the run in the work directory.
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
    """Imports and returns the function of a mode. This imports jax."""
    return load_target(MODES[mode])
