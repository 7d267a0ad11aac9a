"""What the branches of a problem may still sample within its budget.

The budget in tokens is kept exactly, and does not depend on what else is in the batch: it counts
generated and scored tokens, and what runs has its whole length reserved. FLOPs and seconds are
measured. Nothing begins that is foreseen to exceed them, but a prompt that was dropped and is
computed again, or a slow step, is seen afterwards: then what runs is cancelled.
"""

import bisect
import dataclasses
from collections.abc import Iterable
from typing import Any

from jaxfm.sampling.strategies import BudgetConfig
from jaxfm.sampling.strategies.base import Branch
from jaxfm.sampling.strategies.ledger import Account


@dataclasses.dataclass
class Segment:
    """What a branch samples after it was begun or extended."""

    options: dict[str, Any]  # of the request
    length: int  # of the prompt, with the branch's tokens before that
    known: int  # so many of these are presumably stored
    start: int  # the branch's tokens before that
    is_judged: bool = False
    is_capped: bool = False  # the budget allows fewer tokens than were asked for

    @property
    def max_tokens(self) -> int:
        """Most tokens to sample."""
        return self.options['max_tokens']

    def left(self, branch: Branch) -> int:
        """Tokens that it may still sample."""
        return self.max_tokens - (len(branch.tokens) - self.start)


class Budget:
    """Compares what an account has spent, and what is reserved, with a budget."""

    def __init__(self, config: BudgetConfig, account: Account):
        self._config, self._account = config, account
        self.score_flops = 0.0  # of a Score that has begun

    @property
    def seconds_left(self) -> float:
        """At least 0; infinite if there is no limit."""
        limit = self._config.seconds
        return max(limit - self._account.entry.seconds, 0.0) if limit else float('inf')

    @property
    def is_over(self) -> bool:
        """Whether time is up, or more FLOPs were spent than there are."""
        limit = self._config.flops
        return not self.seconds_left or 0 < limit < self._account.entry.flops

    def room(self, segment: Segment, running: Iterable[tuple[Branch, Segment]]) -> int:
        """How many tokens a segment may sample, beside what is running; 0 if none."""
        config, entry, room = self._config, self._account.entry, segment.max_tokens
        running = list(running)
        if not self.seconds_left:
            return 0
        if config.tokens:
            reserved = sum(other.left(branch) for branch, other in running)
            room = min(room, config.tokens - entry.decoded_tokens - entry.score_tokens - reserved)
        if config.flops and room > 0:
            left = config.flops - entry.flops - self.score_flops - self._unread(segment)
            left -= sum(self._flops_left(branch, other) for branch, other in running)
            cost, behind = self._account.flops_of, segment.length - 1
            left_of = range(1, room + 1)
            room = bisect.bisect_right(left_of, left, key=lambda count: cost(behind, count))
        return max(room, 0)

    def _unread(self, segment: Segment) -> float:
        """FLOPs of the ids before a segment that are not stored."""
        known = min(segment.known, segment.length - 1)
        return self._account.flops_of(known, segment.length - 1 - known)

    def _flops_left(self, branch: Branch, segment: Segment) -> float:
        left = segment.left(branch)
        behind = segment.length - 1 + segment.max_tokens - left
        unread = self._unread(segment) if left == segment.max_tokens else 0.0
        return unread + self._account.flops_of(behind, left)
