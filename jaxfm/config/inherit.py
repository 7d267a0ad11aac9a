"""What a config inherits from the model that `init_from` names, and from an adapter.

A run stores the inherited values in its work directory, so it can resume after the adapter has been
deleted, and after the model, unless its checkpoints leave out that model's weights
(`jaxfm.checkpoint.base`).
"""

import json
from pathlib import Path

from jaxfm.config.file import read_json, write_whole
from jaxfm.config.run import RunConfig
from jaxfm.config.validation import format_value
from jaxfm.errors import ConfigError, DataError, MissingInputError, RunError
from jaxfm.storage.files import explain_errors

# A file in the work directory: {config key: {name of the model or adapter: its values}}.
INHERITED = 'inherited.json'

# Keys of `model` that say how the model is trained and run, not what its architecture is.
NOT_INHERITED = (
    *('name', 'scan', 'remat', 'param_dtype', 'compute_dtype', 'gradient_reduce_dtype', 'lora'),
    *('implementations', 'matmul_dtype', 'batch_invariant'),
)


def remove_inherited(values: dict) -> dict:
    """Removes from a file's values what the model of `init_from` decides; returns its tokenizer.

    This lets any config start from any model. Command-line overrides are applied later, on top of
    the inherited values rather than of the file's values or the defaults.
    """
    model, tokenizer = values.get('model'), values.get('tokenizer') or {}
    if isinstance(model, dict):
        values['model'] = {key: model[key] for key in NOT_INHERITED if key in model}
    is_trained = isinstance(tokenizer, dict) and tokenizer.get('name', 'file') != 'file'
    values['tokenizer'] = {} if is_trained else tokenizer
    return tokenizer


def brings_config(init_from: str, inherited: dict) -> bool:
    """Whether the model of `init_from` decides about its architecture, rather than the config.

    Args:
        inherited: the values stored when the run began, {} for a new run.
    """
    known = inherited.get('init_from', {})
    if init_from in known:
        return bool(known[init_from])
    from jaxfm.pretrained import locate  # as in `describe_model`

    try:
        return not locate.is_without_config(init_from)
    except (RunError, OSError):
        return True  # `_describe` meets the same error and explains it


def inherit(values: dict, inherited: dict, tokenizer: dict | None) -> None:
    """Fills in the values that the named model and adapter specify about themselves.

    Args:
        inherited: the values stored when the run began, {} for a new run.
        tokenizer: the config file's tokenizer, used if the model comes without one.

    Raises:
        ConfigError: the config contradicts them.
        MissingInputError, DataError: the model or adapter does not exist or has a format that jaxfm
            does not read.
    """
    if isinstance(values.get('init_from'), str) and values['init_from']:
        _inherit_model(values, inherited, tokenizer)
    elif 'init_from' in values and 'model' not in values:
        raise ConfigError('config.init_from is empty: name a model with --config.init_from=PATH')
    _inherit_adapter(values, inherited)


def _inherit_model(values: dict, inherited: dict, tokenizer: dict) -> None:
    """Fills in the values of the model that `init_from` names, where `values` has none."""
    name = values['init_from']
    earlier = _describe('init_from', name, inherited, values.get('checkpoint'))
    if not earlier:
        _check_has_model(values)
        return
    for key in ('init_names', 'init_ignore'):
        if values.get(key):
            raise ConfigError(
                f'config.{key} is for a checkpoint that another project saved with Orbax; {name} '
                'has names of its own: leave it out'
            )
    for group, theirs in earlier.items():
        ours = values.get(group) or {}
        if isinstance(ours, dict) and ours.get('name') in (None, theirs.get('name')):
            values[group] = _merge(theirs, ours)
    values['tokenizer'] = values['tokenizer'] or tokenizer
    if not values['tokenizer']:
        raise ConfigError(
            'config.tokenizer is required, because the model of init_from comes without one; give '
            '--config.tokenizer.name=file --config.tokenizer.path=PATH'
        )
    if earlier['model'].get('lora'):
        _keep_adapters(values['model'], earlier['model']['lora'])


def _check_has_model(values: dict) -> None:
    if 'model' not in values:
        raise ConfigError(
            f'config.model is required: {values["init_from"]} has weights, but not the shape of '
            'their model; use a config file that sets model and tokenizer'
        )


