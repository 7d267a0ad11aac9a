"""report.html: made only from the run's files, self-contained, and from whatever is recorded."""

import base64
import json
import math
import re
import time

import pytest

from jaxfm.metrics import goodput
from jaxfm.metrics.writers import JsonlWriter, Recorder, read_records
from jaxfm.report.page import write_report
from jaxfm.report.samples import find_panels
from jaxfm.report.series import collect_series


def record_run(workdir, steps=200, failures_per_day=1.0):
    config = {'steps': steps, 'note': '<script>x</script>', 'checkpoint': {'every': 1000}}
    config |= {'metrics': {'failures_per_day': failures_per_day}}
    (workdir / 'config.json').write_text(json.dumps(config))
    recorder = Recorder(JsonlWriter(workdir / 'metrics.jsonl'))
    for step in range(0, steps + 1, 10):
        recorder.write(step, 'train', {'train/loss': 8 / (1 + step)})
        speed = {'perf/tokens_per_second': 11_000.0 + step, 'perf/elapsed_seconds': float(step)}
        recorder.write(step, 'perf', speed | {'perf/total_tokens': step * 2048, 'perf/mfu': 0.4})
        recorder.write(step, 'perf', goodput.values(account(step=step, wasted=step / 10)))
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


def account(**seconds):
    return dict.fromkeys(goodput.BUCKETS, 0.0) | {'init': 30.0} | seconds


def record_saves(workdir, *seconds, blocking=0.5):
    """Records committed checkpoints whose saves took the given seconds."""
    recorder = Recorder(JsonlWriter(workdir / 'metrics.jsonl'))
    for save in seconds:
        times = {'checkpoint/save_seconds': save, 'checkpoint/blocking_seconds': blocking}
        recorder.write(200, 'event', times | {'checkpoint/bytes': 10**9})
        recorder.write(200, 'perf', {'perf/step_seconds': 2.0})
    recorder.close()


def text_of(page):
    return re.sub(r'\s+', ' ', re.sub(r'<[^>]*>', ' ', page))


def test_the_report_shows_first_and_last_scores_with_intervals(tmp_path):
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
        'Where the time went bucket time share init 30s 12.0% compile 0.0s 0.0%',
        'step 3m20s 80.0%',
        'wasted 20s 8.0%',
        'Data of sft source web code',
        'train_tokens 1,234 99',
        'epochs 0.25 1.5',
        'Contamination evaluator functions contaminated_share 0.125',
    ):
        assert part in text, part
    assert 'pass@1_low' not in text
    pictures = sorted(path.name for path in (tmp_path / 'plots').iterdir())
    assert pictures == ['eval.png', 'goodput.png', 'lengths.png', 'loss.png', 'throughput.png']
    assert all((tmp_path / 'plots' / name).read_bytes().startswith(b'\x89PNG') for name in pictures)


def test_the_report_recommends_an_interval_from_the_saves_that_were_measured(tmp_path):
    record_run(tmp_path)
    record_saves(tmp_path, 11.0, 100.0, 12.0)
    assert (
        'recommended checkpoint.every 147 steps (4m54s) for 1 failure per day; '
        'a save blocks training for 0.5s and takes 12s; current value: 1000'
    ) in text_of(write_report(tmp_path).read_text())


def test_more_failures_recommend_a_shorter_interval(tmp_path):
    record_run(tmp_path, failures_per_day=4.0)
    record_saves(tmp_path, 12.0)
    text = text_of(write_report(tmp_path).read_text())
    assert 'checkpoint.every 73 steps (2m26s) for 4 failures per day' in text


@pytest.mark.parametrize(('saves', 'failures_per_day'), [((), 1.0), ((12.0,), 0.0)])
def test_without_saves_or_failures_no_interval_is_recommended(tmp_path, saves, failures_per_day):
    record_run(tmp_path, failures_per_day=failures_per_day)
    record_saves(tmp_path, *saves)
    text = text_of(write_report(tmp_path).read_text())
    assert 'Where the time went' in text and 'recommended' not in text


def test_the_report_is_one_file_and_escapes_html(tmp_path):
    workdir = tmp_path / 'a <b> & "c"'
    workdir.mkdir()
    record_run(workdir)
    page = write_report(workdir).read_text()
    assert page.count('src="data:image/png;base64,') == page.count('src=') == 5
    assert 'http' not in page and '<link' not in page and '<script' not in page
    assert '<b>' not in page and '&lt;script&gt;' in page


