"""Reinforcement learning with a tool: a model learns to ask a calculator, from rewards alone.

    python -m jaxfm.main --config configs/rl_calculator.py          # with the calculator
    python -m jaxfm.main --config configs/rl_calculator.py:alone    # the same training without it

The user asks `Please multiply 437*982`. Demonstrations show how to ask: the assistant writes
`[437*982]`, the result comes as the user's next message, and the assistant repeats it. Then it is
rewarded for right answers to other questions, and asks by itself.

Hardware: 2 CPU cores, about one and a half minutes. Expect a pass@1 of 0.73 (95 % interval 0.68 to
0.79) on products that it has not seen after the demonstrations, and of 0.85 (0.80 to 0.89) after
the rewards; with the seeds 1 and 2 of 0.93 and 0.95, and then 0.95 and 0.98. `alone` is at 0 (0 to
0.015) with each seed, before and after (2026-12-01).
"""

from ml_collections import ConfigDict


def get_config(arg: str = '') -> ConfigDict:
    """'alone': answers without the calculator. 'smoke': the whole run at a size of seconds."""
    if arg not in ('', 'alone', 'smoke'):
        raise ValueError(f"the argument is 'alone' or 'smoke', got {arg!r}")
    smoke, alone = arg == 'smoke', arg == 'alone'
    config = ConfigDict()
    config.seed = 0
    config.tokenizer = dict(name='bytes', chat_template='qa')
    config.model = dict(
        name='transformer',
        vocab_size=258,
        embed_dim=128,
        num_layers=1 if smoke else 2,
        block=dict(
            num_heads=4,
            num_kv_heads=4,
            head_dim=32,
            mlp_dim=256,
            rope=dict(theta=100.0),  # wavelengths of 6 to 600 tokens
            qk_norm=True,
            query_scale=1.5 / 32**0.5,
        ),
        embedding_norm=True,
        embedding_std=0.1,
        zero_init_outputs=True,
        scan=False,
    )
    products = dict(name='problems', kinds=['multiplication'], num_heldout=256, seed=1)
    form = 'chat' if alone else 'calls'
    chats = dict(form=form, num_problems=1_000 if smoke else 8_000, **products)
    calculator = dict(name='calculator', start='[', end=']', role='user', max_turns=2)
    environment = dict() if alone else dict(environment=calculator)
    config.phases = [
        dict(
            name='sft',
            steps=10 if smoke else 120,
            data=dict(sequence_length=128, batch_size=16, **chats),
            optimizer=dict(
                name='muon',
                muon_learning_rate=0.03,
                learning_rate=0.02,
                warmup_steps=5 if smoke else 30,
                schedule='linear',
                final_fraction=0.0,
                weight_decay=0.0,
                clip_norm=0.0,
            ),
        ),
        dict(
            name='rl',
            steps=6 if smoke else 30,
            data=dict(
                name='rollout',
                task=dict(name='exact_answer', before='first', num_prompts=8_000),
                documents=chats,
                prompts=4 if smoke else 16,
                samples=4 if smoke else 8,
                sequence_length=72,  # one sample a row
                batch_size=16 if smoke else 128,
                max_tokens=12,
                filter='zero_variance',
                max_refills=1,
                **environment,
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
        products=dict(
            name='generate',
            phase='sft',
            task=dict(name='exact_answer', before='first', num_prompts=16 if smoke else 256),
            max_tokens=12,
            every=0,
            at_start=False,
            **environment,
        ),
    )
    config.checkpoint = dict(every=5 if smoke else 200)
    config.sampling = dict(
        slots=16 if smoke else 128, max_length=73, decode_steps=8, max_tokens=12, num_samples=0
    )
    config.metrics = dict(log_every=10)
    return config
