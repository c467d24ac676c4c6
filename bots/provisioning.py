"""Partners and channels of the configuration in the database.

A start creates what is missing and reports what differs; `distributary config apply` changes what exists.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from core.channels import adapter_names, audit, bindings, directory, partners, settings, terminal
from core.chat import conversations
from core.config.schema import ChannelSettings, Config, PartnerSettings, channel_keys
from core.engine.protocol import EngineInfo
from core.errors import BadConfig, BadInput, UnknownThing
from core.i18n.messages import say
from core.storage.database import Tx
from core.types import Address, Caller, Channel, Grant
from core.usage import prices

OWNER = Address("terminal", "home", "home", "home")
DESK = Address("terminal", "desk", "", "desk")  # the command line, where nobody waits for a message
_ACTION = "config apply"


@dataclass(frozen=True, slots=True)
class Difference:
    """A key that the file sets to `file` and the database holds as `stored`. `group` is "partner" or "channel"."""

    group: str
    name: str
    key: str
    file: Any
    stored: Any

    def render(self, sentence: str) -> str:
        """`sentence` is a key of [terminal]."""
        shown = {"file": settings.brief(self.file), "stored": settings.brief(self.stored)}
        return say("en", f"terminal.{sentence}", target=f"{self.group} {self.name}", setting=self.key, **shown)


def seed(tx: Tx, config: Config) -> None:
    """Create what is missing: the terminal's channel, and the partners and channels of the configuration."""
    terminal.ensure_terminal(tx, OWNER.account)
    for name, partner in config.partners.items():
        if partners.find(tx, name) is None:
            partners.create(tx, name, **_partner_columns(_partner_values(name, partner)))
    for name, given in config.channels.items():
        if directory.channel_by_name(tx, name) is None:
            made = directory.create_channel(tx, name, partner=given.partner)
            settings.store(tx, made, _channel_values(name, given, config))
            settings.moved(tx, made, given.bind)


def differences(tx: Tx, config: Config) -> tuple[Difference, ...]:
    """What the file sets otherwise than the database. What the file leaves out, and what is missing, is none."""
    return (*_partner_differences(tx, config), *_channel_differences(tx, config))


def missing(tx: Tx, config: Config) -> tuple[str, ...]:
    """The partners and channels that the next start creates."""
    return (
        *(f"partner {name}" for name in config.partners if partners.find(tx, name) is None),
        *(f"channel {name}" for name in config.channels if directory.channel_by_name(tx, name) is None),
    )


def preview(tx: Tx, config: Config) -> str:
    """What `apply` would change, line by line. Raises BadConfig for what cannot be changed."""
    found = differences(tx, config)
    _refuse_other_partners(found)
    made = [say("en", "terminal.is_made", target=target) for target in missing(tx, config)]
    return "\n".join([*made, *(one.render("changes") for one in found)]) or say("en", "terminal.nothing_to_change")


def apply(tx: Tx, config: Config) -> str:
    """Change what exists to what the file sets; each change is audited. The changes, line by line.

    Raises BadConfig for what cannot be changed; then nothing is.
    """
    told = preview(tx, config)
    seed(tx, config)
    found = differences(tx, config)
    for name in config.partners:
        _apply_partner(tx, name, {one.key: one for one in found if (one.group, one.name) == ("partner", name)})
    for name in config.channels:
        _apply_channel(tx, name, [one for one in found if (one.group, one.name) == ("channel", name)])
    return told


