"""Batches of chats that are compared: pairs, and chats with a label."""

import json

import numpy as np
import pytest

from jaxfm.chat.render import Chat
from jaxfm.data import FilesData, ProblemsData
from jaxfm.data.corpus.encode import encode_documents
from jaxfm.data.corpus.token_cache import COUNTS, WORSE
from jaxfm.data.dataset import open_dataset
from jaxfm.data.documents import Document
from jaxfm.data.packing.rows import COMPARED_DTYPES
from jaxfm.errors import ConfigError, DataError
from jaxfm.tokenizer import BytesConfig
from jaxfm.tokenizer.build import build_tokenizer

T = 128
TOKENIZER = build_tokenizer(BytesConfig(), ())


def write(path, records):
    path.write_text(''.join(json.dumps(record) + '\n' for record in records), 'utf-8')
    return str(path)


@pytest.fixture
def open_records(tmp_path):
    def make(records, tokenizer=TOKENIZER, **options):
        options = {'sequence_length': T, 'batch_size': 4, 'heldout_fraction': 0.2} | options
        config = FilesData(path=write(tmp_path / 'a.jsonl', records), **options)
        return open_dataset(config, tokenizer, tmp_path / 'cache')

    return make


def pairs(count=40):
    turns = [
        {'role': 'user', 'content': 'Hi!'},
        {'role': 'assistant', 'content': 'Yes?'},
    ]
    return [
        {
            'prompt': [*turns[: n % 3], {'role': 'user', 'content': f'{n}?'}],
            'chosen': 'good' * (1 + n % 3),
            'rejected': 'bad' * (1 + n % 2),
        }
        for n in range(count)
    ]


def expected(document):
    """[(inputs, targets, target that count, side)] of the chats of a document."""
    chat, found = Chat(TOKENIZER), []
    given = chat.prompt(document.messages[: document.num_given])
    sides = [(document.messages, -1 if document.is_wanted is False else 1)]
    sides += [(document.rejected, -1)] if document.rejected else []
    for messages, side in sides:
        ids, mask = chat.encode(messages)
        mask[: len(given)] = False
        found.append((ids.tolist(), mask.tolist(), side))
    return found


def chats_in(batch):
    """{(row, pair): [(inputs, targets that count, side)]} of a batch, in order."""
    found = {}
    for row in range(len(batch['tokens'])):
        segments = batch['segment_ids'][row]
        for segment in range(1, segments.max() + 1):
            (slots,) = np.nonzero(segments == segment)
            assert (np.diff(slots) == 1).all()
            one = {name: array[row, slots] for name, array in batch.items()}
            np.testing.assert_array_equal(one['positions'], np.arange(len(slots)))
            (pair,) = set(one['pair_ids'].tolist())
            np.testing.assert_array_equal(one['sides'] != 0, one['loss_mask'] != 0)
            (side,) = set(one['sides'][one['loss_mask'] == 1].tolist())
            # The last input has no target.
            np.testing.assert_array_equal(one['targets'][:-1], one['tokens'][1:])
            assert one['targets'][-1] == one['loss_mask'][-1] == 0
            mask = [False, *(one['loss_mask'][:-1] == 1).tolist()]
            found.setdefault((row, pair), []).append((one['tokens'].tolist(), mask, side))
    return found


# A prompt asks for an answer without a thought, and earlier turns are rendered without one.
THINKING = """{%- for m in messages -%}
<|{{ m.role }}|>
{%- if m.role == 'assistant' and loop.last -%}
<think>{{ m.reasoning_content or '' }}</think>
{%- endif -%}
{{ m.content }}<|end|>
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|><think></think>{%- endif -%}"""


def test_all_of_an_answer_counts_whatever_a_prompt_ends_with(tmp_path):
    path = tmp_path / 'thinking.jinja'
    path.write_text(THINKING, 'utf-8')
    special = ['<|user|>', '<|assistant|>', '<think>', '</think>', '<|end|>']
    tokenizer = build_tokenizer(BytesConfig(chat_template=str(path), special_tokens=special), ())
    asked, again = ({'role': 'user', 'content': text} for text in ('Who?', 'Why?'))
    first = {'role': 'assistant', 'content': 'Yes.'}
    good = {'role': 'assistant', 'content': 'Me.', 'reasoning_content': 'Hm'}
    bad = {'role': 'assistant', 'content': 'I.'}
    for turns, counted in (
        (((asked, good), (asked, bad), 1), ['Hm</think>Me.<|end|>', 'I.<|end|>']),
        (
            ((asked, first, again, good), (asked, first, again, bad), 3),
            ['Hm</think>Me.<|end|>', 'I.<|end|>'],
        ),
        (((asked, first, again, good), (asked, bad), 1), ['Yes.<|end|>Hm</think>Me.<|end|>', None]),
    ):
        chosen, rejected, num_given = turns
        document = Document('x', messages=chosen, rejected=rejected, num_given=num_given)
        ((_, _, ids, mask),) = encode_documents([(False, document)], tokenizer, pytest.fail)
        for text, worse in zip(counted, (0, WORSE)):
            some = ids[(mask & COUNTS > 0) & (mask & WORSE == worse)]
            found = tokenizer.decode(some, skip_special_tokens=False)
            assert text is None or found.removeprefix('</think>') == text


