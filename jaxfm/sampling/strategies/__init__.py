"""Strategies: ways to spend test-time compute on a problem. They share the sampler's batch.

A strategy is built as `Strategy(config, context)`; its `run(problem)` is a generator that yields
actions and returns an Outcome (see base.py). driver.py runs the generators of all problems.
"""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from jaxfm.registry import Entry, Registry, one_of
from jaxfm.schema import Group, KeyPath, Problem

_Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Number = Annotated[float, Field(allow_inf_nan=False)]


class BudgetConfig(Group):
    """What one problem may cost; 0 is no limit. A sample that it cuts ends with 'budget'."""

    # Generated, also by samples that were cancelled, and scored.
    tokens: int = Field(0, ge=0)
    flops: _Amount = 0.0  # forward FLOPs of all tokens that are computed
    # Of the device and of the verifier; tokens in a batch share the time of a step. Compiling
    # counts, too, so warm the sampler up.
    seconds: _Amount = 0.0


class PriceConfig(Group):
    """Dollars for a million tokens, and for a verifier call."""

    prompt: _Amount = 0.0  # computed
    shared: _Amount = 0.0  # found in the pages of others
    generated: _Amount = 0.0
    call: _Amount = 0.0


class ScorerConfig(Group):
    """The keys of every scorer. A score outside the range fails the problem."""

    name: str
    least: _Number = 0.0
    most: _Number = 1.0

    @classmethod
    def find_conflicts(cls, parts: dict) -> list[Problem]:
        least, most = parts.get('least', 0.0), parts.get('most', 1.0)
        if least <= most:
            return []
        paths: tuple[KeyPath, ...] = ('least',), ('most',)
        return [Problem(paths, f'least {least} is more than most {most}')]


class RewardConfig(ScorerConfig):
    """The task's own reward, which knows the right answer: an oracle."""

    name: Literal['reward'] = 'reward'


class LogprobConfig(Group):
    """The sample's log-prob under the model itself."""

    name: Literal['logprob'] = 'logprob'
    mean: bool = True  # per token; otherwise the sum


SCORERS = Registry(
    {
        'reward': Entry('jaxfm.sampling.strategies.scorers:Reward', RewardConfig),
        'logprob': Entry('jaxfm.sampling.strategies.scorers:Logprob', LogprobConfig),
    },
    base=ScorerConfig,
)


class RewardCheckerConfig(Group):
    """Is satisfied with a certain reward of the task, and otherwise says the same each time."""

    name: Literal['reward'] = 'reward'
    at_least: float = 1.0
    feedback: str = Field('That is not right. Try again.', min_length=1)


CHECKERS = Registry(
    {'reward': Entry('jaxfm.sampling.strategies.scorers:RewardChecker', RewardCheckerConfig)},
    base=Group,
)


class StrategyConfig(Group):
    """The keys of every strategy."""

    reads_max_tokens: ClassVar[bool] = True  # False: other keys say how long a sample may be

    name: str
    budget: BudgetConfig = BudgetConfig()
    price: PriceConfig | None = None
    # For one call of a scorer, checker or parser of answers. Later it fails its problem.
    call_seconds: float = Field(60.0, gt=0, allow_inf_nan=False)


class BestOfNConfig(StrategyConfig):
    """n samples, of which the best one by a score is chosen."""

    name: Literal['best_of_n'] = 'best_of_n'
    n: int = Field(8, ge=1)
    scorer: one_of(SCORERS) = LogprobConfig()


# Deciding when a vote may stop takes seconds of arithmetic for more samples.
MOST_ADAPTIVE = {'doubling': 256, 'one': 64}


class VoteConfig(StrategyConfig):
    """The answer that most of n samples give. A sample without an answer does not vote."""

    name: Literal['vote'] = 'vote'
    n: int = Field(8, ge=1)
    # Weighs the votes, by a score in [0, 1] or by the sample's probability; None: all count 1.
    weights: one_of(SCORERS) | None = None
    # Rounds of 2, 4, 8 ... samples in all, or one by one: until the vote of all n is decided.
    adaptive: Literal['off', 'doubling', 'one'] = 'off'
    # Most probability that stopping early gives another answer than the vote of all n. It needs
    # adaptive and plain votes: weighted ones stop only when the others could not change them.
    delta: float = Field(0.05, ge=0, lt=1)

    @classmethod
    def find_conflicts(cls, parts: dict) -> list[Problem]:
        n, adaptive = parts.get('n', 8), parts.get('adaptive', 'off')
        most, found = MOST_ADAPTIVE.get(adaptive, n), []
        if n > most:
            sentence = f'n {n} is too many to stop early: with adaptive={adaptive!r} at most {most}'
            found.append(Problem((('n',), ('adaptive',)), sentence))
        usual = cls.model_fields['delta'].default
        if (delta := parts.get('delta', usual)) == usual:
            return found
        if adaptive == 'off':
            sentence = (
                f"delta {delta:g} would do nothing: adaptive is 'off', so no vote stops early"
            )
            found.append(Problem((('delta',), ('adaptive',)), sentence))
        elif parts.get('weights') is not None:
            sentence = (
                f'delta {delta:g} would do nothing: a weighted vote stops only when the other '
                'samples cannot change it'
            )
            found.append(Problem((('delta',), ('weights',)), sentence))
        return found