def owner(tx: Tx, name: str = terminal.TERMINAL) -> Caller:
    """The owner at the command line of this home, in the channel of that name.

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
    """The first lines of the terminal: model and channel, and how to begin."""
    channel = bindings.channel_for(tx, OWNER.platform, OWNER.account, place)
    name = channel.name if channel else "-"
    label = adapter_names.champion(tx, channel.adapter)[1] if channel else "-"
    fields = {"version": version, "model": info.model, "engine": info.description, "channel": name, "adapter": label}
    return say(language, "terminal.header", **fields), say(language, "terminal.ask")


def _partner_values(name: str, given: PartnerSettings) -> dict[str, Any]:
    return {"title": given.title or name, "share": given.share, "weight": given.weight}


def _partner_columns(values: Mapping[str, Any]) -> dict[str, Any]:
    """`share`, in percent, is stored in basis points."""
    share = {"share_bps": round(values["share"] * 100)} if "share" in values else {}
    return {key: value for key, value in values.items() if key != "share"} | share


def _partner_differences(tx: Tx, config: Config) -> Iterator[Difference]:
    for name, given in config.partners.items():
        row = partners.find(tx, name)
        if row is None:
            continue
        now = {"title": row["title"], "share": row["share_bps"] / 100, "weight": row["weight"]}
        for key, value in _partner_values(name, given).items():
            if key in given.written and value != now[key]:
                yield Difference("partner", name, key, value, now[key])


def _apply_partner(tx: Tx, name: str, changes: Mapping[str, Difference]) -> None:
    """A new share is a new price of the channels that had the old one: books keep the share that they were made at."""
    if not changes:
        return
    partners.update(tx, name, _partner_columns({key: one.file for key, one in changes.items()}))
    if "share" in changes:
        before, after = (round(one * 100) for one in (changes["share"].stored, changes["share"].file))
        for channel_id in partners.channel_ids(tx, name):
            price = prices.price_now(tx, channel_id)
            if price.share_bps == before:
                prices.set_price(tx, channel_id, price.in_nano, price.out_nano, after, price.train_nano)
    _audit(tx, f"partner {name}", changes.values())


def _channel_values(name: str, given: ChannelSettings, config: Config) -> dict[str, Any]:
    """The settings of a new channel, but its places."""
    values: dict[str, Any] = {"title": given.title or name, **asdict(given.limits)}
    for key, one in channel_keys().items():
        if one.file and key not in values and key != "bind":
            value = getattr(given, key)
            values[key] = getattr(config.generation, key) if value is None else value
    return values


def _channel_differences(tx: Tx, config: Config) -> Iterator[Difference]:
    for name, given in config.channels.items():
        channel = directory.channel_by_name(tx, name)
        if channel is None:
            continue
        if given.partner != channel.partner and "partner" in given.written:
            yield Difference("channel", name, "partner", given.partner, channel.partner)
        now = settings.current(tx, channel)
        for key, value in _channel_values(name, given, config).items():
            if key in given.written and value != now[key]:
                yield Difference("channel", name, key, value, now[key])
        for place in given.bind:
            held = bindings.bound_to(tx, *bindings.split(place))
            if held != name:
                yield Difference("channel", name, f"bind {place}", name, held)


def _apply_channel(tx: Tx, name: str, changes: list[Difference]) -> None:
    if changes:
        channel = directory.channel_by_name(tx, name)
        assert isinstance(channel, Channel), name
        settings.store(tx, channel, {one.key: one.file for one in changes if not one.key.startswith("bind ")})
        settings.moved(tx, channel, [one.key.removeprefix("bind ") for one in changes if one.key.startswith("bind ")])
        _audit(tx, f"channel {name}", changes)


def _refuse_other_partners(found: tuple[Difference, ...]) -> None:
    """Charges and adapters belong to the partner of their channel, so a channel stays with its partner."""
    problems = [
        f"channels.{one.name}.partner = {one.file!r}: {one.name} belongs to {one.stored!r}, and so do its charges and"
        " its adapter; make another channel and bind the places there"
        for one in found
        if one.key == "partner"
    ]
    if problems:
        told = "\n".join(f"  {problem}" for problem in problems)
        raise BadConfig(detail=f"the configuration:\n{told}", file="the configuration", problems="\n".join(problems))


def _audit(tx: Tx, target: str, changes: Iterable[Difference]) -> None:
    changed = list(changes)
    before = settings.stored({one.key: one.stored for one in changed})
    after = settings.stored({one.key: one.file for one in changed})
    audit.record(tx, owner(tx), _ACTION, target, before, after)
