"""What --mode train records outside of the training loop."""

from types import SimpleNamespace

from jaxfm.evals import GenerateConfig, LossConfig
from jaxfm.modes import train
from jaxfm.tasks import PythonFunctionsConfig


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
    phases = [SimpleNamespace(name=name) for name in DATA.datasets]
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
