"""Programs in processes of their own: all ways to end, and nothing is left behind."""

import os
import time
from pathlib import Path

import pytest

from jaxfm.tasks.execution import run_program
from tests.tasks.rows import make_task, write_rows


def run(source, seconds=10.0, memory_mb=512):
    return run_program(source, seconds, memory_mb)


def ends(pid):
    """Whether a process is gone, or dead and not yet reaped, within seconds."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            stat = Path(f'/proc/{pid}/stat').read_text(encoding='utf-8')
        except OSError:
            return True
        if stat.rpartition(')')[2].split()[0] in 'ZX':
            return True
        time.sleep(0.01)
    return False


def test_a_program_that_ends_passes():
    assert run('assert 1 + 1 == 2\nprint("done")').passed


@pytest.mark.parametrize(
    'source, reason',
    [
        ('assert 1 + 1 == 3', 'AssertionError'),
        ('raise ValueError("no")', 'ValueError: no'),
        ('def f(:', 'SyntaxError: invalid syntax'),
        ('import sys; sys.exit(0)', 'it ended early, with exit status 0'),
        ('import os; os._exit(0)', 'it ended early, with exit status 0'),
        ('import os; os.abort()', 'signal 6'),
        ('import ctypes; ctypes.string_at(0)', 'signal 11'),
        ('x = bytearray(1 << 30)', 'MemoryError'),
        ('open("big", "wb").write(bytes(1 << 25))', 'OSError: [Errno 27] File too large'),
        ('[open("/dev/null") for _ in range(100)]', 'OSError: [Errno 24] Too many open files'),
        ('x = "\udc80', 'SyntaxError'),
    ],
)
def test_other_ends_do_not_pass_and_are_named(source, reason):
    result = run(source)
    assert not result.passed and result.reason.startswith(reason), result


@pytest.mark.parametrize('source', ['while True: pass', 'import time; time.sleep(60)'])
def test_a_program_that_hangs_is_killed(source):
    start = time.monotonic()
    result = run(source, seconds=0.5)
    assert not result.passed and result.reason in ('timeout', 'signal 24')
    assert time.monotonic() - start < 10


def test_huge_output_costs_nothing():
    assert run('for _ in range(1000): print("x" * 100_000)').passed
    result = run('import sys\nwhile True: sys.stderr.write("y" * 100_000)')
    assert not result.passed and len(result.reason) <= 200


@pytest.mark.parametrize('end', ['', 'os.wait()'])
def test_forked_processes_are_killed_with_their_parent(tmp_path, end):
    """The child would outlive its parent, which ends, or waits for it until the time limit."""
    note = tmp_path / 'pid'
    fork = 'pid = os.fork()\nif pid == 0:\n    time.sleep(30)\n    os._exit(0)\n'
    tell = f'open({str(note)!r}, "w").write(str(pid))\n'
    # Long enough to start on a busy machine.
    result = run(f'import os, time\n{fork}{tell}{end}', seconds=2.0 if end else 10.0)
    if os.getuid():  # the limit of processes does not bind root
        assert result.reason.startswith('BlockingIOError') and not note.exists()
    else:
        pid = int(note.read_text(encoding='utf-8'))
        assert result.passed == (not end) and ends(pid)


def test_a_program_does_not_see_our_environment(monkeypatch):
    monkeypatch.setenv('SECRET_TOKEN', 'x')
    assert run('import os; assert "SECRET_TOKEN" not in os.environ').passed
    assert run('import os; assert os.listdir() == ["program.py"]').passed
    assert run('import sys; assert not sys.flags.no_site and sys.flags.isolated').passed


HUMANEVAL = [
    {
        'task_id': f'HumanEval/{i}',
        'prompt': f'import math\n\n\ndef add{i}(x):\n    """Adds {i}."""\n',
        'entry_point': f'add{i}',
        'canonical_solution': f'    return math.floor(x) + {i}\n',
        'test': f'def check(candidate):\n    assert candidate(2) == {2 + i}\n',
    }
    for i in range(5)
]
MBPP = [
    {
        'text': f'Write a function to add {i}.',
        'code': f'def add(x):\r\n    return x + {i}',
        'task_id': i,
        'test_setup_code': 'k = add(2) - add(0)',
        'test_list': [f'assert add(k) == {2 + i}'],
        'challenge_test_list': [],
    }
    for i in (1, 2, 3, 4, 12)
]


def test_humaneval_runs_the_tests_on_the_completed_function(tmp_path):
    path = str(write_rows(tmp_path / 'HumanEval.jsonl', HUMANEVAL))
    task = make_task('humaneval', path=path)
    prompt = task.prompts()[1]
    assert (prompt.id, prompt.text) == ('HumanEval/1', HUMANEVAL[1]['prompt'])
    right = HUMANEVAL[1]['canonical_solution']
    assert task.evaluate(prompt, right) == 1.0
    assert task.evaluate(prompt, '    return x\n') == 0.0
    assert task.evaluate(prompt, '') == 0.0
    # What follows the function is not run.
    after = right + '\nprint(add1(3))\nraise SystemExit'
    assert task.stop(prompt, after) and task.evaluate(prompt, after) == 1.0
    assert task.answer(prompt, right) is None


def test_humaneval_in_a_chat_runs_the_last_block(tmp_path):
    path = str(write_rows(tmp_path / 'HumanEval.jsonl', HUMANEVAL))
    task = make_task('humaneval', path=path, chat=True)
    prompt = task.prompts()[1]
    assert HUMANEVAL[1]['prompt'].strip() in prompt.messages[0]['content']
    whole = 'Sure:\n```python\ndef add1(x):\n    return math.floor(x) + 1\n```\nDone.'
    assert task.evaluate(prompt, whole) == 1.0
    assert task.evaluate(prompt, '```\n    return x + 1\n```') == 1.0
    assert task.evaluate(prompt, 'I cannot.') == 0.0


def test_mbpp_runs_the_tests_on_what_precedes_done(tmp_path):
    path = str(write_rows(tmp_path / 'mbpp.jsonl', MBPP))
    task = make_task('mbpp', path=path, shots=3)
    (prompt,) = task.prompts()
    first = 'You are an expert Python programmer, and here is your task: Write a function to add 2.'
    assert prompt.id == '12' and prompt.text.startswith(first)
    assert prompt.text.count('\n[DONE]\n\nYou are') == 3 and prompt.text.endswith('14\n[BEGIN]\n')
    assert task.evaluate(prompt, 'def add(x):\n    return x + 12\n[DONE]\n\nYou are') == 1.0
    assert task.evaluate(prompt, 'def add(x):\n    return x\n[DONE]') == 0.0
    chat = make_task('mbpp', path=path, chat=True)
    answer = 'Here:\n```python\ndef add(x):\n    return x + 12\n```'
    assert chat.evaluate(chat.prompts()[0], answer) == 1.0
    assert chat.evaluate(chat.prompts()[0], '[BEGIN]\ndef add(x): return x + 12\n[DONE]') == 1.0


def test_a_time_limit_of_the_config_is_kept(tmp_path):
    path = str(write_rows(tmp_path / 'HumanEval.jsonl', HUMANEVAL))
    task = make_task('humaneval', path=path, seconds=0.3)
    assert task.run(task.prompts()[0], '    while True: pass').reason == 'timeout'


def test_solutions_of_real_problems_pass(shared_data):
    """A few of each. Of all, 164 of 164 and 499 of 500 pass within 10 s (2026-11-30, CPU)."""
    for name, count in (('humaneval', 5), ('mbpp', 5)):
        task = make_task(name, path=str(shared_data / f'eval_{name}'), num_prompts=count)
        solutions = {one.id: one.worked for one in task.read_examples()}
        assert len(task.prompts()) == count
        for prompt in task.prompts():
            assert task.evaluate(prompt, solutions[prompt.id]) == 1.0, prompt.id
