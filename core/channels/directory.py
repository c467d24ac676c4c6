"""Partners, channels, accounts, people, operators, the audit log. Knows who and where; knows no sentence, no model."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from pathlib import Path

from core.config.schema import NAME
from core.errors import BadInput, StorageError, UnknownThing
from core.storage.database import Row, Tx, Value
from core.types import Caller, Channel, Grant, Json, Limits, Price, Sampling

OWNER_PARTNER, TERMINAL, LOCAL_USER = "owner", "terminal", "local"
RESERVED = frozenset({"base", "all"})  # an adapter version, and every channel
LINK = "start="  # before the payload of a link, as the place that a channel is bound to
INVITE_MS = 7 * 24 * 3_600_000
_ALPHABET = "23456789ABCDEFGHJKMNPQRSTUVWXYZ"  # nothing that is read as something else
_CODE_LENGTH, _CODE_GROUP = 12, 4
_CHANNEL = "SELECT channel.*, partner.name AS partner, weight FROM channel JOIN partner ON partner.id = partner_id"


# --- channels ---


def check_key(tx: Tx, key_file: Path) -> None:
    """Raises StorageError where the key is not the one that this database is written with."""
    sealed = tx.value("SELECT value FROM setting WHERE key = 'sealed'") or tx.value(
        "SELECT hex(payload) FROM inbox WHERE payload IS NOT NULL ORDER BY id DESC LIMIT 1"  # of an earlier release
    )
    try:
        if sealed:
            tx.cipher.unseal(bytes.fromhex(sealed))
    except StorageError as error:
        raise StorageError("error.key_other", f"{key_file} is not this home's key", path=str(key_file)) from error
    tx.run("INSERT OR IGNORE INTO setting VALUES ('sealed', ?)", [tx.cipher.seal("").hex()])


def ensure_terminal(tx: Tx, account: str) -> None:
    """Make what the terminal needs: its partner, channel and binding; its user operates everything. Repeatable."""
    if tx.value("SELECT 1 FROM partner WHERE name = ?", [OWNER_PARTNER]) is None:
        tx.insert("partner", name=OWNER_PARTNER, title="Owner", created_ms=tx.now_ms)
    channel = channel_by_name(tx, TERMINAL)
    if channel is None:
        channel = create_channel(tx, TERMINAL, title="Terminal", limits=Limits(per_minute=0, per_hour=0))
    tx.run("INSERT OR IGNORE INTO binding VALUES (?, ?, '', ?)", [TERMINAL, account, channel.id])
    grant_operator(tx, tx.cipher.hash_user(TERMINAL, account, LOCAL_USER), None, "terminal", "")


def channel_for(tx: Tx, platform: str, account: str, place: str) -> Channel | None:
    """The channel of a place: its own, else its account's default. None where there is none, or it is archived."""
    row = tx.one(
        f"{_CHANNEL} JOIN binding ON channel_id = channel.id WHERE platform = ? AND account = ? AND place IN (?, '')"
        " ORDER BY place = '' LIMIT 1",
        [platform, account, place],
    )
    return _channel(row) if row and row["archived_ms"] is None else None


def channel_of_person(tx: Tx, platform: str, account: str, place: str, user_hash: str) -> Channel | None:
    """The channel of a place; in a place of their own, the one whose link a person came by.

    None where there is none, or it is archived.
    """
    if tx.cipher.hash_user(platform, account, place) == user_hash:
        row = tx.one(
            f"{_CHANNEL} JOIN person ON channel.id = person.channel_id WHERE user_hash = ? AND archived_ms IS NULL"
            " AND NOT EXISTS (SELECT 1 FROM binding WHERE platform = ? AND account = ? AND place = ?)",
            [user_hash, platform, account, place],
        )
        if row is not None:
            return _channel(row)
    return channel_for(tx, platform, account, place)


def channel_of_link(tx: Tx, platform: str, account: str, payload: str) -> Channel | None:
    """The channel whose link this is: it is bound to the place `start=<payload>` of the account."""
    row = tx.one(
        f"{_CHANNEL} JOIN binding ON channel_id = channel.id"
        " WHERE platform = ? AND account = ? AND place = ? AND archived_ms IS NULL",
        [platform, account, f"{LINK}{payload}"],
    )
    return _channel(row) if row else None


