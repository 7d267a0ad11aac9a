"""The benchmark of importing and exporting models measures everything it promises."""

from tests.models import goldens
from tools.bench import pretrained as bench


def test_every_figure_is_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, 'SHAPE', dict(num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=16))
    record = bench.measure(tmp_path, layers=1, repeats=1, model=goldens.Golden('llama').path)
    assert record['bytes'] > 128256 * 2048 * 2
    assert all(len(seconds) == 1 for seconds in record['seconds'].values())
    assert 0 < record['load_seconds'] < record['loads'][0]['all']
    bench.show(record)
    shown = capsys.readouterr().out
    assert 'of the speed of copying (bar: at least 0.5)' in shown
    assert 'llama loads in' in shown
    assert [path.name for path in tmp_path.iterdir()] == ['source']
