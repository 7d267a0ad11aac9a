"""The ledger: what each problem has cost, in tokens, FLOPs, seconds, calls and dollars.

Its entries are told by the engine itself (`Meter`), so they add up to the engine's counters: tokens
of cancelled samples count, and so do prompts that are computed again.
"""

import dataclasses
from collections.abc import Callable, Iterable

from jaxfm.sampling.strategies import PriceConfig

# The FLOPs of a forward pass over a document of so many tokens, one or more.
Flops = Callable[[int], float]


@dataclasses.dataclass
class Entry:
    """What a problem has cost so far, or a sum of such."""

    prefill_tokens: int = 0  # of prompts, computed
    shared_tokens: int = 0  # of prompts, found in pages of others
    decoded_tokens: int = 0  # generated
    score_tokens: int = 0  # given ids whose log-probs were asked for; prefill_tokens has them, too
    flops: float = 0.0  # forward
    seconds: float = 0.0  # of the device, shared by the tokens of a step, and of calls
    calls: int = 0  # of verifiers, scorers and parsers
    dollars: float = 0.0
    samples: int = 0  # that the engine was given, copies included; one that goes on is the same

    def __add__(self, other: 'Entry') -> 'Entry':
        ours, theirs = dataclasses.astuple(self), dataclasses.astuple(other)
        return Entry(*(x + y for x, y in zip(ours, theirs)))

    @property
    def computed_tokens(self) -> int:
        """Tokens that the model read or gave."""
        return self.prefill_tokens + self.decoded_tokens


def total(entries: Iterable[Entry]) -> Entry:
    """The sum of entries."""
    return sum(entries, Entry())


class Account:
    """Keeps one entry; the engine and the driver tell it what happens. It is a `Meter`.

    Args:
      flops: of a document's forward pass; tokens behind others cost the difference. None: 0.
    """

    def __init__(self, flops: Flops | None = None, price: PriceConfig | None = None):
        self.entry = Entry()
        self._flops, self._price = flops or (lambda length: 0.0), price or PriceConfig()

    def flops_of(self, start: int, length: int) -> float:
        """FLOPs of `length` tokens behind `start` others."""
        return self._flops(start + length) - (self._flops(start) if start else 0.0)

    def prefill(self, start: int, length: int) -> None:
        """Tokens of a prompt were computed."""
        self.entry.prefill_tokens += length
        self.entry.flops += self.flops_of(start, length)
        self.entry.dollars += length * self._price.prompt / 1e6

    def share(self, length: int) -> None:
        """Tokens of a prompt were found."""
        self.entry.shared_tokens += length
        self.entry.dollars += length * self._price.shared / 1e6

    def decode(self, start: int, length: int) -> None:
        """Tokens were generated."""
        self.entry.decoded_tokens += length
        self.entry.flops += self.flops_of(start, length)
        self.entry.dollars += length * self._price.generated / 1e6

    def call(self, seconds: float) -> None:
        """A verifier was called."""
        self.entry.calls += 1
        self.entry.seconds += seconds
        self.entry.dollars += self._price.call
