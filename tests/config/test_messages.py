"""Compares the full text of every config error message with tests/goldens/config_messages.json.

    python -m tests.config.test_messages

rewrites the golden file; its diff shows every message that a change affects.
"""

import contextlib
import json
import tempfile
from pathlib import Path

import pytest

from jaxfm import errors
from jaxfm.config.load import load_config, read_config, split_arguments
from jaxfm.config.overrides import find_sources
from jaxfm.config.resume import check_resume
from jaxfm.config.run import RunConfig, check_on_mesh
from jaxfm.config.validation import select_kinds

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / 'tests' / 'goldens' / 'config_messages.json'

MODEL = {
    'vocab_size': 2048,
    'embed_dim': 64,
    'num_layers': 2,
    'block': {'num_heads': 4, 'num_kv_heads': 2, 'head_dim': 16, 'mlp_dim': 128},
}
BLOCK = MODEL['block']
DATA = {'name': 'python_stdlib', 'sequence_length': 64, 'batch_size': 8}
ADAMW = {'name': 'adamw', 'learning_rate': 1e-3}
RUN = {'steps': 100, 'model': MODEL, 'data': DATA, 'optimizer': ADAMW}
PHASE = {'steps': 100, 'data': DATA, 'optimizer': ADAMW}
PHASES = {'model': MODEL, 'phases': [{'name': 'first'} | PHASE, {'name': 'second'} | PHASE]}
LOSS = {'name': 'loss'}
GENERATE = {'name': 'generate', 'task': {'name': 'python_functions'}}
SEGMENTS = [{'pattern': [BLOCK, BLOCK | {'num_heads': 6}], 'repeats': 1}]
MIXTURE = {
    'name': 'mixture',
    'sources': {'a': {'name': 'python_stdlib'}, 'b': {'name': 'problems'}},
    'weights': {'a': 1.0, 'b': 2.0},
    'sequence_length': 64,
    'batch_size': 8,
}
ROLLOUT = {
    'name': 'rollout',
    'task': {'name': 'arithmetic'},
    'prompts': 4,
    'samples': 4,
    'max_tokens': 16,
    'sequence_length': 64,
    'batch_size': 8,
}
REWARDS = RUN | {'data': ROLLOUT, 'objective': {'name': 'grpo'}, 'tokenizer': {'name': 'bytes'}}
TAUGHT = REWARDS | {
    'data': ROLLOUT
    | {
        'name': 'rollout_mixture',
        'off_policy': {'name': 'problems', 'sequence_length': 64, 'batch_size': 8},
    },
    'objective': {'name': 'gkd', 'teacher': 'runs/teacher'},
}
EARLIER = RUN | {'model': MODEL | {'lora': {'rank': 8, 'alpha': 32.0}}}