def test_the_report_shows_steps_that_were_skipped_spikes_and_norms(tmp_path):
    recorder = Recorder(JsonlWriter(tmp_path / 'metrics.jsonl'))
    for phase, skipped in (('first', [0, 2, 2]), ('second', [0, 0, 1])):
        recorder.phase = phase
        for count in skipped:
            norms = {f'{kind}_norm/{name}': 0.0 for kind in ('update', 'param') for name in 'ab'}
            values = {'loss': 3.0, 'grad_norm': 1.0, 'skipped_steps': count, 'spikes': 1} | norms
            recorder.write(3, 'train', {f'train/{name}': value for name, value in values.items()})
    for step, spike, more in ((91, 91, {}), (80, 95, {'spike/rewinds': 1})):
        values = {'spike/step': spike, 'spike/loss': 7.25, 'spike/limit': 4.0}
        recorder.write(step, 'event', values | more)
    recorder.close()
    text = text_of(write_report(tmp_path).read_text())
    assert 'skipped steps 3 loss spikes 2: 7.25 at step 91, 7.25 at step 95' in text
    assert 'went back to step 80' in text
    assert (tmp_path / 'plots' / 'norms.png').exists()


def test_the_report_of_a_run_that_learns_from_rewards_begins_with_them(tmp_path):
    recorder = Recorder(JsonlWriter(tmp_path / 'metrics.jsonl'))
    for step in (1, 2, 3):
        bounds = {
            f'rollout/reward{end}': step / 4 + by for end, by in (('_low', -0.1), ('_high', 0.1))
        }
        recorder.write(step, 'perf', {'rollout/reward': step / 4, 'rollout/length': 7.0} | bounds)
        recorder.write(step, 'train', {'train/loss': 0.0, 'train/ratio_max': 1.0})
    recorder.close()
    page = write_report(tmp_path).read_text()
    pictures = [
        base64.b64encode((tmp_path / 'plots' / f'{name}.png').read_bytes()).decode()
        for name in ('rewards', 'loss')
    ]
    assert page.index(pictures[0]) < page.index(pictures[1])


@pytest.mark.parametrize('content', [None, '', '{"step": 1, "ki', '{"step": 1, "kind": "event"}\n'])
def test_a_run_with_nothing_recorded_has_a_report(tmp_path, content):
    if content is not None:
        (tmp_path / 'metrics.jsonl').write_text(content)
    assert 'nothing recorded yet' in write_report(tmp_path).read_text()
    assert not (tmp_path / 'plots').exists()


def test_a_broken_config_and_odd_values_do_not_break_the_report(tmp_path):
    (tmp_path / 'config.json').write_text('{')
    recorder = Recorder(JsonlWriter(tmp_path / 'metrics.jsonl'))
    recorder.write(1, 'train', {'train/loss': math.nan, 'train/moe_loss': math.inf})
    recorder.write(1, 'eval', {'eval/a/$odd^': 1.0, 'eval/a/b_low': 0.5, 'eval/note/x': 'text'})
    recorder.write(2, 'eval', {'eval/a/b': 1.0, 'eval/a/b_high': 2.0})
    recorder.write(3, 'eval', {'eval/a/b': 1.0, 'eval/a/xz_bits_per_byte': math.nan})
    recorder.close()
    text = text_of(write_report(tmp_path).read_text())
    assert 'train/loss nan' in text and 'eval/a/$odd^ 1' in text


def test_a_long_run_takes_no_longer_to_report_than_a_short_one(tmp_path):
    """Matplotlib's share is the same for both: about a second on a quiet machine."""

    def seconds(steps):
        workdir = tmp_path / str(steps)
        workdir.mkdir()
        record_run(workdir, steps)
        started = time.process_time()
        write_report(workdir)
        return time.process_time() - started

    seconds(100)  # imports matplotlib
    assert seconds(20_000) < 2 * seconds(200)


def record_evals(workdir, **evaluators):
    """Records the values of evaluators at the last step."""
    recorder = Recorder(JsonlWriter(workdir / 'metrics.jsonl'))
    for evaluator, values in evaluators.items():
        recorder.write(200, 'eval', {f'eval/{evaluator}/{name}': x for name, x in values.items()})
    recorder.close()


def with_ends(name, score):
    return {name: score, f'{name}_low': score - 0.05, f'{name}_high': score + 0.05}


def of_samples(n=8, prompts=20, tokens=30.0):
    """What n samples of each question give."""
    values = {'prompts': prompts, 'cost/generated_tokens': tokens * prompts * n}
    values |= with_ends('pass@1', 0.3)
    k = 2
    while k <= n:
        scores = {'pass@': 1 - 0.7**k, 'maj@': min(0.3 + 0.05 * k, 0.6), 'pass^': 0.3**k}
        for name, score in scores.items():
            values |= with_ends(f'{name}{k}', score)
        k *= 2
    return values


