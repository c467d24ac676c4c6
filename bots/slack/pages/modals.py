"""The modals, and the command or question that a submitted one stands for. Pure.

What a modal is about travels in its `private_metadata`, with the language it was opened in. A submission becomes
the same text that a person could have typed, and is checked where all commands are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from bots.slack.pages.text import plain_text
from core.config.keys import Key, keys
from core.config.schema import channel_keys
from core.i18n.messages import Refusal, say
from core.platform import Choice, Overview
from core.types import Attachment, Limits

Values = Mapping[str, Mapping[str, Any]]
View = dict[str, Any]
ASK = "ask"  # also the callback id of the message shortcut
LIMITS, INSTRUCTIONS, DATASET, VERSION = "limits", "instructions", "dataset", "version"
LIMIT_KEYS = keys(Limits)
FILE_TYPES = ("jsonl", "json", "csv", "tsv", "txt", "gz")
MAX_INSTRUCTIONS = min(3_000, channel_keys()["instructions"].longest)  # Slack's input holds 3,000 characters
_QUOTE, _MAX_METADATA = 1_000, 3_000
_QUOTES = (('"', '"'), ("「", "」"), ("«", "»"), ("“", "”"), ("＂", "＂"))


@dataclass(frozen=True, slots=True)
class ModalContext:
    """The context of a modal. `quoted` is the message that a question refers to."""

    place: str
    conversation: str
    language: str = "en"
    reply_to: str = ""
    quoted: str = ""

    def dump(self) -> str:
        """As JSON within Slack's limit; `quoted` is cut, since a character may take up to six in JSON."""
        given = [self.place, self.conversation, self.language, self.reply_to, self.quoted]
        dumped = json.dumps(given, ensure_ascii=False)
        over = len(dumped) - _MAX_METADATA
        fits = over <= 0 or not self.quoted
        return dumped if fits else replace(self, quoted=self.quoted[: -max(over // 6, 1)]).dump()

    @classmethod
    def read(cls, view: Mapping[str, Any]) -> ModalContext:
        return cls(*json.loads(view["private_metadata"]))


@dataclass(frozen=True, slots=True)
class Submission:
    """A submitted modal: a text, or errors by block, or neither when nothing was changed."""

    text: str = ""
    attachments: tuple[Attachment, ...] = ()
    errors: Mapping[str, str] = field(default_factory=dict)


# --- views ---


def ask_view(message: Mapping[str, Any], place: str, language: str) -> View:
    """The modal of the message shortcut."""
    (_, text), ts = plain_text(str(message.get("text") or "")), str(message["ts"])
    context = ModalContext(place, str(message.get("thread_ts") or ts), language, ts, text[:_QUOTE])
    return _modal(ASK, context, [_input(context, "question", "ask_label", _text_input(multiline=True), optional=True)])


def limits_view(context: ModalContext, shown: Overview) -> View:
    """The limits of each person, with their present values."""
    blocks = []
    for name, key in LIMIT_KEYS.items():
        element = {"type": "number_input", "action_id": "number", "is_decimal_allowed": False}
        element |= {"min_value": str(key.low), "max_value": str(key.high)}
        element["initial_value"] = str(getattr(shown.channel.limits, name))
        hint, label = "" if key.low else "limits_zero", limit_label(context.language, key)
        blocks.append(_input(context, name, "", element, hint=hint, text=label))
    return _modal(LIMITS, context, blocks)


def limit_label(language: str, key: Key) -> str:
    """The name of a limit; its English help where no sentence names it."""
    sentence = say(language, name := f"slack.limits_{key.name}")
    return key.help if sentence == name else sentence


def instructions_view(context: ModalContext, shown: Overview) -> View | None:
    """None where the instructions exceed Slack's input, which would cut them."""
    now = shown.channel.instructions
    if len(now) > MAX_INSTRUCTIONS:
        return None
    element = _text_input(multiline=True, max_length=MAX_INSTRUCTIONS, **({"initial_value": now} if now else {}))
    return _modal(INSTRUCTIONS, context, [_input(context, "text", "instructions_label", element, optional=True)])


def dataset_view(context: ModalContext, shown: Overview) -> View:
    element = {"type": "file_input", "action_id": "files", "filetypes": list(FILE_TYPES), "max_files": 1}
    return _modal(DATASET, context, [_input(context, "file", "dataset_label", element, hint="dataset_hint")])


def version_view(context: ModalContext, shown: Overview) -> View:
    """The versions are loaded when the list is opened (`options`)."""
    choice = {"type": "external_select", "action_id": VERSION, "min_query_length": 0}
    reason = _text_input(max_length=200)
    blocks = [
        _input(context, "version", "version_label", choice),
        _input(context, "reason", "version_reason", reason, hint="version_reason_hint", optional=True),
    ]
    return _modal(VERSION, context, blocks)


def notice_view(language: str, name: str, text: str) -> View:
    """A modal with a notice instead of its inputs."""
    return {
        "type": "modal",
        "title": _plain(say(language, f"slack.{name}_title")),
        "close": _plain(say(language, "slack.close")),
        "blocks": [{"type": "section", "text": {"type": "mrkdwn", "text": text}}],
    }


VIEWS: Mapping[str, Callable[[ModalContext, Overview], View | None]] = {
    LIMITS: limits_view,
    INSTRUCTIONS: instructions_view,
    DATASET: dataset_view,
    VERSION: version_view,
}


def options(choices: Sequence[Choice], typed: str, language: str) -> dict[str, Any]:
    """The options that match `typed`. The sign of a value says whether the version passed its evaluation."""
    fit = [one for one in choices if typed.lower() in one.label.lower()][:100]
    labels = [one.label if one.passed else say(language, "slack.version_failed", label=one.label) for one in fit]
    values = [f"{'+' if one.passed else '-'}{one.label}" for one in fit]
    return {"options": [{"text": _plain(a), "value": b} for a, b in zip(labels, values, strict=True)]}


# --- submissions ---


def submission(view: Mapping[str, Any]) -> tuple[ModalContext, Submission] | None:
    """Read a submission; None for a foreign modal. Raises KeyError or TypeError for missing fields."""
    read = _FILLED.get(str(view.get("callback_id")))
    if read is None:
        return None
    context = ModalContext.read(view)
    return context, read(context, view["state"]["values"])


def _asked(context: ModalContext, values: Values) -> Submission:
    question = str(values["question"]["text"].get("value") or "").strip()
    if not question:
        return Submission(errors={"question": say(context.language, "slack.ask_empty")})
    quoted = "\n".join(f"> {line}" for line in context.quoted.splitlines())
    return Submission(f"{quoted}\n\n{question}" if quoted else question)


def _limits(context: ModalContext, values: Values) -> Submission:
    given = {key: str(values[key]["number"].get("value") or "").strip() for key in LIMIT_KEYS if key in values}
    errors = {}
    for name, text in given.items():
        try:
            if text:
                LIMIT_KEYS[name].parse(text)
        except Refusal as refusal:
            errors[name] = refusal.reason.render(context.language)
    if errors:
        return Submission(errors=errors)
    wanted = " ".join(f"{key}={value}" for key, value in given.items() if value)
    return Submission(f"/channel set {wanted}" if wanted else "")


def _instructions(context: ModalContext, values: Values) -> Submission:
    text = str(values["text"]["text"].get("value") or "").strip()
    opening, closing = next((pair for pair in _QUOTES if pair[1] not in text), _QUOTES[-1])
    return Submission(f"/channel set instructions={opening}{text.replace(closing, '')}{closing}")


def _dataset(context: ModalContext, values: Values) -> Submission:
    files = values["file"]["files"].get("files") or []
    if not files:
        return Submission(errors={"file": say(context.language, "slack.dataset_missing")})
    return Submission("/finetune", (attachment(files[0]),))


def _version(context: ModalContext, values: Values) -> Submission:
    chosen = str((values["version"][VERSION].get("selected_option") or {}).get("value") or "")
    reason = " ".join(str(values["reason"]["text"].get("value") or "").split())
    if not chosen:
        return Submission(errors={"version": say(context.language, "slack.version_missing")})
    if chosen[0] == "-" and not reason:
        return Submission(errors={"reason": say(context.language, "slack.version_needs_reason", label=chosen[1:])})
    return Submission(f"/adapter promote {chosen[1:]} {reason}".strip())


_FILLED: Mapping[str, Callable[[ModalContext, Values], Submission]] = {
    ASK: _asked,
    LIMITS: _limits,
    INSTRUCTIONS: _instructions,
    DATASET: _dataset,
    VERSION: _version,
}


def attachment(given: Mapping[str, Any]) -> Attachment:
    """An Attachment from Slack's file object."""
    name, size_bytes = str(given.get("name") or "file"), int(given.get("size") or 0)
    return Attachment(str(given["id"]), name, size_bytes, str(given.get("mimetype") or ""))


# --- parts ---


def _modal(name: str, context: ModalContext, blocks: list[View]) -> View:
    return {
        "type": "modal",
        "callback_id": name,
        "private_metadata": context.dump(),
        "title": _plain(say(context.language, f"slack.{name}_title")),
        "submit": _plain(say(context.language, f"slack.{name}_submit")),
        "close": _plain(say(context.language, "slack.close")),
        "blocks": blocks,
    }


def _input(
    context: ModalContext, id: str, label: str, element: View, *, hint: str = "", text: str = "", optional: bool = False
) -> View:
    block = {"type": "input", "block_id": id, "optional": optional, "element": element}
    block["label"] = _plain(text or say(context.language, f"slack.{label}"))
    return block | ({"hint": _plain(say(context.language, f"slack.{hint}"))} if hint else {})


def _text_input(**given: Any) -> View:
    return {"type": "plain_text_input", "action_id": "text", **given}


def _plain(text: str) -> dict[str, str]:
    return {"type": "plain_text", "text": text}
