"""Supervised fine-tuning (SFT): teach a trained model to answer, from a file of chats.

    python -m jaxfm.main --config configs/sft.py --config.data.path=my.jsonl

Each line of my.jsonl is a chat: {"messages": [{"role": "user", "content": "..."}, {"role":
"assistant", "content": "..."}]}. A chat may have a system message, tools and any number of turns.
Records with ShareGPT's `conversations` or with `prompt` and `completion` work, too; set
--config.data.fields.* for any other field names. The path may be a glob or s3://bucket/path, and
the files may be .jsonl, .jsonl.gz, .jsonl.zst or .parquet.

The run starts from the model in runs/quickstart; choose another with --config.init_from=runs/NAME.
The loss covers only the assistant's tokens. Its first value shows how well the model predicts them
before fine-tuning.

With --config.model.lora.rank=16 the weights are frozen and only low-rank adapters are trained
(LoRA), so the train state is hardly larger than the weights. --config.model.lora.alpha=32 sets the
scale; --config.model.lora.targets="['all']" adapts all matrices of the blocks, not only q and v.
LoRA usually needs about ten times the learning rate: --config.optimizer.learning_rate=3e-3.

Hardware: depends on the model. The quickstart's takes a minute on 2 CPU cores.
"""

from ml_collections import ConfigDict


def get_config(arg: str = '') -> ConfigDict:
    """With arg='smoke': a tiny model, from scratch, on generated chats, in seconds."""
    if arg not in ('', 'smoke'):
        raise ValueError(f"the only argument is 'smoke', got {arg!r}")
    smoke = arg == 'smoke'
    config = ConfigDict()
    config.seed = 0
    config.steps = 30 if smoke else 200
    config.data = dict(
        sequence_length=128 if smoke else 512,
        batch_size=8,
        too_long='drop',  # the log and the report give the number of dropped chats
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
        config.init_from = 'runs/quickstart'  # provides the model and the tokenizer
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