def _merge(theirs: dict, ours: dict) -> dict:
    """Merges recursively; ours wins. `lora` is taken whole."""
    merged = theirs | ours
    for key in theirs.keys() & ours.keys():
        if isinstance(theirs[key], dict) and isinstance(ours[key], dict) and key != 'lora':
            merged[key] = _merge(theirs[key], ours[key])
    return merged


def _inherit_adapter(values: dict, inherited: dict) -> None:
    """Fills in the values of the adapter that `model.lora.path` names.

    Raises:
        ConfigError: the config contradicts the adapter.
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
                f'config.model.lora.{key} is {format_value(lora[key])}, but the adapter in {path} '
                f'has {format_value(value)}: leave this key out'
            )
    model['lora'] = lora | theirs


def _keep_adapters(model: dict, earlier: dict) -> None:
    """Keeps the adapters of the model a run starts from; `lora=None` merges them instead.

    Raises:
        ConfigError: the config asks for different adapters.
    """
    given = model.get('lora')
    if not isinstance(given, dict):
        return
    kept = earlier | {'path': ''}  # the earlier run's own source of its adapters
    differ = [key for key in given if given != earlier and given[key] != kept.get(key)]
    if differ:
        has = ', '.join(f'{key} {format_value(value)}' for key, value in kept.items() if value)
        raise ConfigError(
            f'config.model.lora.{differ[0]} cannot change: the model of init_from already has '
            f'adapters ({has}). Leave model.lora out to train them further, or give '
            '--config.model.lora=None to merge them into the weights'
        )
    model['lora'] = kept


def _describe(place: str, name: str, inherited: dict, checkpoint=None) -> dict:
    """The values of the model or adapter `name`: as stored when the run began, else read now.

    Args:
        place: the config key that holds the name, 'init_from' or 'model.lora.path'.
        name: the path or hub id given there.
        checkpoint: the config's checkpoint group, to word the hint.

    Raises:
        MissingInputError, DataError: it does not exist or has a format that jaxfm does not read.
    """
    if name in inherited.get(place, {}):
        return inherited[place][name]
    read = describe_model if place == 'init_from' else _describe_adapter
    # OSError: for example a name too long for the file system.
    with explain_errors(f'config.{place}: {name} cannot be read', MissingInputError):
        try:
            return read(name)
        except MissingInputError as error:
            elsewhere = checkpoint.get('directory') if isinstance(checkpoint, dict) else ''
            hint = f'; the run in {elsewhere} can resume without it only in the work directory '
            hint += 'where it began'
            raise MissingInputError(f'config.{place}: {error}{hint if elsewhere else ""}') from None
        except DataError as error:
            raise DataError(f'config.{place}: {error}') from None


def _describe_adapter(path: str) -> dict:
    # Imported here: it pulls in numpy and safetensors, which most configs do not need.
    from jaxfm.pretrained.huggingface import peft

    return peft.describe(path)


def describe_model(init_from: str) -> dict:
    """{group: values} of an existing model: a jaxfm run or a pretrained model.

    {} for a checkpoint of another project, which has weights only.
    """
    # Imported here: it pulls in numpy and safetensors, which most configs do not need.
    from jaxfm.pretrained import locate
    from jaxfm.pretrained.orbax.directory import find_tree

    if locate.is_without_config(init_from):
        find_tree(init_from)  # raises if there is none
        return {}
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
    """Stores what a run has inherited. Call it before `write_config`, which marks the run as begun.

    From then on the config does not depend on the original model and adapter: they may change or
    disappear.
    """
    known, lora = read_inherited(workdir), config.model.lora
    names = {'init_from': config.init_from, 'model.lora.path': lora.path if lora else ''}
    inherited = {
        place: {name: _describe(place, name, known)} for place, name in names.items() if name
    }
    if inherited:
        write_whole(workdir / INHERITED, json.dumps(inherited, indent=2) + '\n')


def read_inherited(workdir: Path | None) -> dict:
    """What the run in a work directory has inherited; {} if no run has begun there."""
    if workdir is None or not (workdir / 'config.json').exists():
        return {}
    return read_json(workdir / INHERITED) if (workdir / INHERITED).exists() else {}
