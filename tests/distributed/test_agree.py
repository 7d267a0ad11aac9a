"""Barriers and common decisions of real processes."""

from tests.distributed.processes import ranks, read_until, start


def test_one_rank_is_primary_and_barriers_hold_under_an_explicit_mesh():
    program = """
        import jax, time
        from jaxfm.distributed import agree, join
        join.initialize(timeout_seconds=40)
        rank = jax.process_index()
        explicit = (jax.sharding.AxisType.Explicit,)
        mesh = jax.make_mesh((jax.device_count(),), ('all',), axis_types=explicit)
        start = time.monotonic()
        time.sleep(rank)
        with jax.set_mesh(mesh), jax.transfer_guard('disallow'):
            agree.barrier('loaded')
        waited = time.monotonic() - start
        print('rank', rank, agree.is_primary(), waited > 0.9, flush=True)
    """
    with start(program, ranks(2)) as processes:
        assert read_until(processes[0], 'rank') == 'rank 0 True True\n'
        assert read_until(processes[1], 'rank') == 'rank 1 False True\n'


def test_decisions_and_errors_of_one_rank_reach_all_ranks():
    program = """
        import jax
        from jaxfm.distributed import agree, join
        from jaxfm.errors import DamagedError, LockedError, StorageError, UnavailableError
        join.initialize(timeout_seconds=40)
        rank = jax.process_index()

        def outcome(function, *arguments, **options):
            try:
                return function(*arguments, **options)
            except Exception as error:
                return f'{type(error).__name__}: {error}'

        def lock():
            raise LockedError('held')

        print('said', [
            outcome(agree.from_primary, lambda: [rank, 'value']),
            outcome(agree.from_primary, lock),
            outcome(agree.first_error, DamagedError('bad') if rank == 1 else None),
            outcome(agree.first_error, None),
            outcome(agree.common, ['a', 'b', 'c'] if rank == 0 else ['c', 'x', 'b']),
        ], flush=True)
        late = outcome(agree.wait_for, 'never', 0.2)
        print('late', late.startswith('UnavailableError'), flush=True)
        agree.barrier('end')
    """
    said = [[0, 'value'], 'LockedError: held', 'DamagedError: bad', None, ['b', 'c']]
    with start(program, ranks(2)) as processes:
        for process in processes:
            assert read_until(process, 'said') == f'said {said}\n'
            assert read_until(process, 'late') == 'late True\n'
