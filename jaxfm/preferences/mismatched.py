"""Prompts with the answers to other prompts, for KTO's estimate of the divergence.

How far the policy is from the reference is measured on answers that do not belong to their prompts
(Ethayarajh et al. 2024, section 4.1). They are those of the same row, so they fit into a row again,
and are the same whenever that row comes.
"""

import numpy as np


def mismatched_rows(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Rows in which each prompt is followed by an answer to the prompt of another document.

    Args:
      batch: the arrays of `jaxfm.data.packing.rows.COMPARED_DTYPES`, each [n, T].

    Returns tokens, targets, positions, segment_ids and loss_mask, each [n, T]. Each document of a
    row gets the answers of the next one. A row with one document is empty.
    """
    names = ('tokens', 'targets', 'positions', 'segment_ids', 'loss_mask')
    made = {name: np.zeros_like(batch[name]) for name in names}
    for row in range(len(batch['tokens'])):
        _fill({name: array[row] for name, array in made.items()}, _chats(batch, row))
    return made


def _chats(batch: dict[str, np.ndarray], row: int) -> list[list[tuple]]:
    """[chats of a document: (inputs before the answer, inputs of it, its targets that count)]."""
    segments, pairs = batch['segment_ids'][row], batch['pair_ids'][row]
    tokens, mask = batch['tokens'][row], batch['loss_mask'][row]
    documents: dict[int, list] = {}
    for segment in range(1, segments.max(initial=0) + 1):
        (slots,) = np.nonzero(segments == segment)
        first, last = slots[0], slots[-1] + 1
        answer = first + int(np.argmax(mask[first:last])) + 1  # the first input of the answer
        chat = tokens[first:answer], tokens[answer:last], mask[answer - 1 : last - 1]
        documents.setdefault(int(pairs[first]), []).append(chat)
    return list(documents.values())


def _fill(out: dict[str, np.ndarray], documents: list[list[tuple]]) -> None:
    """Fills the arrays of one row."""
    if len(documents) < 2:
        return
    start, segment = 0, 0
    for own, other in zip(documents, [*documents[1:], documents[0]]):
        for number, (_, answer, counts) in enumerate(other):
            prompt = own[number % len(own)][0]
            ids = np.concatenate([prompt, answer])
            segment, stop = segment + 1, start + len(ids)
            out['tokens'][start:stop] = ids
            out['targets'][start : stop - 1] = ids[1:]
            out['positions'][start:stop] = np.arange(len(ids))
            out['segment_ids'][start:stop] = segment
            out['loss_mask'][start + len(prompt) - 1 : stop - 1] = counts
            start = stop
