"""Supervised fine-tuning: a trained model learns to answer from chats.

    python -m jaxfm.main --config configs/sft.py --config.data.path=my.jsonl

A line of my.jsonl is a chat: {"messages": [{"role": "user", "content": "..."}, {"role":
"assistant", "content": "..."}]}, with a system message, tools and as many turns as there are. Also
understood: ShareGPT's conversations, prompt and completion, and any other names by
--config.data.fields.*; .jsonl.gz, .jsonl.zst, .parquet; globs; s3://bucket/path.

It starts from the model in runs/quickstart; another one by --config.init_from=runs/NAME. Only what
the assistant says is learned; the loss of the first step is what the model knows already.

With --config.model.lora.rank=16 the weights stay as they are and adapters beside them are trained
(LoRA): the state is hardly larger than the weights. Also --config.model.lora.alpha=32 and
--config.model.lora.targets="['all']" (else q and v of the attention); the learning rate is usually
about ten times as large, --config.optimizer.learning_rate=3e-3.

Hardware: what the model needs; the quickstart's on 2 CPU cores, a minute.
"""

from ml_collections import ConfigDict


def get_config(arg: str = '') -> ConfigDict:
    """`smoke` is the same path in seconds, from scratch, on generated chats."""
    if arg not in ('', 'smoke'):
        raise ValueError(f"the argument is 'smoke' or nothing, got {arg!r}")
    smoke = arg == 'smoke'
    config = ConfigDict()
    config.seed = 0
    config.steps = 30 if smoke else 200
    config.data = dict(
        sequence_length=128 if smoke else 512,
        batch_size=8,
        too_long='drop',  # the log and the report say how many
    )
    if smoke:
        config.data.update(name='problems', form='chat', num_problems=2000, num_heldout=40)
        config.tokenizer = dict(name='bytes')
        config.model = dict(
            name='transformer',
            vocab_size=258,
            embed_dim=64,
            num_layers=2,
            block=dict(num_heads=2, num_kv_heads=1, head_dim=32, mlp_dim=128),
        )
    else:
        config.data.update(name='files')
        config.init_from = 'runs/quickstart'  # its model and its tokenizer
    config.optimizer = dict(
        name='adamw',
        learning_rate=1e-3 if smoke else 3e-4,
        warmup_steps=5 if smoke else 10,
        schedule='cosine',
        weight_decay=0.0,
    )
    config.evals = dict(heldout=dict(name='loss', every=0 if smoke else 50, batch_size=8))
    config.checkpoint = dict(every=10 if smoke else 50)
    config.sampling = dict(
        chat=True,
        slots=4,
        max_length=512,
        max_tokens=96,
        temperature=0.7,
        prompts=['What can you do?', 'Write a short story.', 'How do I sort a list?'],
    )
    config.metrics = dict(log_every=10)
    return config
