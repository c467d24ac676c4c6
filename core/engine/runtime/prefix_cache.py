"""Keys and values of conversations between turns, so that the next turn computes only its new tokens.

One entry per conversation of a channel, tied to the adapter that computed it: a request with another adapter drops the
entry. Bounded in bytes, least recently used first. All methods belong to the model thread.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from cachetools import LRUCache
from torch import Tensor

from core.engine.protocol import Scope


@dataclass(frozen=True, slots=True)
class CachedPrefix:
    """Tokens of a conversation with their keys and values.

    `tensors` are (kv_heads, len(ids), head_dim), keys and values of each layer in turn.
    """

    adapter: str  # sha256; "" is the base model
    ids: tuple[int, ...]
    tensors: list[Tensor]

    @property
    def size(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def wipe(self) -> None:
        for tensor in self.tensors:
            tensor.zero_()  # freed memory may stay in the allocator's pool


class _Entries(LRUCache[tuple[str, str], CachedPrefix]):
    def popitem(self) -> tuple[tuple[str, str], CachedPrefix]:
        key, evicted = super().popitem()
        evicted.wipe()
        return key, evicted


class PrefixCache:
    """Prefixes by (channel, conversation), at most `limit` bytes."""

    def __init__(self, limit: int) -> None:
        self._entries = _Entries(limit, getsizeof=lambda prefix: prefix.size)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def size(self) -> int:
        return int(self._entries.currsize)

    def accepts(self, scope: Scope, size: int) -> bool:
        """Whether an entry of that many bytes would be kept. Without a conversation there is no next turn."""
        return bool(scope.conversation) and size <= self._entries.maxsize

    def put(self, scope: Scope, prefix: CachedPrefix) -> None:
        """Replace the conversation's entry; the least recently used ones are evicted to fit."""
        self._drop((scope.channel, scope.conversation))
        self._entries[scope.channel, scope.conversation] = prefix

    def find(self, scope: Scope, adapter: str, prompt: Sequence[int]) -> tuple[CachedPrefix, int] | None:
        """The conversation's prefix and how many of the prompt's first tokens it covers, never all of them.

        An entry of another adapter is dropped.
        """
        key = (scope.channel, scope.conversation)
        prefix = self._entries.get(key)
        if prefix is None:
            return None
        if prefix.adapter != adapter:
            self._drop(key)
            return None
        pairs = zip(prefix.ids, prompt[:-1], strict=False)  # the last token is computed for its logits
        count = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        return (prefix, count) if count else None

    def forget(self, channel: str, conversation: str) -> None:
        """Drop a conversation, or all of the channel's if none is named."""
        for key in [key for key in self._entries if key[0] == channel and conversation in ("", key[1])]:
            self._drop(key)

    def clear(self) -> None:
        for key in list(self._entries):
            self._drop(key)

    def _drop(self, key: tuple[str, str]) -> None:
        prefix = self._entries.pop(key, None)
        if prefix is not None:
            prefix.wipe()
