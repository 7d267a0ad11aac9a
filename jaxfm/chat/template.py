"""Chat templates: sandboxed Jinja with the functions and tags that Hugging Face templates expect.

A template cannot reach into Python, change its inputs, or loop over huge ranges; its running time
is not limited otherwise. It cannot tell the time either: `strftime_now` always formats the same
day, so the text of a chat is the same on every day of a training run.
"""

import datetime
import difflib
import functools
import json
from pathlib import Path

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.sandbox

from jaxfm.errors import DataError, MissingInputError, PermissionDeniedError

TODAY = datetime.datetime(2026, 1, 1)

_PLAIN = """\
{%- if tools %}{{ 'Tools:\\n' }}
{%- for tool in tools %}{{ tool | tojson + '\\n' }}{% endfor %}{{ '\\n' }}{% endif %}
{%- for message in messages %}
{%- if message.role == 'assistant' %}
{{- 'Assistant:\\n' + (message.content or '') }}
{%- for call in message.tool_calls or [] %}
{{- '<tool_call>' + call.function | tojson + '</tool_call>' }}{% endfor %}
{{- eos_token + '\\n\\n' }}
{%- elif message.role in ('system', 'developer', 'user', 'tool') %}
{{- message.role | capitalize + ':\\n' + message.content + '\\n\\n' }}
{%- else %}{{ raise_exception('plain has no role ' + message.role) }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'Assistant:\\n' }}{% endif %}"""

_CHATML = """\
{%- if tools %}
{{- '<|im_start|>system\\n' }}
{%- if messages[0].role == 'system' %}{{ messages[0].content + '\\n\\n' }}{% endif %}
{{- 'Tools:\\n' }}
{%- for tool in tools %}{{ tool | tojson + '\\n' }}{% endfor %}
{{- 'To call one, write <tool_call>{"name": ..., "arguments": {...}}</tool_call>.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'assistant' %}
{{- '<|im_start|>assistant\\n' + (message.content or '') }}
{%- for call in message.tool_calls or [] %}
{{- '<tool_call>' + call.function | tojson + '</tool_call>' }}{% endfor %}
{{- '<|im_end|>\\n' }}
{%- elif not (tools and loop.first and message.role == 'system') %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

_QA = """\
{%- if tools %}{{ raise_exception('qa has no tools') }}{% endif %}
{%- for message in messages %}
{%- if message.role == 'assistant' %}
{%- if message.tool_calls %}{{ raise_exception('qa has no tool calls') }}{% endif %}
{{- 'A: ' + message.content + eos_token + '\\n' }}
{%- elif message.role == 'user' %}{{ 'Q: ' + message.content + '\\n' }}
{%- elif message.role in ('system', 'developer') %}{{ message.content + '\\n' }}
{%- else %}{{ raise_exception('qa has no role ' + message.role) }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'A: ' }}{% endif %}"""

# The built-in templates. `plain` needs no special token except the tokenizer's eos, `chatml` needs
# those of ChatML, and `qa` has the shortest markup, for small byte-level models.
TEMPLATES = {'plain': _PLAIN, 'chatml': _CHATML, 'qa': _QA}


def read_template(name: str) -> str:
    """The text of a template, given its name in TEMPLATES or its path; '' for ''.

    Raises:
        MissingInputError: it is neither the name of a template nor the path of a file.
        PermissionDeniedError: the file may not be read.
        DataError: it is not valid Jinja, or not UTF-8.
    """
    if not name:
        return ''
    text = TEMPLATES.get(name) or _read_file(Path(name).expanduser())
    compile_template(text)
    return text


def _read_file(path: Path) -> str:
    try:
        return path.read_text(encoding='utf-8')
    except PermissionError as error:
        raise PermissionDeniedError(
            f'config.tokenizer.chat_template: {path} cannot be read: permission denied'
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f'config.tokenizer.chat_template: {path} is not UTF-8') from error
    except OSError as error:
        files = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, [*TEMPLATES, *files], 1)
        hint = f'; do you mean {near[0]}?' if near else ''
        raise MissingInputError(
            f'config.tokenizer.chat_template: {path} is neither a file '
            f'nor one of {", ".join(TEMPLATES)}{hint}'
        ) from error


@functools.lru_cache(maxsize=32)
def compile_template(text: str) -> jinja2.Template:
    """The compiled template. Raises DataError with the line unless it is valid Jinja."""
    try:
        return _environment().from_string(text)
    except jinja2.TemplateSyntaxError as error:
        raise DataError(f'chat template, line {error.lineno}: {error.message}') from error


@functools.lru_cache(maxsize=32)
def find_variables(text: str) -> frozenset[str]:
    """The names of the variables that must be passed to a template."""
    environment = _environment()
    return frozenset(jinja2.meta.find_undeclared_variables(environment.parse(text)))


def render_template(text: str, **given) -> str:
    """The text of a chat. Raises DataError with the template's message if it refuses the chat."""
    try:
        return compile_template(text).render(given)
    except DataError:
        raise
    except Exception as error:  # A template can raise anything that an expression can.
        what = str(error) or type(error).__name__
        raise DataError(f'the chat template refuses this chat: {what}') from error


class _Generation(jinja2.ext.Extension):
    """{% generation %}, with which some templates mark what a model writes; we ignore it."""

    tags = {'generation'}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(['name:endgeneration'], drop_needle=True)


@functools.cache
def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=['jinja2.ext.loopcontrols', _Generation]
    )
    environment.filters['tojson'] = _to_json
    environment.globals['raise_exception'] = _raise
    environment.globals['strftime_now'] = TODAY.strftime
    return environment


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    # Jinja's own filter would escape <, > and & for HTML.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message):
    raise jinja2.TemplateError(message)
