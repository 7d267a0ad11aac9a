"""Episodes on a scripted engine: what is sampled next, when they end, and what a fault costs."""

import functools
import json
import types

import pytest

from jaxfm.chat.render import Chat
from jaxfm.environments import ENVIRONMENTS
from jaxfm.environments.episode import Player
from jaxfm.errors import ConfigError, DataError
from jaxfm.evals import time_limit
from jaxfm.sampling.request import Request
from jaxfm.tasks.base import Prompt
from jaxfm.tokenizer import BytesConfig
from jaxfm.tokenizer.build import Bytes
from tests.environments.scripted import Tokenizer, Writer

DOUBLING, MOODY = (f'tests.environments.scripted:{name}' for name in ('Doubling', 'Moody'))


def player_of(name=DOUBLING, seconds=5.0, chat=None, **values) -> Player:
    config = ENVIRONMENTS.find(name).schema(**values)
    context = types.SimpleNamespace(tokenizer=Tokenizer(), chat=lambda: chat)
    limit = functools.partial(time_limit.call, seconds=seconds)
    return Player(config, context, 'config.data.environment', limit)


def play(player, engine, texts=('p:',), n=1, max_tokens=8, longest=60, **more):
    prompts = {text: Prompt(text, text) for text in texts}
    requests = [
        Request(
            text,
            Tokenizer().encode(text),
            max_tokens,
            n=n,
            seed=5,
            stop_ids=frozenset([0]),
            stop=player.stop,
            **more,
        )
        for text in texts
    ]
    return player.play(engine, requests, prompts, None, 3, longest)


def tell(episode) -> str:
    return '|'.join(f'{part["by"][0]}:{part["text"]}' for part in episode.record()['turns'])


def next_of(script: dict, default='x$'):
    """text so far -> what is written: the value of the longest key that it ends with."""

    def write(text, index):
        keys = [key for key in script if text.endswith(key)]
        found = script[max(keys, key=len)] if keys else default
        return found if isinstance(found, str) else found[index]

    return write


def test_turns_and_observations_follow_each_other():
    engine = Writer(next_of({'p:': 'ab[3]', '=6;': 'c[40]', '=80;': 'd$'}))
    player = player_of()
    [[episode]] = play(player, engine).values()
    assert tell(episode) == 'm:ab[3]|e:=6;|m:c[40]|e:=80;|m:d'
    assert episode.text == 'ab[3]=6;c[40]=80;d'
    assert episode.finish_reason == 'stop' and episode.stop == 0 and episode.error is None
    assert [text for text, _ in player._environment.turns] == ['ab[3]', 'c[40]', 'd']
    assert [len(turn.tokens) for turn in episode.turns] == [5, 5, 2]
    assert engine.versions == [3]


def test_each_turn_is_asked_behind_the_very_ids_that_were_sampled():
    """Not behind ids of the same text, which the model never wrote."""
    engine = Writer(next_of({'p:': 'ab[3]', '=6;': 'c[40]', '=80;': 'd$'}))
    [[episode]] = play(player_of(), engine).values()
    prompt, first, second = Tokenizer().encode('p:'), [200, 201, 91, 51, 93], [61, 54, 59]
    assert episode.turns[0].tokens == first
    assert Tokenizer().encode(Tokenizer().decode(first)) != first
    asked = [(list(request.tokens), num_prompt) for request, num_prompt in engine.asked]
    assert asked[:2] == [(prompt, 2), ([*prompt, *first, *second], 2)]
    last = [202, 91, 52, 48, 93, 61, 56, 48, 59]
    assert asked[2] == ([*prompt, *first, *second, *last], 2)
    ids, logprobs = episode.trail
    assert ids == [*first, *second, *last, 203, 0]
    written = [x is not None for x in logprobs]
    assert written == [True] * 5 + [False] * 3 + [True] * 5 + [False] * 4 + [True] * 2
    assert [x for x in logprobs if x is not None] == episode.logprobs
    # The engine's log-prob of a token tells its place: none has moved.
    assert logprobs[8] == pytest.approx(-0.01 * (2 + 8 + 1))


def test_options_stay_and_noise_is_of_the_sample():
    engine = Writer(next_of({'p:': ['a[3]', 'b[4]', 'x$'], ';': 'd$'}))
    found = play(player_of(), engine, n=3, temperature=0.5, min_tokens=2)['p:']
    assert [episode.sample_index for episode in found] == [0, 1, 2]
    assert [tell(episode) for episode in found] == [
        'm:a[3]|e:=6;|m:d',
        'm:b[4]|e:=8;|m:d',
        'm:x',
    ]
    for request, _ in engine.asked:
        assert (request.temperature, request.seed, request.min_tokens) == (0.5, 5, 2)
    assert [request.sample_index for request, _ in engine.asked] == [0, 1, 2, 0, 1]


