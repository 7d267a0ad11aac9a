"""Pages: who holds them, which prefixes are known, and what goes first when others need room."""

import numpy as np
import pytest

from jaxfm.sampling.pages import PagePool
from jaxfm.sampling.prefix import PrefixTree

SIZE = 3
A, B, C = [1, 2, 3], [4, 5, 6], [7, 8, 9]


def taken(pool, count):
    return [pool.take() for _ in range(count)]


def test_page_0_is_never_given_away():
    pool = PagePool(5)
    assert sorted(taken(pool, 4)) == [1, 2, 3, 4]
    with pytest.raises(IndexError):
        pool.take()


def test_a_page_is_free_when_its_last_holder_has_gone():
    pool = PagePool(3)
    page = pool.take()
    pool.hold(page)
    pool.release(page)
    assert pool.num_free == 1
    pool.release(page)
    assert pool.num_free == 2


@pytest.mark.parametrize('call', ['release', 'hold', 'give_up'])
def test_a_page_that_is_freed_twice_is_an_error(call):
    pool = PagePool(3)
    page = pool.take()
    pool.release(page)
    with pytest.raises(RuntimeError, match=f'page {page} is '):
        getattr(pool, call)(page)
    assert pool.num_free == 2


def test_spare_pages_are_those_that_the_store_alone_holds():
    pool = PagePool(4)
    page, other = taken(pool, 2)
    pool.keep(page)
    pool.keep(other)
    assert pool.num_spare == 0
    pool.release(page)
    assert pool.num_spare == 1
    pool.hold(page)
    assert pool.num_spare == 0
    pool.release(page)
    pool.give_up(page)
    assert (pool.num_spare, pool.num_free) == (0, 2)
    with pytest.raises(RuntimeError, match='kept already'):
        pool.keep(other)


@pytest.fixture
def pool():
    return PagePool(8)


@pytest.fixture
def tree(pool):
    return PrefixTree(pool, SIZE)


def known(tree, pool, tokens):
    """Inserts tokens with new pages, which only the tree holds afterwards."""
    pages = taken(pool, len(tokens) // SIZE)
    tree.insert(tokens, pages)
    for page in pages:
        pool.release(page)
    return pages


def test_only_whole_pages_of_an_equal_prefix_match(tree, pool):
    first, second = known(tree, pool, A + B + [7])
    assert tree.match(A + B + C) == tree.match(A + B) == [first, second]
    assert tree.match(A + [4, 5]) == tree.match(A + [0] + B) == [first]
    assert tree.match([1, 2]) == tree.match(B + A) == tree.match([]) == []


def test_the_same_page_after_another_beginning_is_another(tree, pool):
    known(tree, pool, A + C)
    known(tree, pool, B + C)
    assert tree.match(A + C)[1] != tree.match(B + C)[1]


def test_a_known_page_stays_and_the_second_copy_is_not_kept(tree, pool):
    [page] = known(tree, pool, A)
    known(tree, pool, A)
    assert tree.match(A) == [page]
    assert pool.num_free == 6


def test_the_prefix_that_was_not_used_for_longest_goes_first(tree, pool):
    known(tree, pool, A)
    known(tree, pool, B)
    known(tree, pool, C)
    tree.match(A)
    assert tree.free(5)
    assert (len(tree.match(A)), tree.match(B), len(tree.match(C))) == (1, [], 1)


def test_pages_go_from_the_end_of_a_prefix_and_never_while_held(tree, pool):
    first, second = known(tree, pool, A + B)
    held, _ = known(tree, pool, C + B)
    pool.hold(held)
    assert tree.free(6) and tree.match(C + B) == [held]
    assert not tree.free(7)
    assert tree.match(A + B) in ([first], [first, second], [])
    assert pool.num_free <= 6


def test_clearing_gives_every_page_back(tree, pool):
    known(tree, pool, A + B + C)
    [page] = known(tree, pool, B)
    pool.hold(page)
    tree.clear()
    assert tree.match(A) == [] and pool.num_free == 6
    pool.release(page)
    assert pool.num_free == 7
    known(tree, pool, A)
    assert len(tree.match(A)) == 1


def test_random_use_loses_no_page(tree, pool):
    """Sequences come, share, and go, in any order; at last every page is free."""
    random, running = np.random.default_rng(0), []
    for _ in range(2000):
        if random.random() < 0.5 and running:
            tokens, pages = running.pop(random.integers(len(running)))
            if random.random() < 0.7:
                tree.insert(tokens, pages)
            for page in pages:
                pool.release(page)
        else:
            tokens = random.integers(0, 2, size=random.integers(3, 13)).tolist()
            pages = tree.match(tokens)
            for page in pages:
                pool.hold(page)
            missing = len(tokens) // SIZE - len(pages)
            if tree.free(missing):
                running.append((tokens, [*pages, *taken(pool, missing)]))
            else:
                for page in pages:
                    pool.release(page)
        held = {page for _, pages in running for page in pages}
        assert pool.num_free + pool.num_spare <= 7 - len(held)
        assert pool.num_free + len(held) + pool.num_spare >= 7 - len(tree._leaves) * 4
    for _, pages in running:
        for page in pages:
            pool.release(page)
    tree.clear()
    assert pool.num_free == 7
