"""Quickstart: pre-train a small transformer on the source code of Python's standard library.

    python -m jaxfm.main --config configs/quickstart.py

Hardware: 2 CPU cores, three minutes. Expect a held-out loss of 1.52 bits per byte.
"""

from ml_collections import ConfigDict


def get_config(arg: str = '') -> ConfigDict:
    """With arg='smoke': the whole run, end to end, at a size that takes seconds."""
    if arg not in ('', 'smoke'):
        raise ValueError(f"the only argument is 'smoke', got {arg!r}")
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
            query_scale=1.5 / 64**0.5,  # 1.5 times the usual: QK norm keeps the logits small
        ),
        embedding_norm=True,
        embedding_std=0.1,
        zero_init_outputs=True,
        scan=False,  # three layers compile quickly, and unrolled layers run faster
    )
    config.tokenizer = dict(name='bpe', vocab_size=2048)
    # Many steps with small batches: at this budget they teach more than few steps with large ones.
    config.data = dict(
        name='python_stdlib',
        sequence_length=128,
        batch_size=16,
    )
    config.optimizer = dict(
        name='muon',
        muon_learning_rate=0.03,  # for the matrices inside blocks
        learning_rate=0.02,  # AdamW, for embedding, head and norms
        warmup_steps=5 if smoke else 40,
        schedule='linear',
        final_fraction=0.0,
        weight_decay=0.0,
        clip_norm=0.0,
    )
    config.evals = dict(
        # A stride of half a window, so that every target has at least 64 tokens of context.
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
            contamination_bytes=0,  # headers like `def close(self)` recur in many files: no leak
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
