"""Whether two tokenizers give the same ids, so that a model can read what another one wrote."""

from jaxfm.tokenizer.kinds import Tokenizer

# Texts that merges split in many ways, for vocabularies that are equal but used differently.
_TEXTS = (
    "The quick brown fox jumps over 12345 lazy dogs; internationalisation isn't unbelievable.",
    'def f(x):\n    return {"a": [x ** 2, -1.5e-3]}  # \t\n\n',
    'Größe, naïveté, 東京, здравствуйте, 🙂',
)


def describe_difference(ours: Tokenizer, theirs: Tokenizer) -> str:
    """The first difference between the ids of two tokenizers; '' if there is none.

    Chat templates, and which token ends a text, do not count: they do not change what an id means.
    """
    if ours.fingerprint == theirs.fingerprint:
        return ''
    here, there = ours.tokens, theirs.tokens
    for i in sorted(here.keys() | there.keys()):
        if here.get(i) != there.get(i):
            return f'token {i} is {_show(here.get(i))} here, but {_show(there.get(i))} there'
    for text in _TEXTS:
        one, other = ours.encode(text), theirs.encode(text)
        if one != other:
            begin = f'{text[:20]!r}... has the ids {one[:8]} here, but {other[:8]} there'
            return f'the tokens are the same, but {begin}'
    return ''


def _show(token) -> str:
    return 'missing' if token is None else repr(token)
