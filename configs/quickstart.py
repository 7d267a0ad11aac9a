"""Quickstart: a small transformer learns to write Python from the standard library's own source.

    python -m jaxfm.main --config configs/quickstart.py

Hardware: 2 CPU cores, three minutes. Expect a held-out loss of 1.52 bits per byte.
"""

from ml_collections import ConfigDict


def get_config(arg: str = '') -> ConfigDict:
    """`smoke` is the same path end to end in seconds."""
    if arg not in ('', 'smoke'):
        raise ValueError(f"the argument is 'smoke' or nothing, got {arg!r}")
    smoke = arg == 'smoke'
    config = ConfigDict()
    config.seed = 0
    config.steps = 30 if smoke else 850
    config.model = dict(
        name='transformer',
        vocab_size=2048,
        embed_dim=128,
        num_layers=3,
        block=dict(
            num_heads=2,
            num_kv_heads=2,
            head_dim=64,
            mlp_dim=384,
            qk_norm=True,
            query_scale=1.5 / 64**0.5,  # sharper than usual: normed queries and keys are short
        ),
        embedding_norm=True,
        embedding_std=0.1,
        zero_init_outputs=True,
        scan=False,  # three layers compile quickly, and unrolled steps are faster
    )
    config.tokenizer = dict(name='bpe', vocab_size=2048)
    # Many small steps: at this budget they teach more than few large ones.
    config.data = dict(
        name='python_stdlib',
        sequence_length=128,
        batch_size=16,
    )
    config.optimizer = dict(
        name='muon',
        muon_learning_rate=0.03,  # matrices inside blocks
        learning_rate=0.02,  # AdamW: embedding, head, norms
        warmup_steps=5 if smoke else 40,
        schedule='linear',
        final_fraction=0.0,
        weight_decay=0.0,
        clip_norm=0.0,
    )
    config.evals = dict(
        # Windows overlap by half, so that every target has at least 64 tokens of context.
        heldout=dict(
            name='loss',
            stride=64,
            at_start=False,
            xz_baseline=True,
            max_batches=4 if smoke else 0,
        ),
        functions=dict(
            name='generate',
            task=dict(name='python_functions', num_prompts=64 if smoke else 128),
            max_tokens=96,
            contamination_bytes=0,  # a header like `def close(self)` in other files is no leak
        ),
    )
    config.checkpoint = dict(every=10 if smoke else 200)
    config.sampling = dict(
        slots=64,
        max_length=256,
        temperature=0.6,
        max_tokens=96,
        num_samples=3,
        prompts=['def main(', 'class Reader:', 'if __name__ =='],
    )
    config.metrics = dict(log_every=10 if smoke else 50)
    return config
