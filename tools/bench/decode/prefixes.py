"""Case `prefix`: chats that begin with the same system prompt, which is computed once.

Without sharing, the first token of each chat is another one, and all else is the same.
"""

import jax
import numpy as np

from jaxfm.sampling.complete import complete
from jaxfm.sampling.request import Request
from tools.bench.decode.models import Model, random_prompts
from tools.bench.decode.timing import alternate, bar, ratios, spread

CHATS, PROMPT, QUESTIONS, ANSWER = 32, 500, (8, 24), 16
LIMIT = 0.1


def measure(model: Model, repeats: int, chats: int = CHATS, prompt: int = PROMPT) -> dict:
    """Tokens of prompts computed over all of them, and the seconds with and without sharing."""
    random, vocab_size = np.random.default_rng(0), model.config.vocab_size
    [system, *firsts] = random_prompts([prompt] + [1] * chats, vocab_size, seed=0)
    lengths = random.integers(*QUESTIONS, chats, endpoint=True)
    questions = [random.integers(0, vocab_size, length).tolist() for length in lengths]
    groups = {
        'shared': [system + question for question in questions],
        'separate': [first + system[1:] + more for first, more in zip(firsts, questions)],
    }
    length = prompt + QUESTIONS[1] + ANSWER
    sampler = model.sampler(slots=chats, max_length=length)
    version = iter(range(1, 1 << 30))

    def work(prompts):
        before = sampler.counters
        requests = [
            Request(str(i), tokens, ANSWER, temperature=0.0) for i, tokens in enumerate(prompts)
        ]
        complete(sampler, requests, model.params, next(version))  # nothing earlier is known
        after = sampler.counters
        return {
            'computed': after.prefill_tokens - before.prefill_tokens,
            'shared': after.shared_tokens - before.shared_tokens,
        }

    with jax.set_mesh(model.mesh):
        sampler.warm_up()
        works = {name: lambda prompts=prompts: work(prompts) for name, prompts in groups.items()}
        results = alternate(works, repeats, warm_up=0)
    total = sum(map(len, groups['shared']))
    return {
        'model': model.name,
        'chats': chats,
        'prompt': prompt,
        'answer': ANSWER,
        'prompt_tokens': total,
        'results': results,
        'computed_share': [count / total for count in results['shared']['computed']],
        'speedup': ratios(results, 'shared', 'separate'),
    }


def bars(figures: dict) -> list[dict]:
    """What is computed of all prompts."""
    return [bar('computed share of prompts', figures['computed_share'], LIMIT, is_least=False)]


def show(figures: dict) -> None:
    """The counts, and the time of everything, answers included."""
    print(
        f'{figures["model"]}: {figures["chats"]} chats with a prompt of {figures["prompt"]}, '
        f'{figures["prompt_tokens"]} tokens of prompts, {figures["answer"]} of each answer'
    )
    for name, result in figures['results'].items():
        print(
            f'  {name:8} {result["computed"][0]:6} computed, {spread(result["seconds"])} s, '
            f'{spread(result["cpu_seconds"])} CPU-s'
        )
    print(f'  {spread(figures["speedup"])} times as fast')
