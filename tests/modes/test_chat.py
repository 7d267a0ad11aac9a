"""Chat: turns that know what was said, text that streams, and a terminal that keeps control."""

import contextlib
import functools
import json
import os
import pty
import shutil
import signal
import subprocess
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxfm import sharding, state
from jaxfm.chat.render import Chat
from jaxfm.errors import DataError
from jaxfm.models import BlockConfig, TransformerConfig
from jaxfm.modes import chat
from jaxfm.modes.chat import Assistant
from jaxfm.run.run import model_maker
from jaxfm.sampling import SamplingConfig, SamplingOptions
from jaxfm.sampling.engine import Sampler
from jaxfm.sampling.logits import Sampled
from jaxfm.sampling.output import Output
from jaxfm.tokenizer import BytesConfig
from jaxfm.tokenizer.build import build_tokenizer, load_tokenizer
from tests.runs import PATIENCE, start_ranks, stderr_of

ROOT = Path(__file__).resolve().parents[2]
GREEDY = ['--temperature=0', '--max_tokens=8']
OPTIONS = dict(temperature=0.0, max_tokens=20, seed=3)
NAN = -1


class Answers:
    """A sampler that answers with given ids, one a step, and remembers what it was asked.

    Its events are those of the engine. None in place of an id is a step without any; NAN is logits
    that are not numbers.
    """

    config = SamplingConfig(max_length=200)

    def __init__(self, tokenizer, *answers):
        self._tokenizer, self._answers = tokenizer, list(answers)
        self.requests, self.cancelled = [], []

    def add(self, request):
        self.requests.append(request)
        self._ids = list(self._answers.pop(0))
        self._output = Output(request, self._tokenizer)

    def step(self):
        token = self._ids.pop(0)
        if token is None:
            return []
        nothing = [np.zeros(1)] * 2 + [np.zeros((1, 1))] * 2
        sampled = Sampled(np.array([token]), *nothing, is_bad=np.array([token == NAN]))
        _, event = self._output.take(sampled, most=1 + len(self._ids), version=0)
        return [event] if event else []

    def cancel(self, request_id):
        self.cancelled.append(request_id)


@pytest.fixture(scope='module')
def coder():
    return build_tokenizer(BytesConfig(chat_template='qa'), ())


def answering(sampler, coder) -> Assistant:
    chat_format = Chat(coder)
    options = dict(OPTIONS, stop_ids=chat_format.stop_ids)
    return Assistant(sampler, chat_format, options)


def ask(assistant, messages, stop_after=None):
    """(text, reason, pieces) of the answer, stopped when so many pieces are there."""
    pieces = []
    text, reason = assistant.answer(messages, pieces.append, lambda: len(pieces) == stop_after)
    return text, reason, pieces


def user(content):
    return {'role': 'user', 'content': content}


def test_a_turn_begins_with_the_ids_of_those_before_it(coder, capsys):
    said = ['hello', 'more', '/reset', 'hello']
    sampler = Answers(coder, [*coder.encode('hi!'), coder.eos_id], [coder.eos_id], [coder.eos_id])
    assert chat._talk(answering(sampler, coder), said, None, chat._no_hint) == 0
    assert capsys.readouterr() == ('hi!\n\n\n', '')
    first, second, third = sampler.requests
    assert first.tokens == Chat(coder).prompt([user('hello')])
    before = [*first.tokens, *coder.encode('hi!'), coder.eos_id]
    assert second.tokens[: len(before)] == before
    assert coder.decode(second.tokens[len(before) :]) == '\nQ: more\nA: '
    assert third.tokens == first.tokens
    assert first.temperature == 0 and first.max_tokens == 20 and first.seed == 3
    assert len({request.sample_index for request in sampler.requests}) == 3


def test_a_character_is_shown_whole_and_the_stop_token_not(coder):
    smile = coder.encode('\U0001f600')
    sampler = Answers(coder, [*coder.encode('a'), None, *smile, coder.eos_id], smile[:2])
    assistant = answering(sampler, coder)
    assert ask(assistant, [user('x')]) == ('a\U0001f600', 'stop', ['a', '\U0001f600', ''])
    assert ask(assistant, [user('x')]) == ('\ufffd', 'length', ['\ufffd'])


