"""A recipe: everything that the files of a cache depend on. Its digest names the directory."""

import hashlib

from pydantic import ValidationError

from jaxfm.code import find_digest
from jaxfm.data import SOURCES
from jaxfm.tokenizer.build import Tokenizer

# Part of every recipe: raise it when the files of a cache, or the way they are written, change.
FORMAT = 2
# Where the files are does not matter as long as they are the same files.
PLACES = frozenset({'path', 'heldout_path'})


def select_source(config):
    """The part of a data config that defines the documents."""
    schema = SOURCES.find(config.name).schema
    return schema.model_validate({name: getattr(config, name) for name in schema.model_fields})


def make_recipe(config, tokenizer: Tokenizer | None) -> dict:
    """Everything that determines a cache's files. Raises MissingInputError if an input is gone."""
    source = SOURCES.load(config.name)(config)
    source.files()
    code = find_digest(config.name)
    return ({'code': code} if code else {}) | {
        'format': FORMAT,
        'source': config.model_dump(mode='json'),
        'files': source.fingerprint(),
        'tokenizer': tokenizer.fingerprint if tokenizer else '',
    }


def drop_places(recipe: dict) -> dict:
    """The recipe without the locations of the files."""
    return recipe | {'source': {k: v for k, v in recipe['source'].items() if k not in PLACES}}


def list_differences(made: dict, wanted: dict, ignored: set[str]) -> list[str]:
    """Describes the differences between two recipes, except source keys in `ignored`."""
    names = {'format': 'the format', 'files': "the source's files", 'tokenizer': 'the tokenizer'}
    differences = [
        f'{what} {"differ" if key == "files" else "differs"}'
        for key, what in names.items()
        if made.get(key) != wanted[key]
    ]
    if made.get('code') != wanted.get('code'):
        differences.append('the code of the source differs')
    there = _with_new_keys(made.get('source', {}), wanted['source'])
    for key in sorted(there.keys() | wanted['source'].keys() - ignored):
        a, b = there.get(key), wanted['source'].get(key)
        if a != b and key not in ignored:
            differences.append(f'config.data.{key} was {a!r} and is {b!r}')
    return differences


def _with_new_keys(made: dict, wanted: dict) -> dict:
    """A source of a recipe, with the defaults of keys that its schema has got since."""
    if made.get('name') != wanted['name']:
        return made
    try:
        schema = SOURCES.find(wanted['name']).schema
        return schema.model_validate(made).model_dump(mode='json')
    except ValidationError:
        return made


def digest(text: str) -> str:
    """sha256, in hex."""
    return hashlib.sha256(text.encode()).hexdigest()
