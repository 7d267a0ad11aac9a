"""Llama 1B: a transformer shaped like Llama 3.2 1B, pre-trained from scratch on your own text.

    python -m jaxfm.main --config configs/llama_1b.py --config.data.path='text/**/*.txt'

Each UTF-8 file is one document. A twentieth of the files is held out, chosen by a hash of the path.
A byte-level BPE tokenizer is trained first, on the other files; its vocabulary is at most as large
as Llama's.

Hardware: one node of 8 H200. The run trains on 25 G tokens, 20 per parameter (of 1.24 G), in 16
hours: computed from 6 FLOPs per parameter and token at 40 % of the dense bf16 peak, not measured.
Expect a held-out loss of 2.5 to 2.8 nats per token on web text: an estimate (Hoffmann et al.,
2022), not a measurement.

`configs/llama_1b.py:smoke` runs the same path in seconds, with a tiny model of the same shape on
the source code of Python's standard library.
"""

from ml_collections import ConfigDict


def get_config(arg: str = '') -> ConfigDict:
    """With arg='smoke': the whole run, end to end, at a size that takes seconds."""
    if arg not in ('', 'smoke'):
        raise ValueError(f"the only argument is 'smoke', got {arg!r}")
    smoke = arg == 'smoke'
    config = ConfigDict()
    config.seed = 0
    config.steps = 30 if smoke else 24_000  # of 1 M tokens each
    config.model = dict(
        name='transformer',
        vocab_size=512 if smoke else 128_256,
        embed_dim=64 if smoke else 2048,
        num_layers=4 if smoke else 16,
        block=dict(
            num_heads=8 if smoke else 32,
            num_kv_heads=2 if smoke else 8,
            head_dim=8 if smoke else 64,
            mlp_dim=256 if smoke else 8192,
            norm_epsilon=1e-5,
            rope=dict(
                theta=500_000.0,
                scaling='llama3',
                factor=32.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position=8192,
            ),
        ),
        tie_embeddings=True,
        # Recompute activations in the backward pass; this stores 4 KiB per token and layer.
        remat='full',
    )
    config.tokenizer = dict(name='bpe', vocab_size=config.model.vocab_size)
    config.data = dict(
        # Your own text: --config.data.path='/data/text/**/*.jsonl.zst'
        **(dict(name='python_stdlib') if smoke else dict(name='files', path='text/**/*.txt')),
        sequence_length=128 if smoke else 4096,
        batch_size=8 if smoke else 256,
    )
    config.optimizer = dict(
        name='adamw',
        learning_rate=3e-3 if smoke else 6e-4,
        warmup_steps=5 if smoke else 1000,
        schedule='cosine',
        final_fraction=0.1,
        weight_decay=0.1,
        accumulate=2 if smoke else 8,  # 4 rows per device and microbatch, on 8 devices
    )
    config.mesh = dict(fsdp=-1)  # all devices
    config.evals = dict(
        heldout=dict(name='loss', every=10 if smoke else 1000, max_batches=4 if smoke else 64)
    )
    config.checkpoint = dict(every=10 if smoke else 1000, keep=3)
    config.sampling = dict(
        temperature=0.7,
        max_tokens=32 if smoke else 128,
        prompts=['The meaning of life is', 'Once upon a time', 'In 1969,'],
    )
    config.metrics = dict(log_every=10)
    return config
