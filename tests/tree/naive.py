"""The naive twin of `RadixTree`: a dict of runs by their whole path, everything by scanning.

No links, no heap, no folding of uses: each use marks every run on the path, and each eviction
looks at all runs.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise

from smg_sglang.tree.eviction import EvictionPolicy


@dataclass
class Run:
    path: tuple[int, ...]
    """All keys from the root to this run's end."""
    start: int
    pages: list[int]
    born_at: int
    used_at: int = 0
    uses: int = 0
    credit: float = 0.0
    pins: int = 0
    attached: bool = True
    demoted_at: int = -1
    kept_until: float = 0.0
    tenant: bytes = b""

    @property
    def length(self) -> int:
        return len(self.pages)


@dataclass
class NaiveTree:
    policy: EvictionPolicy
    runs: dict[tuple[int, ...], Run] = field(default_factory=dict)
    clock: int = 0

    def match(self, path: tuple[int, ...]) -> tuple[list[int], Run | None]:
        pages = [page for run in self._along(path) for page in self._shared_pages(run, path)]
        return pages, next(reversed(self._along(path)), None)

    def touch(self, path: tuple[int, ...], uses: int = 1) -> Run | None:
        """-> the run that the known part of `path` ends in, cut there."""
        known, last = self.match(path)
        if last is not None and len(known) < len(last.path):
            last = self._split(last, len(known))
        self.clock += 1
        for above in self._along(path[: len(known)]):
            above.uses += uses
            above.used_at = self.clock
            self.policy.used(above)
        return last

    def insert(self, path: tuple[int, ...], pages: list[int], start: int):
        """-> the duplicates and the deepest run, or None where a parent is missing."""
        known, last = self.match(path)
        if len(known) < start:
            return None
        duplicates = pages[: len(known) - start]
        if last is not None and len(known) < len(last.path):
            last = self._split(last, len(known))
        if len(known) < len(path):
            self.clock += 1
            last = Run(path, len(known), pages[len(duplicates) :], self.clock)
            self.runs[path] = last
        self.touch(path, uses=0)
        return duplicates, last

    def retain(self, path, until: float, tenant: bytes, most: int) -> tuple[int, int, int]:
        known, last = self.match(path)
        if last is not None and len(known) < len(last.path):
            self._split(last, len(known))
        done = 0
        for run in self._along(path[: len(known)]):
            kept = run
            if not run.kept_until:
                part = min(run.length, most)
                most -= part
                if part < run.length:
                    kept = self._split(run, run.start + part) if part else None
            if kept is None or kept.start != done:
                break
            kept.kept_until, kept.tenant = max(kept.kept_until, until), tenant
            done += kept.length
        return len(known), done, len(known) - done

    def end_retain(self, path) -> tuple[int, int, int]:
        known, alone = self._alone(path)
        for run in alone:
            run.kept_until = 0.0
        return known, sum(run.length for run in alone), 0

    def demote(self, path) -> tuple[int, int, int]:
        known, alone = self._alone(path)
        if alone and known == len(path):
            alone += [r for p, r in self.runs.items() if r.start >= known and p[:known] == path]
        for run in alone:
            run.demoted_at, run.kept_until = self.clock, 0.0
        return known, sum(run.length for run in alone), 0

    def _alone(self, path) -> tuple[int, list[Run]]:
        """-> pages known, and the runs of the known path with nothing beside them; none where the
        path's own end has gone and others go on from there."""
        known, last = self.match(path)
        length = len(known)
        if last is None or (length < len(path) and self._goes_on(path[:length])):
            return length, []
        if length < len(last.path):
            self._split(last, length)
        along = self._along(path[:length])[::-1]
        beside = [
            any(
                other.start >= len(run.path)
                and other.path[: len(run.path)] == run.path
                and other.path[: len(below.path)] != below.path
                for other in self.runs.values()
            )
            for below, run in pairwise(along)
        ]
        return length, along[: [*beside, True].index(True) + 1]

    def _goes_on(self, path) -> bool:
        return any(len(p) > len(path) and p[: len(path)] == path for p in self.runs)

    def expire(self, now: float) -> None:
        for run in self.runs.values():
            if run.kept_until <= now:
                run.kept_until = 0.0

    def retained(self) -> dict[bytes, int]:
        kept = Counter()
        for run in self.runs.values():
            if run.kept_until:
                kept[run.tenant] += run.length
        return dict(kept)

    def rank(self, run: Run):
        grade = 2 if run.kept_until else 0 if run.demoted_at >= run.used_at else 1
        return grade, self.policy.rank(run)

    def evict(self, n: int, spare_retained: bool = False) -> list[int]:
        freed: list[int] = []
        while len(freed) < n and (leaves := [run for run in self.runs.values() if self._free(run)]):
            leaf = min(leaves, key=self.rank)
            if spare_retained and leaf.kept_until:
                break
            self.policy.evicted(leaf)
            del self.runs[leaf.path]
            cut = max(len(leaf.pages) - (n - len(freed)), 0)
            freed += leaf.pages[cut:]
            leaf.path, leaf.pages = leaf.path[: leaf.start + cut], leaf.pages[:cut]
            leaf.attached = bool(cut)
            if cut:
                self.runs[leaf.path] = leaf
        return freed

    def evict_leaf(self) -> list[int]:
        leaves = [run for run in self.runs.values() if self._free(run)]
        return self.evict(len(min(leaves, key=self.rank).pages)) if leaves else []

    def clear(self) -> list[int]:
        pages = [page for run in self.runs.values() for page in run.pages]
        for run in self.runs.values():
            run.attached = False
        self.runs.clear()
        return pages

    def pinned_pages(self) -> int:
        pinned = [run for run in self.runs.values() if run.pins]
        protected = {above.path for run in pinned for above in self._along(run.path)}
        return sum(len(self.runs[path].pages) for path in protected)

    def contents(self) -> dict[tuple[int, ...], int]:
        """Every known prefix and the page at its end."""
        return {
            run.path[: run.start + i + 1]: page
            for run in self.runs.values()
            for i, page in enumerate(run.pages)
        }

    def _along(self, path: tuple[int, ...]) -> list[Run]:
        """The runs of which `path` has at least the first page, upper ones first."""
        on_path = [run for run in self.runs.values() if self._shared_pages(run, path)]
        return sorted(on_path, key=lambda run: run.start)

    @staticmethod
    def _shared_pages(run: Run, path: tuple[int, ...]) -> list[int]:
        shared = 0
        while shared < min(len(run.path), len(path)) and run.path[shared] == path[shared]:
            shared += 1
        return run.pages[: max(shared - run.start, 0)]

    def _split(self, run: Run, at: int) -> Run:
        cut = at - run.start
        upper = Run(run.path[:at], run.start, run.pages[:cut], run.born_at, run.used_at, run.uses)
        upper.credit, upper.demoted_at = run.credit, run.demoted_at
        upper.kept_until, upper.tenant = run.kept_until, run.tenant
        run.start, run.pages = at, run.pages[cut:]
        self.runs[upper.path] = upper
        return upper

    def _free(self, run: Run) -> bool:
        below = [
            other
            for path, other in self.runs.items()
            if other.start >= len(run.path) and path[: len(run.path)] == run.path
        ]
        return not run.pins and not below
