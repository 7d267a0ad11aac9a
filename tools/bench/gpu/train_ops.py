"""Times every op of a training step by itself, forward and backward, at the 1B shape.

`flops` and `bytes` are the minimum for any implementation; `count` is how often a step runs the op.
"""

import functools

import jax
import jax.numpy as jnp

from jaxfm.ops.attention import KeyValues, attention
from jaxfm.ops.linear import linear
from jaxfm.ops.logprobs import Unembedding, token_logprobs
from jaxfm.ops.norm import rms_norm
from jaxfm.ops.rope import apply_rope, rope_frequencies
from tools.bench.gpu import models, peers, speed
from tools.bench.gpu.stages import Task
from tools.bench.gpu.timing import normal

ROWS = 4  # of 4096 tokens


def tasks(smoke: bool) -> list[Task]:
    """The ops of one step."""
    config, T = models.model_config(smoke), models.sequence_length(smoke)
    block, B, layers, D = config.block, 2 if smoke else ROWS, config.num_layers, config.embed_dim
    N, K, H, F = block.num_heads, block.num_kv_heads, block.head_dim, block.mlp_dim
    V, M = config.padded_vocab_size, B * T
    measure = functools.partial(_measure, smoke=smoke)

    def matmul(inputs, outputs):
        x, w = normal(0, (B, T, inputs)), normal(1, (inputs, outputs), scale=inputs**-0.5)
        moved = 2 * 3 * (M * inputs + inputs * outputs + M * outputs)
        flops = 6 * M * inputs * outputs
        return measure(linear, x, w, like=(B, T, outputs), flops=flops, moved=moved)

    def attend(implementation):
        q = normal(0, (B, T, N, H))
        k, v = (normal(i, (B, T, K, H)) for i in (1, 2))
        rows = peers.Rows([[T]] * B)

        def function(q, k, v):
            keys = KeyValues(k, v, rows.positions, rows.segments)
            return attention(
                q,
                keys,
                rows.positions,
                rows.segments,
                scale=H**-0.5,
                one_document=True,
                implementation=implementation,
            )

        flops = 3.5 * 4 * N * H * B * T * T / 2
        return measure(function, q, k, v, like=q.shape, flops=flops, moved=4 * 2 * q.nbytes)

    def head():
        hidden, weight = normal(0, (B, T, D)), normal(1, (V, D), scale=D**-0.5)
        targets = jax.random.randint(jax.random.key(2), (B, T), 0, config.vocab_size, jnp.int32)

        def loss(hidden, weight):
            unembedding = Unembedding(weight, config.vocab_size)
            return -jnp.sum(token_logprobs(hidden, unembedding, targets)[0])

        flops = 3 * 2 * M * D * V
        function = jax.value_and_grad(loss, (0, 1))
        return speed.measure(function, hidden, weight, smoke=smoke, flops=flops)

    def norm():
        x, scale = normal(0, (B, T, D)), jnp.ones((D,), jnp.float32)
        function = functools.partial(rms_norm, epsilon=1e-5)
        return measure(function, x, scale, like=x.shape, moved=5 * x.nbytes)

    def rope():
        q, k = normal(0, (B, T, N, H)), normal(1, (B, T, K, H))
        positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
        frequencies = rope_frequencies(H, **dict(block.rope))

        def function(qk):
            return apply_rope(qk, positions, *frequencies)

        both = jnp.concatenate([q, k], axis=2)
        return measure(function, both, like=both.shape, moved=4 * both.nbytes)

    def gate():
        x = normal(0, (B, T, 2, F))

        def function(x):
            return jax.nn.silu(x[:, :, 0]) * x[:, :, 1]

        return measure(function, x, like=(B, T, F), moved=8 * M * F * 2)

    def embed():
        table = normal(0, (V, D), jnp.float32)
        tokens = jax.random.randint(jax.random.key(1), (B, T), 0, V, jnp.int32)

        def function(table):
            return table.at[tokens].get().astype(jnp.bfloat16)

        moved = table.nbytes + 4 * M * D * 2
        return measure(function, table, like=(B, T, D), moved=moved)

    def optimize():
        with models.one_device():
            trainer = models.Trainer(config)
            state = trainer.state()
            optimizer = trainer.optimizer.transform
            grads = jax.tree.map(lambda p: normal(0, p.shape, p.dtype, 1e-3), state.trainable)

            def function(params, moments, grads):
                updates, moments = optimizer.update(grads, moments, params)
                rate = models.OPTIMIZER['learning_rate']
                return jax.tree.map(lambda p, u: p - rate * u, params, updates), moments

            size = sum(p.nbytes for p in state.trainable.values())
            arrays = (state.trainable, state.opt_state, grads)
            return speed.measure(function, *arrays, smoke=smoke, moved=7 * size)

    products = {
        'attention/q': (1, D, N * H),
        'attention/k, v': (2, D, K * H),
        'attention/out': (1, N * H, D),
        'mlp/gate_up': (1, D, 2 * F),
        'mlp/down': (1, F, D),
    }
    found = {
        f'matmul {name}': (layers * times, functools.partial(matmul, *sides))
        for name, (times, *sides) in products.items()
    }
    implementations = ('xla',) if smoke else ('cudnn', 'mosaic')
    for name in implementations:
        found[f'attention / {name}'] = (layers, functools.partial(attend, name))
    found |= {
        'head and cross-entropy': (1, head),
        'elementwise: rms_norm': (2 * layers + 1, norm),
        'elementwise: rope': (layers, rope),
        'elementwise: silu(gate) * up': (layers, gate),
        'embedding': (1, embed),
        'optimizer: adamw': (1, optimize),
    }
    return [
        Task(name, functools.partial(_count, run, count, M)) for name, (count, run) in found.items()
    ]


def _count(run, count: int, tokens: int) -> dict:
    return {'count': count, 'tokens': tokens, **run()}


def _measure(function, *arrays, like, smoke: bool, flops: float = 0, moved: float = 0) -> dict:
    """Times forward and backward in one program; `like` is the shape of the result."""

    def both(dout, *arrays):
        out, back = jax.vjp(function, *arrays)
        return out, back(dout)

    dout = normal(9, like)
    return speed.measure(both, dout, *arrays, smoke=smoke, flops=flops, moved=moved)
