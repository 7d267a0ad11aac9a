"""What a run is and needs: a summary of a few lines for the screen, tables for log.txt."""

import jax

from jaxfm import sharding
from jaxfm.errors import human_bytes
from jaxfm.models.implementations import choices
from jaxfm.models.transformer import compute_dtype
from jaxfm.plan.flops import frozen_matmul_params
from jaxfm.plan.memory import bytes_per_device, num_parameters

MOST_PHASES = 3  # that the summary lists


def summary(config, phases, datasets, mesh, state, workdir) -> list[tuple[str, str]]:
    """The run in a few lines, as [(name, value), ...]; arguments as of `tables`."""
    rows = [
        ('work directory', str(workdir)),
        *_origin(config),
        ('model', _model_line(config.model, phases[0])),
        ('devices', _device_line(mesh, state)),
        ('ops', _ops_line(choices(config.model, mesh))),
    ]
    for phase in phases[:MOST_PHASES]:
        optimizer, steps = phase.config.optimizer, phase.config.steps
        line = f'{steps:,} steps of {phase.tokens_per_step:,} tokens, {optimizer.name}'
        rows.append((f'phase {phase.name}' if phase.name else 'training', line))
        if phase.teacher:
            rows.append(('  teacher' if phase.name else 'teacher', _teacher_line(phase.teacher)))
        rows.append(('  data' if phase.name else 'data', _data_line(datasets[phase.name])))
    if len(phases) > MOST_PHASES:
        rows.append(('', f'and {len(phases) - MOST_PHASES} more phases'))
    return [*rows, ('details', f'{workdir / "log.txt"}')]


def _ops_line(chosen) -> str:
    """'mosaic: attention; xla: rms_norm, token_logprobs'."""
    ops_of = {}
    for op, choice in chosen.items():
        ops_of.setdefault(choice.name, []).append(op)
    return '; '.join(f'{name}: {", ".join(ops)}' for name, ops in sorted(ops_of.items()))


def _model_line(model, phase) -> str:
    trained, total = _parameter_counts(phase)
    parts = [f'{model.name}, {model.num_layers} layers', f'{total:,} parameters']
    parts += [f'{trained:,} trained'] if trained < total else []
    return ', '.join([*parts, compute_dtype(model).name])


def _teacher_line(teacher) -> str:
    count = num_parameters(teacher.parts.shapes)
    size = human_bytes(bytes_per_device(teacher.abstract_params()))
    layers = f'{teacher.config.num_layers} layers'
    return f'{teacher.place}, {layers}, {count:,} parameters, {size} on each device'


def _parameter_counts(phase) -> tuple[int, int]:
    """Parameters that the phase trains, and all of them."""
    shapes = phase.parts.shapes
    trained = num_parameters({path: shapes[path] for path in phase.parts.trainable})
    return trained, num_parameters(shapes)


def _device_line(mesh, state) -> str:
    processes = f' in {jax.process_count()} processes' if jax.process_count() > 1 else ''
    devices = f'{jax.device_count()} x {jax.devices()[0].device_kind}{processes}'
    split = f', mesh {_mesh_line(mesh)}' if mesh.size > 1 else ''
    return f'{devices}{split}, {human_bytes(bytes_per_device(state))} of train state on each'


def _mesh_line(mesh) -> str:
    return ', '.join(f'{axis} {size}' for axis, size in mesh.shape.items() if size > 1)


def _data_line(dataset) -> str:
    found = {'train_tokens': 0, 'heldout_tokens': 0}  # of a mixture: in all sources together
    for name, value in dataset.statistics.items():
        if (known := name.rpartition('/')[2]) in found:
            found[known] += value
    documents = f'{found["train_tokens"]:,} tokens, and {found["heldout_tokens"]:,} held out'
    if 'prompts' not in dataset.statistics:
        return documents
    prompts = '{prompts:,} prompts of {task}, {samples} samples of each'
    line = prompts.format(**dataset.statistics)
    return f'{line}; {documents}' if found['train_tokens'] else line