def test_states_are_of_one_episode_each():
    engine = Writer(next_of({':': ['a[3]', 'x$'], ';': 'd$'}))
    player = player_of()
    play(player, engine, texts=('p:', 'q:'), n=2)
    states = player._environment.states
    assert [state['id'] for state in states] == ['p:', 'p:', 'q:', 'q:']
    assert [state['turns'] for state in states] == [2, 1, 2, 1]


def test_an_episode_ends_with_its_turns():
    engine = Writer(next_of({'p:': '[3]', ';': '[1]'}))
    [[episode]] = play(player_of(max_turns=3), engine).values()
    assert tell(episode) == 'm:[3]|e:=6;|m:[1]|e:=2;|m:[1]'
    assert episode.finish_reason == 'turns' and episode.error is None
    assert len(episode.trail[0]) == len(episode.trail[1]) == 15


def test_an_episode_ends_with_a_turn_that_is_cut():
    engine = Writer(next_of({'p:': '[3]', ';': 'abcdefghijk'}))
    player = player_of()
    [[episode]] = play(player, engine).values()
    assert tell(episode) == 'm:[3]|e:=6;|m:abcdefgh'
    assert episode.finish_reason == 'length'
    assert len(player._environment.turns) == 1  # what is cut is not answered


@pytest.mark.parametrize(
    'longest, told', [(8, 'm:[3]'), (9, 'm:[3]|e:=6;|m:a'), (11, 'm:[3]|e:=6;|m:abc')]
)
def test_an_episode_ends_where_there_is_no_room(longest, told):
    """An observation that leaves no room for a token is not part of it."""
    engine = Writer(next_of({'p:': '[3]', ';': 'abcdefghijk'}))
    [[episode]] = play(player_of(), engine, longest=longest, max_tokens=6).values()
    assert tell(episode) == told and episode.finish_reason == 'length'
    assert 2 + len(episode.trail[0]) <= longest


def test_what_the_engine_fails_is_an_error():
    engine = Writer(next_of({'p:': '[3]', ';': 'ab!'}))
    [[episode]] = play(player_of(), engine).values()
    assert tell(episode) == 'm:[3]|e:=6;|m:ab'
    assert (episode.finish_reason, episode.error) == ('error', 'NaN logits')


FAULTS = {
    'n': 'step gave None, but must give an Observation',
    'h': 'TimeoutError: took longer than 0.2 s',
    'r': 'ZeroDivisionError: ',
    't': 'text is None, but must be a text',
    'q': 'DataError: its ids range from 5 to 999, but the vocabulary has 226 ids',
    'f': 'ids is [0.5], but must be a sequence of token ids',
    'b': 'an observation has a text or ids, and neither if the episode is done',
    'd': 'an observation has a text or ids, and neither if the episode is done',
    'u': "done is 'no', but must be True or False",
    'x': 'reward is nan, but must be a number from -1e6 to 1e6',
    'y': 'reward is None, but must be a number from -1e6 to 1e6',
}


def test_a_fault_of_the_environment_costs_its_sample():
    letters = [*FAULTS, 's']
    engine = Writer(next_of({'p:': [f'{letter}[3]' for letter in letters], ';': 'v$'}))
    found = play(player_of(MOODY, seconds=0.2), engine, n=len(letters))['p:']
    for letter, episode in zip(letters[:-1], found):
        assert episode.finish_reason == 'environment'
        assert episode.error.startswith(f'{MOODY}: {FAULTS[letter]}')
        assert tell(episode) == f'm:{letter}[3]'
    assert tell(found[-1]) == 'm:s[3]|e:=6;|m:v' and found[-1].finish_reason == 'stop'


def test_an_episode_that_cannot_begin_costs_itself():
    engine = Writer(next_of({':': 's[3]', ';': 'v$'}))
    found = play(player_of(MOODY), engine, texts=('z:', 'p:'))
    [failed], [sound] = found['z:'], found['p:']
    assert failed.error.endswith('ValueError: no such game') and failed.tokens == []
    assert failed.trail == ([], []) and sound.finish_reason == 'stop'
    assert len(engine.asked) == 2
    assert play(player_of(MOODY), engine, texts=('z:',))['z:'][0].finish_reason == 'environment'


