"""The corpus tool: runs can use what it builds, and it shows what a model reads."""

import json
import re

import pytest

from tools import corpus

CHATS = [
    [('user', 'What is 2 + 3?'), ('assistant', 'Five.')],
    [('system', 'Be kind.'), ('user', 'Hi'), ('assistant', 'Hello!'), ('user', 'Bye'),
     ('assistant', 'See you.')],
]  # fmt: skip
CONFIG = """
from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.steps = 5
    config.model = dict(
        name='transformer',
        vocab_size=300,
        embed_dim=32,
        num_layers=1,
        block=dict(num_heads=2, num_kv_heads=2, head_dim=8, mlp_dim=64),
    )
    config.tokenizer = dict(name='bytes')
    config.data = dict(
        name='files', path=PATH, heldout_fraction=0.3, sequence_length=96, batch_size=4
    )
    config.optimizer = dict(name='adamw', learning_rate=1e-2)
    return config
"""


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A config over forty chats."""
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    lines = []
    for number in range(40):
        turns = CHATS[number % 2]
        messages = [{'role': role, 'content': f'{text} {number}'} for role, text in turns]
        lines.append(json.dumps({'messages': messages}) + '\n')
    (tmp_path / 'chats.jsonl').write_text(''.join(lines))
    path = tmp_path / 'run.py'
    path.write_text(CONFIG.replace('PATH', repr(str(tmp_path / 'chats.jsonl'))))
    return f'--config={path}'


def test_decode_marks_what_the_assistant_says_and_nothing_else(config, capsys):
    assert corpus.main(['decode', config, '--rows', '4']) == 0
    shown = capsys.readouterr().out
    marked = re.findall(r'\[\[(.*?)\]\]', shown, re.DOTALL)
    answer = re.compile(r'(Five\.|Hello!|See you\.) \d+<\|eos\|>')
    assert len(marked) >= 4
    assert all(answer.fullmatch(text) for text in marked)
    outside = re.sub(r'\[\[.*?\]\]', '', shown, flags=re.DOTALL)
    assert not re.search(r'Five|Hello|See you', outside)
    segments = re.findall(r'row \d: (\d+) segments', shown)
    assert len(re.findall(r'--- segment', shown)) == sum(map(int, segments))


def test_decode_tells_the_sides_of_pairs(config, tmp_path, capsys):
    records = [{'prompt': f'{n}?', 'chosen': f'Yes {n}.', 'rejected': 'No.'} for n in range(40)]
    (tmp_path / 'chats.jsonl').write_text('\n'.join(map(json.dumps, records)))
    assert corpus.main(['decode', config, '--rows', '1', '--config.data.sequence_length=200']) == 0
    found = re.findall(
        r'segment (\d+), (\w+) of (\d+) ---\n.*?\[\[(\w+)', capsys.readouterr().out, re.DOTALL
    )
    assert len(found) > 2
    for number, (segment, side, pair, word) in enumerate(found):
        assert int(segment) == number + 1 and int(pair) == number // 2 + 1
        assert (side, word) == (('chosen', 'Yes'), ('rejected', 'No'))[number % 2]


def test_decode_shows_the_rows_of_a_step_in_the_order_of_training(config, capsys):
    def shown(*flags):
        assert corpus.main(['decode', config, *flags]) == 0
        return capsys.readouterr().out

    assert shown('--step', '3') == shown('--step', '3')
    assert shown('--step', '3') != shown()
    assert shown() != shown('--config.seed=1')


def test_a_cache_that_was_built_is_what_a_run_opens(config, tmp_path, capsys):
    cache = tmp_path / 'made'
    assert corpus.main(['build', config, '--output', str(cache)]) == 0
    assert f'--config.data.cache={cache}' in capsys.readouterr().out
    assert corpus.main(['inspect', str(cache), '--verify']) == 0
    by_directory = capsys.readouterr().out
    assert corpus.main(['inspect', config, f'--config.data.cache={cache}']) == 0
    by_config = capsys.readouterr().out
    for name in ('train_documents', 'train_tokens', 'train_length_histogram/64'):
        row = re.search(rf'{name} +([\d,]+)', by_directory)
        assert row and row[0] in by_config
    assert re.search(r'packing +best_fit', by_config)


def test_a_cache_of_other_data_is_replaced_only_when_asked(config, tmp_path, capsys):
    build = ['build', config, '--output', str(tmp_path / 'made')]
    assert corpus.main(build) == 0
    other = [*build, '--config.data.heldout_fraction=0.5']
    assert corpus.main(other) == 65
    assert 'heldout_fraction was 0.3 and is 0.5' in capsys.readouterr().err
    assert corpus.main([*other, '--rebuild']) == 0
    assert corpus.main(build) == 65


def test_only_a_cache_is_ever_replaced(config, tmp_path, capsys):
    mine = tmp_path / 'mine'
    mine.mkdir()
    (mine / 'thesis.txt').write_text('the only copy')
    assert corpus.main(['build', config, '--output', str(mine), '--rebuild']) == 65
    assert corpus.main(['inspect', str(mine)]) == 65
    said = capsys.readouterr().err
    assert said.count(f'{mine} is not a token cache') == 2 and 'remove' not in said
    assert (mine / 'thesis.txt').read_text() == 'the only copy'


def test_a_damaged_file_is_named_by_verify_alone(config, tmp_path, capsys):
    cache = tmp_path / 'made'
    assert corpus.main(['build', config, '--output', str(cache)]) == 0
    tokens = bytearray((cache / 'train.tokens').read_bytes())
    tokens[100] ^= 1
    (cache / 'train.tokens').write_bytes(tokens)
    assert corpus.main(['inspect', str(cache)]) == 0
    capsys.readouterr()
    assert corpus.main(['inspect', str(cache), '--verify']) == 65
    assert 'train.tokens: digest mismatch' in capsys.readouterr().err


@pytest.mark.parametrize(
    'arguments, code, message',
    [
        (['decode'], 64, 'no data given'),
        (['bulid'], 64, 'invalid choice'),
        (['decode', 'CONFIG', '--phase', 'sft'], 64, '--phase sft: this run has one phase'),
        (['build', 'CONFIG', '--rebuild'], 64, '--rebuild needs --output'),
        (['inspect', 'nowhere'], 66, 'nowhere'),
        (['decode', 'CONFIG', '--rows', '0'], 64, '--rows: must be at least 1, got 0'),
        (['decode', 'CONFIG', '--step', '-1'], 64, '--step: must be at least 0, got -1'),
        (['decode', 'CONFIG', '--config.data.pth=x'], 78, 'did you mean path?'),
        (['decode', 'CONFIG', '--config.data.path=gone.jsonl'], 66, 'gone.jsonl'),
    ],
)
def test_mistakes_are_told(config, capsys, arguments, code, message):
    arguments = [config if argument == 'CONFIG' else argument for argument in arguments]
    assert corpus.main(arguments) == code
    assert message in capsys.readouterr().err
