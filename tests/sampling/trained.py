"""Log-probs of texts in the jitted train step, which makes their gradients too."""

import jax
import numpy as np
import optax

from jaxfm import sharding, state
from jaxfm.objectives import NextTokenConfig
from jaxfm.objectives.next_token import NextToken
from jaxfm.ops.logprobs import token_logprobs


class Reporting(NextToken):
    """Next-token cross-entropy whose metrics contain the log-probs of the whole batch."""

    def __call__(self, model, batch, rng):
        hidden, _ = model(batch['tokens'], batch['positions'], batch['segment_ids'])
        logprobs, _ = token_logprobs(hidden, model.unembed(), batch['targets'])
        total = -jax.numpy.sum(logprobs * batch['loss_mask'])
        return {'next_token': total}, {'logprobs': (logprobs, np.float32(1))}, {}


class PlainDescent:
    """The update is the gradient."""

    transform = optax.identity()

    @staticmethod
    def schedule(updates):
        return jax.numpy.float32(1.0)


def pack(texts, rows: int, length: int):
    """Batches of packed texts -> one batch and the places of its texts at a time, in order."""
    names = ('tokens', 'targets', 'positions', 'segment_ids')
    texts = list(texts)
    assert max(map(len, texts)) <= length - 6  # behind up to six of padding, or a text before it
    while texts:
        batch = {name: np.zeros((rows, length), np.int32) for name in names}
        places, row, at = [], 0, 5
        while texts:
            number = len(texts[0]) - 1
            if at + number > length:
                row, at = row + 1, len(places) % 7
            if row == rows:
                break
            text, here = texts.pop(0), (row, slice(at, at + number))
            batch['tokens'][here], batch['targets'][here] = text[:-1], text[1:]
            batch['positions'][here] = np.arange(number)
            batch['segment_ids'][here] = len(places) + 1
            places.append(here)
            at += number
        yield batch | {'loss_mask': (batch['segment_ids'] > 0).astype(np.float32)}, places


def trainer(parts, params, mesh, rows: int, length: int):
    """texts -> the log-probs of all their tokens but the first, in a step that makes gradients."""
    step = state.make_train_step(parts, Reporting(NextTokenConfig()), PlainDescent, accumulate=1)

    def run(texts):
        found = []
        for batch, places in pack(texts, rows, length):
            with jax.set_mesh(mesh):
                copied = jax.tree.map(lambda x: x.copy(), params)
                begun = state.begin_phase(copied, parts, PlainDescent, 0)
                _, metrics = step(begun, sharding.put(batch, mesh, rows))
            logprobs = np.asarray(metrics['logprobs'])
            found += [logprobs[place] for place in places]
        return found

    return run
