"""Distillation on the student's own samples: a small model learns to add from one twice its size.

    python -m jaxfm.main --config configs/distill.py:teacher
    python -m jaxfm.main --config configs/distill.py

The first command trains the teacher in runs/distill-teacher: 1.15 million parameters. The second
begins with a short SFT of a student of 0.56 million, with narrower MLPs. Then the student answers
questions, and at every token of its answers its distribution is drawn to that of the teacher
(reverse KL). The right answers are not shown, and rewards are only recorded. pass@1 is measured on
256 sums that no phase has seen.

--config.phases[1].objective.teacher=MODEL names any other model with the same tokenizer: the work
directory of a run, a directory in Hugging Face's layout, a .gguf file, or a model on the hub.

Hardware: 2 CPU cores, four minutes for the teacher and nine for the student while others used the
cores, too. Expect a pass@1 of 0.99 (95 % interval 0.97 to 1.00) of the teacher, of 0.15 (0.11 to
0.20) of the student after SFT, and of 0.79 (0.74 to 0.83) after distillation, which closes 76 % of
the gap (seed 0, 2026-12-01).
"""

from ml_collections import ConfigDict


def get_config(arg: str = '') -> ConfigDict:
    """The student, or the teacher.

    arg: 'teacher'; 'smoke' or 'smoke_teacher' for a size that takes seconds.
    """
    known = ('', 'teacher', 'smoke', 'smoke_teacher')
    if arg not in known:
        raise ValueError(f'the argument is one of {known}, got {arg!r}')
    smoke, is_teacher = arg.startswith('smoke'), arg.endswith('teacher')
    config = ConfigDict()
    config.seed = 0
    config.tokenizer = dict(name='bytes', chat_template='qa')
    config.model = dict(
        name='transformer',
        vocab_size=258,
        embed_dim=128,
        num_layers=1 if smoke else 4,
        block=dict(
            num_heads=2,
            num_kv_heads=2,
            head_dim=64,
            mlp_dim=512 if is_teacher else 128,
            rope=dict(theta=100.0),  # wavelengths of 6 to 600 tokens, for rows of 128
            qk_norm=True,
            query_scale=1.5 / 64**0.5,
        ),
        embedding_norm=True,
        embedding_std=0.1,
        zero_init_outputs=True,
        scan=False,  # a few layers compile quickly, and unrolled layers run faster
    )
    sums = dict(name='problems', kinds=['addition'], num_heldout=256)
    chats = dict(form='chat', num_problems=1_000 if smoke else 60_000, seed=1, **sums)
    rows = dict(sequence_length=128, batch_size=16)
    muon = dict(
        name='muon',
        muon_learning_rate=0.03,  # for the matrices inside blocks
        learning_rate=0.02,  # AdamW, for embedding, head and norms
        warmup_steps=5 if smoke else 30,
        schedule='linear',
        final_fraction=0.0,
        weight_decay=0.0,
        clip_norm=0.0,
    )
    steps = {'': 250, 'teacher': 400, 'smoke': 10, 'smoke_teacher': 20}[arg]
    config.phases = [dict(name='sft', steps=steps, data=dict(**chats, **rows), optimizer=muon)]
    if not is_teacher:
        distill = dict(
            name='distill',
            steps=10 if smoke else 120,
            data=dict(
                name='rollout',
                task=dict(name='exact_answer', num_prompts=1_000 if smoke else 20_000),
                documents=chats,
                prompts=32 if smoke else 256,
                samples=1,
                sequence_length=48,  # one sample a row
                batch_size=32 if smoke else 256,
                max_tokens=12,
            ),
            objective=dict(
                name='distillation',
                teacher='runs/distill-smoke_teacher' if smoke else 'runs/distill-teacher',
                beta=1.0,  # the reverse KL
            ),
            optimizer=dict(
                muon,
                muon_learning_rate=0.02,
                learning_rate=0.01,
                warmup_steps=5,
                final_fraction=0.1,
            ),
        )
        config.phases.append(distill)
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
    config.checkpoint = dict(every=5 if smoke else 200)
    config.sampling = dict(
        chat=True,
        slots=128,
        max_length=64,
        decode_steps=8,
        temperature=0.0,
        max_tokens=12,
        prompts=['Please sum 123456+7', 'Please sum 999999+9', 'Please sum 248163+8'],
    )
    config.metrics = dict(log_every=2 if smoke else 10)
    return config
