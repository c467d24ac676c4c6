"""The log: one line an event, with its fields; never a secret, never a message of a person.

Secrets are masked three times, because no one place sees everything. A filter on the root logger sees no record of a
child logger, and a library may add a handler of its own; so the message and traceback are masked when the record is
made (`_Record`). Fields of `extra` are set later and cleaned by the filter on our handler. Last, the line is masked.
"""

import logging
import re
import sys
import textwrap
import threading
import time
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO
from urllib.parse import quote

OURS = ("core", "bots", "finetune", "distributary", "__main__")
MASK = "***"
_SHORTEST_SECRET = 6
_LONGEST_FIELD = 300
_LONGEST_CHAIN = 12
_PATTERNS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern, flags), rf"\g<keep>{MASK}" if "?P<keep>" in pattern else MASK)
    for pattern, flags in (
        (r"(?P<keep>/bot)\d[^/\s\"'?&]*", 0),  # URLs of a bot API: the token is part of the path
        (r"(?<!\d)\d{6,12}(?::|%3A)[\w-]{30,}", re.ASCII | re.IGNORECASE),
        (r"xox[a-z](?:\.xox[a-z])?-[\w%.-]{6,}", re.ASCII | re.IGNORECASE),
        (r"xapp-[\w%.-]{6,}", re.ASCII | re.IGNORECASE),
        (r"(?P<keep>hooks\.\w+\.com/\w+/)[^\s\"']+", re.ASCII),
        (r"v0=[0-9a-f]{64}", 0),  # a signature of a webhook request
        (r"(?P<keep>\bbearer(?:\s+|%20|\+))[\w.~+/=%-]{6,}", re.IGNORECASE),
        (r"(?P<keep>\bbasic\s+)[A-Za-z0-9+/=]{16,}", re.IGNORECASE),
        (r"\bhf_[A-Za-z0-9]{20,}", 0),
        (r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL),
        (
            r"(?P<keep>(?:token|secret|password|passphrase|api_?key)[\"']?\s*[=:]\s*[bru]?[\"']?)[^\s\"'&,;)}\]]{6,}",
            re.IGNORECASE,
        ),
    )
)
_TEXT_FIELDS = frozenset(
    "text body payload raw prompt messages content answer question instructions value caption title reason"
    " update event_body request response data line user_name username first_name last_name".split()
)
_QUOTING_ERRORS = (ValueError, LookupError, AssertionError)  # messages that may quote the value
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_secrets: set[str] = set()
_known: re.Pattern[str] | None = None


def install(level: str, stream: TextIO | None = None) -> None:
    """Replace all handlers of the process by one on `stream`, by default the sys.stderr at the time of writing."""
    handler = _Handler(stream)
    handler.addFilter(_clean)
    handler.setFormatter(_Line())
    logging.setLogRecordFactory(_Record)
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for other in [one for one in logging.Logger.manager.loggerDict.values() if isinstance(one, logging.Logger)]:
        for foreign in list(other.handlers):
            other.removeHandler(foreign)
        other.propagate = True
    logging.captureWarnings(True)
    sys.excepthook = _uncaught
    threading.excepthook = _uncaught_in_thread


def register_secret(value: str) -> None:
    """Mask this exact value from now on, also in the forms that a URL or a repr gives it."""
    global _known
    if len(value) < _SHORTEST_SECRET:
        return
    _secrets.update({value, quote(value, safe=""), quote(value), repr(value)[1:-1]})
    _known = re.compile("|".join(re.escape(one) for one in sorted(_secrets, key=len, reverse=True)))


def mask(text: str) -> str:
    """The text without secrets. Also for what is written to a screen outside the log."""
    if _known is not None:
        text = _known.sub(MASK, text)
    for pattern, instead in _PATTERNS:
        text = pattern.sub(instead, text)
    return text


