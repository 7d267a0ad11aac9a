"""The divergence of a student from a teacher: float64, chunks, devices, extremes."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfm.ops import logprobs
from jaxfm.ops.divergence import divergence
from jaxfm.ops.logprobs import Unembedding
from jaxfm.sharding import MESH_AXES, make_mesh, place

# The teacher is wider, has ids that the student lacks, and is padded further.
B, T, D, E, V = 2, 8, 16, 24, 59
STUDENT, TEACHER = (V, 64), (61, 96)  # ids, rows of the weight

CASES = {
    'forward': dict(),
    'forward, warm': dict(temperature=2.5),
    'reverse': dict(beta=1.0),
    'reverse, cold': dict(beta=1.0, temperature=0.6),
    'middle': dict(beta=0.5),
    'near the student': dict(beta=0.1, temperature=1.5),
    'top 1': dict(top_k=1),
    'top 7, warm': dict(top_k=7, temperature=2.0),
    'top all': dict(top_k=V),
}

pytestmark = pytest.mark.usefixtures('quick_compilation')


def arrays():
    random = np.random.default_rng(0)
    found = [random.normal(size=shape) for shape in ((B, T, D), (64, D), (B, T, E), (96, E))]
    hidden, weight, teacher_hidden, teacher_weight = (np.float32(x) for x in found)
    weight[STUDENT[0] :] *= 100  # padding would have the largest logits everywhere
    teacher_weight[V:] *= 100
    return hidden / 2, weight, teacher_hidden / 2, teacher_weight


def reference(arrays, softcaps=(0.0, 0.0), beta=0.0, temperature=1.0, top_k=0):
    hidden, weight, teacher_hidden, teacher_weight = (np.float64(x) for x in arrays)
    logprobs = []
    pairs = (hidden, weight), (teacher_hidden, teacher_weight)
    for (states, table), softcap in zip(pairs, softcaps):
        logits = states @ table[:V].T
        logits = (softcap * np.tanh(logits / softcap) if softcap else logits) / temperature
        logprobs.append(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
    q, p = np.exp(logprobs)
    if top_k and top_k < V:
        order = np.argsort(-p, axis=-1)
        p, q = (np.take_along_axis(x, order, -1) for x in (p, q))
        p, q = (
            np.concatenate([x[..., :top_k], x[..., top_k:].sum(-1, keepdims=True)], -1)
            for x in (p, q)
        )
    if beta in (0, 1):
        one, other = (p, q) if beta == 0 else (q, p)
        return np.sum(one * np.log(one / other), -1)
    m = beta * p + (1 - beta) * q
    return np.sum(beta * p * np.log(p / m) + (1 - beta) * q * np.log(q / m), -1)


@functools.partial(jax.jit, static_argnames=('softcaps', 'options', 'chunk_size'))
def value_and_gradients(arrays, softcaps=(0.0, 0.0), options=(), chunk_size=None):
    """-> divergences, gradients of a sum that weights them differently, the teacher's mass."""

    def total(hidden, weight, teacher_hidden, teacher_weight):
        values, mass = divergence(
            hidden,
            Unembedding(weight, STUDENT[0], softcaps[0]),
            teacher_hidden,
            Unembedding(teacher_weight, TEACHER[0], softcaps[1]),
            chunk_size=chunk_size,
            **dict(options),
        )
        return jnp.sum(jnp.sin(values)), (values, mass)

    grad = jax.grad(total, argnums=(0, 1, 2, 3), has_aux=True)
    gradients, (values, mass) = grad(*arrays)
    return values, gradients, mass


def softcaps_of(name):
    return (4.0, 6.0) if 'warm' in name or 'near' in name else (0.0, 0.0)


def compute(name, given=None, chunk_size=20):
    given = arrays() if given is None else given
    options = tuple(CASES[name].items())
    return value_and_gradients(given, softcaps_of(name), options, chunk_size)


@pytest.mark.parametrize(
    ('name', 'chunk_size'),
    [*((name, 20) for name in CASES), ('middle', None), ('top 7, warm', None)],
)
def test_equals_float64(name, chunk_size):
    given, case, softcaps = arrays(), CASES[name], softcaps_of(name)
    values, gradients, _ = compute(name, chunk_size=chunk_size)
    assert values.shape == (B, T) and values.dtype == jnp.float32
    np.testing.assert_allclose(values, reference(given, softcaps, **case), rtol=2e-5, atol=1e-6)
    assert not np.asarray(gradients[1])[V:].any()
    for index in (0, 1):
        step = np.random.default_rng(index).normal(size=given[index].shape) * 1e-6
        sides = []
        for sign in (1, -1):
            moved = [np.float64(x) for x in given]
            moved[index] = moved[index] + sign * step
            sides.append(np.sin(reference(moved, softcaps, **case)).sum())
        found = np.sum(gradients[index] * step)
        np.testing.assert_allclose(found, (sides[0] - sides[1]) / 2, rtol=2e-4)


