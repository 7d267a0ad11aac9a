"""Pages of the key-value cache: which are free, and how many hold each of the others.

Plain Python without arrays: a page is its index in the pool of one shard of the mesh. Page 0 is
never given away; padding writes to it.
"""


class PagePool:
    """Free pages and reference counts. A page is free again when nobody holds it any more.

    One of the holders may be a store of known prefixes, which gives pages back when asked: they are
    `kept`. A page that is held by the store alone is spare.
    """

    def __init__(self, num_pages: int):
        self._free = list(range(num_pages - 1, 0, -1))
        self._holders = [0] * num_pages
        self._is_kept = [False] * num_pages
        self.num_spare = 0

    @property
    def num_free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def take(self) -> int:
        """A free page, with one holder. Raises IndexError if there is none."""
        page = self._free.pop()
        self._holders[page] = 1
        return page

    def hold(self, page: int) -> None:
        """Adds a holder. Raises RuntimeError if the page is free."""
        self._check_held(page)
        self.num_spare -= self.is_spare(page)
        self._holders[page] += 1

    def release(self, page: int) -> None:
        """Removes a holder. Raises RuntimeError if the page is free: it was released twice."""
        self._check_held(page)
        self._holders[page] -= 1
        self.num_spare += self.is_spare(page)
        if not self._holders[page]:
            self._free.append(page)

    def keep(self, page: int) -> None:
        """Adds the store as a holder. Raises RuntimeError if the page is free or kept already."""
        if self._is_kept[page]:
            raise RuntimeError(f'page {page} is kept already')
        self.hold(page)
        self._is_kept[page] = True

    def give_up(self, page: int) -> None:
        """Removes the store as a holder. Raises RuntimeError if the page is not kept."""
        if not self._is_kept[page]:
            raise RuntimeError(f'page {page} is not kept')
        self.num_spare -= self.is_spare(page)
        self._is_kept[page] = False
        self.release(page)

    def is_spare(self, page: int) -> bool:
        """Whether the store alone holds the page."""
        return self._is_kept[page] and self._holders[page] == 1

    def _check_held(self, page: int) -> None:
        if not self._holders[page]:
            raise RuntimeError(f'page {page} is free, so nobody can hold or release it')
