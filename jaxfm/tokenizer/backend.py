"""Opens a tokenizer.json with the `tokenizers` library, for the start of a text or its middle."""

import json
import re
from collections.abc import Iterator

import tokenizers

from jaxfm.errors import DataError


def open_backend(content: str) -> tokenizers.Tokenizer:
    """Opens the content of a tokenizer.json. Raises DataError unless the library accepts it."""
    try:
        backend = tokenizers.Tokenizer.from_str(content)
    except Exception as error:  # The library raises bare Exceptions.
        raise DataError(f'tokenizer.json is not a tokenizer: {error}') from error
    # Otherwise the library would turn text that spells a special token into that token's id.
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    return backend


def open_further(content: str, backend) -> tuple[tokenizers.Tokenizer, bool]:
    """Opens a backend for text that continues other text, without a space in front.

    Some tokenizers put a space before every text, which would be wrong in the middle of one.
    Also returns whether text after a special token gets that space.
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
    """Yields a normalizer or pre-tokenizer and all those nested in it."""
    if step:
        yield step
        for inner in step.get('normalizers', []) + step.get('pretokenizers', []):
            yield from _steps(inner)


def _without_prefix(step: dict) -> bool:
    """Adapts a step, in place, to the middle of a text.

    Returns whether the step put a space before every text.
    """
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
        step.clear()  # it changes white space at the ends of a text
        step.update(nothing)
    elif step.get('add_prefix_space'):
        step['add_prefix_space'] = False
        return True
    return False
