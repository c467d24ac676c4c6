"""Keys and values of conversations between turns, so that the next turn computes only its new tokens.

One entry per conversation of a channel, tied to the adapter that computed it: a request with another adapter drops the
entry. Bounded in bytes, least recently used first. All methods belong to the model thread.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from torch import Tensor

from core.engine.protocol import Scope


@dataclass(frozen=True, slots=True)
class CachedPrefix:
    """The tokens of a conversation so far, and what the model made of them.

    `tensors` are (kv_heads, len(ids), head_dim), keys and values of each layer in turn.
    """

    adapter: str  # sha256; "" is the bare base model
    ids: tuple[int, ...]
    tensors: list[Tensor]

    @property
    def size(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def wipe(self) -> None:
        for tensor in self.tensors:
            tensor.zero_()  # freed memory may lie in an allocator's pool for long


class PrefixCache:
    """What is kept, by (channel, conversation)."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit, self.size = limit_bytes, 0
        self._kept: OrderedDict[tuple[str, str], CachedPrefix] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def wants(self, scope: Scope, size: int) -> bool:
        """Whether an entry of that many bytes would be kept: without a conversation there is no next turn."""
        return bool(scope.conversation) and size <= self.limit

    def put(self, scope: Scope, kept: CachedPrefix) -> None:
        """Keep it in place of what was there; the least recently used make room."""
        self._drop((scope.channel, scope.conversation))
        while self._kept and self.size + kept.size > self.limit:
            self._drop(next(iter(self._kept)))
        self._kept[scope.channel, scope.conversation] = kept
        self.size += kept.size

    def find(self, scope: Scope, adapter: str, prompt: Sequence[int]) -> tuple[CachedPrefix, int] | None:
        """What is kept of the conversation, and how many of the prompt's first tokens it covers; never all of them.

        An entry of another adapter is dropped.
        """
        key = (scope.channel, scope.conversation)
        kept = self._kept.get(key)
        if kept is None:
            return None
        if kept.adapter != adapter:
            self._drop(key)
            return None
        self._kept.move_to_end(key)
        pairs = zip(kept.ids, prompt[:-1], strict=False)  # the last one is run for its logits
        count = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        return (kept, count) if count else None

    def forget(self, channel: str, conversation: str) -> None:
        """Drop a conversation; without one all of the channel's."""
        for key in [key for key in self._kept if key[0] == channel and conversation in ("", key[1])]:
            self._drop(key)

    def clear(self) -> None:
        for key in list(self._kept):
            self._drop(key)

    def _drop(self, key: tuple[str, str]) -> None:
        kept = self._kept.pop(key, None)
        if kept is not None:
            self.size -= kept.size
            kept.wipe()
