"""--mode chat: a conversation in the terminal with the newest weights.

Each line of stdin is a user message. Only the text of the answers goes to stdout, as it is
generated; hints for a person at a terminal go to stderr. Every turn renders the whole conversation
with the chat template again, so the model sees what it would see in training. The engine computes
only what is new: it still has the keys and values of the turns before.
"""

import contextlib
import logging
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import jax

from jaxfm import process
from jaxfm.chat.render import Chat
from jaxfm.config.run import RunConfig
from jaxfm.errors import DataError, NumericsError, UsageError
from jaxfm.metrics.console import Console
from jaxfm.modes.generation import request_options
from jaxfm.modes.output import write_lines
from jaxfm.run.data import open_tokenizer
from jaxfm.run.run import start_run
from jaxfm.run.weights import current_params
from jaxfm.sampling.request import Completion, Request

log = logging.getLogger('jaxfm')

HINTS = 'Ctrl-C stops an answer, /reset forgets the conversation, /exit or Ctrl-D quits'
# Tokens per compiled call. With one sequence, more tokens per call gain little (2 CPU cores,
# 2026-11-26, 1M parameters: 411 tokens/s with 1, 440 with 4, 475 with 16; 135M: 6, 4, 4), and text
# would arrive in bursts, every 4 s at 135M. Ctrl-C is also noticed only between calls.
DECODE_STEPS = 1

Messages = list[dict[str, str]]


def chat(flags, config: RunConfig, changes) -> int:
    """Answers until the input ends.

    Returns 0 if stdin is a terminal. Otherwise, if messages were refused (65) or answers failed
    (70), the code of the last of these.

    Raises:
      UsageError: there are several processes, but only one can read the keyboard.
    """
    config = _stream_tokens(config)
    with start_run(config, flags.workdir) as run, contextlib.ExitStack() as stack:
        if jax.process_count() > 1:
            raise UsageError(
                f'--mode chat needs a single process, but there are {jax.process_count()}: start '
                'it without srun and JAX_NUM_PROCESSES'
            )
        console = Console()
        stack.callback(console.close)
        tokenizer = open_tokenizer(config, run.workdir)
        if not tokenizer.chat_template:
            log.warning('the tokenizer has no chat template, so `plain` is used')
        chat_format = Chat(tokenizer)
        sampler = run.sampler(tokenizer, slots=1)
        options = request_options(config, chat_format, flags.seed)
        # Before the weights are read, refuse options with which no answer is possible.
        sampler.check(Request(id='of the chat', tokens=[tokenizer.eos_id], **options))
        params, step = current_params(run)
        sampler.lend(params, step or 0)
        assistant = Assistant(sampler, chat_format, options)
        if step is not None:
            log.info('chatting with the weights of step %d', step)
        is_terminal = sys.stdin is not None and sys.stdin.isatty()
        hint = _hint if is_terminal else _no_hint
        hint(f'{HINTS}\n')
        turns = _turns(flags.prompt or [], is_terminal, hint)
        code = 0
        with contextlib.suppress(_NobodyReads):
            code = _talk(assistant, turns, flags.output, hint)
    return 0 if is_terminal else code


class _NobodyReads(Exception):
    """stdout was closed, as by `| head -1`: the chat ends."""


class Assistant:
    """Answers conversations, one at a time.

    Args:
      options: arguments that every `Request` shares, from `request_options`.
    """

    def __init__(self, sampler, chat_format: Chat, options: dict):
        self._sampler, self._format, self._options = sampler, chat_format, options
        self._num_answers = 0  # gives each answer its own sampling noise

    def answer(
        self, messages: Messages, show: Callable[[str], None], is_stopped: Callable[[], bool]
    ) -> tuple[str, str]:
        """Generates an answer; returns its text and the reason it ended.

        The reason is 'stop', 'length', or 'interrupted' (`is_stopped` returned True).

        Args:
          show: is called with each piece of text as it is generated.
          is_stopped: is called between decode steps.

        Raises:
          DataError: the template refuses the conversation, or it is too long. Nothing was shown.
          NumericsError: the answer failed; its beginning may have been shown.
        """
        request = self._request(messages)
        answer = Completion(request.id, request.sample_index)
        self._sampler.add(request)
        while answer.finish_reason is None:
            if is_stopped():
                self._sampler.cancel(request.id)
                return answer.text, 'interrupted'
            for event in self._sampler.step():
                show(event.text)
                answer.add(event)
        if answer.finish_reason == 'error':
            raise NumericsError(f'the answer failed: {answer.error}')
        return answer.text, answer.finish_reason

    def _request(self, messages: Messages) -> Request:
        ids = self._format.prompt(messages)
        self._check_length(len(ids))
        self._num_answers += 1
        return Request(
            id=str(self._num_answers),
            tokens=ids,
            sample_index=self._num_answers,
            **self._options,
        )

    def _check_length(self, num_ids: int) -> None:
        max_tokens, max_length = self._options['max_tokens'], self._sampler.config.max_length
        needed = num_ids + max_tokens
        if needed > max_length:
            raise DataError(
                f'{num_ids} tokens of the conversation + {max_tokens} of the answer = {needed} '
                f'exceed sampling.max_length {max_length}: type /reset to forget the conversation, '
                f'or restart with --config.sampling.max_length={max(needed, 2 * max_length)} or a '
                'smaller --max_tokens'
            )


