"""RoPE against an independent formula (complex rotations), and its relative-position property."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxfm.ops.rope import apply_rope, rope_frequencies

LLAMA3 = dict(
    scaling='llama3',
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position=8192,
)


def llama3_by_wavelength(head_dim, theta):
    """Llama 3.1's published form: case by case on the wavelength of each frequency."""
    frequencies = []
    for i in range(head_dim // 2):
        frequency = 1 / theta ** (2 * i / head_dim)
        wavelength = 2 * np.pi / frequency
        if wavelength > 8192 / 1.0:
            frequency /= 8.0
        elif wavelength >= 8192 / 4.0:
            smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
            frequency = (1 - smooth) * frequency / 8.0 + smooth * frequency
        frequencies.append(frequency)
    return np.array(frequencies)


def test_frequencies_are_powers_of_theta():
    expected = [1.0, 100.0**-0.25, 0.1, 100.0**-0.75]
    np.testing.assert_allclose(rope_frequencies(8, theta=100.0)[0], expected)


def test_linear_scaling_divides_every_frequency():
    scaled, _ = rope_frequencies(16, theta=1e4, scaling='linear', factor=4.0)
    np.testing.assert_allclose(scaled, rope_frequencies(16, theta=1e4)[0] / 4)


def test_llama3_scaling_equals_the_published_cases():
    frequencies, magnitude = rope_frequencies(64, theta=5e5, **LLAMA3)
    plain, _ = rope_frequencies(64, theta=5e5)
    assert magnitude == 1
    np.testing.assert_allclose(frequencies, llama3_by_wavelength(64, 5e5), rtol=1e-12)
    ratio = plain / frequencies
    assert ratio[0] == 1
    np.testing.assert_allclose(ratio[-1], 8)
    assert ((ratio > 1.01) & (ratio < 7.99)).any()  # some frequencies are on the ramp


def test_yarn_keeps_fast_pairs_and_slows_down_slow_ones():
    """OLMo 3's values: the ramp lies between the pairs that turn 32 times and once."""
    said = dict(scaling='yarn', factor=8.0, original_max_position=8192)
    frequencies, magnitude = rope_frequencies(128, theta=5e5, **said)
    plain, _ = rope_frequencies(128, theta=5e5)
    np.testing.assert_allclose(magnitude, 1.2079441541679836)
    turns = 8192 * plain / (2 * np.pi)
    np.testing.assert_allclose(frequencies[turns > 40], plain[turns > 40])
    np.testing.assert_allclose(frequencies[turns < 0.8], plain[turns < 0.8] / 8)
    kept = (frequencies / plain - 1 / 8) / (1 - 1 / 8)
    between = (kept > 1e-9) & (kept < 1 - 1e-9)
    assert between.sum() > 10
    np.testing.assert_allclose(np.diff(kept[between], n=2), 0, atol=1e-9)  # linear in between
    assert rope_frequencies(128, theta=5e5, **said, attention_factor=1.5)[1] == 1.5


def test_the_magnitude_scales_what_is_rotated():
    x = jnp.ones((1, 2, 1, 4))
    turned = apply_rope(x, jnp.array([[0, 3]]), np.array([1.0, 0.1]), 1.5)
    np.testing.assert_allclose(jnp.linalg.norm(turned, axis=-1), 3, rtol=1e-6)


def test_an_unknown_scaling_is_an_error():
    with pytest.raises(ValueError, match="'longrope'"):
        rope_frequencies(8, theta=1e4, scaling='longrope')


def test_a_pair_turns_by_position_times_frequency():
    random = np.random.default_rng(0)
    x = random.normal(size=(2, 5, 3, 8))
    positions = random.integers(0, 1000, (2, 5))
    frequencies, _ = rope_frequencies(8, theta=1e4)
    turns = np.exp(1j * positions[:, :, None, None] * frequencies)
    turned = (x[..., :4] + 1j * x[..., 4:]) * turns
    result = apply_rope(jnp.asarray(x, jnp.float32), jnp.asarray(positions), frequencies)
    expected = np.concatenate([turned.real, turned.imag], axis=-1)
    np.testing.assert_allclose(result, expected, rtol=0, atol=3e-4)  # float32 angles up to 1000


def test_a_product_of_query_and_key_depends_only_on_their_distance():
    random = np.random.default_rng(1)
    q, k = (jnp.asarray(random.normal(size=(1, 1, 1, 16)), jnp.float32) for _ in 'qk')
    frequencies, _ = rope_frequencies(16, theta=1e4, **LLAMA3)

    def product(q_position, k_position):
        turned = [
            apply_rope(x, jnp.full((1, 1), position), frequencies)
            for x, position in ((q, q_position), (k, k_position))
        ]
        return float(jnp.sum(turned[0] * turned[1]))

    assert abs(product(17, 5) - product(112, 100)) < 1e-4
    assert abs(product(17, 5) - product(17, 6)) > 1e-2


def test_position_zero_changes_nothing_and_the_dtype_stays():
    x = jnp.asarray(np.random.default_rng(2).normal(size=(1, 3, 2, 8)), jnp.bfloat16)
    result = apply_rope(x, jnp.zeros((1, 3), jnp.int32), *rope_frequencies(8, theta=1e4))
    assert result.dtype == jnp.bfloat16
    np.testing.assert_array_equal(result, x)