def test_bfloat16_is_summed_in_float32():
    hidden, weight, teacher_hidden, teacher_weight = arrays()
    narrow = [jnp.asarray(x, jnp.bfloat16) for x in (hidden, teacher_hidden, teacher_weight)]
    given = narrow[0], jnp.asarray(weight), *narrow[1:]
    values, gradients, _ = compute('middle', given)
    rounded = [np.float32(jnp.asarray(x, jnp.bfloat16)) for x in given]
    np.testing.assert_allclose(values, reference(rounded, **CASES['middle']), rtol=2e-5)
    assert [gradient.dtype for gradient in gradients[:2]] == [jnp.bfloat16, jnp.float32]
    expected = compute('middle', rounded)[1]
    for found, wanted in zip(gradients[:2], expected):
        difference = np.linalg.norm(np.float32(found) - wanted)
        assert difference < 1e-2 * np.linalg.norm(wanted)


@pytest.mark.parametrize('name', CASES)
def test_the_teacher_has_no_gradient(name):
    _, gradients, _ = compute(name)
    assert not np.asarray(gradients[2]).any() and not np.asarray(gradients[3]).any()


@pytest.mark.parametrize('name', [name for name in CASES if not softcaps_of(name)[0]])
def test_a_student_that_equals_its_teacher_has_neither_divergence_nor_gradient(name):
    hidden, weight, _, _ = arrays()
    wider = np.pad(hidden, ((0, 0), (0, 0), (0, E - D))), np.pad(weight, ((0, 32), (0, E - D)))
    values, gradients, _ = compute(name, (hidden, weight, *wider))
    np.testing.assert_allclose(values, 0, atol=1e-6)
    for gradient in gradients[:2]:
        np.testing.assert_allclose(gradient, 0, atol=2e-6)


def test_the_mass_is_that_of_the_ids_compared():
    given = arrays()
    logits = np.float64(given[2]) @ np.float64(given[3][:V]).T
    probs = np.sort(np.exp(logits) / np.exp(logits).sum(-1, keepdims=True), -1)[..., ::-1]
    for options, count in (((), V), ((('top_k', 5),), 5)):
        mass = value_and_gradients(given, options=options, chunk_size=20)[2]
        np.testing.assert_allclose(mass, probs[..., :count].sum(-1), rtol=1e-5)


def test_fewer_ids_compared_never_make_the_divergence_larger():
    """The rest is one id, so that what the student gives it is seen."""
    one, five, every = (
        np.asarray(value_and_gradients(arrays(), options=(('top_k', k),), chunk_size=20)[0])
        for k in (1, 5, V)
    )
    assert (one <= five + 1e-6).all() and (five <= every + 1e-6).all()
    assert (one > 0).all()


@pytest.mark.parametrize('name', CASES)
def test_extreme_distributions_have_finite_gradients(name):
    hidden, weight, teacher_hidden, teacher_weight = arrays()
    for sides in ((1e3, 1e3), (1e3, 0), (0, 1e3)):
        given = (hidden * sides[0], weight, teacher_hidden * sides[1], teacher_weight)
        values, gradients, _ = compute(name, given)
        assert np.isfinite(values).all() and (np.asarray(values) > -1e-6).all()
        assert all(np.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize('name', ['reverse', 'middle', 'top 7, warm'])
def test_splitting_over_eight_devices_changes_nothing(name):
    alone = compute(name)
    with jax.set_mesh(make_mesh(dict.fromkeys(MESH_AXES, 1) | dict(fsdp=2, context=2, tensor=2))):
        given = [
            place(x, 'batch', 'position', 'embed') if x.ndim == 3 else place(x, 'vocab', 'embed')
            for x in arrays()
        ]
        together = compute(name, given)
    for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


def test_logits_exist_only_for_a_chunk(monkeypatch):
    monkeypatch.setattr(logprobs, 'CHUNK_BYTES', 8 * 256 * B * T)
    rows = 600

    def total(hidden, weight, teacher_hidden, teacher_weight):
        student = Unembedding(weight, rows), Unembedding(teacher_weight, rows)
        return divergence(hidden, student[0], teacher_hidden, student[1])[0].sum()

    given = [jnp.zeros(shape) for shape in ((B, T, D), (rows, D), (B, T, E), (rows, E))]
    jaxpr = str(jax.make_jaxpr(jax.grad(total, argnums=(0, 1)))(*given))
    found = {int(n) for n in re.findall(rf'f32\[{B},{T},(\d+)\]', jaxpr)}
    assert found - {0, 1, D, E} == {256, 600 % 256}


def test_a_bound_on_the_ids_needs_the_forward_divergence():
    with pytest.raises(ValueError, match='top_k needs beta 0, got 1'):
        value_and_gradients(arrays(), options=(('beta', 1.0), ('top_k', 3)))
