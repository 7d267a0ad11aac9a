"""A source of rollouts over the scripted engine and task."""

import contextlib
import types

import jax
import pytest

from jaxfm import sharding
from jaxfm.objectives import OBJECTIVES
from jaxfm.rollout import RolloutConfig
from jaxfm.rollout.source import Rollouts
from tests.evals.test_generate import Chat, Tokenizer
from tests.rollout.scripted import Digits, Engine


@pytest.fixture
def make(monkeypatch, tmp_path):
    monkeypatch.setattr(
        'jaxfm.evals.prompts.TASKS', types.SimpleNamespace(load=lambda name: Digits)
    )

    def rollouts(engine=None, objective='rloo', seed=3, devices=1, more=None, **changes):
        sizes = dict.fromkeys(sharding.MESH_AXES, 1)
        values = dict(
            task=dict(name='arithmetic'),
            prompts=3,
            samples=4,
            sequence_length=8,
            batch_size=12,
            max_tokens=4,
            write_every=0,
        )
        context = types.SimpleNamespace(
            sampler=engine or Engine(),
            tokenizer=Tokenizer(),
            chat=Chat,
            samples_directory=tmp_path,
            weights=lambda step: {'step': step},
            mesh=sharding.make_mesh(sizes | {'fsdp': devices}, jax.devices()[:devices]),
        )
        config = RolloutConfig(**values | changes)
        more = {'put': dict, 'copy': lambda params, last: params} | (more or {})
        parts = more.pop('parts', {})  # of the objective
        parts |= {'teacher': 'runs/teacher'} if objective == 'gkd' else {}
        objective = OBJECTIVES[objective].schema(**parts)
        made = Rollouts(config, objective, context, seed=seed, **more)
        made.engine = context.sampler
        stack.callback(made.close)
        return made

    with contextlib.ExitStack() as stack:
        yield rollouts
