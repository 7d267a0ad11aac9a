"""Llama 8B: a transformer shaped like Llama 3.1 8B, pre-trained from scratch on your own text.

    python -m jaxfm.main --config configs/llama_8b.py --config.data.path='text/**/*.txt'

Run this command on every node, for example with `srun` in front of it.

Each UTF-8 file is one document. A twentieth of the files is held out, chosen by a hash of the path.
A byte-level BPE tokenizer is trained first, on the other files; its vocabulary is at most as large
as Llama's.

Hardware: 8 nodes of 8 H200. The run trains on 160 G tokens, 20 per parameter (of 8.03 G), in 3.5
days: computed from 6 FLOPs per parameter and token at 40 % of the dense bf16 peak, not measured.
Expect a held-out loss of 2.2 to 2.4 nats per token on web text: an estimate (Hoffmann et al.,
2022), not a measurement.

`configs/llama_8b.py:smoke` runs the same path in seconds, with a tiny model of the same shape on
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
    config.steps = 30 if smoke else 38_000  # of 4.2 M tokens each
    config.model = dict(
        name='transformer',
        vocab_size=512 if smoke else 128_256,
        embed_dim=64 if smoke else 4096,
        num_layers=4 if smoke else 32,
        block=dict(
            num_heads=8 if smoke else 32,
            num_kv_heads=2 if smoke else 8,
            head_dim=8 if smoke else 128,
            mlp_dim=224 if smoke else 14_336,
            norm_epsilon=1e-5,
            rope=dict(
                theta=500_000.0,
                scaling='llama3',
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position=8192,
            ),
        ),
        tie_embeddings=False,
        # Recompute activations in the backward pass; this stores 8 KiB per token and layer.
        remat='full',
    )
    config.tokenizer = dict(name='bpe', vocab_size=config.model.vocab_size)
    config.data = dict(
        # Your own text: --config.data.path='/data/text/**/*.jsonl.zst'
        **(dict(name='python_stdlib') if smoke else dict(name='files', path='text/**/*.txt')),
        sequence_length=128 if smoke else 4096,
        batch_size=8 if smoke else 1024,
    )
    config.optimizer = dict(
        name='adamw',
        learning_rate=3e-3 if smoke else 3e-4,
        warmup_steps=5 if smoke else 2000,
        schedule='cosine',
        final_fraction=0.1,
        weight_decay=0.1,
        accumulate=2 if smoke else 8,  # 2 rows per device and microbatch, on 64 devices
    )
    config.mesh = dict(fsdp=-1)  # all devices; with more nodes: --config.mesh.replica=N
    config.evals = dict(
        heldout=dict(name='loss', every=10 if smoke else 1000, max_batches=4 if smoke else 64)
    )
    config.checkpoint = dict(every=10 if smoke else 500, keep=3)
    config.sampling = dict(
        temperature=0.7,
        max_tokens=32 if smoke else 128,
        prompts=['The meaning of life is', 'Once upon a time', 'In 1969,'],
    )
    config.metrics = dict(log_every=10)
    return config
