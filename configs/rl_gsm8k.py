"""Reinforcement learning on GSM8K, from any model that can answer some of it.

    python -m jaxfm.main --config configs/rl_gsm8k.py --config.init_from=MODEL --config.data.task.path=FILE

MODEL is a directory in Hugging Face's layout, a .gguf file, a model of the hub or a run of yours.
FILE is the published train.jsonl of GSM8K. At each step the model answers 32 questions 8 times
each. An answer whose final number is right has the reward 1, any other 0. To evaluate on the test
split every 50 steps, add

    --config.evals.test.name=generate --config.evals.test.task.name=gsm8k --config.evals.test.task.path=FILE --config.evals.test.task.chat=True --config.evals.test.max_tokens=512 --config.evals.test.every=50

With --config.model.lora.rank=32 only adapters are trained (learning rate 1e-4 and above).
--config.objective.name=dapo, rloo or another name changes the algorithm; docs/reinforcement_learning.md
has them all.

Hardware: one GPU with memory for the train state of the model (16 bytes a parameter) and the
key-value cache of config.sampling. No run has been made on one.
"""  # noqa: E501

from ml_collections import ConfigDict


def get_config(arg: str = '') -> ConfigDict:
    """With arg='smoke': a tiny model, from scratch, on generated sums, in seconds."""
    if arg not in ('', 'smoke'):
        raise ValueError(f"the only argument is 'smoke', got {arg!r}")
    smoke = arg == 'smoke'
    config = ConfigDict()
    config.seed = 0
    config.steps = 6 if smoke else 200
    config.data = dict(
        name='rollout',
        prompts=4 if smoke else 32,
        samples=4 if smoke else 8,
        sequence_length=64 if smoke else 1024,
        batch_size=16 if smoke else 256,
        max_tokens=8 if smoke else 512,
        too_long='drop',
        filter='zero_variance',
    )
    if smoke:
        config.data.task = dict(name='arithmetic', split='train', num_prompts=200, digits=[1])
        config.tokenizer = dict(name='bytes')
        config.model = dict(
            name='transformer',
            vocab_size=258,
            embed_dim=64,
            num_layers=2,
            block=dict(num_heads=2, num_kv_heads=1, head_dim=32, mlp_dim=128),
        )
    else:
        config.data.task = dict(name='gsm8k', chat=True)  # give its path
        config.init_from = ''  # give the model; it has the tokenizer, too
    config.objective = dict(name='grpo')
    config.optimizer = dict(
        name='adamw',
        learning_rate=1e-3 if smoke else 1e-6,
        warmup_steps=2 if smoke else 10,
        schedule='constant',
        weight_decay=0.0,
        clip_norm=1.0,
        accumulate=2 if smoke else 32,
    )
    if smoke:
        task = dict(name='arithmetic', num_prompts=20, digits=[1])
        config.evals = dict(test=dict(name='generate', task=task, max_tokens=8))
    config.checkpoint = dict(every=2 if smoke else 50)
    config.sampling = dict(
        chat=not smoke,
        slots=16 if smoke else 128,
        max_length=64 if smoke else 1536,
        max_tokens=8 if smoke else 512,
        num_samples=1,
        prompts=['Question: What is 2 + 3?\nAnswer:'],
    )
    config.metrics = dict(log_every=1)
    return config