# {name of a config file: the values that it returns}.
FILES = {
    'run.py': RUN,
    'phases.py': PHASES,
    'evals.py': RUN | {'evals': {'heldout': LOSS, 'code': GENERATE}},
    'phased_evals.py': PHASES | {'evals': {'heldout': LOSS | {'phase': 'first'}}},
    'segments.py': RUN | {'model': MODEL | {'segments': SEGMENTS}},
    'mixture.py': RUN | {'data': MIXTURE},
    'rollout.py': REWARDS,
    'taught.py': TAUGHT,
    'rewarded.py': PHASES
    | {
        'tokenizer': {'name': 'bytes'},
        'phases': [
            {'name': 'first'} | PHASE,
            {'name': 'second'} | PHASE | {'data': ROLLOUT, 'objective': {'name': 'grpo'}},
        ],
    },
    'after.py': {key: value for key, value in RUN.items() if key != 'model'}
    | {'init_from': 'earlier'},
    'after_bytes.py': RUN | {'init_from': 'earlier', 'tokenizer': {'name': 'bytes'}},
    'nowhere.py': RUN | {'init_from': 'earlyer'},
    'quickstart.py': {},
    # Mistakes that only a file can make.
    'no_steps.py': {key: value for key, value in RUN.items() if key != 'steps'},
    'no_data.py': {key: value for key, value in RUN.items() if key != 'data'},
    'no_optimizer.py': {key: value for key, value in RUN.items() if key != 'optimizer'},
    'only_model.py': {'model': MODEL},
    'empty.py': {},
    'unknown_keys.py': RUN | {'modle': 3, 'data': DATA | {'batchsize': 4}, 'stps': 9},
    'types.py': RUN | {'steps': 'many', 'seed': 1.5, 'mesh': 3, 'sampling': {'chat': 'yes'}},
    'choices.py': RUN | {'optimizer': {'name': 'adam'}, 'tokenizer': {}, 'data': {'name': 'fils'}},
    'odd_values.py': RUN | {'steps': float('inf'), 'seed': {1}, 'init_from': None},
    'several.py': RUN
    | {
        'steps': 10,
        'optimizer': ADAMW | {'accumulate': 3, 'warmup_steps': 20},
        'mesh': {'tensor': 3},
        'tokenizer': {'name': 'bpe', 'vocab_size': 4096},
        'evals': {'export': LOSS, 'code': GENERATE | {'max_tokens': 600}},
        'export': {'every': 5},
        'sampling': {'max_tokens': 512},
    },
    'broken_and_unfit.py': RUN
    | {'sampling': {'slots': 0}, 'optimizer': ADAMW | {'accumulate': 3}, 'steps': -1},
    'several_phases.py': {
        'model': MODEL,
        'steps': 3,
        'mesh': {'fsdp': 4, 'replica': 4},
        'phases': [
            {'name': 'one', 'keep_optimizer': True} | PHASE,
            {'name': 'one', 'keep_optimizer': True}
            | PHASE
            | {'steps': 4, 'optimizer': ADAMW | {'warmup_steps': 5, 'accumulate': 3}},
            {'name': 'two', 'keep_optimizer': True}
            | PHASE
            | {'optimizer': ADAMW | {'name': 'muon'}},
        ],
        'evals': {'a': LOSS, 'b': LOSS | {'phase': 'ones'}},
    },
}
# Files whose body is not `return {...}`: the arguments of get_config and its body.
BODIES = {
    'undefined.py': ('', 'x = 1\n    return {"a": y}'),
    'unclosed.py': ('', 'return ('),
    'imports.py': ('', 'import nothere'),
    'number.py': ('', 'return 3'),
    'needs.py': ('arg', 'return {}'),
    'raises.py': ('arg=""', 'raise ValueError(f"no size {arg}; there is tiny")'),
}