def move_place(tx: Tx, platform: str, account: str, before: str, now: str) -> None:
    """A place has another name from now on: what is bound to it and what was said in it goes along."""
    for table in ("binding", "conversation", "job", "inbox"):
        tx.run(
            f"UPDATE OR IGNORE {table} SET place = ? WHERE platform = ? AND account = ? AND place = ?",
            [now, platform, account, before],
        )


def channel_by_name(tx: Tx, name: str) -> Channel | None:
    """Also where it is archived."""
    row = tx.one(f"{_CHANNEL} WHERE channel.name = ?", [name])
    return _channel(row) if row else None


def channels(tx: Tx, user_hash: str) -> tuple[Channel, ...]:
    """The channels that this person operates, by name."""
    rows = tx.all(
        f"{_CHANNEL} WHERE EXISTS (SELECT 1 FROM operator WHERE user_hash = ?"
        " AND (channel_id IS NULL OR channel_id = channel.id)) ORDER BY channel.name",
        [user_hash],
    )
    return tuple(_channel(row) for row in rows)


def create_channel(
    tx: Tx, name: str, *, title: str = "", partner: str = OWNER_PARTNER, limits: Limits | None = None
) -> Channel:
    """A channel on base, free of charge, with an adapter name of its own.

    Raises BadInput for a name that is taken or not allowed, UnknownThing for a partner that does not exist.
    """
    if not NAME.fullmatch(name) or name in RESERVED:
        raise BadInput("operators.channel_bad_name", name=name[:80])
    if channel_by_name(tx, name):
        raise BadInput("operators.channel_taken", name=name)
    if tx.value("SELECT 1 FROM adapter_name WHERE name = ?", [name]):
        raise BadInput("operators.adapter_taken", name=name)
    owner = tx.one("SELECT id, share_bps FROM partner WHERE name = ?", [partner])
    if owner is None:
        raise UnknownThing(name=partner)
    limits = limits or Limits()
    tx.insert("adapter_name", name=name, partner_id=owner["id"])
    channel_id = tx.insert(
        "channel",
        name=name,
        title=title or name,
        partner_id=owner["id"],
        adapter=name,
        per_minute=limits.per_minute,
        per_hour=limits.per_hour,
        tokens_in=limits.tokens_in,
        tokens_out=limits.tokens_out,
        created_ms=tx.now_ms,
    )
    set_price(tx, channel_id, 0, 0, owner["share_bps"])
    made = channel_by_name(tx, name)
    assert made is not None
    return made


def set_channel(tx: Tx, channel_id: int, **values: Value) -> None:
    """Change columns of a channel; the caller has checked them."""
    marks = ", ".join(f"{name} = ?" for name in values)
    tx.run(f"UPDATE channel SET {marks} WHERE id = ?", [*values.values(), channel_id])


def archive(tx: Tx, channel_id: int) -> None:
    """Its places answer no more; its books stay."""
    tx.run("UPDATE channel SET archived_ms = ? WHERE id = ? AND archived_ms IS NULL", [tx.now_ms, channel_id])


def bind(tx: Tx, platform: str, account: str, place: str, channel_id: int) -> None:
    """From now on this place ("" is the account's default) belongs to the channel."""
    tx.run(
        "INSERT INTO binding VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE SET channel_id = excluded.channel_id",
        [platform, account, place, channel_id],
    )


def places(tx: Tx, channel_id: int) -> tuple[str, ...]:
    """The places of a channel, as they are written: platform:account/place."""
    rows = tx.all("SELECT * FROM binding WHERE channel_id = ? ORDER BY platform, account, place", [channel_id])
    return tuple(f"{row['platform']}:{row['account']}" + f"/{row['place']}" * bool(row["place"]) for row in rows)


def bound_to(tx: Tx, platform: str, account: str, place: str) -> str:
    """The name of the channel that holds exactly this place, or ""."""
    name = tx.value(
        "SELECT name FROM channel JOIN binding ON channel_id = channel.id"
        " WHERE platform = ? AND account = ? AND place = ?",
        [platform, account, place],
    )
    return name or ""


def version_label(tx: Tx, adapter: str) -> str:
    """The version that channels of this adapter name answer from: name@version, or base."""
    row = tx.one(
        "SELECT adapter.name, version FROM adapter_name JOIN adapter ON sha256 = champion WHERE adapter_name.name = ?",
        [adapter],
    )
    return f"{row['name']}@{row['version']}" if row else "base"


