"""What a config takes over from the model that `init_from` names, and from adapters.

A run keeps it in its work directory, so that it can go on when the others are gone.
"""

import json
from pathlib import Path

from jaxfm.config.file import read_json, write_whole
from jaxfm.config.run import RunConfig
from jaxfm.config.validation import format_value
from jaxfm.errors import ConfigError, DataError, MissingInputError
from jaxfm.storage.files import explain_errors

# {place in the config: {what it names: what that said of itself}}, in the work directory.
INHERITED = 'inherited.json'

# What of `model` says how it is trained and run, not what it is.
_NOT_INHERITED = (
    *('name', 'scan', 'remat', 'param_dtype', 'compute_dtype', 'gradient_reduce_dtype', 'lora'),
    *('implementations', 'matmul_dtype'),
)


def remove_inherited(values: dict) -> dict:
    """Takes out of a file's values what the model of `init_from` decides -> its tokenizer.

    So any config can start from any model. What the command line says later is said of the
    inherited values, not of those of the file, nor of defaults.
    """
    model, tokenizer = values.get('model'), values.get('tokenizer') or {}
    if isinstance(model, dict):
        values['model'] = {key: model[key] for key in _NOT_INHERITED if key in model}
    is_trained = isinstance(tokenizer, dict) and tokenizer.get('name', 'file') != 'file'
    values['tokenizer'] = {} if is_trained else tokenizer
    return tokenizer


def inherit(values: dict, inherited: dict, tokenizer: dict | None) -> None:
    """Fills in what the model and the adapter that a config names say of themselves.

    inherited: what they said when the run began, if it has.
    tokenizer: that of the file, for a model that brings none.

    Raises:
        ConfigError: the config says something else of them.
        MissingInputError, DataError: there is none, or it is not one that we read.
    """
    if isinstance(values.get('init_from'), str) and values['init_from']:
        _inherit_model(values, inherited, tokenizer)
    elif 'init_from' in values and 'model' not in values:
        raise ConfigError('config.init_from is empty: which model? --config.init_from=PATH')
    _inherit_adapter(values, inherited)


def _inherit_model(values: dict, inherited: dict, tokenizer: dict) -> None:
    """Fills in what the model that `init_from` names says of itself, where `values` does not."""
    earlier = _describe('init_from', values['init_from'], inherited, values.get('checkpoint'))
    for group, theirs in earlier.items():
        ours = values.get(group) or {}
        if isinstance(ours, dict) and ours.get('name') in (None, theirs.get('name')):
            values[group] = _merge(theirs, ours)
    values['tokenizer'] = values['tokenizer'] or tokenizer
    if not values['tokenizer']:
        raise ConfigError(
            'config.tokenizer is required: the model of init_from brings none; '
            '--config.tokenizer.name=file --config.tokenizer.path=PATH'
        )
    if earlier['model'].get('lora'):
        _keep_adapters(values['model'], earlier['model']['lora'])


def _merge(theirs: dict, ours: dict) -> dict:
    """Ours over theirs, group by group."""
    merged = theirs | ours
    for key in theirs.keys() & ours.keys():
        if isinstance(theirs[key], dict) and isinstance(ours[key], dict) and key != 'lora':
            merged[key] = _merge(theirs[key], ours[key])
    return merged


def _inherit_adapter(values: dict, inherited: dict) -> None:
    """Fills in what the adapter that `model.lora.path` names says of itself.

    Raises:
        ConfigError: the config says something else of it.
    """
    model = values.get('model')
    lora = model.get('lora') if isinstance(model, dict) else None
    path = lora.get('path') if isinstance(lora, dict) else None
    if not path or not isinstance(path, str):
        return
    theirs = _describe('model.lora.path', path, inherited, values.get('checkpoint'))
    for key, value in theirs.items():
        if lora.get(key, value) != value:
            raise ConfigError(
                f'config.model.lora.{key}: is {format_value(lora[key])}, but that of the adapter '
                f'in {path} is {format_value(value)}: leave it out'
            )
    model['lora'] = lora | theirs


def _keep_adapters(model: dict, earlier: dict) -> None:
    """Adapters that a run starts from stay as they are, unless it says None: then none are left.

    Raises:
        ConfigError: it wants others.
    """
    given = model.get('lora')
    if not isinstance(given, dict):
        return
    kept = earlier | {'path': ''}  # where they came from once
    differ = [key for key in given if given != earlier and given[key] != kept.get(key)]
    if differ:
        has = ', '.join(f'{key} {format_value(value)}' for key, value in kept.items() if value)
        raise ConfigError(
            f'config.model.lora: the model of init_from has adapters already ({has}), which cannot '
            f'have another {differ[0]}: leave it out to train them further, or give '
            '--config.model.lora=None, which merges them into the weights'
        )
    model['lora'] = kept


def _describe(place: str, name: str, inherited: dict, checkpoint=None) -> dict:
    """What that which `place` of a config names says of itself, or said when the run began.

    Raises:
        MissingInputError, DataError: there is none, or it is not one that we read.
    """
    if name in inherited.get(place, {}):
        return inherited[place][name]
    read = _describe_model if place == 'init_from' else _describe_adapter
    # An OSError: not even a name that the system can look for.
    with explain_errors(f'config.{place}: {name} cannot be read', MissingInputError):
        try:
            return read(name)
        except MissingInputError as error:
            elsewhere = checkpoint.get('directory') if isinstance(checkpoint, dict) else ''
            hint = f'; a run in {elsewhere} goes on without it '
            hint += 'only in the work directory it began in'
            raise MissingInputError(f'config.{place}: {error}{hint if elsewhere else ""}') from None
        except DataError as error:
            raise DataError(f'config.{place}: {error}') from None


def _describe_adapter(path: str) -> dict:
    # numpy and safetensors, for those alone who need them
    from jaxfm.pretrained.huggingface import peft

    return peft.describe(path)


def _describe_model(init_from: str) -> dict:
    """{group: values} of a model that exists: of a run of ours, or from outside."""
    from jaxfm.pretrained import locate  # numpy and safetensors, for those alone who need them

    directory = Path(init_from).expanduser()
    if not locate.is_run(directory):
        return locate.values_of(locate.open_pretrained(init_from))
    earlier = read_json(directory / 'config.json')
    return {
        'model': earlier['model'],
        'tokenizer': {'name': 'file', 'path': str(directory)},
        'sampling': {'stop_ids': earlier.get('sampling', {}).get('stop_ids', [])},
        'export': {'dtype': earlier.get('export', {}).get('dtype', 'auto')},
    }


def write_inherited(config: RunConfig, workdir: Path) -> None:
    """Keeps what a run has inherited; call it before `write_config`, by which a run begins.

    So a run that has begun does not need the others any more, and what becomes of them does not
    matter to it.
    """
    known, lora = read_inherited(workdir), config.model.lora
    names = {'init_from': config.init_from, 'model.lora.path': lora.path if lora else ''}
    inherited = {
        place: {name: _describe(place, name, known)} for place, name in names.items() if name
    }
    if inherited:
        write_whole(workdir / INHERITED, json.dumps(inherited, indent=2) + '\n')


def read_inherited(workdir: Path | None) -> dict:
    """What the run in a work directory has inherited; nothing where none has begun."""
    if workdir is None or not (workdir / 'config.json').exists():
        return {}
    return read_json(workdir / INHERITED) if (workdir / INHERITED).exists() else {}
