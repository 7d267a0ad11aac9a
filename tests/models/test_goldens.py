"""The committed goldens are consistent with each other."""

import numpy as np
import pytest

from tests.models.goldens import FAMILIES, Golden, read_safetensors


@pytest.mark.parametrize('name', FAMILIES)
def test_gradients_and_trained_parameters_match_the_tensors_of_the_checkpoint(name):
    golden = Golden(name)
    weights = read_safetensors(golden.path / 'model.safetensors')
    for kind in ('gradient', 'after'):
        shapes = {key: value.shape for key, value in golden.parameters(kind).items()}
        assert shapes == {key: value.shape for key, value in weights.items()}
    for key, value in golden.parameters('after').items():
        assert (value != weights[key]).any(), key


@pytest.mark.parametrize('name', FAMILIES)
def test_first_loss_is_the_mean_cross_entropy_of_the_logits(name):
    arrays = Golden(name).arrays
    logits, counted = arrays['logits'].astype(np.float64), arrays['loss_mask'][0]
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    picked = np.take_along_axis(logprobs, arrays['targets'][0][..., None], -1)[..., 0]
    assert -picked[counted].mean() == pytest.approx(arrays['losses'][0], abs=1e-6)


@pytest.mark.parametrize('name', FAMILIES)
def test_padding_before_the_row_gives_the_logits_of_padding_after_it(name):
    arrays = Golden(name).arrays
    left, right = arrays['left_attention_mask'], arrays['attention_mask'][0]
    assert not left[1, 0] and not right[1, -1]
    np.testing.assert_allclose(arrays['left_logits'][left], arrays['logits'][right], atol=2e-5)
