"""A tokenizer.json as the `tokenizers` library runs it: at the start of a text, and further on."""

import json
import re
from collections.abc import Iterator

import tokenizers

from jaxfm.errors import DataError


def open_backend(content: str) -> tokenizers.Tokenizer:
    try:
        backend = tokenizers.Tokenizer.from_str(content)
    except Exception as error:  # The library raises bare Exceptions.
        raise DataError(f'tokenizer.json is not a tokenizer: {error}') from error
    # Otherwise the library would turn text that spells a special token into its id.
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    return backend


def open_further(content: str, backend) -> tuple[tokenizers.Tokenizer, bool]:
    """A backend for text that goes on, and whether a space is due behind special tokens.

    Some put a space before every text; in the middle of a text that would be a space too many.
    """
    if not re.search(r'"Prepend"|"Metaspace"|"add_prefix_space"\s*:\s*true', content):
        return backend, False
    spec = json.loads(content)
    parts = [spec['normalizer'], spec['pre_tokenizer']]
    before = json.dumps(parts)
    always = [_without_prefix(step) for part in parts for step in _steps(part)]
    if json.dumps(parts) == before:
        return backend, False
    return open_backend(json.dumps(spec)), True in always


def _steps(step: dict | None) -> Iterator[dict]:
    """A normalizer or pre-tokenizer and those inside it."""
    if step:
        yield step
        for inner in step.get('normalizers', []) + step.get('pretokenizers', []):
            yield from _steps(inner)


def _without_prefix(step: dict) -> bool:
    """Changes a step to one for the middle of a text; whether it put a space before every text."""
    nothing = {'type': 'Sequence', 'normalizers': []}
    pattern = step.get('pattern', {}).get('Regex', '')
    if step['type'] == 'Metaspace':
        scheme, step['prepend_scheme'] = step.get('prepend_scheme', 'always'), 'never'
        return scheme == 'always'
    if step['type'] == 'Prepend':
        step.clear()
        step.update(nothing)
        return True
    if step['type'] == 'Strip' or (pattern.startswith('^') and not step.get('content')):
        step.clear()  # white space at the ends of a text
        step.update(nothing)
    elif step.get('add_prefix_space'):
        step['add_prefix_space'] = False
        return True
    return False