# Command lines: the values of --config= and of each --config.*
RUN_OVERRIDES = """
tokenizer.vocab_size=4096
model.vocab_size=1024
tokenizer.name=bpe model.vocab_size=1024
model.vocab_size=1024 tokenizer.name=bpe tokenizer.vocab_size=1500
tokenizer.name=bytes model.vocab_size=100
optimizer.accumulate=3
data.batch_size=7 optimizer.accumulate=3
optimizer={'name':'adamw','learning_rate':1e-3,'accumulate':3} optimizer.warmup_steps=2
optimizer.warmup_steps=2 optimizer={'name':'adamw','learning_rate':1e-3,'accumulate':3}
mesh.fsdp=4 mesh.replica=2 optimizer.accumulate=2
mesh.fsdp=16
mesh.fsdp=3
mesh.fsdp=3 mesh.tensor=2 seed=4
mesh.tensor=3
mesh.tensor=8 model.block.num_kv_heads=4
mesh.tensor=4 model.block.window=8
model.block.mlp_dim=130 mesh.tensor=4 model.block.num_kv_heads=4
model.embed_dim=65 mesh.fsdp=8
optimizer.warmup_steps=101
steps=10 optimizer.warmup_steps=20
steps=10 steps=5 optimizer.warmup_steps=20
evals.code={'name':'generate','task':{'name':'python_functions'},'max_tokens':512}
evals.code.name=generate evals.code.task.name=python_functions evals.code.max_tokens=600
sampling.max_length=64
sampling.max_tokens=512 sampling.temperature=0.5
sampling.max_tokens=700 sampling.max_length=600
sampling.min_tokens=200
sampling.min_tokens=9 sampling.max_tokens=8 sampling.temperature=0.5
sampling.top_p=0 sampling.min_p=1.5 sampling.frequency_penalty=-3 sampling.n=0
sampling.allowed_ids=[5,2048] sampling.logit_bias={5000:1.0}
sampling.allowed_ids=[] sampling.stop=['']
sampling.logit_bias={'a':1.0} sampling.stop=END
sampling.logit_bias={3:-1e999}
sampling.topk=3
evals.export={'name':'loss'} export.every=10
export.every=10 evals.export.name=loss export.dtype=float32
mesh.context=2
mesh.expert=-1
mesh.fsdp=0
mesh.tensor=-1
mesh.tensor=-1 mesh.replica=-1 mesh.fsdp=2
mesh.zz=1
model.lora.path=adapters
model.lora.rank=8 export.adapters=peft model.lora=None
export.adapters=peft
export.adapters=peft export.every=3
model.lora.targets=['attention/qq']
model.lora.targets=[]
model.lora.rank=0
model.lora.ranks=4
model.lora.rank=4 model.matmul_dtype=float8
model.matmul_dtype=float8 model.remat=full model.lora.rank=4
model.batch_invariant=true model.matmul_dtype=float8
model.batch_invariant=true model.compute_dtype=bfloat16 model.remat=full
model.batch_invariant=true model.implementations.attention=interpret
model.family=nobody
model.family=nobody model.remat=full
model.num_layers=3 model.segments=[{'pattern':[],'repeats':1}]
model.block.num_heads=3
model.block.num_heads=3 model.block.window=4
model.block={'num_heads':3,'num_kv_heads':2,'head_dim':16,'mlp_dim':128} model.block.window=4
model.block.pre_norm=false
model.block.pre_norm=false model.block.post_norm=false model.block.qkv_bias=true
model.block.joint_qk_norm=true
model.block.joint_qk_norm=true model.block.qk_norm=false
model.block.rope.scaling=llama3 model.block.rope.low_freq_factor=8
model.block.rope.scaling=yarn model.block.rope.beta_slow=40 model.block.rope.theta=5
model.block.rope=None model.block.head_dim=15
model.implementations.attention=cudnn
model.implementations.attention=cudnn sampling.num_samples=0
model.implementations.attention=cudnn evals.heldout.name=loss evals.heldout.every=3
model.implementations.attention=cudnn evals.heldout.name=loss sampling.num_samples=0 evals.heldout.every=3
model.implementations.attention=cudnn sampling.num_samples=2
model.implementations.attention=fa4
model.implementations.one_document=true
model.implementations.one_document=true data.packing=concat
model.implementations.one_document=true data.packing=best_fit data.too_long=drop
model.implementations.attention=cudnn model.implementations.one_document=true
model.implementations=cudnn
optimizer.name=adam
optimizer.name=muon optimizer.momentun=0.9
optimizer.momentum=0.9
optimizer=None
data=None
steps=None
steps=None data=None optimizer=None
steps=None seed=3
model=None
model={}
data.name=files
data.name=file
data.name=mixture
data={}
data.name=files data.path=[]
data.fields.roles.human=person data.name=files data.path=a
steps=many
steps=2.5
steps=true
steps=-1
steps=1e999
steps=[1]
seed=-1
seed=4294967296
seed=x
optimizer.learning_rate=fast
optimizer.learning_rate=0
optimizer.b2=1
optimizer.b2=-0.5
optimizer.final_fraction=1.5
optimizer.frozen=trunk
optimizer.frozen=[1]
optimizer.frozen=[{'a':1}]
objective.name=grp
objective.name=dr_grpo
objective.name=grpo objective.importance=truncate
objective.name=grpo objective.old_logprobs=recomputed objective.importance=mask objective.importance_floor=3
objective.name=grpo objective.old_logprobs=recomputed objective.importance=truncate objective.importance_floor=0.5
objective.name=grpo objective.dual_clip=1.2
objective.name=cispo objective.dual_clip=6
objective.name=gspo objective.clip_low=1
objective.name=grpo objective.importance_cap=3 objective.importance_level=sequence
objective.name=cispo objective.clip_low=0.1
objective.name=policy_gradient objective.clip=none objective.clip_high=0.1
objective.name=rloo objective.kl_estimator=k1 objective.kl_weighted=false
objective.name=dapo objective.length=512
objective.name=dapo objective.kl=0.1 objective.kl_estimator=k2
objective.name=dapo objective.kl=0.1 objective.kl_estimator=k1 objective.kl_weighted=false
objective.name=rloo objective.clip=ppoo objective.kl=1e999 objective.importance_floor=2
objective.name=grpo objective.clip_low=1 objective.dual_clip=1 objective.length=3
init_from=3
model.block.head_dim=15
model.scan=1
model.tie_embeddings=maybe
model.segments=3
model.segments=[{}]
model.segments=[{'pattern':[],'repeats':1}]
phases=3
phases=[3]
phases=[{}]
evals=3
evals.a=3
evals.a.name=los
evals.a.nme=loss
evals.a.name=generate
evals.a.name=generate evals.a.task.name=python_function
evals.a.name=loss evals.a.evry=3
checkpoint.local.every=3
checkpoint.local=x
checkpoint.local.directory=a checkpoint.local.evry=3
checkpoint.timeout_seconds=0
tokenizer.name=file
tokenizer.name=file tokenizer.path=
tokenizer.vocab_size=100
tokenizer.name=bites
metrics={1,2}
metrics.log_every=0
export.dtype=float8
stps=3
modle.width=3
modle={'width':3}
model.wdth=3
zzz=3
zzz.steps=3 zzz.unknown=4
phases[7].steps=1
phases.steps=9
steps.x=9
model[0]=9
steps[=9
model.block.rope.theta.x=3
=3
stps=3 optimizer.accumulate=3
stps=3 model.wdth=3 mesh.tensor=3
sampling.slots=0 optimizer.accumulate=3 seed=1
model.embed_dim=x optimizer.accumulate=3 tokenizer.vocab_size=4096
data.batch_size=x optimizer.warmup_steps=101 mesh.tensor=3
optimizer.acumulate=3 optimizer.accumulate=3
phases=3 mesh.tensor=3 optimizer.accumulate=3
mesh.tensor=3 tokenizer.vocab_size=4096 optimizer.accumulate=3 steps=1 optimizer.warmup_steps=2
phases[0].steps=1 stps=3 optimizer.accumulate=3
steps={1,2} optimizer.accumulate=3
steps=3 steps=many seed=x
steps=many steps=3 seed=x
"""  # noqa: E501
PHASE_OVERRIDES = """
steps=7
steps=7 phases[0].steps=5
data.batch_size=4
data={'name':'python_stdlib','sequence_length':64,'batch_size':8}
optimizer.name=adamw optimizer.learning_rate=1
phases[1].name=first
phases[1].name=first phases[0].name=first
phases[1].name=first phases[0].name=third phases[1].name=third tokenizer.name=bytes
phases[1].name=2nd
phases[1].name=first tokenizer.name=bytes model.vocab_size=2048
phases[1].optimizer.warmup_steps=101
phases[1].steps=5 phases[1].optimizer.warmup_steps=101 phases[0].steps=3
phases[1].steps=5 phases[0].optimizer.warmup_steps=101
phases[0].optimizer.warmup_steps=101 phases[1].optimizer.warmup_steps=102
phases[1].optimizer.accumulate=3
phases[1].data.batch_size=9 phases[1].optimizer.accumulate=2 phases[0].optimizer.accumulate=4
phases[0].data.batch_size=6 mesh.fsdp=4
mesh.fsdp=16 phases[0].steps=2
phases[0].keep_optimizer=true
phases[1].keep_optimizer=true phases[1].optimizer.frozen=['trunk*']
phases[1].optimizer.frozen=['trunk*'] phases[1].keep_optimizer=true phases[1].optimizer.b1=0.5
phases[0].optimizer.moment_dtype=bfloat16 phases[1].keep_optimizer=true
phases[1].optimizer.name=muon phases[1].keep_optimizer=true phases[0].name=third
evals.loss={'name':'loss'}
evals.loss.name=loss
evals.loss.name=loss phases[1].name=third
evals.loss={'name':'loss','phase':'secnod'}
evals.loss={'name':'loss','phase':'secnod'} phases[0].name=third
evals.loss.name=loss evals.loss.phase=secnod
phases[1].setps=3
phases[1].steps=x phases[0].optimizer.accumulate=3
phases[1].name=first seed=x mesh.tensor=3
phases[2].steps=3
phases[0]=3
phases[0]={'name':'a','steps':1}
phases=[]
model.implementations.one_document=true
model.implementations.one_document=true phases[0].data.packing=none
model.implementations.one_document=true phases[1].data.packing=concat phases[0].data.packing=none
phases[0].data.name=files
phases[0].optimizer.name=adam
phases[0].optimizer=None
tokenizer.vocab_size=4096 phases[1].name=first
"""
MORE = """
rollout.py data.temperature=0.7 data.top_p=0.9 data.top_k=5 data.min_p=0.1
rollout.py data.promts=3
rollout.py data.prompts=0 data.samples=0
rollout.py data.max_tokens=65
rollout.py data.max_tokens=600 data.sequence_length=1024
rollout.py data.samples=1
rollout.py data.samples=1 objective.name=rloo data.filter=zero_variance
rollout.py data.samples=1 objective.name=reinforce_plus_plus
rollout.py data.samples=1 data.prompts=1 objective.name=reinforce_plus_plus
rollout.py data.samples=1 objective.name=policy_gradient
rollout.py data.overlong_penalty=1
rollout.py data.overlong_penalty=1 data.overlong_tokens=200
rollout.py data.max_staleness=-1
rollout.py data.curriculum={'low':0.5,'high':0.5}
rollout.py data.curriculum={'low':0,'high':1}
rollout.py data.curriculum={'floor':0}
rollout.py data.curriculum={'lo':0}
rollout.py data.max_staleness=2 objective.old_logprobs=recomputed
rollout.py data.documents.name=problems
rollout.py data.task={'name':'exact_answer'}
rollout.py data.task={'name':'exact_answer'} data.documents={'name':'problems','form':'chat'}
rollout.py data.task.name=arithmetics
rollout.py objective.name=next_token
rollout.py objective.name=dpo
rollout.py objective.name=grop
rollout.py objective.name=dr_grpo
rollout.py tokenizer.name=bpe
rollout.py evals.loss.name=loss
rollout.py evals.code={'name':'generate','task':{'name':'python_functions'}}
rollout.py optimizer.accumulate=3
rollout.py optimizer.spikes.policy=rewind
rollout.py data.batch_size=6 mesh.fsdp=4
rollout.py model.implementations.one_document=true
rollout.py objective={'name':'distillation'}
taught.py objective.teacher=
taught.py objective.beta=1.5
taught.py objective.temperature=0
taught.py objective.top_k=8
taught.py objective.beta=0 objective.top_k=4096
taught.py objective.tecaher=x
taught.py objective.name=grpo
taught.py data.on_policy_share=1
taught.py data.off_policy.batch_size=4
taught.py data.off_policy.sequence_length=32 data.off_policy.name=problem
taught.py data.overlong_penalty=1 data.overlong_tokens=4
taught.py data.max_tokens=600
taught.py data.packing=none model.implementations.one_document=true
taught.py tokenizer.name=bpe
taught.py optimizer.spikes.policy=skip
taught.py evals.loss.name=loss
rewarded.py evals.loss={'name':'loss','phase':'second'}
rewarded.py evals.loss={'name':'loss','phase':'first'}
rewarded.py phases[1].data.max_tokens=63 sampling.max_length=60
rewarded.py phases[0].objective.name=grpo
rewarded.py phases[1].objective.name=next_token
run.py objective.name=grpo
run.py objective.name=dpo data.tokenize=on_the_fly
run.py objective.name=dpo objective.desirable_weight=2
run.py objective.name=ipo objective.margin=1
run.py objective.name=kto objective.reference=none
run.py objective.name=kto data.packing=none
run.py objective.name=preference objective.smoothing=robust
evals.py model.implementations.attention=cudnn
evals.py model.implementations.attention=cudnn evals.heldout.every=3
evals.py sampling.max_length=100 sampling.max_tokens=50 evals.code.max_tokens=200
evals.py evals.code.max_tokens=200 evals.code.strategy.name=budget_forcing
evals.py sampling.max_length=90 sampling.max_tokens=50 evals.code.strategy.name=budget_forcing
evals.py sampling.max_length=90 sampling.max_tokens=50 evals.code.strategy.name=vote
evals.py evals.code.max_tokens=600 evals.code.temperature=1
evals.py evals.code.min_tokens=97
evals.py evals.code.logit_bias={2048:1.0} evals.code.ignore_eos=1
evals.py evals.code.logit_bias={2048:1.0}
evals.py evals.code.phase=first
evals.py evals.heldout.phase=first evals.code.phase=second phases=[]
evals.py phases=[{'name':'a','steps':1},{'name':'b'}]
phased_evals.py phases[0].name=third
phased_evals.py phases[0].name=second
phased_evals.py evals.heldout.phase=
phased_evals.py evals.heldout.phase=frist
phased_evals.py evals.heldout.name=generate
segments.py mesh.tensor=4
segments.py mesh.tensor=3 model.segments[0].pattern[0].num_kv_heads=1
segments.py mesh.tensor=4 model.segments[0].pattern[1].num_heads=8 model.segments[0].pattern[0].window=4
segments.py model.num_layers=3
segments.py model.segments[0].repeats=2
segments.py model.segments[0].repeats=2 model.segments[0].pattern[0].window=4
segments.py model.segments[0].pattern[0].num_heads=3
segments.py model.segments[1].repeats=2
mixture.py data.weights.c=1
mixture.py data.sources.c.name=python_stdlib
mixture.py data.weights={'a':1} seed=3
mixture.py data.weights.a=0
mixture.py data.sources.b.kinds=['add']
mixture.py data.sources={}
mixture.py data.sources.b.path=x
after.py model.lora.rank=4
after.py model.lora.alpha=3 model.lora.rank=9
after.py model.lora.targets=['all']
after.py model.vocab_size=4 mesh.tensor=3
after.py tokenizer.name=bites
after.py tokenizer.pth=x
after.py model.num_layers=3 model.segments=[{'pattern':[],'repeats':1}]
after.py init_from=
after.py init_from=nobody
after.py init_from=broken
after.py init_from=broken checkpoint.directory=s3://bucket/run
after.py init_from=nobody checkpoint.directory=s3://bucket/run
after.py model.lora.path=adapters
after.py model.lora.path=adapters checkpoint.directory=s3://bucket/run
after.py model.wdth=4 init_from=earlier
after.py model.block.num_heads=3
after_bytes.py model.block.num_heads=3 tokenizer.special_tokens=a
after_bytes.py model.vocab_size=100
after_bytes.py model.name=transformr
nowhere.py
nowhere.py model.embed_dim=x
no_steps.py
no_steps.py data=None
no_data.py
no_data.py data.batch_size=3
no_optimizer.py
no_optimizer.py optimizer.learning_rate=1
only_model.py
only_model.py steps=3
empty.py
empty.py steps=3
unknown_keys.py
unknown_keys.py optimizer.accumulate=3
types.py
types.py steps=3 mesh.tensor=3
choices.py
odd_values.py
several.py
several.py optimizer.accumulate=5 mesh.tensor=5 steps=4
broken_and_unfit.py
broken_and_unfit.py optimizer.accumulate=5 steps=3
several_phases.py
several_phases.py phases[1].name=three phases[2].optimizer.accumulate=5
several_phases.py phases[2].name=one evals.b.phase=twoo
undefined.py
unclosed.py
imports.py
number.py
needs.py
raises.py:huge
raises.py
run.py:smoke
quikstart.py:smoke
nowhere/quickstart.py
text
broken
configs/lifecycle.py:smok
configs/lifecycle.py:smoke phases[1].name=pretrain
configs/lifecycle.py:smoke phases[1].name=pretrain tokenizer.name=bytes evals.problems.phase=pretrain
configs/lifecycle.py:smoke tokenizer.name=bpe
configs/lifecycle.py:smoke phases[0].optimizer.momentm=3 phases[1].steps=3
configs/lifecycle.py:smoke phases[0].data.kinds=['add']
configs/lifecycle.py:smoke sampling.max_length=16 sampling.max_tokens=8
configs/lifecycle.py:smoke evals.problems.task.name=exact
configs/lifecycle.py model.block.num_kv_heads=4 model.block.num_heads=2
configs/quickstart.py model.implementations.attention=cudnn model.implementations.one_document=true
configs/quickstart.py model.implementations.attention=fa4
configs/quickstart.py tokenizer.vocab_size=4096 evals.functions.max_tokens=256
configs/quickstart.py phases=[{'name':'a','steps':1}]
configs/quickstart.py:smoke steps=2
configs/sft.py init_from=earlier
configs/sft.py init_from=nobody data.path=my.jsonl
configs/sft.py:smoke tokenizer.name=bpe
configs/pretrained.py
configs/pretrained.py steps=3 init_from=earlier
configs/pretrained.py init_from=earlier sampling.max_tokens=4096
configs/pretrained.py init_from=earlier evals.a.name=loss evals.a.phase=x
configs/llama_1b.py mesh.tensor=16
configs/llama_8b.py model.vocab_size=100
"""  # noqa: E501
# Invalid command lines, split at spaces.
USAGE = """
--config
--config=
--config --mode
--config.steps
--config.steps --seed
--config=a.py --config=b.py
"""
MESHES = [
    ('run.py', {'fsdp': 16}),
    ('run.py', {'fsdp': 3, 'tensor': 3}),
    ('phases.py', {'fsdp': 16, 'tensor': 8}),
    ('evals.py', {'replica': 3, 'fsdp': 1}),
]
RESUMED = [
    ({'steps': 200}, []),
    ({'steps': 200, 'seed': 3, 'optimizer': ADAMW | {'name': 'muon'}}, ['seed']),
    ({'model': MODEL | {'num_layers': 4}, 'steps': 3}, ['steps']),
    ({'data': DATA | {'batch_size': 16}, 'checkpoint': {'directory': 'elsewhere'}}, []),
    ({'model': MODEL | {'segments': [{'pattern': [BLOCK], 'repeats': 2}]}}, []),
    ({}, ['model']),
    ({}, ['optimiser']),
]
RECORDS = {
    'absent.json': None,
    'cut.json': '{"steps": ',
    'list.json': '[]',
    'old_key.json': json.dumps(RUN | {'old_key': 1}),
    'unfit.json': json.dumps(RUN | {'optimizer': ADAMW | {'accumulate': 3}, 'steps': 2.5}),
    'several.json': json.dumps(FILES['several.py']),
    'several_phases.json': json.dumps(FILES['several_phases.py']),
}


