"""Runs requests to completion on a sampler that has no other work."""

from collections.abc import Iterable, Iterator

from jaxfm.sampling.engine import Sampler
from jaxfm.sampling.request import Completion, Request


def complete(
    sampler: Sampler, requests: Iterable[Request], params, version: int, stop=None
) -> dict[str, list[Completion]]:
    """Lends weights to the sampler and runs all requests to completion -> {id: its samples}.

    Requests with one id and different sample indices give one list. If anything is raised, none of
    them is left in the sampler. Arguments and errors are those of `complete_each`.
    """
    requests = list(requests)
    ended = complete_each(sampler, requests, params, version, stop)
    found = {(sample.id, sample.sample_index): sample for sample in ended}
    completions: dict[str, list[Completion]] = {}
    for request in requests:
        indices = range(request.sample_index, request.sample_index + request.n)
        samples = [found[request.id, index] for index in indices]
        completions.setdefault(request.id, []).extend(samples)
    return completions


def complete_each(
    sampler: Sampler,
    requests: Iterable[Request],
    params,
    version: int,
    stop=None,
    most: int | None = None,
) -> Iterator[Completion]:
    """Lends weights to the sampler and runs all requests; yields each sample when it has ended.

    If the caller stops reading, the samples that are left are cancelled.

    Args:
      params, version: as in `Sampler.lend`.
      stop: called with the Completion so far after each event; True ends that sample, with the
        finish reason None.
      most: about how many samples are in the sampler at a time; the requests for the others are
        read later. None: all.

    Raises:
      RuntimeError: the sampler has other requests, whose events would be lost.
    """
    if sampler.has_work:
        raise RuntimeError('the sampler has other requests, whose events would be lost')
    sampler.lend(params, version)
    requests = iter(requests)
    running: dict[tuple[str, int], Completion] = {}
    try:
        while True:
            while most is None or len(running) < most:
                request = next(requests, None)
                if request is None:
                    break
                sampler.add(request)
                for index in range(request.sample_index, request.sample_index + request.n):
                    running[request.id, index] = Completion(request.id, index)
            if not sampler.has_work:
                return
            for event in sampler.step():
                completion = running[event.id, event.sample_index]
                completion.add(event)
                is_stopped = event.finish_reason is None and stop and stop(completion)
                if is_stopped:
                    sampler.cancel(event.id, event.sample_index)
                if is_stopped or event.finish_reason:
                    yield running.pop((event.id, event.sample_index))
    except BaseException:  # also if the caller stops reading
        for id, index in running:
            sampler.cancel(id, index)
        raise
