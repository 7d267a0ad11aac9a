"""Records losses and gradients of TRL's GKDTrainer for given logits.

    ENV/bin/python -m tools.goldens.distillation --output tests/goldens

Logits are products of hidden states and a matrix, as in a model. The loss is TRL's own code; its
gradients with respect to the student's hidden states and matrix are autograd's.
"""

import argparse
import json
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.numpy import save_file
from trl.experimental.gkd import GKDTrainer

ROWS, LENGTH, VOCABULARY, STUDENT, TEACHER = 3, 7, 29, 8, 12
SEED = 5

# {name: arguments of generalized_jsd_loss}.
CASES = {
    'forward': {'beta': 0.0},
    'forward_warm': {'beta': 0.0, 'temperature': 2.0},
    'reverse': {'beta': 1.0},
    'reverse_cold': {'beta': 1.0, 'temperature': 0.7},
    'middle': {'beta': 0.5},
    'middle_warm': {'beta': 0.2, 'temperature': 1.5},
}


def main() -> None:
    flags = parse()
    torch.set_num_threads(1)
    random = torch.Generator().manual_seed(SEED)

    def normal(*shape):
        # Numbers that float32 has, computed with in float64: what differs is our rounding.
        return torch.randn(*shape, generator=random).double()

    data = {
        'student_hidden': normal(ROWS, LENGTH, STUDENT),
        'student_weight': normal(VOCABULARY, STUDENT),
        'teacher_hidden': normal(ROWS, LENGTH, TEACHER),
        'teacher_weight': normal(VOCABULARY, TEACHER),
        'mask': (torch.rand(ROWS, LENGTH, generator=random) < 0.6).to(torch.int32),
    }
    labels = torch.where(data['mask'] > 0, 0, -100)
    golden = {
        'versions': {name: version(name) for name in ('trl', 'torch', 'transformers')},
        'seed': SEED,
        'cases': {},
    }
    arrays = {name: value.numpy() for name, value in data.items()}
    for name, arguments in CASES.items():
        hidden, weight = (
            data[key].clone().requires_grad_() for key in ('student_hidden', 'student_weight')
        )
        loss = GKDTrainer.generalized_jsd_loss(
            hidden @ weight.T,
            data['teacher_hidden'] @ data['teacher_weight'].T,
            labels=labels,
            **arguments,
        )
        loss.backward()
        arrays |= {
            f'hidden_gradient/{name}': hidden.grad.numpy(),
            f'weight_gradient/{name}': weight.grad.numpy(),
        }
        golden['cases'][name] = {'arguments': arguments, 'loss': loss.item()}
    directory = flags.output / 'distillation'
    directory.mkdir(exist_ok=True)
    save_file(arrays, directory / 'golden.safetensors')
    (directory / 'golden.json').write_text(json.dumps(golden, indent=1) + '\n', 'utf-8')


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line -> flags."""
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--output', type=Path, required=True)
    return parser.parse_args(argv)


if __name__ == '__main__':
    main()