def write_files(directory: Path) -> None:
    """Writes every file that the command lines name into an empty directory."""
    (directory / 'configs').symlink_to(ROOT / 'configs')
    bodies = {name: ('', f'return {values!r}') for name, values in FILES.items()} | BODIES
    for name, (signature, body) in bodies.items():
        text = f'inf = float("inf")\ndef get_config({signature}):\n    {body}\n'
        (directory / name).write_text(text)
    (directory / 'text').write_text('config = {}\n')
    for name in ('earlier', 'broken'):
        (directory / name).mkdir()
    (directory / 'earlier' / 'config.json').write_text(RunConfig(**EARLIER).model_dump_json())
    (directory / 'broken' / 'config.json').write_text('{"model": ')
    for name, text in RECORDS.items():
        if text is not None:
            (directory / name).write_text(text)


def message(call, *arguments) -> list[str]:
    """The lines of the error that a call raises, preceded by its type unless it is ConfigError."""
    try:
        call(*arguments)
    except errors.RunError as error:
        kind = type(error).__name__
        return ([] if kind == 'ConfigError' else [kind]) + str(error).splitlines()
    except ValueError as error:
        return ['ValueError', *(line['msg'] for line in error.errors())]
    return ['accepted']


def load(line: str) -> list[str]:
    file, *overrides = line.split(' ')
    return message(load_config, file, overrides)


