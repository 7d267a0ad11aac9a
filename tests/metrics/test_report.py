"""report.html: made of the files alone, whole in one file, of whatever there is."""

import json
import math
import re
import time

import pytest

from jaxfm.metrics.report import write_report
from jaxfm.metrics.writers import JsonlWriter, Recorder


def record_run(workdir, steps=200):
    (workdir / 'config.json').write_text(json.dumps({'steps': steps, 'note': '<script>x</script>'}))
    recorder = Recorder(JsonlWriter(workdir / 'metrics.jsonl'))
    for step in range(0, steps + 1, 10):
        recorder.write(step, 'train', {'train/loss': 8 / (1 + step)})
        speed = {'perf/tokens_per_second': 11_000.0 + step, 'perf/elapsed_seconds': float(step)}
        recorder.write(step, 'perf', speed | {'perf/total_tokens': step * 2048, 'perf/mfu': 0.4})
    recorder.phase = 'sft'
    data = {'web/train_tokens': 1234, 'code/train_tokens': 99, 'web/train_length_histogram/64': 7}
    data['web/heldout_length_histogram/64'] = 1
    recorder.write(0, 'event', {f'data/{name}': value for name, value in data.items()})
    recorder.write(steps, 'perf', {'data/web/epochs': 0.25, 'data/code/epochs': 1.5})
    recorder.write(steps, 'event', {'data/contamination/functions/contaminated_share': 0.125})
    for step, share in ((0, 0.0), (steps, 0.75)):
        scores = {'pass@1': share, 'pass@1_low': share - 0.1, 'pass@1_high': share + 0.1}
        recorder.write(step, 'eval', {f'eval/functions/{n}': v for n, v in scores.items()})
        loss = {'bits_per_byte': 8 - share * 8, 'xz_bits_per_byte': 1.64}
        recorder.write(step, 'eval', {f'eval/held_out/{n}': v for n, v in loss.items()})
    recorder.close()


def text_of(page):
    return re.sub(r'\s+', ' ', re.sub(r'<[^>]*>', ' ', page))


def test_the_report_shows_scores_with_intervals_beside_the_first_ones(tmp_path):
    record_run(tmp_path)
    page = write_report(tmp_path).read_text()
    text = text_of(re.sub(r'src="[^"]*"', '', page))
    for part in (
        tmp_path.name,
        'steps 200 of 200',
        'train/loss 0.0398',
        'tokens/s (median) 11,100',
        'tokens 409,600',
        'time 3m20s',
        'eval/functions/pass@1 0.75 (0.65 to 0.85) at step 200 0 (-0.1 to 0.1) at step 0',
        'eval/held_out/bits_per_byte 2 at step 200 8 at step 0',
        'eval/held_out/xz_bits_per_byte 1.64',
        'Data of sft source web code',
        'train_tokens 1,234 99',
        'epochs 0.25 1.5',
        'Contamination evaluator functions contaminated_share 0.125',
    ):
        assert part in text, part
    assert 'pass@1_low' not in text
    pictures = sorted(path.name for path in (tmp_path / 'plots').iterdir())
    assert pictures == ['eval.png', 'lengths.png', 'loss.png', 'throughput.png']
    assert all((tmp_path / 'plots' / name).read_bytes().startswith(b'\x89PNG') for name in pictures)


def test_the_report_is_one_file_and_escapes_what_it_quotes(tmp_path):
    workdir = tmp_path / 'a <b> & "c"'
    workdir.mkdir()
    record_run(workdir)
    page = write_report(workdir).read_text()
    assert page.count('src="data:image/png;base64,') == page.count('src=') == 4
    assert 'http' not in page and '<link' not in page and '<script' not in page
    assert '<b>' not in page and '&lt;script&gt;' in page


@pytest.mark.parametrize('content', [None, '', '{"step": 1, "ki', '{"step": 1, "kind": "event"}\n'])
def test_a_run_with_nothing_recorded_has_a_report(tmp_path, content):
    if content is not None:
        (tmp_path / 'metrics.jsonl').write_text(content)
    assert 'nothing recorded yet' in write_report(tmp_path).read_text()
    assert not (tmp_path / 'plots').exists()


def test_a_broken_config_and_odd_values_do_not_hinder_the_report(tmp_path):
    (tmp_path / 'config.json').write_text('{')
    recorder = Recorder(JsonlWriter(tmp_path / 'metrics.jsonl'))
    recorder.write(1, 'train', {'train/loss': math.nan, 'train/moe_loss': math.inf})
    recorder.write(1, 'eval', {'eval/a/$odd^': 1.0, 'eval/a/b_low': 0.5, 'eval/note/x': 'text'})
    recorder.write(2, 'eval', {'eval/a/b': 1.0, 'eval/a/b_high': 2.0})
    recorder.write(3, 'eval', {'eval/a/b': 1.0, 'eval/a/xz_bits_per_byte': math.nan})
    recorder.close()
    text = text_of(write_report(tmp_path).read_text())
    assert 'train/loss nan' in text and 'eval/a/$odd^ 1' in text


def test_a_report_takes_less_than_two_seconds(tmp_path):
    record_run(tmp_path, steps=20_000)
    write_report(tmp_path)  # imports matplotlib
    started = time.monotonic()
    write_report(tmp_path)
    assert time.monotonic() - started < 2
