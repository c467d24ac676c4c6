"""What the configuration says of partners and channels -> the directory. Knows no platform and no model.

At a start only what is missing is made: the database decides over what exists, until `distributary config apply`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from core.channels import adapter_names, audit, bindings, directory, partners, terminal
from core.chat import conversations
from core.config.schema import ChannelSeed, Config, PartnerSeed
from core.engine.protocol import EngineInfo
from core.errors import BadConfig, BadInput, UnknownThing
from core.i18n.messages import say
from core.storage.database import Tx, Value
from core.types import Address, Caller, Grant, Json
from core.usage import prices

OWNER = Address("terminal", "home", "home", "home")
DESK = Address("terminal", "desk", "", "desk")  # the command line, where nobody waits for a message


def seed(tx: Tx, config: Config) -> None:
    """Make what is missing: the terminal's channel, and what the configuration names."""
    terminal.ensure_terminal(tx, OWNER.account)
    for name, partner in _partners(config).items():
        if partners.find(tx, name) is None:
            partners.create(tx, name, **_partner_values(name, partner))
    for name, channel in config.channels.items():
        if directory.channel_by_name(tx, name) is None:
            made = directory.create_channel(tx, name, partner=channel.partner)
            directory.set_channel(tx, made.id, **_channel_values(name, channel, config))
            _bind(tx, channel, made.id)


def apply(tx: Tx, config: Config) -> str:
    """Change what exists to what the configuration says; each change is audited. What was changed, line by line.

    Raises BadConfig for what cannot be changed.
    """
    seed(tx, config)
    _check_partners(tx, config)
    changes = []
    for name, partner in config.partners.items():
        changes += _audited(tx, "partner", name, _partner_values(name, partner))
        _share_from_now_on(tx, name)
    for name, channel in config.channels.items():
        changes += _audited(tx, "channel", name, _channel_values(name, channel, config))
        changes += _bind(tx, channel, int(tx.value("SELECT id FROM channel WHERE name = ?", [name])), name)
    return "\n".join(changes) or say("en", "terminal.nothing_to_change")


def owner(tx: Tx, name: str = terminal.TERMINAL) -> Caller:
    """Who sits at the command line of this home, in the channel of that name: they operate everything.

    Raises UnknownThing, and BadInput for one that is archived.
    """
    user = tx.cipher.hash_user(OWNER.platform, OWNER.account, terminal.LOCAL_USER)
    channel = directory.channel_by_name(tx, name)
    if channel is None:
        known = ", ".join(one.name for one in directory.channels(tx, user))
        raise UnknownThing("operators.no_channel", name=name[:80], known=known)
    if channel.archived:
        raise BadInput("operators.channel_archived", name=channel.name)
    at = replace(DESK, place=channel.name)
    return Caller(user, at, channel, "en", 0, conversations.conversation_id(tx, at, channel.id), grant=Grant.OWNER)


def greeting(tx: Tx, info: EngineInfo, place: str, language: str, version: str) -> tuple[str, ...]:
    """What the terminal says first: what answers, and the three keys to know."""
    channel = bindings.channel_for(tx, OWNER.platform, OWNER.account, place)
    name = channel.name if channel else "-"
    label = adapter_names.champion(tx, channel.adapter)[1] if channel else "-"
    fields = {"version": version, "model": info.model, "engine": info.description, "channel": name, "adapter": label}
    return say(language, "terminal.header", **fields), say(language, "terminal.ask")


def _partners(config: Config) -> Mapping[str, PartnerSeed]:
    """The partners that are described, and those that channels only name."""
    named = {channel.partner: PartnerSeed() for channel in config.channels.values()}
    return {**named, **config.partners}


def _check_partners(tx: Tx, config: Config) -> None:
    """Books and adapters find their partner by the channel: it stays theirs."""
    problems = []
    for name, given in config.channels.items():
        channel = directory.channel_by_name(tx, name)
        if channel is not None and channel.partner != given.partner:
            problems.append(
                f"channels.{name}.partner = {given.partner!r}: {name} belongs to {channel.partner!r}, and so do its"
                " charges and its adapter; make another channel and bind the places there"
            )
    if problems:
        told = "\n".join(f"  {problem}" for problem in problems)
        raise BadConfig(detail=f"the configuration:\n{told}", file="the configuration", problems="\n".join(problems))


def _partner_values(name: str, given: PartnerSeed) -> dict[str, Value]:
    return {"title": given.title or name, "share_bps": round(given.share * 10_000), "weight": given.weight}


def _channel_values(name: str, given: ChannelSeed, config: Config) -> dict[str, Value]:
    temperature, top_p, limits = given.temperature, given.top_p, given.limits
    return {
        "title": given.title or name,
        "instructions": given.instructions,
        "language": given.language,
        "questions": "\n".join(given.questions),
        "per_minute": limits.per_minute,
        "per_hour": limits.per_hour,
        "tokens_in": limits.tokens_in,
        "tokens_out": limits.tokens_out,
        "temperature": config.generation.temperature if temperature is None else temperature,
        "top_p": config.generation.top_p if top_p is None else top_p,
    }


def _bind(tx: Tx, channel: ChannelSeed, channel_id: int, name: str = "") -> list[str]:
    """Bind the channel's places. With a `name` what is taken from another channel is audited and told."""
    changes = []
    for place in channel.bind:
        platform, _, rest = place.partition(":")
        account, _, where = rest.partition("/")
        before = bindings.bound_to(tx, platform, account, where)
        bindings.bind(tx, platform, account, where, channel_id)
        if name and before != name:
            audit.record(tx, owner(tx), "config apply", f"bind {place}", before, name)
            changes.append(f"{place}: {before or '-'} -> {name}")
    return changes


def _share_from_now_on(tx: Tx, partner: str) -> None:
    """A price holds the share at which it was made: a new share is a new price, and books stay as they are."""
    rows = tx.all(
        "SELECT channel.id, share_bps FROM channel JOIN partner ON partner.id = partner_id WHERE partner.name = ?",
        [partner],
    )
    for row in rows:
        price = prices.price_now(tx, row["id"])
        if price.share_bps != row["share_bps"]:
            prices.set_price(tx, row["id"], price.in_nano, price.out_nano, row["share_bps"], price.train_nano)


def _audited(tx: Tx, table: str, name: str, values: Mapping[str, Value]) -> list[str]:
    now = tx.one(f"SELECT * FROM {table} WHERE name = ?", [name])
    assert now is not None, name
    changed = {key: value for key, value in values.items() if now[key] != value}
    if not changed:
        return []
    marks = ", ".join(f"{key} = ?" for key in changed)
    tx.run(f"UPDATE {table} SET {marks} WHERE name = ?", [*changed.values(), name])
    before: Json = {key: now[key] for key in changed}
    after: Json = {key: str(value) if isinstance(value, bytes) else value for key, value in changed.items()}
    audit.record(tx, owner(tx), "config apply", f"{table} {name}", before, after)
    return [f"{table} {name}: {key} = {now[key]!r} -> {value!r}" for key, value in changed.items()]
