"""What --mode train shows and records outside of the training loop."""

from types import SimpleNamespace

from jaxfm.evals import GenerateConfig, LossConfig
from jaxfm.modes import train
from jaxfm.sampling import SamplingConfig
from jaxfm.sampling.request import Completion
from jaxfm.tasks import PythonFunctionsConfig
from jaxfm.tokenizer import BytesConfig
from jaxfm.tokenizer.build import build_tokenizer


class Records:
    """A recorder that keeps its records in memory."""

    phase = ''

    def __init__(self):
        self.written = []

    def write(self, step, kind, values):
        self.written.append((self.phase, step, kind, values))


def data_of(**texts):
    datasets = {
        name: SimpleNamespace(
            num_train_bytes=len(text), train_texts=lambda max_bytes, text=text: [text]
        )
        for name, text in texts.items()
    }
    return SimpleNamespace(datasets=datasets)


DATA = data_of(first='a b c', second='x y')


def run_with(primary=True):
    task = PythonFunctionsConfig()
    evals = {
        'heldout': LossConfig(),
        'functions': GenerateConfig(task=task),
        'unasked': GenerateConfig(task=task, contamination_bytes=0),
    }
    phases = [SimpleNamespace(name=name, is_rollout=False) for name in DATA.datasets]
    config = SimpleNamespace(evals=evals, total_steps=7)
    return SimpleNamespace(primary=primary, phases=phases, config=config)


def test_every_phase_records_which_prompts_occur_in_its_training_text():
    """The loss and export evaluators have no prompts and are left out."""
    asking = SimpleNamespace(prompt_texts=['b c', 'z'])
    evaluators = {'heldout': object(), 'functions': asking, 'unasked': asking, 'export': object()}
    records = Records()
    train._record_contamination(records, run_with(), DATA, evaluators)
    assert [record[:3] for record in records.written] == [
        ('first', 7, 'event'),
        ('second', 7, 'event'),
    ]
    start = 'data/contamination/functions/'
    assert [
        {name.removeprefix(start): value for name, value in values.items()}
        for *_, values in records.written
    ] == [
        dict(
            prompts=2,
            contaminated=count,
            contaminated_share=count / 2,
            ngram=13,
            bytes_read=size,
            bytes_total=size,
        )
        for count, size in ((1, 5), (0, 3))
    ]
    elsewhere = Records()
    train._record_contamination(elsewhere, run_with(primary=False), DATA, evaluators)
    assert not elsewhere.written


def test_final_samples_that_fail_are_told_and_the_run_goes_on(tmp_path, capsys, caplog):
    config = SimpleNamespace(seed=0, sampling=SamplingConfig(num_samples=2, prompts=['a', 'b']))
    run = SimpleNamespace(primary=True, workdir=tmp_path, config=config)
    tokenizer = build_tokenizer(BytesConfig(), ())
    prompts, requests = train._last_samples(config, tokenizer)
    good = Completion('0', 0, [120], text='x', finish_reason='length')
    bad = Completion('1', 1, finish_reason='error', error='NaN')
    completions = {'0': [good], '1': [bad]}
    train._show_samples(run, tokenizer, prompts, requests, completions)
    assert capsys.readouterr().out == 'ax\nb\n'
    assert len((tmp_path / 'samples' / 'final.jsonl').read_text('utf-8').splitlines()) == 2
    [record] = [record for record in caplog.records if record.levelname == 'WARNING']
    assert record.getMessage() == "1 of 2 samples failed: 'b' (sample 1): NaN"