def lines(text: str, file: str = '') -> list[str]:
    return [f'{file} {line}'.strip() for line in text.strip().splitlines()]


def check_mesh(file: str, sizes: dict) -> list[str]:
    return message(lambda: check_on_mesh(load_config(file), sizes))


def resume(changes: dict, allowed: list[str]) -> list[str]:
    return message(lambda: check_resume(RunConfig(**RUN), RunConfig(**(RUN | changes)), allowed))


def build(values: dict) -> list[str]:
    return message(lambda: RunConfig(**values))


# {group: {command line or other input: the lines of its message}}
GROUPS = {
    'run': lambda: {line: load(line) for line in lines(RUN_OVERRIDES, 'run.py')},
    'phases': lambda: {line: load(line) for line in lines(PHASE_OVERRIDES, 'phases.py')},
    'more': lambda: {line: load(line) for line in lines(MORE)},
    'usage': lambda: {line: message(split_arguments, line.split(' ')) for line in lines(USAGE)},
    'mesh': lambda: {f'{file} {sizes}': check_mesh(file, sizes) for file, sizes in MESHES},
    'resume': lambda: {f'{c} {allowed}': resume(c, allowed) for c, allowed in RESUMED},
    'record': lambda: {name: message(read_config, name) for name in RECORDS},
    'direct': lambda: {
        name: build(FILES[name])
        for name in ('several.py', 'several_phases.py', 'no_data.py', 'broken_and_unfit.py')
    },
}