def adapter_is_of(tx: Tx, adapter: str, partner: str) -> bool:
    """Whether this adapter name belongs to the partner."""
    return bool(
        tx.value(
            "SELECT 1 FROM adapter_name JOIN partner ON partner.id = partner_id"
            " WHERE adapter_name.name = ? AND partner.name = ?",
            [adapter, partner],
        )
    )


def price_now(tx: Tx, channel_id: int) -> Price:
    """The price in force: the newest row, since none is made for later."""
    row = tx.one("SELECT * FROM price WHERE channel_id = ? ORDER BY id DESC LIMIT 1", [channel_id])
    assert row is not None, channel_id
    return Price(row["id"], row["in_nano"], row["out_nano"], row["share_bps"], row["train_nano"])


def set_price(tx: Tx, channel_id: int, in_nano: int, out_nano: int, share_bps: int, train_nano: int = 0) -> None:
    """A price from now on, as a new row: those before it are what earlier replies are charged by."""
    last = tx.value("SELECT max(valid_from_ms) FROM price WHERE channel_id = ?", [channel_id])
    tx.insert(
        "price",
        channel_id=channel_id,
        valid_from_ms=tx.now_ms if last is None else max(tx.now_ms, last + 1),
        in_nano=in_nano,
        out_nano=out_nano,
        share_bps=share_bps,
        train_nano=train_nano,
    )


# --- the base model ---


def keep_base(tx: Tx, fingerprint: str) -> None:
    """The base model that is loaded: adapters trained on another one cannot be put into service."""
    tx.run(
        "INSERT INTO setting VALUES ('base_fingerprint', ?) ON CONFLICT DO UPDATE SET value = excluded.value",
        [fingerprint],
    )


def loaded_base(tx: Tx) -> str | None:
    """The fingerprint that was kept last; None before the first start."""
    kept = tx.value("SELECT value FROM setting WHERE key = 'base_fingerprint'")
    return None if kept is None else str(kept)


# --- people ---


def touch_person(tx: Tx, user_hash: str, platform: str) -> None:
    """Someone was here."""
    tx.run(
        "INSERT INTO person (user_hash, platform, first_ms, last_ms) VALUES (?, ?, ?, ?)"
        " ON CONFLICT DO UPDATE SET last_ms = excluded.last_ms",
        [user_hash, platform, tx.now_ms, tx.now_ms],
    )


def person_language(tx: Tx, user_hash: str) -> str:
    """The language that this person chose, or ""."""
    return tx.value("SELECT language FROM person WHERE user_hash = ?", [user_hash]) or ""


def set_person_language(tx: Tx, user_hash: str, platform: str, language: str) -> None:
    touch_person(tx, user_hash, platform)
    tx.run("UPDATE person SET language = ? WHERE user_hash = ?", [language, user_hash])


def came_by_link(tx: Tx, user_hash: str, platform: str, channel_id: int) -> None:
    """From now on this channel answers the person, where they are by themselves."""
    touch_person(tx, user_hash, platform)
    tx.run("UPDATE person SET channel_id = ? WHERE user_hash = ?", [channel_id, user_hash])


# --- operators ---


@dataclass(frozen=True, slots=True)
class Operator:
    """`channel` "" is every channel."""

    id: int
    user_hash: str
    channel_id: int | None
    channel: str
    label: str


@dataclass(frozen=True, slots=True)
class Claimed:
    """What an invitation gave. `channel_id` None is every channel."""

    channel_id: int | None
    title: str
    label: str


def grant_of(tx: Tx, user_hash: str, channel_id: int) -> Grant:
    """What this person may do in this channel."""
    rows = tx.all(
        "SELECT channel_id FROM operator WHERE user_hash = ? AND (channel_id IS NULL OR channel_id = ?)",
        [user_hash, channel_id],
    )
    if any(row["channel_id"] is None for row in rows):
        return Grant.OWNER
    return Grant.OPERATOR if rows else Grant.ANYONE


def grant_operator(tx: Tx, user_hash: str, channel_id: int | None, label: str, granted_by: str) -> None:
    """Make someone an operator; who is one already stays so."""
    tx.run(
        "INSERT OR IGNORE INTO operator (user_hash, channel_id, label, granted_by, granted_ms) VALUES (?, ?, ?, ?, ?)",
        [user_hash, channel_id, label, granted_by, tx.now_ms],
    )


