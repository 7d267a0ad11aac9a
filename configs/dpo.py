"""Direct preference optimisation from nothing: a model learns which answers are wrong, in minutes.

    python -m jaxfm.main --config configs/dpo.py

Pre-training shows problems as lines of text, SFT teaches the form of a chat, and the last phase
learns from pairs: the right answer, and one with a wrong letter. How often the model prefers the
right one is measured on 400 held-out pairs, before and after.

For pairs of your own, in the layout of TRL, UltraFeedback or HH-RLHF, and any model:

    python -m jaxfm.main --config configs/dpo.py:files --config.init_from=MODEL \\
        --config.data.path=pairs.jsonl

Hardware: 2 CPU cores, about two minutes.
"""

from ml_collections import ConfigDict


def get_config(arg: str = '') -> ConfigDict:
    """'smoke': the whole run at a size that takes seconds. 'files': pairs in files, any model."""
    if arg not in ('', 'smoke', 'files'):
        raise ValueError(f"the argument is 'smoke' or 'files', got {arg!r}")
    return _from_files() if arg == 'files' else _from_nothing(smoke=arg == 'smoke')


def _from_files() -> ConfigDict:
    config = ConfigDict()
    config.init_from = ''  # on the command line
    config.steps = 500
    config.data = dict(
        name='files',
        path='pairs.jsonl',  # {"prompt", "chosen", "rejected"}; fields.* names others
        heldout_fraction=0.05,
        sequence_length=2048,  # both chats of a pair, side by side
        batch_size=16,
        too_long='drop',
    )
    config.objective = dict(name='dpo', beta=0.1)
    config.optimizer = dict(
        name='adamw', learning_rate=5e-7, warmup_steps=50, schedule='linear', weight_decay=0.0
    )
    config.evals = dict(pairs=dict(name='preference', every=100))
    return config


def _from_nothing(smoke: bool) -> ConfigDict:
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
            rope=dict(theta=100.0),  # wavelengths of 6 to 600 tokens
            qk_norm=True,
        ),
        embedding_norm=True,
        zero_init_outputs=True,
        scan=False,  # three layers compile quickly, and unrolled layers run faster
    )
    problems = dict(name='problems', kinds=['reverse', 'rotate'], num_heldout=400)
    rows = dict(sequence_length=256, batch_size=8)
    config.phases = [
        dict(
            name='pretrain',
            steps=10 if smoke else 200,
            data=dict(form='text', num_problems=2_000 if smoke else 60_000, **problems, **rows),
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
            data=dict(
                form='chat', num_problems=1_000 if smoke else 20_000, seed=1, **problems, **rows
            ),
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
            name='dpo',
            steps=10 if smoke else 100,
            data=dict(
                form='pairs', num_problems=1_000 if smoke else 20_000, seed=2, **problems, **rows
            ),
            # Without its cross-entropy, right answers become less likely, only wrong ones more so.
            objective=dict(name='dpo', beta=0.1, sft=1.0),
            optimizer=dict(
                name='adamw',
                learning_rate=0.0003,
                warmup_steps=10,
                schedule='linear',
                final_fraction=0.0,
                weight_decay=0.0,
            ),
        ),
    ]
    config.evals = dict(pairs=dict(name='preference', phase='dpo', every=50 if not smoke else 0))
    config.sampling = dict(max_length=128, max_tokens=32)
    config.checkpoint = dict(every=10 if smoke else 1_000)
    return config
