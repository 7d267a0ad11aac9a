"""Which shard a sequence runs in, and what it copies."""

from jaxfm.sampling.request import Request
from jaxfm.sampling.scheduler import Scheduler, Sequence

BOS = 0


def scheduler(num_shards=2, slots=8, num_pages=9, page_size=4):
    return Scheduler(num_shards=num_shards, slots=slots, num_pages=num_pages, page_size=page_size)


def waiting(scheduler, *tokens):
    """Sequences with these prompts, which wait."""
    made = [Sequence(Request(f'{i}', t, 1), t, len(t), 1) for i, t in enumerate(tokens)]
    scheduler.waiting.extend(made)
    return made


def admit_and_store(scheduler):
    copies = scheduler.admit()
    for shard in scheduler.running:
        for sequence in shard:
            scheduler.store(sequence, len(sequence.tokens) - 1)
    return copies


def test_a_full_shard_does_not_block_the_others():
    """The second shares a page with the first, but only the other shard has room for it."""
    both = scheduler()
    start = [BOS, 1, 2, 3]
    [first] = waiting(both, start + list(range(10, 27)))
    admit_and_store(both)
    later = waiting(both, start + list(range(30, 50)), [50, 51, 52])
    admit_and_store(both)
    assert first.shard is not None
    assert later[0].shard == 1 - first.shard and later[1].shard is not None


def test_a_common_first_token_is_not_worth_a_copy_or_a_crowd():
    four = scheduler(num_shards=4)
    waiting(four, [BOS, 99])
    copies = admit_and_store(four)
    waiting(four, *([BOS, i, i, i, i] for i in range(1, 12)))
    assert copies == admit_and_store(four) == []
    assert sorted(map(len, four.running)) == [3, 3, 3, 3]


def test_a_prompt_that_is_known_but_for_a_part_of_a_page_is_copied():
    one = scheduler(num_shards=1)
    waiting(one, [BOS, 1, 2, 3, 4, 5])
    admit_and_store(one)
    [same, half, less] = waiting(one, [BOS, 1, 2, 3, 4, 6], [BOS, 1, 9, 9, 9], [BOS, 8, 8, 8])
    copies = one.admit()
    assert [copy.target for copy in copies] == [same.pages[1], half.pages[0]]
    assert (same.num_stored, half.num_stored, less.num_stored) == (5, 2, 0)