def operators(tx: Tx, channel_id: int | None = None) -> tuple[Operator, ...]:
    """The operators of one channel, or all that there are."""
    rows = tx.all(
        "SELECT operator.*, ifnull(channel.name, '') AS channel FROM operator"
        " LEFT JOIN channel ON channel.id = channel_id WHERE ? IS NULL OR channel_id = ? ORDER BY operator.id",
        [channel_id, channel_id],
    )
    return tuple(Operator(row["id"], row["user_hash"], row["channel_id"], row["channel"], row["label"]) for row in rows)


def remove_operator(tx: Tx, operator: Operator) -> None:
    """Take the rights back, and the invitations that were made with them and not used yet."""
    tx.run("DELETE FROM operator WHERE id = ?", [operator.id])
    tx.run(
        "UPDATE invite SET expires_ms = ? WHERE made_by = ? AND claimed_by IS NULL"
        " AND (? IS NULL OR channel_id = ?) AND expires_ms > ?",
        [tx.now_ms, operator.user_hash, operator.channel_id, operator.channel_id, tx.now_ms],
    )


def invite(tx: Tx, channel_id: int | None, label: str, made_by: str) -> str:
    """A one-time code, good for a week. Only its hash is kept: who has lost it needs another."""
    letters = "".join(secrets.choice(_ALPHABET) for _ in range(_CODE_LENGTH))
    tx.insert(
        "invite",
        code_hash=tx.cipher.hash_code(letters),
        channel_id=channel_id,
        label=label,
        made_by=made_by,
        made_ms=tx.now_ms,
        expires_ms=tx.now_ms + INVITE_MS,
    )
    return "-".join(letters[at : at + _CODE_GROUP] for at in range(0, _CODE_LENGTH, _CODE_GROUP))


def claim(tx: Tx, code: str, user_hash: str) -> Claimed | None:
    """Make this person what the invitation says; None where the code is wrong, used or too old. Once for each code."""
    letters = "".join(c for c in code.upper() if c in _ALPHABET)
    code_hash = tx.cipher.hash_code(letters)
    if not tx.run(
        "UPDATE invite SET claimed_by = ?, claimed_ms = ?"
        " WHERE code_hash = ? AND claimed_by IS NULL AND expires_ms > ?",
        [user_hash, tx.now_ms, code_hash, tx.now_ms],
    ):
        return None
    row = tx.one(
        "SELECT channel_id, label, made_by, channel.title FROM invite LEFT JOIN channel ON channel.id = channel_id"
        " WHERE code_hash = ?",
        [code_hash],
    )
    assert row is not None
    grant_operator(tx, user_hash, row["channel_id"], row["label"], row["made_by"])
    return Claimed(row["channel_id"], row["title"] or "", row["label"])


# --- the audit log ---


def audit(
    tx: Tx,
    caller: Caller,
    action: str,
    target: str = "",
    before: Json = None,
    after: Json = None,
    *,
    allowed: bool = True,
) -> None:
    """Write down what someone did, or was refused. Never a code, a key or what people say."""
    tx.insert(
        "audit",
        at_ms=tx.now_ms,
        actor=caller.user,
        platform=caller.address.platform,
        action=action,
        target=target,
        allowed=int(allowed),
        before=_dump(before),
        after=_dump(after),
    )


def _dump(value: Json) -> str:
    return "" if value is None else json.dumps(value, ensure_ascii=False, sort_keys=True)


def _channel(row: Row) -> Channel:
    return Channel(
        id=row["id"],
        name=row["name"],
        title=row["title"],
        partner=row["partner"],
        adapter=row["adapter"],
        instructions=row["instructions"],
        language=row["language"],
        questions=tuple(row["questions"].splitlines()),
        limits=Limits(row["per_minute"], row["per_hour"], row["tokens_in"], row["tokens_out"]),
        sampling=Sampling(temperature=row["temperature"], top_p=row["top_p"]),
        archived=row["archived_ms"] is not None,
        weight=row["weight"],
    )


def operator_label(tx: Tx, user_hash: str) -> str:
    """What an operator is called; the beginning of their hash where nobody has named them."""
    return str(tx.value("SELECT label FROM operator WHERE user_hash = ?", [user_hash]) or user_hash[:12])