def tables(config, phases, datasets, mesh, state) -> dict[str, list[tuple]]:
    """What a run is, in full, as {title: [(name, value), ...]}.

    Args:
      config: a RunConfig.
      phases: its Phases.
      datasets: {name of a phase: its data, or its rollouts}.
      state: the TrainState of the first phase, or its shapes and shardings.
    """
    model = config.model
    chosen = choices(model, mesh)
    sections = {
        'run': [('steps', f'{config.total_steps:,}'), *_origin(config)],
        'model': [
            ('name', f'{model.name}, {model.num_layers} layers'),
            ('parameters', f'{num_parameters(phases[0].parts.shapes):,}'),
            *([('adapters', f'{model.lora.description}, stored float32')] if model.lora else []),
            (
                'precision',
                f'stored {model.param_dtype}, computed {compute_dtype(model).name}, logits float32',
            ),
            *(
                [
                    (
                        'matrices of blocks',
                        'multiplied in float8, unproven on hardware; MFU is of '
                        f'the peak in {compute_dtype(model).name}',
                    )
                ]
                if model.matmul_dtype == 'float8'
                else []
            ),
        ],
        'ops': [(op, f'{choice.name}: {choice.reason}') for op, choice in chosen.items()],
        'devices': [
            ('devices', f'{jax.device_count()} x {jax.devices()[0].device_kind}'),
            ('processes', jax.process_count()),
            ('mesh', _mesh_line(mesh) or 'one device'),
            ('train state', f'{human_bytes(bytes_per_device(state))} a device'),
        ],
    }
    for phase in phases:
        title = f'phase {phase.name}' if phase.name else 'training'
        sections[title] = _phase_rows(phase, model)
        sections[f'data of {title}'] = _data_rows(datasets[phase.name].statistics)
    return sections


def _origin(config) -> list[tuple]:
    return [('weights from', config.init_from)] if config.init_from else []


def _phase_rows(phase, model) -> list[tuple]:
    optimizer = phase.config.optimizer
    trained, total = _parameter_counts(phase)
    frozen = frozen_matmul_params(phase.parts)
    flops = phase.flops_per_token(model)
    tokens, steps = phase.tokens_per_step, phase.config.steps
    return [
        ('steps', f'{steps:,} of {tokens:,} tokens, {steps * tokens:,} in all'),
        ('optimizer', f'{optimizer.name}, {optimizer.schedule} schedule'),
        *([('trained', f'{trained:,} parameters of {total:,}')] if trained < total else []),
        *_copy_row(phase),
        ('model FLOPs', f'{flops:.3g} a token in training, causal attention counted half'),
        *([('teacher', _teacher_line(phase.teacher))] if phase.teacher else []),
        *(
            [('of its forward', f'{phase.teacher_flops_per_token:.3g} of these FLOPs')]
            if phase.teacher
            else []
        ),
        *([('not counted', 'gradients of frozen weights: none are computed')] if frozen else []),
    ]


def _copy_row(phase) -> list[tuple]:
    """The weights that a phase holds twice, to sample while it trains."""
    if not getattr(phase.config.data, 'max_staleness', 0):
        return []
    copy = bytes_per_device(phase.abstract_state().params)
    return [('second weights', f'{human_bytes(copy)} a device, to sample while training')]


# The statistics in the table; the records and the report have all of them.
SHOWN_STATISTICS = (
    *('task', 'prompts', 'samples', 'prompt_tokens', 'longest_prompt'),
    *('train_documents', 'train_bytes', 'train_tokens', 'train_supervised_tokens'),
    *('heldout_documents', 'heldout_tokens', 'bytes_per_token', 'share', 'rows_per_epoch'),
    *('packing', 'packing_efficiency', 'cut_documents', 'truncated_documents'),
    *('dropped_documents', 'bad_records', 'duplicates_dropped', 'vocab_size', 'fingerprint'),
)


def _data_rows(statistics: dict) -> list[tuple]:
    """In a mixture every name begins with '<source>/'."""
    return [
        (name.replace('_', ' '), _format_value(value))
        for name, value in statistics.items()
        if name.rpartition('/')[2] in SHOWN_STATISTICS and value != 0
    ]


def _format_value(value) -> str:
    if isinstance(value, int):
        return f'{value:,}'
    return f'{value:.4g}' if isinstance(value, float) else value[:16]


def parameter_rows(phases, mesh):
    """(name, shape, dtype, sharding, rule of the optimizer in each phase) of every parameter."""
    parts = phases[0].parts
    for path, leaf in parts.shapes.items():
        spec = sharding.stored_spec(parts.axes[path])
        split = [axis if axis and mesh.shape[axis] > 1 else '-' for axis in spec]
        rules = [phase.optimizer.rules.get(path, 'frozen') for phase in phases]
        rule = '; then '.join(dict.fromkeys(rules)) if len(set(rules)) > 1 else rules[0]
        yield path, leaf.shape, leaf.dtype.name, ', '.join(split), rule
