"""The benchmark of checkpoints measures everything it promises and leaves nothing behind."""

from jaxfm.storage import open_storage
from tools.bench import checkpoint as bench


def test_every_figure_is_measured_on_disk_and_on_s3(s3_environment, tmp_path, capsys):
    places = [str(tmp_path), f's3://bucket/{tmp_path.name}']
    record = bench.measure(places, repeats=2, megabytes=2)
    assert record['bytes'] > 1e6 and record['versions']['tensorstore']
    for figures in record['places'].values():
        assert bench.BARS.keys() < figures.keys()
        assert all(len(figures[name]) == 2 for name in bench.BARS)
        assert all(seconds > 0 for seconds in figures['save'] + figures['peer_restore'])
        assert figures['objects'] >= 3
    assert record['places']['s3']['requests'] >= record['places']['s3']['objects']
    bench.show(record)
    shown = capsys.readouterr().out
    assert shown.count('bar: at most 0.05') == shown.count('restore_vs_peer') == 2
    for place in places:
        assert not open_storage(place).list()
