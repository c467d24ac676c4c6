"""Token ids to text: whole characters only, never part of a stop string."""

from collections.abc import Sequence
from typing import Any, Protocol

INCOMPLETE = "\ufffd"  # decoders write it for bytes that do not yet form a character


class Decoder(Protocol):
    def decode(self, token_ids: Sequence[int], **options: Any) -> Any: ...


class Detokenizer:
    """Splits an answer into pieces that end on a character and join to the decoded whole.

    Decoders depend on the tokens before (byte-level BPE joins bytes, sentencepiece drops the first space), so a few
    emitted tokens are decoded again in front of the new ones, and the difference is the new text. tokenizers'
    DecodeStream gives the same pieces, but raises on bytes that are no UTF-8, which a model may produce, and has no
    flush.
    """

    def __init__(self, tokenizer: Decoder) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.context = 0  # index from which tokens are decoded again
        self.out = 0  # index of the first token that is not emitted as text

    def push(self, token: int) -> str:
        """The text that became certain with this token."""
        self.ids.append(token)
        text = self._pending()
        if not text or text.endswith(INCOMPLETE):
            return ""
        self.context, self.out = self.out, len(self.ids)
        return text

    def flush(self) -> str:
        """The text held back, without the incomplete character at its end."""
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
    """Holds text back while it may be the beginning of a stop string.

    Of several stop strings the one completed first wins, among those the longest; the result does not depend on how the
    text was cut into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = tuple(stop for stop in stops if stop)
        self.held = ""
        self.hit = False

    def push(self, text: str) -> str:
        """The text that may be emitted. On a hit the text before the stop string; after it nothing."""
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
        """The text held back, which turned out to be ordinary."""
        text, self.held = self.held, ""
        return text

    def _could_begin(self, text: str) -> int:
        """Length of the longest suffix of the text that begins a stop string."""
        for length in range(min(max(map(len, self.stops)) - 1, len(text)), 0, -1):
            if any(len(stop) > length and text.endswith(stop[:length]) for stop in self.stops):
                return length
        return 0
