"""/channel and /operator."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import NoReturn

from core.channels import adapter_names, audit, bindings, directory, operators, terminal
from core.commands.registry import command
from core.commands.table import Call
from core.errors import BadInput, NotAllowed, UnknownThing
from core.i18n.messages import Lazy, language_name, languages, resolve, say
from core.storage.database import Tx
from core.types import Body, Caller, Channel, ForgetMemory, Grant, Outcome
from core.usage import prices

ALL = "all"
_OWNERS_SETTINGS = frozenset({"adapter", "price_in", "price_out", "price_train", "share", "bind"})
_PRICES = ("price_in", "price_out", "price_train", "share")
_MOST = 1_000_000_000
_MAX_TITLE, _MAX_INSTRUCTIONS, _MAX_LABEL, _MAX_SHOWN = 80, 8000, 80, 80
_MOST_QUESTIONS, _MAX_QUESTION = 4, 60
_BIND = re.compile(r"([^\s:/]+):([^\s:/]+)(?:[:/](\S+))?")

Setting = str | int | float


# --- /channel ---


@command("channel", "list")
def channel_list(tx: Tx, caller: Caller, call: Call) -> Outcome:
    lines = [say(caller.language, "operators.channels"), ""]
    for channel in directory.channels(tx, caller.user):
        key = "operators.channel_line_archived" if channel.archived else "operators.channel_line"
        version = adapter_names.champion(tx, channel.adapter)[1]
        told = say(
            caller.language, key, name=channel.name, title=channel.title, partner=channel.partner, version=version
        )
        lines.append(f"- {told}")
    return Outcome(Body("\n".join(lines)))


@command("channel", "create")
def channel_create(tx: Tx, caller: Caller, call: Call) -> Outcome:
    """Raises BadInput for a name that is taken or not allowed, or a title that is too long."""
    name, title = call.arguments["name"], call.arguments.get("title", "").strip()
    if title:
        _read_title("title", title)
    channel = directory.create_channel(tx, name, title=title)
    audit.record(tx, caller, call.action, name, None, {**_settings(tx, channel)})
    return Outcome(Body(say(caller.language, "operators.created", name=name)))


@command("channel", "show")
def channel_show(tx: Tx, caller: Caller, call: Call) -> Outcome:
    channel = _channel(tx, caller, call)
    language = caller.language
    none = say(language, "operators.none")
    shown = {
        **_settings(tx, channel),
        "language": language_name(channel.language or language)
        if channel.language
        else say(language, "operators.auto"),
        "instructions": channel.instructions or none,
        "questions": " | ".join(channel.questions) or none,
    }
    text = say(
        language,
        "operators.shown",
        name=channel.name,
        partner=channel.partner,
        version=adapter_names.champion(tx, channel.adapter)[1],
        places=", ".join(bindings.places(tx, channel.id)) or none,
        **shown,
    )
    return Outcome(Body(text.strip()))


@command("channel", "set")
def channel_set(tx: Tx, caller: Caller, call: Call) -> Outcome:
    """All that was asked for, or nothing. Raises BadInput naming the setting, its value and what it must be."""
    channel = _editable(tx, caller, call)
    asked = {key: call.arguments[key].strip() for key in call.form.settings if key in call.arguments}
    if _OWNERS_SETTINGS & set(asked) and operators.grant_of(tx, caller.user, channel.id) < Grant.OWNER:
        raise NotAllowed
    now = _settings(tx, channel)
    bind = _read_bind(asked.pop("bind")) if "bind" in asked else None
    wanted = {key: _read(tx, channel, key, text) for key, text in asked.items()}
    before = {key: now[key] for key, value in wanted.items() if value != now[key]}
    after = {key: wanted[key] for key in before}
    if bind is not None and (held := bindings.bound_to(tx, *bind)) != channel.name:
        place = f"bind {bind[0]}:{bind[1]}" + (f"/{bind[2]}" if bind[2] else "")
        before[place], after[place] = held, channel.name
        bindings.bind(tx, *bind, channel.id)
    if not after:
        return Outcome(Body(say(caller.language, "operators.set_nothing", name=channel.name)))
    _store(tx, channel, {**now, **after}, set(after))
    audit.record(tx, caller, call.action, channel.name, {**before}, {**after})
    told = _changes(caller.language, channel, before, after)
    if "instructions" in after and (label := _trained_otherwise(tx, channel, str(after["instructions"]))):
        told = f"{told}\n\n{say(caller.language, 'operators.trained_otherwise', label=label)}"
    return Outcome(Body(told))


def _trained_otherwise(tx: Tx, channel: Channel, instructions: str) -> str:
    """The version that answers, where it was trained and judged under other instructions; else ""."""
    trained = adapter_names.champion_instructions(tx, channel.adapter)
    if trained in (None, hashlib.sha256(instructions.encode()).hexdigest()):
        return ""
    return adapter_names.champion(tx, channel.adapter)[1]


@command("channel", "archive")
def channel_archive(tx: Tx, caller: Caller, call: Call) -> Outcome:
    channel = _editable(tx, caller, call)
    if channel.name == terminal.TERMINAL:
        raise BadInput("operators.archive_terminal")
    directory.archive(tx, channel.id)
    audit.record(tx, caller, call.action, channel.name, {"archived": False}, {"archived": True})
    told = say(caller.language, "operators.archived", name=channel.name)
    return Outcome(Body(told), (ForgetMemory(channel.name),))


def _channel(tx: Tx, caller: Caller, call: Call) -> Channel:
    """The channel that is named, else the one it is said in. Raises UnknownThing: only an owner comes this far."""
    name = call.arguments.get("channel", caller.channel.name)
    channel = directory.channel_by_name(tx, name)
    if channel is None:
        known = ", ".join(one.name for one in directory.channels(tx, caller.user))
        raise UnknownThing("operators.no_channel", name=name[:_MAX_SHOWN], known=known)
    return channel


def _editable(tx: Tx, caller: Caller, call: Call) -> Channel:
    channel = _channel(tx, caller, call)
    if channel.archived:
        raise BadInput("operators.channel_archived", name=channel.name)
    return channel


# --- the settings of a channel ---


def _settings(tx: Tx, channel: Channel) -> dict[str, Setting]:
    """As people write them; `share` in percent."""
    price = prices.price_now(tx, channel.id)
    limits, sampling = channel.limits, channel.sampling
    return {
        "title": channel.title,
        "instructions": channel.instructions,
        "language": channel.language,
        "per_minute": limits.per_minute,
        "per_hour": limits.per_hour,
        "tokens_in": limits.tokens_in,
        "tokens_out": limits.tokens_out,
        "temperature": sampling.temperature,
        "questions": "\n".join(channel.questions),
        "top_p": sampling.top_p,
        "adapter": channel.adapter,
        "price_in": price.in_nano,
        "price_out": price.out_nano,
        "price_train": price.train_nano,
        "share": price.share_bps / 100,
    }


def _store(tx: Tx, channel: Channel, settings: Mapping[str, Setting], changed: set[str]) -> None:
    columns = {key: settings[key] for key in changed if key not in _PRICES and not key.startswith("bind ")}
    if columns:
        directory.set_channel(tx, channel.id, **columns)
    if changed & set(_PRICES):
        share_bps = round(float(settings["share"]) * 100)
        read, written, trained = (int(settings[name]) for name in ("price_in", "price_out", "price_train"))
        prices.set_price(tx, channel.id, read, written, share_bps, trained)


def _changes(language: str, channel: Channel, before: Mapping[str, Setting], after: Mapping[str, Setting]) -> str:
    lines = [say(language, "operators.set", name=channel.name), ""]
    for key, value in after.items():
        told = say(language, "operators.set_line", key=key, before=_brief(before[key]), after=_brief(value))
        lines.append(f"- {told}")
    return "\n".join(lines)


def _brief(value: Setting) -> str | int:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, int):
        return value
    line = " ".join(value.split())
    return (line if len(line) <= _MAX_SHOWN else f"{line[:_MAX_SHOWN]}…") or "–"


def _read(tx: Tx, channel: Channel, key: str, text: str) -> Setting:
    """The value of one setting. Raises BadInput."""
    match key:
        case "title":
            return _read_title(key, text)
        case "instructions":
            if len(text) > _MAX_INSTRUCTIONS:
                _refuse(key, text, "operators.need_shorter", limit=_MAX_INSTRUCTIONS)
            return text
        case "questions":
            return _read_questions(key, text)
        case "language":
            if text.lower() not in ("", "auto") and not resolve(text):
                _refuse(key, text, "operators.need_language", codes=", ".join(languages()))
            return resolve(text)
        case "temperature":
            return _number(key, text, 0, 2)
        case "top_p":
            return _number(key, text, 0.01, 1)
        case "share":
            return round(_number(key, text.removesuffix("%").strip(), 0, 100), 2)
        case "adapter":
            if not adapter_names.belongs_to(tx, text, channel.partner):
                _refuse(key, text, "operators.need_adapter")
            return text
        case _:
            return _whole(key, text, 1 if key == "tokens_out" else 0)


def _read_title(key: str, text: str) -> str:
    title = " ".join(text.split())
    if not title:
        _refuse(key, text, "operators.need_text")
    if len(title) > _MAX_TITLE:
        _refuse(key, text, "operators.need_shorter", limit=_MAX_TITLE)
    return title


def _read_questions(key: str, text: str) -> str:
    questions = [" ".join(one.split()) for one in re.split(r"[|\n]", text)]
    if any(len(one) > _MAX_QUESTION for one in questions) or len(questions) > _MOST_QUESTIONS:
        _refuse(key, text, "operators.need_questions", most=_MOST_QUESTIONS, limit=_MAX_QUESTION)
    return "\n".join(one for one in questions if one)


def _read_bind(text: str) -> tuple[str, str, str]:
    found = _BIND.fullmatch(text)
    if found is None:
        _refuse("bind", text, "operators.need_bind")
    return found[1], found[2], found[3] or ""


def _whole(key: str, text: str, low: int) -> int:
    if not re.fullmatch(r"[0-9]{1,10}", text) or not low <= int(text) <= _MOST:
        _refuse(key, text, "operators.need_whole", low=low, high=_MOST)
    return int(text)


def _number(key: str, text: str, low: float, high: float) -> float:
    if not re.fullmatch(r"[0-9]{1,10}(\.[0-9]{1,10})?", text) or not low <= float(text) <= high:
        _refuse(key, text, "operators.need_number", low=f"{low:g}", high=f"{high:g}")
    return float(text)


def _refuse(key: str, text: str, need: str, **fields: str | int) -> NoReturn:
    raise BadInput("operators.bad_value", setting=key, value=_brief(text), need=Lazy(need, **fields))


# --- /operator ---


@command("operator", "invite")
def operator_invite(tx: Tx, caller: Caller, call: Call) -> Outcome:
    """A code that is shown once, to the one who asked."""
    label = " ".join(call.arguments.get("label", "").split())[:_MAX_LABEL]
    everywhere = call.arguments.get("channel", "").lower() == ALL
    channel = None if everywhere else _editable(tx, caller, call)
    code = operators.invite(tx, channel.id if channel else None, label, caller.user)
    audit.record(tx, caller, call.action, channel.name if channel else ALL, None, {"label": label})
    whom = label or say(caller.language, "operators.somebody")
    if channel is None:
        return Outcome(Body(say(caller.language, "operators.invited_all", code=code, label=whom).strip()))
    told = say(caller.language, "operators.invited_channel", title=channel.title, code=code, label=whom)
    return Outcome(Body(told.strip()))


@command("operator", "list")
def operator_list(tx: Tx, caller: Caller, call: Call) -> Outcome:
    """An owner sees all; an operator of this channel those of this channel."""
    owner = caller.grant is Grant.OWNER
    lines = [say(caller.language, "operators.operators"), ""]
    for one in operators.find(tx, None if owner else caller.channel.id):
        key = "operators.operator_line_you" if one.user_hash == caller.user else "operators.operator_line"
        lines.append(f"- {say(caller.language, key, id=str(one.id), **_named(caller, one))}")
    return Outcome(Body("\n".join(lines)))


@command("operator", "remove")
def operator_remove(tx: Tx, caller: Caller, call: Call) -> Outcome:
    """Raises NotAllowed for whoever the caller does not see, and UnknownThing for an owner who mistyped."""
    owner = caller.grant is Grant.OWNER
    typed = call.arguments["operator"].removeprefix("#")
    seen = operators.find(tx, None if owner else caller.channel.id)
    operator = next((one for one in seen if str(one.id) == typed), None)
    if operator is None:
        if not owner:
            raise NotAllowed
        raise UnknownThing("operators.no_operator", id=typed[:_MAX_SHOWN])
    named = _named(caller, operator)
    if operator.channel_id is None and sum(one.channel_id is None for one in seen) == 1:
        raise BadInput("operators.last_owner", **named)
    operators.remove(tx, operator)
    was = {"operator": operator.user_hash, "label": operator.label}
    audit.record(tx, caller, call.action, operator.channel or ALL, was, None)
    return Outcome(Body(say(caller.language, "operators.removed", id=str(operator.id), **named)))


def _named(caller: Caller, operator: operators.Operator) -> dict[str, str]:
    return {
        "label": operator.label or operator.user_hash[:12],
        "scope": operator.channel or say(caller.language, "operators.scope_all"),
    }
