"""Pages whose tokens are known, as a radix tree: sequences with a common prefix share its pages.

An edge is a whole page of token ids, so only whole pages are shared, and nobody writes to them any
more. The keys and values of a page depend on all tokens before it, hence a tree. They depend on the
weights, too: the owner empties the tree whenever the weights change.
"""

import dataclasses
from collections.abc import Sequence

from jaxfm.sampling.pages import PagePool


@dataclasses.dataclass(eq=False)
class _Node:
    page: int
    parent: '_Node | None'
    key: tuple[int, ...]
    children: dict[tuple[int, ...], '_Node'] = dataclasses.field(default_factory=dict)


class PrefixTree:
    """Holds pages of a pool until they are needed elsewhere; the least recently used goes first."""

    def __init__(self, pool: PagePool, page_size: int):
        self._pool, self._page_size = pool, page_size
        self._root = _Node(0, None, ())
        # Nodes without children, least recently used first. Some may be held by sequences.
        self._leaves: dict[_Node, None] = {}

    def match(self, tokens: Sequence[int]) -> list[int]:
        """The pages of the longest known prefix, in whole pages. They are not held for the caller.

        Its last node counts as used.
        """
        node, pages = self._root, []
        for key in self._keys(tokens):
            if key not in node.children:
                break
            node = node.children[key]
            pages.append(node.page)
        self._touch(node)
        return pages

    def insert(self, tokens: Sequence[int], pages: Sequence[int]) -> None:
        """Keeps the pages of whole pages of tokens; where a page is known already, that one stays.

        Args:
          tokens: from position 0; what is left after whole pages is ignored.
          pages: those of the tokens, in order.
        """
        node = self._root
        for key, page in zip(self._keys(tokens), pages):
            child = node.children.get(key)
            if child is None:
                child = node.children[key] = _Node(page, node, key)
                self._pool.keep(page)
                self._leaves.pop(node, None)
                self._leaves[child] = None
            node = child
        self._touch(node)

    def free(self, count: int) -> bool:
        """Drops spare pages until `count` pages of the pool are free; False if that is too many."""
        if self._pool.num_free + self._pool.num_spare < count:
            return False
        while self._pool.num_free < count:
            leaf = next((n for n in self._leaves if self._pool.is_spare(n.page)), None)
            if leaf is None:  # what is spare lies above pages that are held
                return False
            self._drop(leaf)
        return True

    def clear(self) -> None:
        """Drops everything: the weights have changed."""
        nodes = [self._root]
        while nodes:
            node = nodes.pop()
            nodes.extend(node.children.values())
            if node is not self._root:
                self._pool.give_up(node.page)
        self._root.children.clear()
        self._leaves.clear()

    def _keys(self, tokens: Sequence[int]):
        size = self._page_size
        for start in range(0, len(tokens) - size + 1, size):
            yield tuple(tokens[start : start + size])

    def _touch(self, node: _Node) -> None:
        if node in self._leaves:
            del self._leaves[node]
            self._leaves[node] = None

    def _drop(self, node: _Node) -> None:
        del self._leaves[node], node.parent.children[node.key]
        self._pool.give_up(node.page)
        if not node.parent.children and node.parent is not self._root:
            self._leaves[node.parent] = None
