"""Whether two tokenizers give the same ids, and what is said if not."""

import json

import pytest

from jaxfm.tokenizer import BPEConfig, BytesConfig
from jaxfm.tokenizer.build import BPE, Bytes
from jaxfm.tokenizer.compare import describe_difference
from jaxfm.tokenizer.kinds import open_files

TEXTS = ['the quick brown fox the lazy dog', 'der schnelle braune Fuchs'] * 20


def bpe(texts=TEXTS, size=290):
    return BPE(BPEConfig(vocab_size=size), texts)


def changed(tokenizer, change):
    """The same tokenizer with another tokenizer.json."""
    files = dict(tokenizer._files)
    said = json.loads(files['tokenizer.json'])
    change(said)
    files['tokenizer.json'] = json.dumps(said).encode()
    return open_files(files)


@pytest.mark.parametrize('make', [lambda: Bytes(BytesConfig(), ()), bpe])
def test_the_same_tokenizer_has_no_difference(make):
    assert describe_difference(make(), make()) == ''


def test_a_chat_template_is_no_difference():
    plain, chats = (Bytes(BytesConfig(chat_template=name), ()) for name in ('', 'qa'))
    assert plain.fingerprint != chats.fingerprint
    assert describe_difference(plain, chats) == ''


def test_the_first_token_that_differs_is_named():
    told = describe_difference(bpe(), bpe(['zzz zzz zzz'] * 50))
    assert told.startswith('token 258 is ') and ' here, but ' in told


def test_a_token_that_only_one_has_is_named():
    more = Bytes(BytesConfig(special_tokens=['<|tool|>']), ())
    less = Bytes(BytesConfig(), ())
    assert describe_difference(more, less) == "token 258 is '<|tool|>' here, but missing there"
    assert describe_difference(less, more) == "token 258 is missing here, but '<|tool|>' there"


def test_the_same_tokens_used_in_another_way_are_a_difference():
    ours = bpe()

    def use_no_merges(said):
        said['model']['merges'] = said['model']['merges'][:1]

    theirs = changed(ours, use_no_merges)
    assert ours.tokens == theirs.tokens
    told = describe_difference(ours, theirs)
    assert told.startswith('the tokens are the same, but ') and 'has the ids' in told