def test_rewards_add_up_and_ids_are_appended_as_they_are():
    engine = Writer(next_of({'p:': ['w$', 'i[3]'], 'ef': 'w$'}))
    first, second = play(player_of(MOODY), engine, n=2)['p:']
    assert first.reward == second.reward == 2.0
    assert second.trail[0] == [208, 91, 51, 93, 101, 102, 222, 0]
    assert tell(second) == 'm:i[3]|e:ef|m:w'


def test_other_processes_play_as_the_primary_one_says(monkeypatch):
    """Their own environment is never asked, and what they hear has gone through JSON."""
    script = {':': ['s[3]', 'h[3]', 'i[3]', 'x[3]'], ';': 'v$', 'ef': 'w$'}
    said = []

    def tell_all(compute):
        said.append(json.dumps(compute()))
        return json.loads(said[-1])

    def listen(compute):
        return json.loads(said.pop(0))

    played = []
    for process in (tell_all, listen):
        monkeypatch.setattr('jaxfm.distributed.agree.from_primary', process)
        player, engine = player_of(MOODY, seconds=0.2), Writer(next_of(script))
        played.append(play(player, engine, texts=('p:', 'z:'), n=4))
    assert played[0] == played[1] and not said
    assert player._environment.states == player._environment.turns == []
    assert len({episode.finish_reason for episode in played[0]['p:']}) == 2


def test_who_stops_reading_leaves_nothing_in_the_engine():
    engine = Writer(next_of({':': ['a[3]', 'x$'], ';': 'abcdefg$'}))
    player, texts = player_of(), ('p:', 'q:', 'r:')
    prompts = {text: Prompt(text, text) for text in texts}
    requests = (Request(t, Tokenizer().encode(t), 8, n=2, stop=player.stop) for t in texts)
    episodes = player.play_each(engine, requests, prompts, None, 0, 60, most=4)
    next(episodes)
    assert 0 < len(engine.running) <= 4
    episodes.close()
    assert not engine.has_work and engine.cancelled


def test_an_engine_with_other_work_is_refused():
    engine = Writer(next_of({}))
    engine.add(Request('other', [5], 4))
    with pytest.raises(RuntimeError, match='the sampler has other requests'):
        play(player_of(), engine)


def test_turns_of_a_chat_are_what_the_template_writes():
    """The ids are those of the whole chat, as if the template had rendered it."""
    tokenizer = Bytes(BytesConfig(chat_template='qa'), texts=[])
    chat = Chat(tokenizer)
    question = {'role': 'user', 'content': 'What is 12*34?'}
    config = ENVIRONMENTS['calculator'].schema(start='[', end=']', role='user')
    context = types.SimpleNamespace(tokenizer=tokenizer, chat=lambda: chat)
    player = Player(config, context, 'here', lambda function, given: function(*given))
    prompt = player.offer(Prompt('p', 'text', messages=(question,)))
    script = {'?\nA: ': '[12*34]$', '408\nA: ': 'It is [408+1]$', '409\nA: ': '9$'}
    engine = Writer(next_of(script), 200, tokenizer)
    request = Request('p', chat.prompt([question]), 20, stop_ids=chat.stop_ids, stop=player.stop)
    [[episode]] = player.play(engine, [request], {'p': prompt}, None, 0, 200).values()
    assert [turn.text for turn in episode.turns] == ['[12*34]', 'It is [408+1]', '9']
    said = ['[12*34]', '408', 'It is [408+1]', '409', '9']
    roles = ['assistant', 'user', 'assistant', 'user', 'assistant']
    messages = [{'role': role, 'content': text} for role, text in zip(roles, said)]
    whole, mask = chat.encode([question, *messages])
    ids, logprobs = episode.trail
    assert [*request.tokens, *ids] == whole.tolist()
    assert [x is not None for x in logprobs] == mask[len(request.tokens) :].tolist()
    assert episode.parts == episode.turns[-1:]


def test_a_role_needs_a_chat():
    player = player_of('calculator', role='tool')
    with pytest.raises(ConfigError) as caught:
        player.offer(Prompt('p', 'text'))
    assert str(caught.value) == (
        'config.data.environment: calculator comes in a chat turn of the role tool, but the prompt '
        'p is a text without turns: set role to None, or take a task with chats'
    )


def test_a_template_that_does_not_keep_what_was_sampled_is_refused_before_sampling():
    def refuse(role, tools):
        raise DataError(f'the chat template rewrites {role} {tools[0]["name"]}')

    player = player_of('calculator', role='tool', chat=types.SimpleNamespace(check_turns=refuse))
    chat = Prompt('p', 'text', messages=({'role': 'user', 'content': 'text'},))
    with pytest.raises(ConfigError) as caught:
        player.offer(chat)
    told = 'config.data.environment: the chat template rewrites tool calculator'
    assert str(caught.value) == told
