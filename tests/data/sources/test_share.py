"""Which documents are held out: the share whose hash is lowest."""

import pytest

from jaxfm.data import sources
from jaxfm.data.sources import is_heldout, place_of


@pytest.mark.parametrize('fraction', [0.0, 0.1, 0.5, 1.0])
def test_the_share_is_held_out(fraction):
    keys = [f'document {n}' for n in range(4000)]
    assert all(0 <= place_of(key) < 1 for key in keys)
    share = sum(is_heldout(key, fraction) for key in keys) / len(keys)
    assert share == pytest.approx(fraction, abs=0.025)  # three standard deviations


def test_a_share_of_zero_holds_out_nothing_whatever_the_hash(monkeypatch):
    monkeypatch.setattr(sources, 'place_of', lambda key: 0.0)
    assert not is_heldout('document', 0.0)
    assert is_heldout('document', 1e-9)


def test_text_and_its_bytes_have_one_place():
    assert place_of('é') == place_of('é'.encode())
