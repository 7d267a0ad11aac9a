"""The update rule of each parameter."""

from jaxfm.optim import AdamWConfig, MuonConfig
from jaxfm.optim.adamw import AdamW
from jaxfm.optim.muon import Muon
from tests.optim.updates import AXES, MATRICES, TABLES, VECTORS


def test_every_parameter_has_a_described_rule():
    adamw = AdamW(AdamWConfig(learning_rate=0.1), 3, AXES).rules
    assert {path for path in AXES if adamw[path] == 'adamw, no decay'} == VECTORS
    assert {path for path in AXES if adamw[path] == 'adamw, decay 0.1'} == AXES.keys() - VECTORS
    muon = Muon(MuonConfig(learning_rate=0.1), 3, AXES).rules
    assert {path for path in AXES if muon[path] == 'muon, decay 0.1'} == MATRICES
    assert all(muon[path] == adamw[path] for path in VECTORS | TABLES)
