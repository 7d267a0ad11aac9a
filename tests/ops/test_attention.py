"""Attention against loops in float64: masks, windows, soft-caps, grouped heads, segments."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfm.ops import attention as module
from jaxfm.ops.attention import KeyValues, attention, attention_mask, obstacles
from jaxfm.sharding import MESH_AXES, make_mesh
from tools import deviceless

B, T, H = 2, 12, 8
# Two documents and padding in the first row, one long document in the second.
POSITIONS = np.array([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 0], range(T)], np.int32)
SEGMENTS = np.array([[1] * 5 + [2] * 5 + [0] * 2, [1] * T], np.int32)


def reference(q, k, v, positions, segments, *, scale, window=0, softcap=0.0):
    """-> [B, T, N, H] float64, computed one query and one head at a time."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    group = q.shape[2] // k.shape[2]
    for b, t, n in np.ndindex(q.shape[:3]):
        seen = [
            s
            for s in range(k.shape[1])
            if segments[b, t] == segments[b, s] != 0
            and positions[b, s] <= positions[b, t]
            and (not window or positions[b, t] - positions[b, s] < window)
        ]
        if seen:
            scores = scale * k[b, seen, n // group] @ q[b, t, n]
            if softcap:
                scores = softcap * np.tanh(scores / softcap)
            weights = np.exp(scores - scores.max())
            out[b, t, n] = weights @ v[b, seen, n // group] / weights.sum()
    return out


def inputs(num_heads, num_kv_heads, seed=0):
    random = np.random.default_rng(seed)
    shapes = [(B, T, num_heads, H)] + 2 * [(B, T, num_kv_heads, H)]
    return [jnp.asarray(random.normal(size=shape), jnp.float32) for shape in shapes]


OPTIONS = ('window', 'softcap', 'scale', 'one_document', 'implementation')


@functools.partial(jax.jit, static_argnames=OPTIONS)
def attend(q, k, v, positions, segments, **options):
    keys = KeyValues(k, v, positions, segments)
    return attention(q, keys, positions, segments, **options)


@pytest.mark.parametrize('softcap', [0.0, 2.0])
@pytest.mark.parametrize('window', [0, 3])
@pytest.mark.parametrize('heads', [(4, 4), (4, 2), (4, 1)])
def test_equals_float64(heads, window, softcap):
    options = dict(scale=0.5, window=window, softcap=softcap)
    arrays = inputs(*heads)
    result = attend(*arrays, POSITIONS, SEGMENTS, **options)
    expected = reference(*arrays, POSITIONS, SEGMENTS, **options)
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)


def test_the_order_of_a_row_does_not_matter():
    q, k, v = inputs(4, 2)
    order = np.random.default_rng(1).permutation(T)
    rows = [x[:, order] for x in (q, k, v, POSITIONS, SEGMENTS)]
    straight = attend(q, k, v, POSITIONS, SEGMENTS, scale=0.3, window=3)
    permuted = attend(*rows, scale=0.3, window=3)
    np.testing.assert_allclose(permuted, straight[:, order], rtol=1e-5, atol=1e-6)


def test_padding_gets_zeros_and_finite_gradients_and_is_never_read():
    q, k, v = inputs(4, 2)
    keys_of_padding = [x.at[0, 10:].set(1e9) for x in (k, v)]

    def total(*arrays):
        return jnp.sum(jnp.sin(attend(*arrays, POSITIONS, SEGMENTS, scale=0.3)))

    result = attend(q, *keys_of_padding, POSITIONS, SEGMENTS, scale=0.3)
    assert not np.asarray(result[0, 10:]).any()
    np.testing.assert_array_equal(result, attend(q, k, v, POSITIONS, SEGMENTS, scale=0.3))
    gradients = jax.grad(total, argnums=(0, 1, 2))(q, k, v)
    assert all(np.isfinite(g).all() for g in gradients)
    assert all(not np.asarray(g[0, 10:]).any() for g in gradients)


def test_a_batch_of_padding_alone_is_finite_and_zero():
    nothing = np.zeros((B, T), np.int32)

    def total(*arrays):
        return jnp.sum(attend(*arrays, nothing, nothing, scale=0.3, softcap=5.0))

    value, gradients = jax.value_and_grad(total, argnums=(0, 1, 2))(*inputs(4, 2))
    assert value == 0
    assert all(not np.asarray(g).any() for g in gradients)


def test_gradients_equal_finite_differences_in_float64():
    arrays = inputs(2, 1, seed=3)
    weights = np.random.default_rng(4).normal(size=(B, T, 2, H))
    options = dict(scale=0.5, window=4, softcap=3.0)

    def total(*arrays):
        return jnp.sum(attend(*arrays, POSITIONS, SEGMENTS, **options) * weights)

    gradients = jax.grad(total, argnums=(0, 1, 2))(*arrays)
    for index, gradient in enumerate(gradients):
        step = np.random.default_rng(index).normal(size=gradient.shape) * 1e-5
        sides = []
        for sign in (1, -1):
            moved = [np.asarray(x, np.float64) for x in arrays]
            moved[index] = moved[index] + sign * step
            sides.append(np.sum(reference(*moved, POSITIONS, SEGMENTS, **options) * weights))
        np.testing.assert_allclose(np.sum(gradient * step), (sides[0] - sides[1]) / 2, rtol=1e-4)


def test_large_scores_do_not_overflow():
    q, k, v = inputs(2, 2)
    result = attend(1e4 * q, 1e4 * k, v, POSITIONS, SEGMENTS, scale=1.0)
    assert np.isfinite(result).all()


def test_bfloat16_scores_are_float32_inside():
    arrays = [x.astype(jnp.bfloat16) for x in inputs(4, 2)]
    result = attend(*arrays, POSITIONS, SEGMENTS, scale=0.5)
    assert result.dtype == jnp.bfloat16
    expected = reference(*arrays, POSITIONS, SEGMENTS, scale=0.5)
    np.testing.assert_allclose(np.asarray(result, np.float64), expected, rtol=0.02, atol=0.02)


def test_a_window_of_one_sees_only_itself():
    keys = KeyValues(None, None, POSITIONS, SEGMENTS)
    mask = attention_mask(POSITIONS, SEGMENTS, keys, window=1)
    np.testing.assert_array_equal(mask[1], np.eye(T, dtype=bool))


def test_a_window_beyond_the_row_is_no_window():
    q, k, v = inputs(4, 2)
    unlimited = attend(q, k, v, POSITIONS, SEGMENTS, scale=0.5)
    windowed = attend(q, k, v, POSITIONS, SEGMENTS, scale=0.5, window=T)
    np.testing.assert_array_equal(windowed, unlimited)


def test_naming_the_implementation_changes_nothing():
    arrays = inputs(2, 2)
    named = attend(*arrays, POSITIONS, SEGMENTS, scale=1.0, implementation='xla')
    np.testing.assert_array_equal(named, attend(*arrays, POSITIONS, SEGMENTS, scale=1.0))


# The simulated kernel, and cuDNN, which on a CPU is replaced by XLA behind the same interface.


def ragged(width, lengths, seed=0):
    """Positions and segment ids of rows of documents, given each row's list of lengths."""
    positions, segments = np.zeros((2, len(lengths), width), np.int32)
    for row, documents in enumerate(lengths):
        ends = np.cumsum(documents)
        for number, (end, length) in enumerate(zip(ends, documents)):
            positions[row, end - length : end] = np.arange(length)
            segments[row, end - length : end] = number + 1
    return positions, segments


def wide(width, num_heads, num_kv_heads, seed=0):
    random = np.random.default_rng(seed)
    shapes = [(2, width, num_heads, 64)] + 2 * [(2, width, num_kv_heads, 64)]
    return [jnp.asarray(random.normal(size=shape), jnp.bfloat16) for shape in shapes]


def value_and_gradients(arrays, positions, segments, **options):
    weights = np.random.default_rng(9).normal(size=arrays[0].shape)
    weights = jnp.asarray(weights, jnp.bfloat16).astype(arrays[0].dtype)
    out, pull = jax.vjp(lambda *qkv: attend(*qkv, positions, segments, **options), *arrays)
    return [np.asarray(x, np.float64) for x in (out, *pull(weights))]


def assert_as_near_as_xla(found, arrays, positions, segments, **options):
    """The error against float32 is at most twice XLA's error with the same bfloat16 inputs."""
    options |= dict(implementation='xla', one_document=False)
    exact = value_and_gradients(
        [x.astype(jnp.float32) for x in arrays], positions, segments, **options
    )
    xla_found = value_and_gradients(arrays, positions, segments, **options)
    for ours, xla, right in zip(found, xla_found, exact):
        assert np.abs(ours - right).max() <= 2 * np.abs(xla - right).max() + 1e-3


PACKED, ALONE = [[30, 1, 40, 29], [100]], [[100], [70]]


@pytest.mark.parametrize(
    'documents, window, heads, softcap',
    [
        (PACKED, 20, (4, 1), 0.0),
        (ALONE, 0, (2, 2), 5.0),
    ],
)
def test_the_kernel_is_as_near_to_float32_as_xla(interpreter, documents, window, heads, softcap):
    arrays, ids = wide(100, *heads), ragged(100, documents)
    options = dict(scale=0.125, window=window, softcap=softcap)
    found = value_and_gradients(arrays, *ids, **options, implementation='interpret')
    assert_as_near_as_xla(found, arrays, *ids, **options)


def test_a_few_queries_are_not_padded_to_a_tile_unless_the_kernel_is_named(monkeypatch):
    asked = []
    monkeypatch.setattr(module, 'choose', lambda op, name, why: asked.append(why) or 'xla')
    for queries, name in ((1, None), (64, None), (1, 'mosaic')):
        ids = jnp.ones((1, queries), jnp.int32)
        q, kv = jnp.ones((1, queries, 2, 64), jnp.bfloat16), jnp.ones((1, 64, 2, 64), jnp.bfloat16)
        keys = KeyValues(kv, kv, *(jnp.ones((1, 64), jnp.int32),) * 2)
        attention(q, keys, ids, ids, scale=1.0, implementation=name)
    assert ['mosaic' in why for why in asked] == [True, False, False]


def test_the_kernel_reads_a_cache(interpreter):
    """The keys are a whole row, the queries its last tokens."""
    (q, k, v), (positions, segments) = wide(100, 2, 1), ragged(100, PACKED)
    keys = KeyValues(k, v, positions, segments)
    last = [x[:, -5:] for x in (q, positions, segments)]
    whole = attend(q, k, v, positions, segments, scale=0.125)
    found = attention(last[0], keys, *last[1:], scale=0.125, implementation='interpret')
    np.testing.assert_allclose(
        np.asarray(found, float), np.asarray(whole[:, -5:], float), atol=0.02
    )


@pytest.fixture
def cudnn_played_by_xla(monkeypatch):
    plain = jax.nn.dot_product_attention
    monkeypatch.setattr(module, 'choose', lambda op, name, unsupported: name)

    def play(*arrays, implementation, **options):
        assert implementation == 'cudnn'
        return plain(*arrays, implementation='xla', **options)

    monkeypatch.setattr(jax.nn, 'dot_product_attention', play)


@pytest.mark.parametrize('window, heads', [(0, (4, 1)), (1, (2, 2)), (33, (4, 1))])
def test_the_cudnn_call_is_right_for_rows_of_one_document(cudnn_played_by_xla, heads, window):
    arrays, ids = wide(100, *heads, seed=window), ragged(100, ALONE)
    options = dict(scale=0.125, window=window, one_document=True)
    found = value_and_gradients(arrays, *ids, **options, implementation='cudnn')
    assert_as_near_as_xla(found, arrays, *ids, **options)


@pytest.mark.parametrize(
    'name, changes, words',
    [
        ('mosaic', dict(head_dim=80), ['64, 128, 256, not 80', "use 'xla'"]),
        ('mosaic', dict(dtype='float32'), ['bfloat16 or float16, not float32']),
        ('cudnn', dict(one_document=False), ['across documents', 'packing', 'one_document=True']),
        ('cudnn', dict(softcap=30.0), ['no soft-cap', "use 'mosaic'"]),
        ('cudnn', dict(dtype='float32'), ['bfloat16 or float16, not float32']),
        ('cudnn', dict(head_dim=264), ['multiple of 8 up to 256, not 264']),
        ('fa3', {}, ['flash-attn3-jax', "use 'mosaic'"]),
    ],
)
def test_an_unsupported_call_is_refused_with_an_alternative(name, changes, words):
    case = dict(head_dim=128, dtype='bfloat16', one_document=True) | changes
    q = jnp.zeros((2, T, 2, case.pop('head_dim')), case.pop('dtype'))
    keys = KeyValues(q, q, POSITIONS, SEGMENTS)
    with deviceless.target(), pytest.raises(ValueError, match=f"as '{name}'") as told:
        attention(q, keys, POSITIONS, SEGMENTS, scale=1.0, implementation=name, **case)
    assert all(word in str(told.value) for word in words)


def test_cudnn_is_refused_where_rows_are_split_over_devices():
    with jax.set_mesh(make_mesh(dict.fromkeys(MESH_AXES, 1) | {'context': 8})):
        found = obstacles(head_dim=128, dtype='bfloat16', one_document=True)
    assert 'split over context' in found['cudnn']


def test_a_supported_call_has_no_obstacle():
    found = obstacles(head_dim=128, dtype='bfloat16', one_document=True)
    assert found.keys() == {'fa3'}


@pytest.mark.parametrize('name', ['mosaic', 'cudnn', 'fa3'])
def test_without_a_gpu_the_device_is_named(name):
    with pytest.raises(ValueError, match='the device is cpu'):
        attend(*wide(16, 2, 1), *ragged(16, [[16], [9]]), scale=1.0, implementation=name)


@pytest.mark.gpu
@pytest.mark.parametrize(
    'name, softcap, heads, window, documents',
    [
        ('mosaic', 0.0, (4, 4), 0, ALONE),
        ('mosaic', 0.0, (4, 1), 0, PACKED),
        ('mosaic', 0.0, (4, 1), 33, PACKED),
        ('mosaic', 5.0, (4, 4), 33, ALONE),
        ('mosaic', 5.0, (4, 1), 0, PACKED),
        ('cudnn', 0.0, (4, 4), 0, ALONE),
        ('cudnn', 0.0, (4, 1), 33, ALONE),
    ],
)
def test_on_the_gpu_every_implementation_is_as_near_to_float32_as_xla(
    name, softcap, heads, window, documents
):
    arrays, ids = wide(100, *heads), ragged(100, documents)
    options = dict(scale=0.125, window=window, softcap=softcap)
    options |= dict(one_document=documents is ALONE, implementation=name)
    found = value_and_gradients(arrays, *ids, **options)
    assert_as_near_as_xla(found, arrays, *ids, **options)