def _stream_tokens(config: RunConfig) -> RunConfig:
    """The config, changed so that the sampler returns each token as soon as it is generated."""
    sampling = config.sampling.model_copy(update={'decode_steps': DECODE_STEPS})
    return config.model_copy(update={'sampling': sampling})


def _turns(prompts: list[str], is_terminal: bool, hint) -> Iterator[str]:
    """Yields the user's messages: the prompts, then lines of stdin.

    Reads stdin only if it is a terminal or there are no prompts. Bytes that are not UTF-8 become
    surrogates, which the tokenizer refuses.
    """
    for prompt in prompts:
        hint(f'> {prompt}\n')
        yield prompt
    if sys.stdin is None or (prompts and not is_terminal):
        return
    sys.stdin.reconfigure(encoding='utf-8', errors='surrogateescape')
    hint('> ')
    while line := _read_line(is_terminal):
        if line.strip():
            yield line.rstrip('\r\n')
        hint('> ')
    hint('\n')


def _read_line(is_terminal: bool) -> str:
    if is_terminal:
        _wait_for_input()
    return sys.stdin.readline()


def _wait_for_input() -> None:
    """Waits for a line at the terminal, and lets Ctrl-C through at any time.

    `readline` alone misses a Ctrl-C that arrives just before it waits, and one that the system
    gives to another thread.
    """
    wakes, wake = os.pipe()
    os.set_blocking(wake, False)
    before = signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    try:
        while sys.stdin not in select.select([sys.stdin, wakes], [], [])[0]:
            os.read(wakes, 1 << 10)  # Python now calls the handler of the signal
    finally:
        signal.set_wakeup_fd(before)
        os.close(wakes)
        os.close(wake)


def _talk(assistant: Assistant, turns: Iterable[str], output: Path | None, hint) -> int:
    """Answers the turns; returns the exit code of the last that was refused or failed, else 0.

    output: rewritten after every turn with one chat per line, as training reads them. /reset begins
      the next chat.
    """
    chats, code = [[]], 0
    for said in turns:
        command = said.strip()
        if command == '/exit':
            break
        if command == '/reset':
            chats.append([])
            hint('(conversation forgotten)\n')
            continue
        try:
            chats[-1] = _turn(assistant, chats[-1], said, hint)
        except (DataError, NumericsError) as error:
            log.error('%s', error)
            code = error.exit_code
        if output:
            write_lines(output, [{'messages': messages} for messages in chats if messages])
    return code


def _turn(assistant: Assistant, messages: Messages, said: str, hint) -> Messages:
    """The conversation with the new message and answer; unchanged if stopped before any text."""
    asked = [*messages, {'role': 'user', 'content': said}]
    with _interrupt() as interrupted:
        try:
            text, reason = assistant.answer(asked, _show, interrupted.is_set)
        except NumericsError:
            _show('\n')
            raise
        _show('\n')
    if reason == 'interrupted':
        hint('(stopped)\n')
        if not text:
            return messages
    if reason == 'length':
        hint('(cut off; for longer answers restart with a larger --max_tokens)\n')
    return [*asked, {'role': 'assistant', 'content': text}]


@contextlib.contextmanager
def _interrupt() -> Iterator[threading.Event]:
    """Makes Ctrl-C set an event. A KeyboardInterrupt could leave the sampler without its cache."""
    event = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)


def _show(text: str) -> None:
    if not process.print_text(text, end=''):
        raise _NobodyReads


def _hint(text: str) -> None:
    with contextlib.suppress(OSError):
        print(text, end='', file=sys.stderr, flush=True)


def _no_hint(text: str) -> None:
    """Replaces `_hint` if stdin is not a terminal."""
