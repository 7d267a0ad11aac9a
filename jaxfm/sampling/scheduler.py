"""Which sequences run, which pages they hold, and who gives way when pages run out.

Plain Python without arrays, and a function of the calls alone: the processes of a multi-host run
make the same decisions. A sequence runs in one shard of the mesh, whose pool has its pages. It is
first prefilled, up to its last token but one, then decoded; whoever appends to its tokens decides
how far. Sequences run in order of arrival; the one admitted last gives way.
"""

import collections
import dataclasses
import itertools

from jaxfm.sampling.pages import PagePool
from jaxfm.sampling.prefix import PrefixTree
from jaxfm.sampling.request import Meter, Request


@dataclasses.dataclass(eq=False)
class Sequence:
    """One sample of a request: its tokens so far, and the pages with their keys and values."""

    request: Request  # with n = 1
    tokens: list[int]  # the prompt and everything after it
    num_prompt: int  # of them
    max_tokens: int  # how many may still be sampled
    shard: int | None = None  # None: it waits
    pages: list[int] = dataclasses.field(default_factory=list)
    num_stored: int = 0  # tokens whose keys and values are in the pages
    is_mixed: bool = False  # the pages hold keys and values of several weights
    score_from: int | None = None  # log-probs of tokens at this position and later are needed
    first_end: int = 0  # the first position that may end it: behind min_tokens sampled ones
    meter: Meter | None = None

    @property
    def num_missing(self) -> int:
        """Tokens to prefill before the next one can be sampled."""
        return len(self.tokens) - 1 - self.num_stored

    @property
    def shareable(self) -> list[int]:
        """The tokens whose keys and values may come from others.

        The others are computed: the last one when the next is sampled, and those that predict
        tokens to score.
        """
        stop = len(self.tokens) - 1
        return self.tokens[: stop if self.score_from is None else max(0, self.score_from - 1)]


@dataclasses.dataclass(frozen=True)
class Copy:
    """A page to copy: the start of another sequence's page, which the new one goes on to fill."""

    shard: int
    source: int
    target: int


class _Shard:
    def __init__(self, num_pages: int, page_size: int):
        self.num_pages = num_pages
        self.pool = PagePool(num_pages)
        self.tree = PrefixTree(self.pool, page_size)
        self.running: list[Sequence] = []  # in order of admission


