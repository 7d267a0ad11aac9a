"""What the modes share: the logger is given back, and data has to be that of the checkpoint."""

import contextlib
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest

from jaxfm.errors import ConfigError
from jaxfm.modes import chat, evaluate, export, sample

log = logging.getLogger('jaxfm')
FLAGS = SimpleNamespace(workdir='run', output=None, prompt=None)


@pytest.fixture
def in_run(monkeypatch):
    """(module of a mode, run): the mode starts this run."""

    def start(module, run):
        monkeypatch.setattr(module, 'start_run', lambda *_: contextlib.nullcontext(run))

    return start


@pytest.mark.parametrize(
    'module, mode',
    [
        (chat, chat.chat),
        (evaluate, evaluate.evaluate),
        (export, export.export),
        (sample, sample.sample),
    ],
    ids=['chat', 'eval', 'export', 'sample'],
)
def test_a_mode_that_fails_gives_the_logger_back(module, mode, in_run, monkeypatch):
    class Run:
        """One that breaks at the first look at anything but this."""

        primary = True

    monkeypatch.setattr(chat, '_stream_tokens', lambda config: config)
    in_run(module, Run())
    before = log.level, list(log.handlers), log.propagate
    with pytest.raises(AttributeError, match="'Run' object has no attribute"):
        mode(FLAGS, None, [])
    assert (log.level, list(log.handlers), log.propagate) == before


def test_an_evaluation_on_other_data_than_the_checkpoint_had_is_refused(in_run, monkeypatch):
    """Its held-out part would be another one, and may have been trained on."""
    positions = []

    def set_state(position):
        positions.append(position)
        raise ConfigError('the data changed')

    manifest = {'extra': {'source': {'next_row': 7}}}
    source = SimpleNamespace(set_state=set_state)
    run = SimpleNamespace(
        primary=True,
        workdir=Path('run'),
        phases=['first'],
        sampler=lambda tokenizer: None,
        evaluators=lambda *_, **__: {},
        reader=lambda: SimpleNamespace(read_manifest={3: manifest}.get),
        phase_at=lambda step: SimpleNamespace(
            name='first', is_rollout=False, batches={'data': source}.get
        ),
    )
    in_run(evaluate, run)
    monkeypatch.setattr(evaluate, 'current_params', lambda run: ({}, 3))
    data = SimpleNamespace(tokenizer=None, datasets={'first': 'data'})
    monkeypatch.setattr(evaluate, 'open_data', lambda config, workdir: data)
    with pytest.raises(ConfigError, match='the data changed'):
        evaluate.evaluate(FLAGS, None, [])
    assert positions == [{'next_row': 7}]