@contextlib.contextmanager
def files():
    """Changes into a temporary directory that holds the files."""
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
        write_files(Path(name))
        yield


def collect() -> dict:
    """{group: {command line or other input: the lines of its message}}"""
    with files():
        return {group: make() for group, make in GROUPS.items()}


@pytest.fixture(scope='module')
def problems():
    """The problems that were reported while `found` was collected."""
    return []


@pytest.fixture(scope='module')
def found(problems):
    def record(problem, given):
        problems.append(problem)
        return find_sources(problem, given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('jaxfm.config.load.find_sources', record)
        return collect()


@pytest.mark.parametrize('group', GROUPS)
def test_messages_equal_the_golden(group, found):
    assert found[group] == json.loads(GOLDEN.read_text())[group]


def is_value(path) -> bool:
    """Whether the schema of a run has a key at this path."""
    kinds = [RunConfig]
    for part in path:
        kinds = select_kinds(kinds, part)
        if not kinds:
            return False
    return True


def test_problems_have_paths_that_exist_in_the_schema(found, problems):
    """A misspelt path would never match an override."""
    known = [problem for problem in problems if not problem.is_unknown_key]
    assert len(known) > 300
    assert [problem for problem in known if not all(map(is_value, problem.paths))] == []
    assert [problem for problem in known if not problem.paths] == []


def test_the_golden_has_no_other_groups():
    assert json.loads(GOLDEN.read_text()).keys() == GROUPS.keys()


def write_golden() -> None:
    GOLDEN.write_text(json.dumps(collect(), indent=1, ensure_ascii=False) + '\n')


if __name__ == '__main__':
    write_golden()