class _Record(logging.LogRecord):
    """A log record without secrets: its message is formatted and masked, its traceback is masked text."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        try:
            message = self.getMessage()
        except Exception:  # arguments that do not fit: logging itself would print them all
            message = f"{self.msg} (its arguments do not fit)"
        self.msg, self.args = mask(message), ()
        if self.exc_info and self.exc_info[1] is not None:
            self.exc_text = mask(_trace(self.exc_info[1]))
            self.exc_info = None
        if self.stack_info:
            self.stack_info = mask(self.stack_info)


def _clean(record: logging.LogRecord) -> bool:
    """Whether to write the record. Other libraries only from WARNING: below it they log whole messages."""
    if record.name.partition(".")[0] not in OURS and record.levelno < logging.WARNING:
        return False
    for name, value in vars(record).copy().items():
        if name not in _STANDARD:
            if name in _TEXT_FIELDS:
                delattr(record, name)
            else:
                setattr(record, name, _shown(value))
    return True


def _shown(value: object) -> str:
    """The value of a field: an id, a number, a short word; of an object only its type, since it may hold a message."""
    if value is None or isinstance(value, str | int | float | Path):
        text = mask(str(value))
        return text if len(text) <= _LONGEST_FIELD else f"{text[:_LONGEST_FIELD]}…"
    if isinstance(value, BaseException):
        return _named(value)
    return f"<{type(value).__name__}>"


class _Line(logging.Formatter):
    """time level event key=value ..., and below it the traceback."""

    def format(self, record: logging.LogRecord) -> str:
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = f"{at}.{int(record.msecs):03d}Z {record.levelname} {_one_line(record.getMessage())}"
        if record.name.partition(".")[0] not in OURS:
            line += f" logger={record.name}"
        for name, value in vars(record).items():
            if name not in _STANDARD:
                line += f" {name}={_quoted(str(value))}"
        below = [text for text in (record.exc_text, record.stack_info) if text]
        return mask("\n".join([line, *below]))


class _Handler(logging.StreamHandler[TextIO]):
    """Without a stream it writes to the current sys.stderr, which at a terminal prints above the line editor."""

    def __init__(self, stream: TextIO | None) -> None:
        self._given = stream
        super().__init__(stream)

    @property
    def stream(self) -> TextIO:
        return self._given or sys.stderr

    @stream.setter
    def stream(self, _: TextIO) -> None:
        pass


def _one_line(text: str) -> str:
    """Escape line breaks, so that a name cannot forge a line of the log."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def _quoted(text: str) -> str:
    text = _one_line(text)
    return '"{}"'.format(text.replace('"', '\\"')) if " " in text or not text else text


def _trace(error: BaseException) -> str:
    """The traceback, causes first, without messages that quote values."""
    blocks: list[str] = []
    seen: set[int] = set()
    here: BaseException | None = error
    while here is not None and id(here) not in seen and len(blocks) < _LONGEST_CHAIN:
        seen.add(id(here))
        blocks.append(_block(here))
        here = here.__cause__ or (None if here.__suppress_context__ else here.__context__)
    return "\nwhich led to:\n".join(reversed(blocks))


def _block(error: BaseException) -> str:
    lines = [*traceback.format_tb(error.__traceback__), _named(error)]
    if isinstance(error, BaseExceptionGroup):
        lines += ["\n" + textwrap.indent(_trace(one), "    ", lambda _: True) for one in error.exceptions]
    return "".join(lines)


def _named(error: BaseException) -> str:
    kind = type(error)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    if isinstance(error, _QUOTING_ERRORS):
        return f"{name} (its message may quote someone's text)"
    try:
        message = mask(str(error))
    except Exception:
        return name
    if len(message) > _LONGEST_FIELD:
        message = f"{message[:_LONGEST_FIELD]}…"
    return f"{name}: {_one_line(message)}" if message else name


def _uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        logging.getLogger("distributary").critical("program.failed", exc_info=(kind, error, trace))


def _uncaught_in_thread(told: threading.ExceptHookArgs) -> None:
    if told.exc_value is not None and not isinstance(told.exc_value, SystemExit):
        logging.getLogger("distributary").critical("thread.failed", exc_info=told.exc_value)
