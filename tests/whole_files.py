"""How `pytest -n 2` shares the tests between workers: a file is run by one worker."""

from xdist.scheduler import LoadFileScheduling


class WholeFiles(LoadFileScheduling):
    """xdist's scheduler, which goes on when a worker dies while few tests are left.

    xdist would assign the files that the dead worker had finished once more, to a worker that then
    waits for ever. It would also run the test that killed the worker again.
    """

    def __init__(self, config, log=None):
        config.option.loadscopereorder = False  # keep the order of collection
        super().__init__(config, log)

    def remove_node(self, node) -> str | None:
        work = self.assigned_work[node]
        for file in [file for file, tests in work.items() if all(tests.values())]:
            del work[file]
        killer = super().remove_node(node)
        for tests in self.workqueue.values():
            if killer in tests:
                tests[killer] = True
        return killer
