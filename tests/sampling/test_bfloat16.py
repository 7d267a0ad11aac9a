"""In bfloat16, the engine's log-probs are those of the train step but for rounding.

d is the log of an importance ratio, sampler to trainer, which policy gradients divide by.
"""

import jax
import numpy as np
import pytest
from flax import nnx

from jaxfm import state
from jaxfm.models import TransformerConfig
from jaxfm.models.transformer import Transformer
from jaxfm.pretrained.load import load_params
from jaxfm.pretrained.locate import open_pretrained, values_of
from jaxfm.sampling import SamplingConfig
from jaxfm.sampling.complete import complete
from jaxfm.sampling.engine import Sampler
from jaxfm.sampling.request import Request
from tests.sampling import conftest
from tests.sampling.trained import trainer


@pytest.fixture(scope='module', autouse=True)
def _compile_quickly():
    """Not here: fusions decide what is rounded to bfloat16."""


def with_dtype(config, compute_dtype: str):
    """-> the config and its parts."""
    config = config.model_copy(update=dict(param_dtype='float32', compute_dtype=compute_dtype))
    return config, state.split(lambda key: Transformer(config, nnx.Rngs(key)))


def load(path):
    """-> the config and the params of a pretrained model."""
    pretrained = open_pretrained(str(path))
    config = TransformerConfig.model_validate(values_of(pretrained)['model'])
    config, parts = with_dtype(config, 'float32')
    return config, load_params(pretrained, config, parts.axes, parts.shapes)


def sample(config, params, mesh, count: int):
    """-> requests and samples with shared prefixes, at several temperatures."""
    config, parts = with_dtype(config, 'bfloat16')
    sampling = SamplingConfig(slots=8, max_length=96, page_size=8, prefill_tokens=64)
    sampler = Sampler(parts.merge, config, sampling, mesh)
    options = [{}, dict(temperature=0.7, top_p=0.9), dict(temperature=1.3, top_k=40)]
    start = np.random.default_rng(0).integers(0, config.vocab_size, 20).tolist()
    requests = [
        Request(f'{i}', start[: 1 + 3 * i % 20], 60, seed=i, n=2, **options[i % 3])
        for i in range(count)
    ]
    samples = complete(sampler, requests, params, 0)
    return [(request, sample) for request in requests for sample in samples[request.id]]


@pytest.fixture(scope='module', params=['random', 'stories260k'])
def differences(request, one_device):
    """d of every token: sampler to trainer, and the trainer in bfloat16 to that in float32."""
    with jax.set_mesh(one_device):
        if request.param == 'random':
            config, params = conftest.CONFIG, conftest.random_params()
        else:
            config, params = load(request.getfixturevalue('shared_data') / 'stories260k_hf')
        samples = sample(config, params, one_device, 40)
        texts = [[*request.tokens, *sample.tokens] for request, sample in samples]
        sampled = np.array([sample.logprobs for _, sample in samples])
        trained = {}
        for dtype in ('bfloat16', 'float32'):
            _, parts = with_dtype(config, dtype)
            logprobs = trainer(parts, params, one_device, 8, 192)(texts)
            trained[dtype] = np.array([x[-sampled.shape[1] :] for x in logprobs])
    found = sampled - trained['bfloat16'], trained['bfloat16'] - trained['float32']
    for name, d in zip(('sampler to trainer', 'bfloat16 to float32'), found):
        ratios = np.exp(np.abs(d))
        figures = dict(mean=ratios.mean(), p999=np.quantile(ratios, 0.999), max=ratios.max())
        figures = {name: round(float(x), 5) for name, x in figures.items()}
        print(f'{request.param}, {name}, {d.size} tokens, exp|d|: {figures}')
    return found


@pytest.mark.slow
def test_the_sampler_is_as_near_to_the_trainer_as_to_float32(differences):
    """And not biased: no precision is lost in the engine alone."""
    sampler, rounding = differences
    assert np.any(sampler != 0) and abs(sampler.mean()) < 3e-3
    assert np.std(sampler) <= 1.2 * np.std(rounding)


@pytest.mark.slow
@pytest.mark.xfail(
    strict=True,
    reason='XLA skips other roundings in the train step than in a decode step '
    '(xla_allow_excess_precision), and decoding rounds the weights of attention before they are '
    'normalised, training afterwards',
)
def test_the_mean_ratio_is_under_one_percent(differences):
    assert np.mean(np.exp(np.abs(differences[0]))) < 1.01
