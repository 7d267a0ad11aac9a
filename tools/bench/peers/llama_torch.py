"""Trains a Llama in PyTorch at its best settings, as the peer of `tools.bench.gpu --part train`.

It needs torch and numpy, and none of our code: model, shape, settings and initial weights come from
the command line, and each setting writes one line of JSON to --rows. Weights are stored in float32
and multiplied in bfloat16 (autocast; on a CPU, float32 throughout). AdamW is fused; q, k, v and
gate, up are one matrix each; no activations are recomputed.

Settings: sdpa (cudnn, flash, fa3, math); compile (blocks, model, none); loss (chunked: gradients
are computed in the forward pass, one chunk of tokens at a time; library: torch's
linear_cross_entropy; whole: all logits at once).
"""

import argparse
import contextlib
import fnmatch
import gc
import json
import math
import statistics
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
COMPUTE = torch.bfloat16 if DEVICE == 'cuda' else torch.float32
CHUNK_BYTES = 1 << 30  # logits of a chunk in the compute dtype
BACKENDS = {
    'cudnn': SDPBackend.CUDNN_ATTENTION,
    'flash': SDPBackend.FLASH_ATTENTION,
    'fa3': SDPBackend.FLASH_ATTENTION,
    'math': SDPBackend.MATH,
}


class NotAvailable(Exception):
    pass


def rope_tables(model: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [T, H / 2] with Llama 3's scaling; the two halves of a head rotate together."""
    rope, dim = model['rope'], model['head_dim']
    frequencies = rope['theta'] ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    if rope['scaling'] == 'llama3':
        turns = rope['original_max_position'] * frequencies / (2 * np.pi)
        low, high = rope['low_freq_factor'], rope['high_freq_factor']
        ramp = np.clip((turns - low) / (high - low), 0, 1)
        frequencies = frequencies * (ramp + (1 - ramp) / rope['factor'])
    angles = np.outer(np.arange(model['sequence_length']), frequencies)
    return tuple(
        torch.tensor(table, dtype=torch.float32, device=DEVICE)
        for table in (np.cos(angles), np.sin(angles))
    )


def rotate(x, cos, sin):
    """x [B, T, N, H]."""
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos[None, :, None], sin[None, :, None]
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return rotated.to(x.dtype)


class Norm(nn.Module):
    def __init__(self, size: int, epsilon: float):
        super().__init__()
        self.weight, self.epsilon = nn.Parameter(torch.ones(size)), epsilon

    def forward(self, x):
        wide = x.float()
        inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.epsilon)
        return (wide * inverse * self.weight).to(x.dtype)