class Scheduler:
    """Admits, grows and preempts sequences.

    Args:
      num_shards: of the batch; each has its own pages and rows.
      slots: most running sequences of a shard.
      num_pages: of a shard, page 0 included.
    """

    def __init__(self, *, num_shards: int, slots: int, num_pages: int, page_size: int):
        self.slots, self.page_size = slots, page_size
        self.waiting: collections.deque[Sequence] = collections.deque()
        self._shards = [_Shard(num_pages, page_size) for _ in range(num_shards)]
        self.num_preempted = self.num_shared_tokens = 0

    @property
    def running(self) -> list[list[Sequence]]:
        """The running sequences of each shard, in order of admission."""
        return [shard.running for shard in self._shards]

    @property
    def sequences(self) -> list[Sequence]:
        """All sequences, running and waiting."""
        return [*itertools.chain(*self.running), *self.waiting]

    @property
    def num_free_pages(self) -> int:
        """Pages that no sequence holds."""
        return sum(shard.pool.num_free + shard.pool.num_spare for shard in self._shards)

    def admit(self) -> list[Copy]:
        """Lets waiting sequences run while there is room -> pages to copy before anything else.

        A sequence waits longer if another one is just storing the prefix that they share.
        """
        copies, later = [], collections.deque()
        while self.waiting and any(len(s.running) < self.slots for s in self._shards):
            sequence = self.waiting.popleft()
            choices = self._choices(sequence)
            if not any(self._start(sequence, *choice, copies) for choice in choices):
                later.append(sequence)
                if choices:  # there is no room for the first in line
                    break
        self.waiting.extendleft(reversed(later))
        return copies

    def _choices(self, sequence: Sequence) -> list[tuple]:
        """(shard, known pages, (tokens, page) to copy): most known tokens first, then most room.

        Nothing if it should wait for a prefix that is being stored, or every row is taken.
        """
        ranked = []
        for index, shard in enumerate(self._shards):
            if len(shard.running) == self.slots:
                continue
            pages, partial = self._known(shard, sequence)
            known = len(pages) * self.page_size + partial[0]
            if self._is_soon_known(shard, sequence, known):
                return []
            ranked.append((-known, len(shard.running), (index, pages, partial)))
        return [choice for *_, choice in sorted(ranked)]

    def _known(self, shard: _Shard, sequence: Sequence) -> tuple[list[int], tuple[int, int]]:
        """Whole pages of its prefix, and how many tokens of which page of a running sequence.

        Fewer tokens than half a page are not worth a copy, unless nothing is left to compute.
        """
        size, wanted = self.page_size, sequence.shareable
        pages = shard.tree.match(wanted)
        start = len(pages) * size
        most = 0, 0
        for other in shard.running:
            stop = min(start + size, other.num_stored, len(wanted))
            if other.is_mixed or stop - start <= most[0] or other.tokens[:start] != wanted[:start]:
                continue
            common = _num_common(other.tokens[start:stop], wanted[start:stop])
            if common > most[0]:
                most = common, other.pages[len(pages)]
        is_worth_it = 2 * most[0] >= size or start + most[0] == len(wanted)
        return pages, most if is_worth_it else (0, 0)

    def _is_soon_known(self, shard: _Shard, sequence: Sequence, known: int) -> bool:
        """Whether a running sequence will store a page more of its prefix, or all of it."""
        wanted = sequence.shareable
        if known == len(wanted):
            return False
        enough = min(known + self.page_size, len(wanted))
        return any(
            other.num_missing > 0
            and not other.is_mixed
            and other.tokens[:enough] == wanted[:enough]
            and len(other.tokens) > enough
            for other in shard.running
        )

    def _start(self, sequence: Sequence, index: int, pages, partial, copies: list[Copy]) -> bool:
        """Runs it in a shard, with pages for all its tokens; False if there are not enough.

        Beside other sequences, each of them could still get another page.
        """
        shard, size = self._shards[index], self.page_size
        for page in pages:
            shard.pool.hold(page)
        needed = -(-len(sequence.tokens) // size) - len(pages)
        if not shard.tree.free(needed + len(shard.running)):
            for page in pages:
                shard.pool.release(page)
            return False
        sequence.shard = index
        sequence.pages = [*pages, *(shard.pool.take() for _ in range(needed))]
        sequence.num_stored = len(pages) * size + partial[0]
        if partial[0]:
            # Never a page that is itself still to be copied: its origin, admitted before, has as
            # many tokens in common.
            copies.append(Copy(index, partial[1], sequence.pages[len(pages)]))
        self.num_shared_tokens += sequence.num_stored
        if sequence.meter:
            sequence.meter.share(sequence.num_stored)
        shard.running.append(sequence)
        return True

    def grow(self, sequence: Sequence, length: int) -> bool:
        """Gives a running sequence pages for `length` tokens, which may preempt younger ones.

        False if it gave way itself: pages below it in the tree of prefixes may be in use. The pool
        holds the longest sequence, so the oldest runs at least when it is admitted again.
        """
        shard = self._shards[sequence.shard]
        while (missing := -(-length // self.page_size) - len(sequence.pages)) > 0:
            if shard.tree.free(missing):
                sequence.pages += [shard.pool.take() for _ in range(missing)]
                continue
            youngest = shard.running[-1]
            self._preempt(youngest)
            if youngest is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.num_preempted += 1
        self.leave(sequence)
        self.waiting.appendleft(sequence)

    def store(self, sequence: Sequence, num_stored: int) -> None:
        """Notes that keys and values of the first tokens are in the pages, for others to share."""
        sequence.num_stored = num_stored
        self.share(sequence)

    def share(self, sequence: Sequence) -> None:
        """Makes the whole pages of a running sequence known, unless they mix weights."""
        if sequence.shard is not None and not sequence.is_mixed:
            tree = self._shards[sequence.shard].tree
            tree.insert(sequence.tokens[: sequence.num_stored], sequence.pages)

    def leave(self, sequence: Sequence, *, is_sound: bool = True) -> None:
        """Takes a sequence out, running or waiting; if sound, its whole pages stay known."""
        if sequence.shard is None:
            if sequence in self.waiting:
                self.waiting.remove(sequence)
            return
        if is_sound:
            self.share(sequence)
        shard = self._shards[sequence.shard]
        shard.running.remove(sequence)
        for page in sequence.pages:
            shard.pool.release(page)
        sequence.shard, sequence.pages, sequence.num_stored = None, [], 0
        sequence.is_mixed = False

    def forget(self) -> None:
        """The weights have changed: no known prefix is of any use, and running sequences mix."""
        for shard in self._shards:
            shard.tree.clear()
            for sequence in shard.running:
                sequence.is_mixed |= sequence.num_stored > 0

    def restart(self) -> None:
        """Sends all running sequences back to the head of the line, without what they stored."""
        for sequence in reversed([*itertools.chain(*self.running)]):
            self.leave(sequence, is_sound=False)
            self.waiting.appendleft(sequence)


def _num_common(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