class BudgetForcingConfig(StrategyConfig):
    """Thinks for a number of tokens between two limits (Muennighoff et al. 2025, s1).

    All ids before the text that ends the thinking count, forced ones included. A sample has at most
    max_think tokens, those of `closing`, and answer_tokens; max_tokens and min_tokens are not read.
    """

    reads_max_tokens: ClassVar[bool] = False

    name: Literal['budget_forcing'] = 'budget_forcing'
    min_think: int = Field(0, ge=0)
    max_think: int = Field(1024, ge=1)
    answer_tokens: int = Field(256, ge=1)  # most tokens after the thinking
    end: str = Field('</think>', min_length=1)  # with this the model ends its thinking
    wait: str = Field('Wait', min_length=1)  # takes the place of an end that is too early
    closing: str = Field('</think>', min_length=1)  # closes thinking that is too long

    @classmethod
    def find_conflicts(cls, parts: dict) -> list[Problem]:
        least, most = parts.get('min_think', 0), parts.get('max_think', 1024)
        if least <= most:
            return []
        paths: tuple[KeyPath, ...] = ('min_think',), ('max_think',)
        return [Problem(paths, f'min_think {least} is more than max_think {most}')]


class BeamSearchConfig(StrategyConfig):
    """Keeps the best beginnings by the score of their last step, and expands each of them.

    With several subtrees, each keeps its own best ones: DVTS (Beeching et al. 2024).
    """

    name: Literal['beam_search'] = 'beam_search'
    width: int = Field(4, ge=1)  # beams that are kept
    expansions: int = Field(4, ge=1)  # samples of the next step of each
    subtrees: int = Field(1, ge=1)
    delimiter: str = '\n\n'  # ends a step; '': steps have step_tokens
    step_tokens: int = Field(128, ge=1)  # most tokens of a step
    max_steps: int = Field(40, ge=1)
    scorer: one_of(SCORERS) = LogprobConfig()

    @classmethod
    def find_conflicts(cls, parts: dict) -> list[Problem]:
        width, subtrees = parts.get('width', 4), parts.get('subtrees', 1)
        if width % subtrees == 0:
            return []
        paths: tuple[KeyPath, ...] = ('width',), ('subtrees',)
        return [Problem(paths, f'width {width} is not a multiple of subtrees {subtrees}')]


class RefinementConfig(StrategyConfig):
    """Answers in turns; between two a checker says what to do better, until it is satisfied.

    A turn has at most the request's max_tokens.
    """

    name: Literal['refinement'] = 'refinement'
    max_turns: int = Field(4, ge=1)
    checker: one_of(CHECKERS) = RewardCheckerConfig()
    # Around what the checker says, such as the marks of a chat's turns; spelled special tokens are
    # meant. If a turn ended with the token that `before` begins with, it is not repeated.
    before: str = '\n\n'
    after: str = '\n\n'


STRATEGIES = Registry({}, base=StrategyConfig)  # its entries follow; one of them takes others


class LevelConfig(Group):
    """A strategy for the problems of which the model is so sure."""

    # Share of the first samples with the same answer, or mean score; None, in the last level: any.
    at_least: _Number | None = None
    strategy: one_of(STRATEGIES)

    @classmethod
    def find_conflicts(cls, parts: dict) -> list[Problem]:
        """A problem has one budget, so keys of the strategy that are about it would do nothing."""
        if 'strategy' not in parts:
            return []
        fields = StrategyConfig.model_fields
        return [
            Problem.at(
                ('strategy', name),
                f'a level has no {name} of its own: set it beside levels, for the whole problem',
            )
            for name in ('budget', 'price', 'call_seconds')
            if getattr(parts['strategy'], name) != fields[name].default
        ]


class ComputeOptimalConfig(StrategyConfig):
    """Estimates a problem's difficulty from a few samples and takes the strategy for it.

    After Snell et al. 2024; the samples are charged to the problem.
    """

    name: Literal['compute_optimal'] = 'compute_optimal'
    first: int = Field(4, ge=1)  # samples to estimate from
    # Its mean over the first samples is how sure the model is; None: the share of the most frequent
    # answer.
    scorer: one_of(SCORERS) | None = None
    levels: list[LevelConfig] = Field(min_length=1)  # from the surest on; the first that is reached

    @classmethod
    def find_conflicts(cls, parts: dict) -> list[Problem]:
        bounds = [level.at_least for level in parts.get('levels', [])]
        found = []
        if bounds and bounds[-1] is not None:
            path = ('levels', len(bounds) - 1, 'at_least')
            found.append(Problem.at(path, 'the last level is for all others: leave at_least out'))
        for index, bound in enumerate(bounds[:-1]):
            path = ('levels', index, 'at_least')
            if bound is None:
                sentence = 'only the last level is for all others: this one needs at_least'
                found.append(Problem.at(path, sentence))
            elif index and bounds[index - 1] is not None and bound >= bounds[index - 1]:
                sentence = f'{bound:g} is not less than {bounds[index - 1]:g}, of the level before'
                found.append(Problem.at(path, sentence))
        return found


STRATEGIES |= {
    'best_of_n': Entry('jaxfm.sampling.strategies.best_of_n:BestOfN', BestOfNConfig),
    'vote': Entry('jaxfm.sampling.strategies.vote:Vote', VoteConfig),
    'budget_forcing': Entry(
        'jaxfm.sampling.strategies.budget_forcing:BudgetForcing', BudgetForcingConfig
    ),
    'beam_search': Entry('jaxfm.sampling.strategies.beam_search:BeamSearch', BeamSearchConfig),
    'refinement': Entry('jaxfm.sampling.strategies.refinement:Refinement', RefinementConfig),
    'compute_optimal': Entry(
        'jaxfm.sampling.strategies.compute_optimal:ComputeOptimal', ComputeOptimalConfig
    ),
}
