"""Reinforcement learning from nothing: a model learns to add from rewards alone, in minutes.

    python -m jaxfm.main --config configs/rl_addition.py

Pre-training shows sums as lines of text. SFT teaches the form: the user asks `Please sum 123456+7`,
the assistant answers with the sum; it stops long before all answers are right. The last phase shows
the model no answers: it samples 16 answers to each of 16 questions, and a reward of 1 or 0 says
which are right (DAPO, a form of GRPO). pass@1 is measured on 256 sums that no phase has seen.

Hardware: 2 CPU cores, under four minutes. Expect a pass@1 of 0.23 (95 % interval 0.19 to 0.29)
after SFT and of 0.97 (0.94 to 0.98) after the rewards. That is with the seed 0. Rewards can only
raise what a model does at times: with the seeds 1 and 2, pre-training does not find out how to add,
SFT ends at 0.05 and 0.07, and the rewards at about 0.1 (2026-11-30).
"""

from ml_collections import ConfigDict


def get_config(arg: str = '') -> ConfigDict:
    """With arg='smoke': the whole run, end to end, at a size that takes seconds."""
    if arg not in ('', 'smoke'):
        raise ValueError(f"the only argument is 'smoke', got {arg!r}")
    smoke = arg == 'smoke'
    config = ConfigDict()
    config.seed = 0
    config.tokenizer = dict(name='bytes', chat_template='qa')
    config.model = dict(
        name='transformer',
        vocab_size=258,
        embed_dim=128,
        num_layers=1 if smoke else 3,
        block=dict(
            num_heads=2,
            num_kv_heads=2,
            head_dim=64,
            mlp_dim=384,
            rope=dict(theta=100.0),  # wavelengths of 6 to 600 tokens, for rows of 128
            qk_norm=True,
            query_scale=1.5 / 64**0.5,
        ),
        embedding_norm=True,
        embedding_std=0.1,
        zero_init_outputs=True,
        scan=False,  # three layers compile quickly, and unrolled layers run faster
    )
    sums = dict(name='problems', kinds=['addition'], num_heldout=256)
    chats = dict(form='chat', num_problems=1_000 if smoke else 20_000, seed=1, **sums)
    rows = dict(sequence_length=128, batch_size=16)
    config.phases = [
        dict(
            name='pretrain',
            steps=10 if smoke else 300,
            data=dict(form='text', num_problems=2_000 if smoke else 60_000, **sums, **rows),
            optimizer=dict(
                name='muon',
                muon_learning_rate=0.03,  # for the matrices inside blocks
                learning_rate=0.02,  # AdamW, for embedding, head and norms
                warmup_steps=5 if smoke else 30,
                schedule='linear',
                final_fraction=0.0,
                weight_decay=0.0,
                clip_norm=0.0,
            ),
        ),
        dict(
            name='sft',
            steps=10 if smoke else 25,
            data=dict(**chats, **rows),
            optimizer=dict(
                name='adamw',
                learning_rate=0.003,
                warmup_steps=10,
                schedule='linear',
                final_fraction=0.0,
                weight_decay=0.0,
            ),
        ),
        dict(
            name='rl',
            steps=12 if smoke else 125,
            data=dict(
                name='rollout',
                task=dict(name='exact_answer', num_prompts=1_000 if smoke else 20_000),
                documents=chats,
                prompts=16,
                samples=4 if smoke else 16,
                sequence_length=48,  # one sample a row
                batch_size=64 if smoke else 256,
                max_tokens=12,
                filter='zero_variance',
            ),
            objective=dict(name='dapo'),
            optimizer=dict(
                name='muon',
                muon_learning_rate=0.003,
                learning_rate=0.0015,
                warmup_steps=5,
                schedule='linear',
                final_fraction=0.1,
                weight_decay=0.0,
                accumulate=2,
            ),
        ),
    ]
    config.evals = dict(
        sums=dict(
            name='generate',
            phase='sft',
            task=dict(name='exact_answer', num_prompts=32 if smoke else 256),
            max_tokens=12,
            every=0 if smoke else 50,
            at_start=False,
        ),
    )
    config.checkpoint = dict(every=8 if smoke else 200)
    config.sampling = dict(
        chat=True,
        slots=128,
        max_length=64,
        decode_steps=8,
        temperature=0.0,
        max_tokens=12,
        prompts=['Please sum 123456+7', 'Please sum 999999+9', 'Please sum 248163+8'],
    )
    config.metrics = dict(log_every=10)
    return config
