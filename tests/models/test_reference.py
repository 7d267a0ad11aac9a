"""The whole model against a plain float64 model with the same weights, layer by layer."""

import numpy as np
import pytest
from scipy.special import erf

ACTIVATIONS = {
    'silu': lambda x: x / (1 + np.exp(-x)),
    'gelu': lambda x: x / 2 * (1 + erf(x / np.sqrt(2))),
    'gelu_tanh': lambda x: x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    'relu_squared': lambda x: np.maximum(x, 0) ** 2,
}


class Reference:
    """The float64 model, for one row with one document; names follow the parameters."""

    def __init__(self, model):
        self.config = model.config
        self.params = {path: np.asarray(x, np.float64) for path, x in model.params.items()}
        for path in [path for path in self.params if path.endswith('_lora/a')]:
            adapted = path.removesuffix('_lora/a')
            a, b = (self.params.pop(f'{adapted}_lora/{half}') for half in 'ab')
            scale = self.config.lora.alpha / self.config.lora.rank
            self.params[adapted] += scale * self.product(a, b, adapted)

    def __call__(self, tokens):
        """-> hidden [T, D], logits [T, V]."""
        config, params = self.config, self.params
        x = params['embedding/table'][tokens] * config.embedding_scale
        if config.embedding_norm:
            x = self.norm(x, params['embedding_norm/scale'], config.trunk[-1].pattern[-1])
        for number, segment in enumerate(config.trunk):
            for repeat in range(segment.repeats):
                for place, block in enumerate(segment.pattern):
                    prefix = f'trunk/{number}/{place}/'
                    layer = {
                        path.removeprefix(prefix): value[repeat]
                        for path, value in params.items()
                        if path.startswith(prefix)
                    }
                    x = self.block(x, layer, block)
        hidden = self.norm(x, params['final_norm/scale'], config.trunk[-1].pattern[-1])
        table = params['embedding/table' if config.tie_embeddings else 'head/table']
        logits = hidden @ table[: config.vocab_size].T
        cap = config.logits_softcap
        return hidden, cap * np.tanh(logits / cap) if cap else logits

    def product(self, a, b, adapted):
        """A B for every layer, and for gate and up each."""
        if adapted.endswith('gate_up'):
            return np.einsum('ldcr,lcrf->ldcf', a, b)
        return np.stack([np.tensordot(*halves, 1) for halves in zip(a, b, strict=True)])

    def norm(self, x, scale, block):
        scale = scale + 1 if block.norm_unit_offset else scale
        return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + block.norm_epsilon) * scale

    def block(self, x, layer, block):
        for part in ('attention', 'mlp'):
            weights = {
                path.removeprefix(f'{part}/'): value
                for path, value in layer.items()
                if path.startswith(f'{part}/')
            }
            before, after = layer.get(f'pre_{part}/scale'), layer.get(f'post_{part}/scale')
            assert (before is not None, after is not None) == (block.pre_norm, block.post_norm)
            y = x if before is None else self.norm(x, before, block)
            y = getattr(self, part)(y, weights, block)
            x = x + (y if after is None else self.norm(y, after, block))
        return x

    def attention(self, x, weights, block):
        T, heads = len(x), {}
        for name in 'qkv':
            heads[name] = np.einsum('td,dnh->tnh', x, weights[name]) + weights.get(
                f'{name}_bias', 0
            )
            if block.qk_norm and name != 'v':
                # Over each head alone, or over all heads as one vector.
                together = heads[name].reshape(T, -1) if block.joint_qk_norm else heads[name]
                normed = self.norm(together, weights[f'{name}_norm/scale'], block)
                heads[name] = normed.reshape(heads[name].shape)
            if block.rope and name != 'v':
                heads[name] = self.rope(heads[name], block.rope)
        group = block.num_heads // block.num_kv_heads
        k, v = (np.repeat(heads[name], group, axis=1) for name in 'kv')
        scores = np.einsum('tnh,snh->nts', heads['q'], k)
        scores *= block.query_scale or 1 / np.sqrt(block.head_dim)
        if block.attention_softcap:
            scores = block.attention_softcap * np.tanh(scores / block.attention_softcap)
        distance = np.arange(T)[:, None] - np.arange(T)
        seen = (distance >= 0) & (distance < (block.window or T))
        scores = np.where(seen, np.exp(scores), 0)
        scores /= scores.sum(-1, keepdims=True)
        out = np.einsum('nts,snh->tnh', scores, v)
        return np.einsum('tnh,nhd->td', out, weights['out']) + weights.get('out_bias', 0)

    def rope(self, x, rope):
        half = x.shape[-1] // 2
        frequency = rope.theta ** (-np.arange(half) / half)
        if rope.scaling == 'linear':
            frequency = frequency / rope.factor
        elif rope.scaling == 'llama3':
            turns = rope.original_max_position * frequency / (2 * np.pi)
            keep = np.interp(turns, [rope.low_freq_factor, rope.high_freq_factor], [0, 1])
            frequency = keep * frequency + (1 - keep) * frequency / rope.factor
        magnitude = 1.0
        if rope.scaling == 'yarn':
            turned = rope.original_max_position * frequency / (2 * np.pi)
            first, last = (
                np.interp(-turns, -turned, range(half))
                for turns in (rope.beta_fast, rope.beta_slow)
            )
            keep = np.interp(range(half), [np.floor(first), np.ceil(last)], [1, 0])
            frequency = keep * frequency + (1 - keep) * frequency / rope.factor
            magnitude = 0.1 * np.log(rope.factor) + 1
        turn = magnitude * np.exp(1j * np.arange(len(x))[:, None] * frequency)[:, None]
        turned = (x[..., :half] + 1j * x[..., half:]) * turn
        return np.concatenate([turned.real, turned.imag], axis=-1)

    def mlp(self, x, weights, block):
        hidden = np.einsum('td,dcf->tcf', x, weights['gate_up']) + weights.get('gate_up_bias', 0)
        out = ACTIVATIONS[block.activation](hidden[:, 0])
        if block.gated:
            out = out * hidden[:, 1]
        return out @ weights['down'] + weights.get('down_bias', 0)


@pytest.mark.parametrize('row', [0, 1])
def test_hidden_states_and_logprobs_equal_the_reference(model, batch, row):
    hidden, logprobs, _ = model(*batch)
    right, logits = Reference(model)(batch[0][row])
    np.testing.assert_allclose(hidden[row], right, rtol=1e-4, atol=1e-4)
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(logprobs[row], expected, rtol=1e-4, atol=1e-4)


def test_the_models_of_these_tests_use_every_option(configs):
    """A new block option must also be added to the reference."""
    blocks = [b for c in configs.values() for s in c.trunk for b in s.pattern]
    single = set()
    for name in type(blocks[0]).model_fields:
        if len({repr(getattr(block, name)) for block in blocks}) == 1:
            single.add(name)
    assert single == {'num_heads', 'head_dim', 'norm_epsilon'}
    assert {config.lora is None for config in configs.values()} == {True, False}
