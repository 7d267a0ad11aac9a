"""Quickstart: a small transformer learns to write Python from the standard library's own source.

    python -m jaxfm.main --config configs/quickstart.py

Hardware: 2 CPU cores.
"""

from ml_collections import ConfigDict


def get_config(arg: str = '') -> ConfigDict:
    """`smoke` is the same path end to end in seconds."""
    smoke = arg == 'smoke'
    config = ConfigDict()
    config.steps = 30 if smoke else 900
    config.seed = 0
    config.model = dict(
        name='transformer',
        vocab_size=2048,
        embed_dim=128,
        num_layers=3,
        block=dict(num_heads=4, num_kv_heads=4, head_dim=32, mlp_dim=384, qk_norm=True),
        scan=False,
    )
    config.data = dict(
        source=dict(name='python_stdlib'),
        tokenizer=dict(name='bpe', vocab_size=2048),
        sequence_length=128,
        batch_size=16,
    )
    config.optimizer = dict(
        name='muon',
        learning_rate=6e-3,
        muon_learning_rate=0.03,
        warmup_steps=10,
        schedule='linear',
        final_fraction=0.0,
        weight_decay=0.0,
    )
    config.evals = dict(
        heldout=dict(name='loss', every=0, xz_baseline=True, max_batches=2 if smoke else 0),
        functions=dict(
            name='generate', task=dict(name='python_functions', num_prompts=64), max_tokens=96
        ),
    )
    config.checkpoint = dict(every=10 if smoke else 300)
    config.sampling = dict(
        temperature=0.7,
        max_tokens=96,
        prompts=['def main(', 'class Reader:\n', 'import os\n'],
    )
    config.metrics = dict(log_every=10 if smoke else 50)
    return config