@pytest.mark.parametrize('packing', ['auto', 'none'])
def test_rows_hold_whole_pairs_of_two_segments(open_records, packing):
    dataset = open_records(pairs(), packing=packing, sequence_length=2 * T)
    assert {cache.kind for cache in dataset.heldout.values()} == {'pair'}
    (packed,) = dataset.packings.values()
    batch = packed.rows(np.arange(packed.num_rows))
    assert {name: array.dtype for name, array in batch.items()} == COMPARED_DTYPES
    found = chats_in(batch)
    (source,) = dataset.sources.values()
    assert len(found) == source.train.num_documents
    assert all(len(chats) == 2 for chats in found.values())
    if packing == 'none':
        assert len(found) == packed.num_rows
    else:
        assert packed.num_rows < len(found) / 1.5
    padding = batch['segment_ids'] == 0
    assert all((array[padding] == 0).all() for array in batch.values())
    # The held-out documents are kept as text, so their ids can be made again.
    heldout = source.heldout
    for document, start, stop in zip(
        source.heldout_documents, heldout.offsets[:-1], heldout.offsets[1:]
    ):
        wanted = expected(document)
        ids = [id for chat, _, _ in wanted for id in chat]
        assert heldout.tokens[start:stop].tolist() == ids
        counted = [counts for _, mask, _ in wanted for counts in mask]
        assert ((heldout.mask[start:stop] & 1) == counted).all()


def test_train_rows_are_the_pairs_of_the_file(open_records):
    records = pairs()
    dataset = open_records(records)
    (packed,) = dataset.packings.values()
    found = chats_in(packed.rows(np.arange(packed.num_rows)))
    (source,) = dataset.sources.values()
    from jaxfm.data import FieldsConfig
    from jaxfm.data.sources.records import to_document

    documents = [to_document(record, FieldsConfig(), 'x') for record in records]
    heldout = {(one.messages, one.rejected) for one in map(freeze, source.heldout_documents)}
    left = [d for d in documents if (freeze(d).messages, freeze(d).rejected) not in heldout]
    key = lambda chats: str(chats)  # noqa: E731
    assert sorted(found.values(), key=key) == sorted(map(expected, left), key=key)


def freeze(document):
    import dataclasses

    return dataclasses.replace(
        document, messages=json.dumps(document.messages), rejected=json.dumps(document.rejected)
    )


def test_labels_are_sides(open_records):
    records = [
        {'prompt': f'{n}?', 'completion': 'x' * (1 + n % 5), 'label': n % 2 == 0} for n in range(40)
    ]
    dataset = open_records(records)
    (packed,) = dataset.packings.values()
    found = chats_in(packed.rows(np.arange(packed.num_rows)))
    for ((ids, mask, side),) in found.values():
        prompt = TOKENIZER.decode([id for id, counts in zip(ids, mask) if not counts])
        number = int(''.join(letter for letter in prompt if letter.isdigit()))
        assert side == (1 if number % 2 == 0 else -1)


def test_generated_pairs_differ_in_one_letter(tmp_path):
    config = ProblemsData(
        form='pairs', num_problems=60, num_heldout=12, sequence_length=2 * T, batch_size=4
    )
    dataset = open_dataset(config, TOKENIZER, tmp_path)
    for document in dataset.heldout_documents:
        good, bad = document.messages[-1]['content'], document.rejected[-1]['content']
        assert len(good) == len(bad) and sum(a != b for a, b in zip(good, bad)) == 1
        assert document.messages[:-1] == document.rejected[:-1]


def test_the_worse_side_of_a_pair_is_never_cut(open_records):
    with pytest.raises(ConfigError, match="too_long='truncate' would cut only the worse"):
        open_records(pairs(), too_long='truncate')
    with pytest.raises(
        DataError, match="pairs are longer than a row of 16.*config.data.too_long='drop'$"
    ):
        open_records(pairs(), sequence_length=16)


def test_sides_that_their_template_makes_equal_are_refused(open_records, tmp_path):
    path = tmp_path / 'trims.jinja'
    path.write_text('{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}\n{% endfor %}')
    tokenizer = build_tokenizer(BytesConfig(chat_template=str(path)), ())
    records = [*pairs(), {'prompt': 'x?', 'chosen': 'Yes.', 'rejected': 'Yes. '}]
    with pytest.raises(DataError, match='a.jsonl:41: chosen and rejected are the same tokens'):
        open_records(records, tokenizer=tokenizer)
    assert open_records(records, tokenizer=tokenizer, max_bad_records=1)


def test_pairs_are_not_read_on_the_fly(open_records):
    with pytest.raises(ConfigError, match='a pair of chosen and rejected: set config.data.token'):
        open_records(pairs(), tokenize='on_the_fly')


def test_a_source_has_one_kind_of_documents(open_records):
    records = [*pairs(), {'prompt': 'a', 'completion': 'b'}]
    with pytest.raises(DataError, match='is a chat, .* is a pair of chosen and rejected'):
        open_records(records)
