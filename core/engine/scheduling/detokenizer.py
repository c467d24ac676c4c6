"""Token ids to text: whole characters only, never part of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

INCOMPLETE = "\ufffd"  # what a decoder writes for bytes that do not yet make a character


class Decoder(Protocol):
    def decode(self, token_ids: Sequence[int], **options: Any) -> Any: ...


class Detokenizer:
    """Joined, the pieces are the decoded whole; each piece ends on a character.

    Decoders look back (byte-level BPE joins bytes, sentencepiece drops the first space), so a few tokens that are out
    already are always decoded again in front of the new ones, and only the difference is new text.
    """

    def __init__(self, tokenizer: Decoder) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.context = 0  # from here on tokens are decoded again
        self.out = 0  # tokens before here are out as text

    def push(self, token: int) -> str:
        """The text that became certain with this token."""
        self.ids.append(token)
        text = self._pending()
        if not text or text.endswith(INCOMPLETE):
            return ""
        self.context, self.out = self.out, len(self.ids)
        return text

    def flush(self) -> str:
        """What was held back, without the incomplete character at its end."""
        text = self._pending().rstrip(INCOMPLETE)
        self.context = self.out = len(self.ids)
        return text

    def _pending(self) -> str:
        before = self._decode(self.ids[self.context : self.out])
        return self._decode(self.ids[self.context :])[len(before) :]

    def _decode(self, ids: Sequence[int]) -> str:
        if not ids:
            return ""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class StopScanner:
    """Holds text back while it could still be the beginning of a stop string.

    Of several stop strings the one that is complete first wins, the longest of those; so the result does not depend on
    how the text was cut into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = tuple(stop for stop in stops if stop)
        self.held = ""
        self.hit = False

    def push(self, text: str) -> str:
        """The text that may be shown. After a hit: what stood before the stop string; then nothing more."""
        if self.hit or not self.stops:
            return "" if self.hit else text
        text = self.held + text
        ends = [(start + len(stop), start) for stop in self.stops if (start := text.find(stop)) >= 0]
        if ends:
            self.hit, self.held = True, ""
            return text[: min(ends)[1]]
        keep = self._could_begin(text)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back and turned out to be ordinary text."""
        text, self.held = self.held, ""
        return text

    def _could_begin(self, text: str) -> int:
        """Length of the longest end of the text with which a stop string begins."""
        for length in range(min(max(map(len, self.stops)) - 1, len(text)), 0, -1):
            if any(len(stop) > length and text.endswith(stop[:length]) for stop in self.stops):
                return length
        return 0
