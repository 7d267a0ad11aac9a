"""AdamW against plain numpy."""

import jax
import numpy as np
import pytest

from jaxfm.optim import AdamWConfig
from jaxfm.optim.adamw import AdamW
from tests.optim.updates import AXES, adamw_in_numpy, make_arrays, run

pytestmark = pytest.mark.usefixtures('quick_compilation')


def test_adamw_equals_numpy_and_leaves_vectors_undecayed():
    config = AdamWConfig(learning_rate=0.1, warmup_steps=2, weight_decay=0.3, schedule='linear')
    params = make_arrays(seed=100)
    result, _ = run(AdamW(config, 6, AXES), params, steps=5)
    # Warm-up: half, full. Then from 0.1 down by 0.09 in four steps.
    rates = [0.05, 0.1, 0.1, 0.0775, 0.055]
    wanted = adamw_in_numpy(config, params, rates)
    for path in AXES:
        np.testing.assert_allclose(result[path], wanted[path], rtol=1e-5, atol=1e-5, err_msg=path)


def test_weight_decay_zero_decays_nothing():
    config = AdamWConfig(learning_rate=0.1, weight_decay=0.0, schedule='constant')
    params = make_arrays(seed=100)
    rule = AdamW(config, 3, AXES)
    wanted = adamw_in_numpy(config, params, [0.1] * 3)
    result, _ = run(rule, params, steps=3)
    for path in AXES:
        np.testing.assert_allclose(result[path], wanted[path], rtol=1e-5, atol=1e-5, err_msg=path)
    assert set(rule.rules.values()) == {'adamw, no decay'}


def test_moments_are_stored_in_their_dtype():
    config = AdamWConfig(learning_rate=0.1, moment_dtype='bfloat16')
    state = AdamW(config, 3, AXES).transform.init(make_arrays(0))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state[0].mu)} == {'bfloat16'}
