"""Attention and cross-entropy of other libraries, if installed, with one signature.

attention: (q_BTNH, k_BSKH, v_BSKH, rows, scale) -> out, where `rows` describes the documents.
"""

import importlib
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np

from jaxfm.ops.logprobs import Unembedding, token_logprobs
from tools.bench.gpu import documents, references
from tools.bench.gpu.stages import Refused


class Rows:
    """Rows of documents, in the forms that the libraries take. window: 0 means no limit."""

    def __init__(self, lengths: list[list[int]], window: int = 0):
        self.lengths, self.window = lengths, window
        self.tokens = sum(lengths[0])
        self.positions, self.segments = map(jnp.asarray, documents.places(lengths, self.tokens))
        self.is_packed = any(len(row) > 1 for row in lengths)

    @property
    def places(self):
        """The four arrays that our kernels take."""
        return (self.positions, self.segments) * 2

    @property
    def mask_BTS(self):
        return references.visible(*self.places, self.window)

    @property
    def starts(self):
        """Offsets of all documents with the rows concatenated, and the end of the last."""
        flat = [length for row in self.lengths for length in row]
        return jnp.asarray(np.concatenate([[0], np.cumsum(flat)]), jnp.int32)


def import_installed(package: str):
    """Imports a package; raises Refused if it is not installed."""
    if importlib.util.find_spec(package) is None:
        raise Refused(f'{package} is not installed')
    return importlib.import_module(package)


def xla(q, k, v, rows: Rows, scale: float):
    return references.attention(q, k, v, rows.mask_BTS, scale=scale)[0]


def cudnn(q, k, v, rows: Rows, scale: float):
    if rows.is_packed:
        raise Refused('jax has no public API for packed documents with cuDNN')
    if jax.default_backend() != 'gpu':
        raise Refused('cuDNN needs a GPU')
    window = (rows.window - 1, 0) if rows.window else None
    return jax.nn.dot_product_attention(
        q, k, v, scale=scale, is_causal=True, local_window_size=window, implementation='cudnn'
    )


def tokamax(q, k, v, rows: Rows, scale: float):
    library = import_installed('tokamax')
    window = (rows.window - 1, 0) if rows.window else None
    mask = rows.mask_BTS[:, None] if rows.is_packed else None
    return library.dot_product_attention(
        q,
        k,
        v,
        mask=mask,
        scale=scale,
        is_causal=True,
        local_window_size=window,
        implementation='mosaic',
    )


def fa3(q, k, v, rows: Rows, scale: float):
    library = import_installed('flash_attn3_jax')
    window = (rows.window - 1, 0) if rows.window else (-1, -1)
    options = dict(softmax_scale=float(scale), is_causal=True, window_size=window)
    if not rows.is_packed:
        return library.flash_mha(q, k, v, **options)
    longest = max(length for row in rows.lengths for length in row)
    flat = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
    out = library.flash_mha_varlen(
        *flat, rows.starts, max_seqlen_q=longest, max_seqlen_k=longest, **options
    )
    return out.reshape(q.shape)


ATTENTION = {'xla': xla, 'cudnn': cudnn, 'fa3': fa3, 'tokamax': tokamax}


def tokamax_rms_norm(x, scale, residual, epsilon: float):
    total = x + residual
    normed = import_installed('tokamax').layer_norm(
        total, scale, None, epsilon=epsilon, subtract_mean=False
    )
    return normed, total


def tokamax_cross_entropy(hidden, weight, targets):
    library = import_installed('tokamax')
    return library.linear_softmax_cross_entropy_loss(
        hidden, targets, weight.T, reduction='sum', implementation='chunked_xla'
    )


def naive_cross_entropy(hidden, weight, targets):
    """Makes all the logits at once."""
    logsumexp, picked = references.cross_entropy(
        hidden, weight, targets, vocab_size=weight.shape[0]
    )
    return jnp.sum(logsumexp - picked)


def ours(name: str):
    """The chunked op as objectives call it, with this implementation."""

    def loss(hidden, weight, targets):
        unembedding = Unembedding(weight, weight.shape[0], implementation=name)
        logprobs, _ = token_logprobs(hidden[None], unembedding, targets[None])
        return -jnp.sum(logprobs)

    return loss


CROSS_ENTROPY = {
    'naive': naive_cross_entropy,
    'xla': ours('xla'),
    'tokamax': tokamax_cross_entropy,
    'interpret': ours('interpret'),
    'mosaic': ours('mosaic'),
}