def test_an_answer_that_fails_is_told_and_the_chat_goes_on(coder, capsys, caplog, tmp_path):
    said, output = ['hello', 'more', 'again'], tmp_path / 'chats.jsonl'
    good = [*coder.encode('hi'), coder.eos_id]
    sampler = Answers(coder, good, [*coder.encode('oh'), NAN], good)
    assert chat._talk(answering(sampler, coder), said, output, chat._no_hint) == 70
    assert capsys.readouterr().out == 'hi\noh\nhi\n'
    assert [record.getMessage() for record in caplog.records] == [
        'the answer failed: the model gives NaN or infinite logits'
    ]
    assert said_in(chats_in(output)) == [['hello', 'again']]


def test_an_answer_that_is_stopped_is_what_was_shown_and_leaves_the_sampler(coder):
    sampler = Answers(coder, coder.encode('a long answer'))
    assert ask(answering(sampler, coder), [user('x')], stop_after=4)[:2] == (
        'a lo', 'interrupted'
    )  # fmt: skip
    assert sampler.cancelled == [sampler.requests[0].id]


def test_a_mark_that_is_no_special_token_ends_an_answer_unseen(tmp_path):
    mark = '<|im_end|>'
    config = BytesConfig(chat_template='chatml', special_tokens=['<|im_start|>', mark])
    build_tokenizer(config, ()).save(tmp_path)
    path = tmp_path / 'tokenizer.json'
    content = json.loads(path.read_text())
    for token in content['added_tokens']:
        token['special'] = token['special'] and token['content'] != mark
    path.write_text(json.dumps(content))
    coder = load_tokenizer(tmp_path)
    end = coder.special_tokens[mark]
    assert coder.decode([end]) == mark
    sampler = Answers(coder, [*coder.encode('yes'), end])
    assert ask(answering(sampler, coder), [user('x')])[:2] == ('yes', 'stop')


def test_a_turn_that_is_stopped_before_any_text_is_forgotten(coder):
    class Hasty(Answers):
        def add(self, request):
            super().add(request)
            signal.raise_signal(signal.SIGINT)

    messages = [user('hello'), {'role': 'assistant', 'content': 'hi'}]
    handler = signal.getsignal(signal.SIGINT)
    assistant = answering(Hasty(coder, coder.encode('long')), coder)
    assert chat._turn(assistant, messages, 'more', chat._no_hint) == messages
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_conversation_that_is_too_long_is_refused_with_what_to_do(coder):
    sampler = Answers(coder)
    with pytest.raises(DataError) as error:
        ask(answering(sampler, coder), [user('x' * 180)])
    for words in (
        '188 tokens', '+ 20 of', '= 208', 'max_length 200', '/reset',
        '--config.sampling.max_length=400', '--max_tokens',
    ):  # fmt: skip
        assert words in str(error.value)
    assert not sampler.requests


