"""/channel and /operator."""

import hashlib
from collections.abc import Mapping

from core.channels import adapter_names, audit, bindings, directory, operators, settings, terminal
from core.commands.registry import command
from core.commands.table import Call
from core.errors import BadInput, NotAllowed, UnknownThing
from core.i18n.messages import language_name, say
from core.storage.database import Tx
from core.types import Body, Caller, Channel, ForgetMemory, Grant, Json, Outcome

ALL = "all"
_MAX_LABEL, _MAX_SHOWN = 80, 80


@command("channel", "list")
def channel_list(tx: Tx, caller: Caller, call: Call) -> Outcome:
    lines = [say(caller.language, "operators.channels"), ""]
    for channel in directory.channels(tx, caller.user):
        key = "operators.channel_line_archived" if channel.archived else "operators.channel_line"
        version = adapter_names.champion(tx, channel.adapter)[1]
        fields = {"name": channel.name, "title": channel.title, "partner": channel.partner, "version": version}
        lines.append(f"- {say(caller.language, key, **fields)}")
    return Outcome(Body("\n".join(lines)))


@command("channel", "create")
def channel_create(tx: Tx, caller: Caller, call: Call) -> Outcome:
    """Raises BadInput for a name that is taken or not allowed, or a title that is too long."""
    name, title = call.arguments["name"], call.arguments.get("title", "").strip()
    channel = directory.create_channel(tx, name, title=settings.parse_title(title) if title else "")
    audit.record(tx, caller, call.action, name, None, settings.stored(settings.current(tx, channel)))
    return Outcome(Body(say(caller.language, "operators.created", name=name)))


@command("channel", "show")
def channel_show(tx: Tx, caller: Caller, call: Call) -> Outcome:
    channel = _channel(tx, caller, call)
    language = caller.language
    none = say(language, "operators.none")
    shown = {
        **settings.current(tx, channel),
        "limits": settings.limits_line(language, channel.limits),
        "language": language_name(channel.language) if channel.language else say(language, "operators.auto"),
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
    more = (f"\n- {name}: {settings.brief(value)}" for name, value in channel.settings.items())
    return Outcome(Body(text.strip() + "".join(more)))


@command("channel", "set")
def channel_set(tx: Tx, caller: Caller, call: Call) -> Outcome:
    """All that was asked for, or nothing. Raises BadInput naming the setting, its value and what it must be."""
    channel = _editable(tx, caller, call)
    asked = {name: call.arguments[name].strip() for name in call.form.settings if name in call.arguments}
    if settings.owners() & set(asked) and operators.grant_of(tx, caller.user, channel.id) < Grant.OWNER:
        raise NotAllowed
    now = settings.current(tx, channel)
    wanted = settings.parse(tx, channel, asked)
    before, after = settings.moved(tx, channel, wanted.pop("bind", ()))
    changed = {name: value for name, value in wanted.items() if value != now[name]}
    if not after and not changed:
        return Outcome(Body(say(caller.language, "operators.set_nothing", name=channel.name)))
    settings.store(tx, channel, changed)
    before |= {name: now[name] for name in changed}
    after |= changed
    audit.record(tx, caller, call.action, channel.name, settings.stored(before), settings.stored(after))
    told = _changes(caller.language, channel, before, after)
    if "instructions" in changed and (label := _trained_otherwise(tx, channel, changed["instructions"])):
        told = f"{told}\n\n{say(caller.language, 'operators.trained_otherwise', label=label)}"
    return Outcome(Body(told))


def _changes(language: str, channel: Channel, before: Mapping[str, Json], after: Mapping[str, Json]) -> str:
    lines = [say(language, "operators.set", name=channel.name), ""]
    for name, value in after.items():
        shown = {"before": settings.brief(before[name]), "after": settings.brief(value)}
        lines.append(f"- {say(language, 'operators.set_line', key=name, **shown)}")
    return "\n".join(lines)


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
    lines = [say(caller.language, "operators.operators"), ""]
    for one in operators.find(tx, None if caller.grant is Grant.OWNER else caller.channel.id):
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
