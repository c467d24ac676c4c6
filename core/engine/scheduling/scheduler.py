"""Fair order of waiting requests, by tokens, bounded.

Virtual token counters (Sheng et al., "Fairness in Serving Large Language Models", arXiv 2401.00588) at three levels:
the partner with the least service goes first, within it the channel, within that the user, whose requests run in order
of arrival. A party that returns after a pause is lifted to the least counter of those present, so idle time earns no
credit. A partner's tokens count divided by its weight: while both wait, weight 2 gets twice the tokens of weight 1.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Generic, TypeVar

from core.engine.protocol import Scope

PROMPT_COST, COMPLETION_COST = 1, 2  # per token; as in the paper's code
MAX_ABSENT = 1024  # counters kept for absent parties, per level

T = TypeVar("T")


class QueueFull(Exception):
    """The queue is full, and nobody in it holds more than the newcomer would."""


class Node(Generic[T]):
    """The root, a partner, a channel or a user. Users have a queue, the others children."""

    def __init__(self) -> None:
        self.served = 0.0
        self.floor = 0.0  # a child that returns to an empty level is lifted to it
        self.waiting = 0  # items in all queues below
        self.running = 0
        self.children: dict[str, Node[T]] = {}
        self.queue: deque[T] = deque()

    @property
    def present(self) -> bool:
        return self.waiting > 0 or self.running > 0

    def enter(self, name: str) -> Node[T]:
        """The child of that name, lifted if it was absent."""
        child = self.children.get(name)
        if child is None:
            self._forget_absent()
            child = self.children[name] = Node()
        if not child.present:
            child.served = max(child.served, self._least())
        return child

    def next_child(self) -> Node[T]:
        """The child with waiting items that was served least; on a tie the one that came first."""
        return min((child for child in self.children.values() if child.waiting), key=lambda child: child.served)

    def _least(self) -> float:
        self.floor = min((child.served for child in self.children.values() if child.present), default=self.floor)
        return self.floor

    def leave(self, child: Node[T]) -> None:
        """Remember the counter of the last child to leave, so that an empty level does not restart from zero."""
        if not any(other.present for other in self.children.values()):
            self.floor = max(self.floor, child.served)

    def _forget_absent(self) -> None:
        """Drop counters that would be lifted anyway and, beyond MAX_ABSENT / 2, the least of the others."""
        if len(self.children) < MAX_ABSENT:
            return
        least = self._least()
        absent = sorted((child.served, name) for name, child in self.children.items() if not child.present)
        excess = max(0, len(absent) - MAX_ABSENT // 2)
        for i, (served, name) in enumerate(absent):
            if served <= least or i < excess:
                del self.children[name]


class Scheduler(Generic[T]):
    """Items wait, are taken in fair order, are charged while they run, and are done. At most `max_waiting` wait."""

    def __init__(self, max_waiting: int) -> None:
        self.max_waiting = max_waiting
        self.root: Node[T] = Node()
        self.waiting: dict[int, tuple[T, Scope]] = {}  # by id(item), in order of arrival

    def __len__(self) -> int:
        return len(self.waiting)

    def items(self) -> Iterator[T]:
        """All waiting items in order of arrival."""
        return (item for item, _ in list(self.waiting.values()))

    def add(self, item: T, scope: Scope) -> T | None:
        """Queue an item. When full, return the displaced one: the newest of the party that holds most.

        Raises QueueFull if that would be the newcomer itself.
        """
        displaced = self._displace(scope) if len(self.waiting) >= self.max_waiting else None
        path = self._enter(scope)
        for node in path:
            node.waiting += 1
        path[-1].queue.append(item)
        self.waiting[id(item)] = (item, scope)
        return displaced

    def peek(self) -> T | None:
        """The item whose turn it is, or None."""
        return self._next()[-1].queue[0] if self.waiting else None

    def take(self) -> T | None:
        """Remove and return that item, which counts as running from now on."""
        if not self.waiting:
            return None
        path = self._next()
        item = path[-1].queue.popleft()
        for node in path:
            node.waiting -= 1
            node.running += 1
        del self.waiting[id(item)]
        return item

    def remove(self, item: T) -> bool:
        """Remove a waiting item; False if it does not wait."""
        found = self.waiting.pop(id(item), None)
        if found is None:
            return False
        path = self._path(found[1])
        queue = path[-1].queue
        del queue[next(i for i, other in enumerate(queue) if other is item)]
        for node in path:
            node.waiting -= 1
        self._left(path)
        return True

    def charge(self, scope: Scope, cost: int) -> None:
        """Charge the parties of a running item."""
        _, partner, channel, user = self._path(scope)
        partner.served += cost / scope.weight
        channel.served += cost
        user.served += cost

    def done(self, scope: Scope) -> None:
        """A running item of that scope has ended."""
        path = self._path(scope)
        for node in path:
            node.running -= 1
        self._left(path)

    def _next(self) -> list[Node[T]]:
        path = [self.root]
        while path[-1].children:
            path.append(path[-1].next_child())
        return path

    def _enter(self, scope: Scope) -> list[Node[T]]:
        path = [self.root]
        for name in _names(scope):
            path.append(path[-1].enter(name))
        return path

    def _path(self, scope: Scope) -> list[Node[T]]:
        path = [self.root]
        for name in _names(scope):
            path.append(path[-1].children[name])
        return path

    def _left(self, path: list[Node[T]]) -> None:
        for parent, child in pairwise(path):
            if not child.present:
                parent.leave(child)

    def _displace(self, newcomer: Scope) -> T:
        """Remove the newest item of the party that holds most, at the first level where it holds two more than the
        newcomer.

        With a difference of one the newcomer would become the largest holder itself.

        """
        node, found = self.root, False
        for name in _names(newcomer):
            heaviest = max(node.children.values(), key=lambda child: child.waiting)
            if not found:
                mine = node.children.get(name)
                found = heaviest.waiting >= (mine.waiting if mine else 0) + 2
                if not found:
                    if mine is None:
                        raise QueueFull
                    heaviest = mine
            node = heaviest
        if not (found and node.queue):
            raise QueueFull
        item = node.queue[-1]
        self.remove(item)
        return item


def row_to_preempt(newcomer: Scope, running: Sequence[Scope]) -> int | None:
    """Index of the running item to preempt for the newcomer, or None.

    At the first level where another party has two more rows than the newcomer's (by weight), it is the last row of the
    party with the most: with one row less it still has as many.
    """
    inside = list(enumerate(running))
    for level, name in enumerate(_names(newcomer)):
        parties: dict[str, list[int]] = {}
        weights = {name: newcomer.weight}
        for index, scope in inside:
            party = _names(scope)[level]
            parties.setdefault(party, []).append(index)
            weights[party] = scope.weight
        left = {party: (len(items) - 1) / weights[party] for party, items in parties.items() if party != name}
        most = max(left, key=left.__getitem__, default=name)
        if most != name and left[most] >= (len(parties.get(name, ())) + 1) / weights[name]:
            return parties[most][-1]
        inside = [(index, scope) for index, scope in inside if _names(scope)[level] == name]
    return None


def _names(scope: Scope) -> tuple[str, str, str]:
    return scope.partner, scope.channel, scope.user