@pytest.mark.usefixtures('quick_programs')
def test_a_turn_computes_only_what_the_turns_before_it_have_not(coder):
    block = BlockConfig(num_heads=1, num_kv_heads=1, head_dim=8, mlp_dim=8)
    model = TransformerConfig(vocab_size=coder.vocab_size, embed_dim=8, num_layers=1, block=block)
    make_model = model_maker(model)
    parts = state.split(make_model)
    mesh = sharding.make_mesh(dict.fromkeys(sharding.MESH_AXES, 1), jax.devices()[:1])
    config = SamplingConfig(slots=1, max_length=128, decode_steps=1, page_size=4)
    options = SamplingOptions(max_tokens=20, allowed_ids=coder.encode('abcdef'))  # never ends
    with jax.set_mesh(mesh):
        params = state.fresh_params(make_model, parts, 0, parts.shapes)
        sampler = Sampler(parts.merge, model, config, mesh, coder)
        sampler.lend(params, 0)
        assistant = Assistant(sampler, Chat(coder), options.request_options([], []))
        messages, prompts, shared, stored = [], [], [], []
        for said in ('hello', 'more', 'again'):
            messages.append(user(said))
            prompts.append(len(Chat(coder).prompt(messages)))
            before = sampler.counters
            messages.append({'role': 'assistant', 'content': ask(assistant, messages)[0]})
            shared.append(sampler.counters.shared_tokens - before.shared_tokens)
            stored.append(sampler.counters.prefill_tokens - before.prefill_tokens)
    # All whole pages of the prompt and of the answer, whose last token nobody has needed yet.
    known = [0, *((length + 19) // 4 * 4 for length in prompts[:2])]
    assert shared == known
    assert stored == [length - 1 - old for length, old in zip(prompts, known)]


# The command, on a trained model that has learnt little but ends


@pytest.fixture(scope='module')
def chatty(tiny):
    """The config of a run whose tokenizer has a chat template, in its work directory."""
    change = """
    config.steps = 6
    config.tokenizer = dict(name='bytes', chat_template='qa')
    config.evals = {}
    config.sampling.update(max_length=512, num_samples=0)
"""
    config = tiny.derive('chatty', change.rstrip())
    workdir = tiny.root / 'chatty'
    process = tiny.start(workdir, config=config)
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, stderr_of(workdir)
    return config, workdir


def talk_to(tiny, config, workdir, said: bytes, *more):
    """Talks to a model by lines of stdin -> (code, stdout, stderr)."""
    arguments = ['--config', config, '--mode=chat', '--workdir', workdir, *more]
    process = tiny.run(*arguments, input=said, text=False, timeout=3 * PATIENCE)
    assert b'Traceback' not in process.stderr, process.stderr.decode()
    return process.returncode, process.stdout.decode(), process.stderr.decode()


@pytest.fixture(scope='module')
def talk(tiny, chatty):
    """`talk_to` the trained run, or a copy of it in another work directory."""

    def run(said: bytes, *more, workdir=chatty[1]):
        return talk_to(tiny, chatty[0], workdir, said, *more)

    return run


def chats_in(path) -> list[list[dict]]:
    return [json.loads(line)['messages'] for line in path.read_text().splitlines()]


def answers_in(chats) -> str:
    answers = [m['content'] for chat in chats for m in chat if m['role'] == 'assistant']
    return ''.join(answer + '\n' for answer in answers)


def said_in(chats) -> list[list[str]]:
    return [[m['content'] for m in chat if m['role'] == 'user'] for chat in chats]


def test_lines_are_turns_until_the_end_and_answers_alone_go_to_stdout(talk, tmp_path):
    output = tmp_path / 'new' / 'chats.jsonl'
    said = b'hello\n\n  again \n/reset\nhello\n/exit\nnever\n'
    code, out, error = talk(said, *GREEDY, '--output', output)
    assert code == 0
    chats = chats_in(output)
    assert said_in(chats) == [['hello', '  again '], ['hello']]
    assert [len(chat) for chat in chats] == [4, 2]
    assert chats[0][:2] == chats[1]  # forgotten: greedy says the same again
    assert out == answers_in(chats)
    assert '> ' not in error and '/reset' not in error and 'template' not in error

    prompts = ['--prompt=hello', '--prompt=  again ']
    code, out, _ = talk(b'never\n', *prompts, *GREEDY)
    assert (code, out) == (0, answers_in(chats[:1]))


def test_temperature_and_seed_hold(talk):
    hot = ['--temperature=1', '--max_tokens=20', '--prompt=hello', '--prompt=hello']
    code, out, _ = talk(b'', *hot)
    assert code == 0
    assert talk(b'', *hot)[1] == out
    assert talk(b'', *hot, '--seed=1')[1] != out


def test_a_turn_that_cannot_be_answered_is_told_and_leaves_the_conversation(talk, tmp_path):
    output = tmp_path / 'chats.jsonl'
    room = ['--config.sampling.max_length=64', '--output', output]
    said = b'hi\n' + 60 * b'x' + b'\nno \xff text\nhi\n'
    code, out, error = talk(said, *GREEDY, *room)
    assert code == 65
    chats = chats_in(output)
    assert said_in(chats) == [['hi', 'hi']]
    assert out == answers_in(chats)
    first, second = [line for line in error.splitlines() if line.startswith('error: ')]
    assert 'exceed sampling.max_length 64' in first and '=128' in first
    assert 'not valid Unicode' in second


def test_a_tokenizer_without_a_template_is_told(talk, chatty, tmp_path):
    workdir = shutil.copytree(chatty[1], tmp_path / 'run')
    path = workdir / 'tokenizer' / 'tokenizer_config.json'
    said = json.loads(path.read_text())
    del said['chat_template']
    path.write_text(json.dumps(said))
    code, out, error = talk(b'hello\n', *GREEDY, workdir=workdir)
    assert code == 0 and out
    [line] = [line for line in error.splitlines() if 'template' in line]
    assert line.startswith('warning: ') and 'plain' in line


def test_several_processes_are_refused(start, chatty):
    config, workdir = chatty
    for process in start_ranks(functools.partial(start, config=config), workdir, '--mode=chat'):
        assert process.communicate(timeout=PATIENCE)[0] == ''
        assert process.returncode == 64
    assert '--mode chat needs a single process, but there are 2' in stderr_of(workdir)


def test_a_real_model_answers_by_its_own_template(tiny, smollm2_gguf, shared_data, tmp_path):
    golden = shared_data / 'models_installable' / 'smollm2_135m_instruct_q4_1.golden.json'
    cases = [case for case in json.loads(golden.read_text())['cases'] if case['chat']]
    said = '\n/reset\n'.join(case['prompt'] for case in cases)
    model = [f'--config.init_from={smollm2_gguf}', '--temperature=0', '--max_tokens=60']
    workdir = tmp_path / 'none'
    code, out, error = talk_to(
        tiny, ROOT / 'configs' / 'pretrained.py:smoke', workdir, said.encode(), *model
    )
    assert code == 0, error
    assert out == ''.join(case['text'].removesuffix('<|im_end|>') + '\n' for case in cases)
    assert 'template' not in error
    assert not workdir.exists()


# At a terminal

OWN_TERMINAL = """
import fcntl, os, runpy, termios
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
runpy.run_module('jaxfm.main', run_name='__main__', alter_sys=True)
"""


class Terminal:
    """A process with a pseudo-terminal of its own; its stdout is a pipe."""

    def __init__(self, tiny, arguments):
        self._master, slave = pty.openpty()
        self.process = tiny.server.start(
            ['-c', OWN_TERMINAL, *arguments],
            env=tiny.environment_of(devices=1),
            stdin=slave,
            stdout=subprocess.PIPE,
            stderr=slave,
            text=False,
        )
        os.close(slave)
        self._screens = {self._master: b'', self.process.stdout.fileno(): b''}
        for stream in self._screens:
            os.set_blocking(stream, False)

    def type(self, text: str) -> None:
        with contextlib.suppress(OSError):  # the process has ended
            os.write(self._master, text.encode())
        self._read(self._master)  # or its echo fills the terminal, and the process waits to write

    @property
    def screen(self) -> str:
        return self._read(self._master)

    @property
    def out(self) -> str:
        return self._read(self.process.stdout.fileno())

    def wait_for(self, condition) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, (self.screen, self.out)
            time.sleep(0.005)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        os.close(self._master)

    def _read(self, stream: int) -> str:
        with contextlib.suppress(BlockingIOError, OSError):  # a terminal that nobody has: EIO
            while more := os.read(stream, 1 << 16):
                self._screens[stream] += more
        return self._screens[stream].decode(errors='replace')


@pytest.fixture
def terminal(tiny, chatty):
    with contextlib.ExitStack() as stack:

        def open_terminal(*more) -> Terminal:
            where = ['--config', str(chatty[0]), '--workdir', str(chatty[1]), '--mode=chat']
            opened = Terminal(tiny, [*where, *map(str, more)])
            stack.callback(opened.close)
            return opened

        yield open_terminal


def test_ctrl_c_stops_an_answer_and_at_the_prompt_the_chat(terminal, tmp_path):
    output = tmp_path / 'chats.jsonl'
    room = ['--config.sampling.max_length=60000', '--max_tokens=29000']
    talk = terminal('--temperature=1', *room, '--output', output)
    talk.wait_for(lambda: talk.screen.endswith('> '))
    assert '/reset' in talk.screen and talk.out == ''
    talk.type('hello\n')
    talk.wait_for(lambda: len(talk.out) > 20)  # long before the end of the answer
    assert talk.process.poll() is None
    talk.type('\x03')
    talk.wait_for(lambda: talk.screen.endswith('(stopped)\r\n> '))
    first = talk.out
    assert len(first) < 20_000
    talk.type('go on\n')
    talk.wait_for(lambda: len(talk.out) > len(first) + 20)
    talk.type('\x03')
    talk.wait_for(lambda: talk.screen.count('(stopped)') == 2 and talk.screen.endswith('> '))
    talk.type('\x03')  # once is enough, even just before it waits for input
    assert talk.process.wait(PATIENCE) == 130
    assert 'Traceback' not in talk.screen
    chats = chats_in(output)
    assert said_in(chats) == [['hello', 'go on']]
    assert answers_in(chats) == talk.out


def test_at_a_terminal_prompts_come_first_and_a_refusal_is_no_failure(terminal):
    talk = terminal(*GREEDY, '--config.sampling.max_length=64', '--prompt=hello')
    talk.wait_for(lambda: talk.screen.endswith('> ') and talk.out)
    assert '> hello\r\n' in talk.screen
    talk.type(60 * 'x' + '\n')
    talk.wait_for(lambda: 'exceed sampling.max_length 64' in talk.screen)
    talk.type('/reset\n')
    talk.wait_for(lambda: 'forgotten' in talk.screen)
    talk.type('\x04')
    assert talk.process.wait(PATIENCE) == 0
    assert 'Traceback' not in talk.screen