class Block(nn.Module):
    def __init__(self, model: dict):
        super().__init__()
        D, H = model['embed_dim'], model['head_dim']
        self.heads = model['num_heads'], model['num_kv_heads'], H
        N, K, _ = self.heads
        self.qkv = nn.Linear(D, (N + 2 * K) * H, bias=False)
        self.out = nn.Linear(N * H, D, bias=False)
        self.gate_up = nn.Linear(D, 2 * model['mlp_dim'], bias=False)
        self.down = nn.Linear(model['mlp_dim'], D, bias=False)
        self.attention_norm = Norm(D, model['norm_epsilon'])
        self.mlp_norm = Norm(D, model['norm_epsilon'])
        self.repeat_keys = False

    def forward(self, x, cos, sin):
        N, K, H = self.heads
        q, k, v = (
            part.unflatten(-1, (-1, H))
            for part in self.qkv(self.attention_norm(x)).split([N * H, K * H, K * H], dim=-1)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if self.repeat_keys:
            k, v = (part.repeat_interleave(N // K, dim=2) for part in (k, v))
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        heads = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=not self.repeat_keys and K < N
        )
        x = x + self.out(heads.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class Llama(nn.Module):
    """Tokens -> hidden states; the embedding table is also the output projection."""

    def __init__(self, model: dict):
        super().__init__()
        self.embedding = nn.Embedding(model['vocab_size'], model['embed_dim'])
        self.blocks = nn.ModuleList(Block(model) for _ in range(model['num_layers']))
        self.norm = Norm(model['embed_dim'], model['norm_epsilon'])

    def forward(self, tokens, cos, sin):
        x = self.embedding(tokens).to(COMPUTE)
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.norm(x)


def load(llama: Llama, directory: Path) -> None:
    """Loads initial weights that are named like ours: stacked over layers, [inputs, outputs]."""

    def read(name: str):
        return torch.from_numpy(np.load(directory / f'{name}.npy'))

    with torch.no_grad():
        llama.embedding.weight.copy_(read('embedding.table'))
        llama.norm.weight.copy_(read('final_norm.scale'))
        stacks = {
            name: read(f'trunk.0.0.{name}')
            for name in (
                *('attention.q', 'attention.k', 'attention.v', 'attention.out'),
                *('mlp.gate_up', 'mlp.down', 'pre_attention.scale', 'pre_mlp.scale'),
            )
        }
        for index, block in enumerate(llama.blocks):
            layer = {name: stack[index] for name, stack in stacks.items()}
            qkv = [layer[f'attention.{name}'].flatten(1) for name in 'qkv']
            block.qkv.weight.copy_(torch.cat(qkv, dim=1).T)
            block.out.weight.copy_(layer['attention.out'].flatten(0, 1).T)
            block.gate_up.weight.copy_(layer['mlp.gate_up'].flatten(1).T)
            block.down.weight.copy_(layer['mlp.down'].T)
            block.attention_norm.weight.copy_(layer['pre_attention.scale'])
            block.mlp_norm.weight.copy_(layer['pre_mlp.scale'])


def initialise(llama: Llama) -> None:
    """Draws random weights with the same spread as ours, if no weights are given."""
    for weight in llama.parameters():
        if weight.ndim > 1:
            std = weight.shape[-1] ** -0.5
            nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


def chunk_gradient(hidden, weight, targets, scale):
    """The loss of a chunk of tokens, and the gradients of its logits and hidden states."""
    logits = (hidden @ weight.T).float()
    logsumexp = torch.logsumexp(logits, dim=-1, keepdim=True)
    loss = (logsumexp - logits.gather(1, targets[:, None])).sum()
    is_target = torch.arange(logits.shape[1], device=logits.device)[None] == targets[:, None]
    gradient = (torch.exp(logits - logsumexp) - is_target.float()) * scale
    gradient = gradient.to(hidden.dtype)
    return loss, gradient, gradient @ weight


class ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy; the forward pass computes the gradients, with three matrix products.

    The gradient of the weight is summed in float32.
    """

    function = staticmethod(chunk_gradient)

    @staticmethod
    def forward(ctx, hidden, weight, targets):
        used = weight.to(hidden.dtype)
        total = torch.zeros((), device=hidden.device)
        hidden_gradient = torch.empty_like(hidden)
        weight_gradient = torch.zeros_like(weight)
        size = max(1, CHUNK_BYTES // (used.element_size() * used.shape[0]))
        for start in range(0, len(hidden), size):
            part = slice(start, start + size)
            loss, gradient, hidden_gradient[part] = ChunkedCrossEntropy.function(
                hidden[part], used, targets[part], 1 / len(hidden)
            )
            total += loss
            if hidden.dtype == torch.float32:
                weight_gradient.addmm_(gradient.T, hidden[part])
            else:
                weight_gradient += torch.mm(gradient.T, hidden[part], out_dtype=torch.float32)
        ctx.save_for_backward(hidden_gradient, weight_gradient)
        return total / len(hidden)

    @staticmethod
    def backward(ctx, upstream):
        hidden_gradient, weight_gradient = ctx.saved_tensors
        return (
            hidden_gradient * upstream.to(hidden_gradient.dtype),
            weight_gradient * upstream,
            None,
        )


def whole_loss(hidden, weight, targets):
    return F.cross_entropy((hidden @ weight.to(hidden.dtype).T).float(), targets)


def make_loss(name: str, compiled: bool):
    if name == 'chunked':
        if compiled:
            ChunkedCrossEntropy.function = staticmethod(
                torch.compile(chunk_gradient, dynamic=False)
            )
        return ChunkedCrossEntropy.apply
    if name == 'whole':
        return torch.compile(whole_loss) if compiled else whole_loss
    if not hasattr(F, 'linear_cross_entropy'):
        raise NotAvailable(f'torch {torch.__version__} has no linear_cross_entropy')
    options = nn.LinearCrossEntropyOptions()
    return lambda hidden, weight, targets: F.linear_cross_entropy(
        hidden, weight.to(hidden.dtype), targets, options=options
    )


@contextlib.contextmanager
def attention_of(sdpa: str):
    """Forces one implementation, without a silent fallback."""
    if sdpa != 'fa3':
        with sdpa_kernel(BACKENDS[sdpa]):
            yield
        return
    try:
        from torch.nn.attention import activate_flash_attention_impl, restore_flash_attention_impl

        activate_flash_attention_impl('FA3')
    except Exception as error:
        raise NotAvailable(f'FA3: {error}') from error
    try:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            yield
    finally:
        restore_flash_attention_impl()


def check_attention(model: dict, sdpa: str) -> bool:
    """Whether grouped queries need repeated keys; raises NotAvailable if the device lacks it."""
    N, K, H = model['num_heads'], model['num_kv_heads'], model['head_dim']
    shapes = [(1, heads, 128, H) for heads in (N, K, K)]
    q, k, v = (torch.randn(s, device=DEVICE, dtype=COMPUTE, requires_grad=True) for s in shapes)
    for repeat in (False, True):
        try:
            used = [x.repeat_interleave(N // K, dim=1) for x in (k, v)] if repeat else (k, v)
            out = F.scaled_dot_product_attention(
                q, *used, is_causal=True, enable_gqa=not repeat and K < N
            )
            out.sum().backward()
            return repeat
        except RuntimeError as error:
            said = str(error).splitlines()[0]
    raise NotAvailable(f'{sdpa}: {said}')


def train(arguments, sdpa: str, compile: str = 'blocks', loss: str = 'chunked') -> dict:
    """Trains with the first number of rows that fits in memory."""
    too_many = []
    for rows in arguments.rows_a_step:
        try:
            measured = train_rows(arguments, rows, sdpa, compile, loss)
        except torch.OutOfMemoryError:
            too_many.append(rows)
        else:
            return measured | ({'out_of_memory_at_rows': too_many} if too_many else {})
        gc.collect()
        torch.cuda.empty_cache()
    raise torch.OutOfMemoryError(f'out of memory at {too_many} rows a step')


def train_rows(arguments, rows: int, sdpa: str, compile: str, loss_name: str) -> dict:
    model, (warm_up, groups, steps) = arguments.model, arguments.steps
    T, start = model['sequence_length'], time.monotonic()
    torch.compiler.reset()
    with torch.device(DEVICE):
        llama = Llama(model)
    if arguments.weights and any(arguments.weights.glob('*.npy')):
        load(llama, arguments.weights)
    else:
        initialise(llama)
    cos, sin = rope_tables(model)
    drawn = np.random.default_rng(0).integers(0, model['vocab_size'], (rows, T + 1))
    drawn = torch.tensor(drawn, device=DEVICE)
    tokens, targets = drawn[:, :-1].contiguous(), drawn[:, 1:].reshape(-1)
    matrices = [p for p in llama.parameters() if p.ndim > 1]
    vectors = [p for p in llama.parameters() if p.ndim == 1]
    decay = arguments.optimizer['weight_decay']
    optimizer = torch.optim.AdamW(
        [{'params': matrices, 'weight_decay': decay}, {'params': vectors, 'weight_decay': 0.0}],
        lr=arguments.optimizer['learning_rate'],
        betas=(0.9, 0.95),
        eps=1e-8,
        fused=True,
    )
    with attention_of(sdpa):
        repeat_keys = check_attention(model, sdpa)
        for block in llama.blocks:
            block.repeat_keys = repeat_keys
        if compile == 'blocks':
            for block in llama.blocks:
                block.compile()
        elif compile == 'model':
            llama.compile()
        cross_entropy = make_loss(loss_name, compile != 'none')

        def step():
            with torch.autocast(DEVICE, COMPUTE, enabled=COMPUTE == torch.bfloat16):
                hidden = llama(tokens, cos, sin).flatten(0, 1)
            loss = cross_entropy(hidden, llama.embedding.weight, targets)
            loss.backward()
            nn.utils.clip_grad_norm_(llama.parameters(), model['clip_norm'], foreach=True)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.detach()

        losses = [step().item() for _ in range(warm_up)]
        compile_seconds, times = time.monotonic() - start, []
        for _ in range(groups):
            synchronize()
            start = time.monotonic()
            for _ in range(steps):
                step()
            synchronize()
            times.append((time.monotonic() - start) / steps)
    speed = rows * T / statistics.median(times)
    memory = torch.cuda.max_memory_allocated() if DEVICE == 'cuda' else None
    return {
        'tokens_per_second': speed,
        'rows': rows,
        'step_seconds': statistics.median(times),
        'spread': [min(times), max(times)],
        'start_seconds': compile_seconds,
        'losses': losses,
        'peak_bytes': memory,
        'keys_repeated': repeat_keys,
    }


def synchronize() -> None:
    if DEVICE == 'cuda':
        torch.cuda.synchronize()


def about() -> dict:
    if DEVICE == 'cpu':
        return {'torch': torch.__version__, 'device': 'cpu'}
    return {
        'torch': torch.__version__,
        'device': torch.cuda.get_device_name(),
        'cudnn': torch.backends.cudnn.version(),
        'cuda': torch.version.cuda,
    }


def attempt(arguments, setting: dict) -> tuple[dict, bool]:
    """Runs a setting; returns (the values of its row, whether the device is broken)."""
    try:
        return train(arguments, **setting), False
    except NotAvailable as error:
        return {'refused': str(error)[:300]}, False
    except torch.OutOfMemoryError:
        return {'failed': 'out of memory'}, False
    except Exception as error:
        text = ' '.join(str(error).split())
        return {'failed': f'{type(error).__name__}: {text[:400]}'}, 'CUDA error' in text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--model', type=json.loads, required=True)
    parser.add_argument('--settings', type=json.loads, required=True, help='{name: setting}')
    parser.add_argument('--optimizer', type=json.loads, required=True)
    parser.add_argument('--steps', type=json.loads, required=True, help='[warm-up, groups, steps]')
    parser.add_argument('--rows_a_step', type=json.loads, required=True, help='tried in order')
    parser.add_argument('--weights', type=Path, help='directory of .npy files')
    parser.add_argument('--only', type=json.loads, default=[], help='glob patterns of names')
    parser.add_argument('--first', type=int, default=0)
    parser.add_argument('--rows', type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_float32_matmul_precision('high')
    torch.manual_seed(0)
    only = arguments.only
    settings = {
        name: setting
        for name, setting in arguments.settings.items()
        if not only or any(fnmatch.fnmatch(name, pattern) for pattern in only)
    }
    with arguments.rows.open('a', encoding='utf-8') as file:

        def write(line: dict) -> None:
            file.write(json.dumps(line) + '\n')
            file.flush()

        write({'about': {'peer': about()}, 'names': list(settings)})
        for name in list(settings)[arguments.first :]:
            values, broken = attempt(arguments, settings[name])
            losses = values.get('losses', [])
            if not all(map(math.isfinite, losses)):
                values = {'failed': f'losses {losses}'}
            write({'name': name, **values})
            gc.collect()
            if DEVICE == 'cuda':
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            if broken:
                return


if __name__ == '__main__':
    main()
