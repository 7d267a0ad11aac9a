"""Peaks of devices: the tables of the vendors, read by the names that JAX gives."""

import pytest

from jaxfm.metrics import devices
from jaxfm.metrics.devices import peak_flops


@pytest.mark.parametrize('name', devices._PEAK_TFLOPS)
def test_half_the_bits_are_twice_the_flops(name):
    """TF32 has half the rate of bfloat16, and float8 twice that; data sheets round each."""
    bfloat16, float32, float8 = devices._PEAK_TFLOPS[name]
    assert 2 * float32 == pytest.approx(bfloat16, rel=0.015)
    assert float8 is None or float8 == pytest.approx(2 * bfloat16, rel=0.015)


def test_a_chip_for_another_market_has_the_rates_of_its_original():
    assert devices._PEAK_TFLOPS['A800'] == devices._PEAK_TFLOPS['A100']
    assert devices._PEAK_TFLOPS['H800'] == devices._PEAK_TFLOPS['H100']
    assert peak_flops('NVIDIA A800-SXM4-80GB', 'float32') == 156e12
