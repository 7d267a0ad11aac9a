"""Pre-training and SFT in one run: first on generated text, then on chats.

    python -m jaxfm.main --config configs/lifecycle.py

Pre-training teaches the skills. Its text has lines such as `reverse planet -->tenalp` and
`sum 123456+7 -->123463`, of five kinds: addition, subtraction, reversing a word, rotating a word,
and the last letters of words. SFT teaches when to use a skill and when to stop: the user asks
`Please reverse planet`, and the assistant answers with only the result. The problems are small, so
that minutes are enough: a sum has one number of 6 digits and one of 1 digit, a word has 5 or 6
letters. pass@1 is measured on 240 problems, the same number of each kind, held out of both phases.
An answer counts only if it is completely right and ends where it should.

Hardware: 2 CPU cores, three to four minutes. Expect a pass@1 of 0 at the start and after
pre-training (the model does not know the chat format and never ends an answer), and 0.99 after SFT.
One of three seeds did not learn addition in this time.
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
        num_layers=3,
        block=dict(
            num_heads=2,
            num_kv_heads=2,
            head_dim=64,
            mlp_dim=384,
            rope=dict(theta=100.0),  # wavelengths of 6 to 600 tokens, for rows of 128
            qk_norm=True,
            query_scale=1.5 / 64**0.5,  # 1.5 times the usual: QK norm keeps the logits small
        ),
        embedding_norm=True,
        embedding_std=0.1,
        zero_init_outputs=True,
        scan=False,  # three layers compile quickly, and unrolled layers run faster
    )
    # The harder kinds are listed twice, so the model trains on them twice as often.
    kinds = 2 * ['addition', 'subtraction', 'reverse'] + ['rotate', 'last_letters']
    shared = dict(name='problems', kinds=kinds, sequence_length=128, batch_size=16)
    config.phases = [
        dict(
            name='pretrain',
            steps=20 if smoke else 1200,
            data=dict(
                form='text',
                num_problems=2_000 if smoke else 120_000,
                **shared,
            ),
            optimizer=dict(
                name='muon',
                muon_learning_rate=0.03,  # for the matrices inside blocks
                learning_rate=0.02,  # AdamW, for embedding, head and norms
                warmup_steps=5 if smoke else 40,
                schedule='linear',
                final_fraction=0.0,
                weight_decay=0.0,
                clip_norm=0.0,
            ),
        ),
        dict(
            name='sft',
            steps=10 if smoke else 250,
            data=dict(
                form='chat',
                num_problems=1_000 if smoke else 15_000,
                num_heldout=240,
                seed=1,
                **shared,
            ),
            optimizer=dict(
                name='adamw',
                learning_rate=0.003,
                warmup_steps=5 if smoke else 10,
                schedule='linear',
                final_fraction=0.0,
                weight_decay=0.0,
                clip_norm=0.0,
            ),
        ),
    ]
    config.evals = dict(
        problems=dict(
            name='generate',
            phase='sft',
            task=dict(name='exact_answer', num_prompts=240),
            max_tokens=16,
            at_start=True,
        ),
    )
    config.checkpoint = dict(every=10 if smoke else 250)
    config.sampling = dict(
        chat=True,
        slots=128,
        max_length=128,
        decode_steps=8,
        temperature=0.0,
        max_tokens=16,
        prompts=['Please reverse planet', 'Please sum 123456+7', 'Please rotate lemon'],
    )
    config.metrics = dict(log_every=10 if smoke else 50)
    return config