def of_one(score, tokens, prompts=20, **more):
    """What an answer to each question gives."""
    costs = {'prompts': prompts, 'cost/generated_tokens': tokens * prompts}
    return with_ends('pass@1', score) | costs | more


def generates(task='gsm8k', **changes):
    """The config of an evaluator: greedy, unless changes say otherwise."""
    group = {'name': 'generate', 'task': {'name': task, 'path': 'x'}, 'phase': ''}
    return group | {'n': 1, 'temperature': 0.0, 'strategy': None} | changes


def panels_of(workdir, config=None):
    return find_panels(collect_series(list(read_records(workdir / 'metrics.jsonl'))), config)


def test_scores_of_several_samples_are_curves(tmp_path):
    record_run(tmp_path)
    record_evals(tmp_path, sums=of_samples())
    lines = panels_of(tmp_path)['sums']
    assert [line.label for line in lines] == [
        'any is right (oracle)',
        'their vote',
        'all are right',
    ]
    for line in lines:  # one sample votes alone
        assert [point.samples for point in line.points] == [1, 2, 4, 8]
        assert [point.tokens for point in line.points] == [30, 60, 120, 240]
    assert lines[0].points[2] == pytest.approx((4, 120, 1 - 0.7**4, 0.7099, 0.8099))
    page = write_report(tmp_path).read_text(encoding='utf-8')
    assert (tmp_path / 'plots' / 'samples.png').stat().st_size > 10_000
    assert 'eval/sums/pass@8' in page  # the table has every number


def test_evaluators_of_one_task_share_their_panels(tmp_path):
    vote = of_one(0.6, 150, **{'strategy/samples': 5.5})
    record_evals(tmp_path, many=of_samples(), one=of_one(0.4, 25), vote=vote, other=of_one(0.5, 9))
    evals = {
        'many': generates(n=8, temperature=0.7),
        'one': generates(),
        'vote': generates(temperature=0.7, strategy={'name': 'vote', 'n': 8}),
        'other': generates('math'),  # alone with one score: it has no panel
    }
    [(title, lines)] = panels_of(tmp_path, {'evals': evals}).items()
    assert title == 'gsm8k: many, one, vote'
    *_, greedy, strategy = lines
    assert (greedy.label, greedy.form) == ('greedy', 'level')
    assert greedy.points == [pytest.approx((1, 25, 0.4, 0.35, 0.45))]
    assert (strategy.label, strategy.form) == ('vote: vote', 'point')
    assert strategy.points == [pytest.approx((5.5, 150, 0.6, 0.55, 0.65))]
    (tmp_path / 'config.json').write_text(json.dumps({'evals': evals}))
    write_report(tmp_path)
    assert (tmp_path / 'plots' / 'samples.png').exists()


def test_only_greedy_decoding_is_called_greedy(tmp_path):
    record_evals(tmp_path, many=of_samples(), hot=of_one(0.4, 25))
    evals = {'many': generates(n=8, temperature=0.0), 'hot': generates(temperature=0.7)}
    [lines] = panels_of(tmp_path, {'evals': evals}).values()
    assert 'greedy' not in [line.label for line in lines]


@pytest.mark.parametrize('change', [{'task': {'name': 'gsm8k', 'path': 'y'}}, {'phase': 'sft'}])
def test_other_questions_have_panels_of_their_own(tmp_path, change):
    record_evals(tmp_path, first=of_samples(), second=of_samples())
    evals = {'first': generates(n=8), 'second': generates(n=8) | change}
    assert list(panels_of(tmp_path, {'evals': evals})) == ['gsm8k: first', 'gsm8k: second']
    assert list(panels_of(tmp_path)) == ['first', 'second']  # without a config


def test_equal_curves_of_one_task_say_whose_they_are(tmp_path):
    record_evals(tmp_path, first=of_samples(2), second=of_samples(2), third=of_one(0.4, 0))
    evals = {name: generates(n=2) for name in ('first', 'second')} | {'third': generates()}
    [lines] = panels_of(tmp_path, {'evals': evals}).values()
    assert [line.label for line in lines] == [
        *('first: any is right (oracle)', 'first: their vote', 'first: all are right'),
        *('second: any is right (oracle)', 'second: their vote', 'second: all are right'),
        'greedy',
    ]
    (tmp_path / 'config.json').write_text(json.dumps({'evals': evals}))
    write_report(tmp_path)  # an answer without tokens has no place on a logarithmic axis


def test_without_several_samples_there_are_no_curves(tmp_path):
    record_run(tmp_path)
    write_report(tmp_path)
    assert not (tmp_path / 'plots' / 'samples.png').exists()
