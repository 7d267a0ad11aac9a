"""Five rows of each benchmark in its published layout, and how tests build a task from rows."""

import json
from pathlib import Path

from jaxfm.tasks import TASKS


def write_rows(path: Path, rows: list) -> Path:
    """Writes records as lines; a text is written as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text('\n'.join(lines) + '\n', encoding='utf-8')
    return path


def make_task(name: str, **values):
    """The task of a config group."""
    entry = TASKS[name]
    return entry.load()(entry.schema(name=name, **values), ())


GSM8K = [
    {
        'question': f'Ann has {i} boxes of {i + 1} pens. How many pens?',
        'answer': f'Ann has {i} * {i + 1} = <<{i}*{i + 1}={i * (i + 1)}>>{i * (i + 1)} pens.\n'
        f'#### {i * (i + 1)}',
    }
    for i in range(2, 7)
]
MATH = [
    {
        'problem': problem,
        'solution': solution,
        'level': 'Level 1',
        'type': kind,
    }
    for problem, solution, kind in [
        ('What is $1/2+1/4$?', r'It is $\boxed{\frac{3}{4}}$.', 'Prealgebra'),
        ('Solve $x^2=4$ for $x>0$.', r'So $x=\boxed{2}$.', 'Algebra'),
        ('Which numbers are in $[0,1)$?', r'By definition \boxed{[0,1)}.', 'Precalculus'),
        ('Expand $(x+1)^2$.', r'We get $\boxed{x^2+2x+1}$.', 'Algebra'),
        ('What is $\\sqrt{8}$?', r'It is $\boxed{2\sqrt{2}}$.', 'Prealgebra'),
    ]
]
ARC = [
    {
        'id': f'Mercury_{i}',
        'question': {
            'stem': stem,
            'choices': [{'text': text, 'label': label} for label, text in zip(labels, texts)],
        },
        'answerKey': key,
    }
    for i, (stem, labels, texts, key) in enumerate(
        [
            ('What falls?', 'ABCD', ('a stone', 'a sound', 'a law', 'a day'), 'A'),
            ('What burns?', 'ABCD', ('water', 'wood', 'sand', 'glass'), 'B'),
            ('What melts at 0 C?', '1234', ('iron', 'gold', 'ice', 'salt'), '3'),
            ('What is a planet?', 'ABCD', ('the sun', 'the moon', 'a comet', 'Mars'), 'D'),
            ('What breathes?', 'ABC', ('a rock', 'a cat', 'a star'), 'B'),
        ]
    )
]
HELLASWAG = [
    {
        'ind': i,
        'activity_label': label,
        'ctx_a': first,
        'ctx_b': second,
        'ctx': f'{first} {second}',
        'split': 'val',
        'split_type': 'indomain',
        'label': right,
        'endings': [f'{ending} [substeps] and stops.' for ending in endings],
        'source_id': f'activitynet~{i}',
    }
    for i, (label, first, second, endings, right) in enumerate(
        [
            ('Cooking', 'A man cuts an onion.', 'he', ('cries', 'flies', 'swims', 'sings'), 0),
            ('Running', 'A woman ties her shoes.', 'she', ('eats', 'runs', 'rows', 'digs'), 1),
            ('Baking', 'The oven is hot. [title] Bake', '', ('a', 'b', 'bread', 'c'), 2),
            ('Rowing', 'Two men sit in a boat.', 'they', ('fly', 'bake', 'knit', 'row'), 3),
            ('Singing', 'The choir stands up.', 'it', ('sings', 'melts', 'rains', 'snows'), 0),
        ]
    )
]
PIQA = [
    {'goal': goal, 'sol1': first, 'sol2': second}
    for goal, first, second in [
        ('Open a jar', 'Turn the lid.', 'Turn the table.'),
        ('Dry a shirt', 'Hang it in a lake.', 'Hang it in the sun.'),
        ('Boil an egg', 'Put it in hot water.', 'Put it in hot sand.'),
        ('Cut paper', 'Use a spoon.', 'Use scissors.'),
        ('Light a candle', 'Use a match.', 'Use a patch.'),
    ]
]
PIQA_LABELS = '0\n1\n0\n1\n0\n'
LAMBADA = [
    {'text': f'He looked for his {thing} all day, and at night he found the {thing}'}
    for thing in ('key', 'dog', 'hat', 'ring', "sailor's knot")
]
