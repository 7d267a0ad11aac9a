"""The benchmark of checkpoints measures everything it promises and leaves nothing behind."""

from jaxfm.storage import open_storage
from tools.bench import checkpoint as bench


def test_every_figure_is_measured_on_disk_and_on_s3(s3_environment, tmp_path, capsys):
    places = [str(tmp_path), f's3://bucket/{tmp_path.name}']
    record = bench.measure(places, repeats=2, sizes=[2])
    (state,) = record['states']
    assert state['bytes'] > 1e6 and record['versions']['orbax-checkpoint']
    for place, figures in state['places'].items():
        assert bench.BARS[place].keys() < figures.keys()
        assert all(len(figures[name]) == 2 for name in bench.BARS[place])
        assert all(seconds > 0 for seconds in figures['save'] + figures['peer_restore'])
        assert figures['objects'] >= 3
    s3 = state['places']['s3']
    assert s3['requests'] >= s3['objects']
    bench.show(record)
    shown = capsys.readouterr().out
    assert shown.count('bar: at most 0.02') == shown.count('restore_vs_peer') == 2
    assert shown.count('peer: Orbax') == shown.count('peer: TensorStore') == 1
    for place in places:
        assert not open_storage(place).list()
