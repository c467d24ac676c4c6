"""/adapter list, show, promote, rollback and discard.

A promotion changes every channel that follows the adapter name: it needs a grant for each, and its answer names them.
"""

from collections.abc import Mapping
from typing import Any

from core.adapters import registry
from core.adapters.registry import Version
from core.channels import adapter_names, audit, bindings, operators
from core.channels.adapter_names import BASE
from core.commands.registry import command
from core.commands.table import Call
from core.errors import BadInput, NotAllowed, UnknownThing
from core.i18n.messages import Lazy, duration, say
from core.storage.database import Row, Tx
from core.types import Body, Button, Caller, Grant, Outcome

DISCARDED = "discarded"
_MAX_REASON = 200
_SHOWN_VERSIONS = 20
_SHOWN_HYPER = ("rank", "alpha", "learning_rate", "clip_value", "clip_norm", "seed")


@command("adapter", "list")
def list_versions(tx: Tx, caller: Caller, call: Call) -> Outcome:
    name = caller.channel.adapter
    champion, _ = adapter_names.champion(tx, name)
    known = registry.versions(tx, name)
    lines = [_line(tx, caller, version, champion) for version in known[:_SHOWN_VERSIONS]]
    if len(known) > _SHOWN_VERSIONS:
        lines.append(say(caller.language, "adapter.more", n=len(known) - _SHOWN_VERSIONS))
    state = Lazy("adapter.in_service") if champion is None else Lazy("adapter.plain")
    lines.append(say(caller.language, "adapter.line_base", state=state))
    head = say(caller.language, "adapter.list", title=caller.channel.title)
    return Outcome(Body("\n".join([head, "", *(f"- {line}" for line in lines)])))


@command("adapter", "show")
def show(tx: Tx, caller: Caller, call: Call) -> Outcome:
    """Raises UnknownThing."""
    version = find_version(tx, caller, call.arguments["version"])
    if version is None:
        return Outcome(Body(say(caller.language, "adapter.shown_base")))
    made = version.manifest
    rows, hyper = made.get("rows") or {}, made.get("hyper") or {}
    champion, _ = adapter_names.champion(tx, version.name)
    text = say(
        caller.language,
        "adapter.shown",
        label=version.label,
        state=_state(tx, version, champion),
        age=_age(tx, caller, version),
        base=made.get("base_model", "?"),
        dataset=_dataset(tx, version),
        sha=version.dataset_sha256[:12] or "?",
        **{part: rows.get(part, "?") for part in ("train", "validation", "test")},
        losses=_losses(made),
        dropout=made.get("dropout", "?"),
        epochs=_epochs(made),
        **{key: hyper.get(key, "?") for key in _SHOWN_HYPER},
        time=duration(caller.language, float(made.get("seconds", 0))),
        adapter=version.sha256[:12],
    )
    if put := registry.put_into_service(tx, version.sha256):
        text += "\n" + _approved(tx, caller, put)
    usable = version.sha256 != champion and not version.unpublished
    return Outcome(Body(text, (promote_button(caller.language, version.label),) if usable else ()))


@command("adapter", "promote")
def promote(tx: Tx, caller: Caller, call: Call) -> Outcome:
    """Raises UnknownThing, BadInput for a version that cannot be used, NotAllowed where a follower is not theirs."""
    version = find_version(tx, caller, call.arguments["version"])
    reason = call.arguments.get("reason", "").strip()
    if len(reason) > _MAX_REASON:
        raise BadInput("adapter.reason_too_long", limit=_MAX_REASON)
    followers = _followers(tx, caller)
    name = caller.channel.adapter
    before, label_before = adapter_names.champion(tx, name)
    if version is not None:
        check_usable(tx, version)
        if not version.passed and not reason:  # the audit log keeps why it is promoted anyway
            why = Lazy(f"adapter.verdict_{version.verdict}")
            raise BadInput("adapter.needs_reason", label=version.label, why=why)
    sha256 = version.sha256 if version else None
    label = version.label if version else BASE
    if sha256 == before:
        return Outcome(Body(say(caller.language, "adapter.already", label=label)))
    measured_against = _measured_against(tx, version)
    registry.promote(tx, name, sha256, caller.user, reason)
    audit.record(tx, caller, "adapter promote", name, label_before, {"version": label, "reason": reason})
    before_it = registry.undo_label(tx, name)
    key = "adapter.promoted" if before_it else "adapter.promoted_for_good"
    lines = [say(caller.language, key, channels=followers, label=label, before=before_it)]
    if measured_against not in ("", label_before) and before_it == label_before:
        told = {"champion": measured_against, "before": label_before}
        lines += ["", say(caller.language, "adapter.measured_otherwise", **told)]
    return Outcome(Body("\n".join(lines)))


@command("adapter", "discard")
def discard(tx: Tx, caller: Caller, call: Call) -> Outcome:
    """Take a version out of use for good. Raises BadInput for the champion and for base."""
    version = find_version(tx, caller, call.arguments["version"])
    followers = _followers(tx, caller)
    champion, _ = adapter_names.champion(tx, caller.channel.adapter)
    if version is None or version.sha256 == champion:
        raise BadInput("adapter.in_use", label=version.label if version else BASE, channels=followers)
    if not version.unpublished:
        registry.unpublish(tx, version.sha256, DISCARDED)
        audit.record(tx, caller, "adapter discard", version.label, None, DISCARDED)
    return Outcome(Body(say(caller.language, "adapter.discarded", label=version.label)))


@command("adapter", "rollback")
def rollback(tx: Tx, caller: Caller, call: Call) -> Outcome:
    """Raises NotAllowed where a follower is not theirs."""
    followers = _followers(tx, caller)
    name = caller.channel.adapter
    _, label_before = adapter_names.champion(tx, name)
    if registry.undo(tx, name) is None:
        return Outcome(Body(say(caller.language, "adapter.nothing_to_undo", label=label_before)))
    _, label = adapter_names.champion(tx, name)
    audit.record(tx, caller, "adapter rollback", name, label_before, {"version": label})
    text = say(caller.language, "adapter.rolled_back", channels=followers, label=label, before=label_before)
    return Outcome(Body(text))


def promote_button(language: str, label: str) -> Button:
    """Promotes a version."""
    return Button(say(language, "adapter.promote_button"), "command", f"/adapter promote {label}")


def compare_button(language: str, label: str) -> Button:
    return Button(say(language, "compare.button"), "command", f"/adapter compare {label}")


def anyway_button(language: str, label: str) -> Button:
    """For a version that did not pass: the command asks for a reason."""
    return Button(say(language, "adapter.anyway_button"), "command", f"/adapter promote {label}")


def discard_button(language: str, label: str) -> Button:
    return Button(say(language, "adapter.discard_button"), "command", f"/adapter discard {label}")


def find_version(tx: Tx, caller: Caller, typed: str) -> Version | None:
    """The version of the channel's adapter name that was typed; None is base. Raises UnknownThing."""
    if typed.lower() == BASE:
        return None
    name, _, number = typed.rpartition("@")
    known = registry.versions(tx, caller.channel.adapter)
    for version in known:
        if name in ("", version.name) and number == str(version.version):
            return version
    names = ", ".join([*(version.label for version in known[:_SHOWN_VERSIONS]), BASE])
    raise UnknownThing("adapter.no_version", typed=typed[:80], known=names)


def check_usable(tx: Tx, version: Version) -> None:
    if version.unpublished:
        raise BadInput("adapter.is_unpublished", label=version.label, reason=_reason(version))
    if registry.is_of_other_base(tx, version):
        raise BadInput("adapter.is_of_another_base", label=version.label)


def _measured_against(tx: Tx, version: Version | None) -> str:
    """The champion that a never promoted version was judged against, or ""."""
    if version is None or registry.put_into_service(tx, version.sha256):
        return ""
    return str(version.judged.get("champion", ""))


def _followers(tx: Tx, caller: Caller) -> str:
    """The channels that follow the name, with their places. Raises NotAllowed where one is not the caller's."""
    sql = "SELECT id, title FROM channel WHERE adapter = ? AND archived_ms IS NULL ORDER BY name"
    rows = tx.all(sql, [caller.channel.adapter])
    if any(operators.grant_of(tx, caller.user, row["id"]) < Grant.OPERATOR for row in rows):
        raise NotAllowed
    places = ((row["title"], ", ".join(bindings.places(tx, row["id"]))) for row in rows)
    return ", ".join(f"**{title}** ({where})" if where else f"**{title}**" for title, where in places)


def _line(tx: Tx, caller: Caller, version: Version, champion: str | None) -> str:
    return say(
        caller.language,
        "adapter.line",
        label=version.label,
        state=_state(tx, version, champion),
        dataset=_dataset(tx, version),
        losses=_losses(version.manifest),
        age=_age(tx, caller, version),
    )


def state_now(tx: Tx, version: Version) -> Lazy | None:
    """The state of a version; None while it is ready and was never used."""
    champion, _ = adapter_names.champion(tx, version.name)
    state = _state(tx, version, champion)
    return None if state == "adapter.ready" else state


def _state(tx: Tx, version: Version, champion: str | None) -> Lazy:
    if version.unpublished:
        return Lazy("adapter.unpublished", reason=_reason(version))
    if registry.is_of_other_base(tx, version):
        return Lazy("adapter.other_base")
    return Lazy("adapter.in_service") if version.sha256 == champion else Lazy("adapter.ready")


def _reason(version: Version) -> str:
    known = {"erased": Lazy("adapter.erased"), DISCARDED: Lazy("adapter.was_discarded")}
    return known.get(version.unpublished, version.unpublished)


def _approved(tx: Tx, caller: Caller, put: Row) -> str:
    age = duration(caller.language, max(0, tx.now_ms - put["at_ms"]) / 1000)
    who = Lazy("training.data_you") if put["actor"] == caller.user else operators.label_of(tx, put["actor"])
    key = "adapter.approved_because" if put["reason"] else "adapter.approved"
    return say(caller.language, key, who=who, age=age, reason=put["reason"])


def _dataset(tx: Tx, version: Version) -> str:
    """The name of its data set in its channel."""
    return tx.value("SELECT dataset FROM job WHERE result = ?", [version.sha256]) or "?"


def _losses(manifest: Mapping[str, Any]) -> str:
    losses = manifest.get("losses") or {}
    base, tuned = losses.get("test_base"), losses.get("test_candidate")
    if not isinstance(base, int | float) or not isinstance(tuned, int | float):
        return "?"
    return f"{base:.2f} → {tuned:.2f}"


def _epochs(manifest: Mapping[str, Any]) -> str | int:
    """The planned epochs, and those done where training stopped early."""
    planned = (manifest.get("hyper") or {}).get("epochs", "?")
    done = manifest.get("epochs_done", planned)
    return planned if done == planned else Lazy("adapter.epochs_done", done=f"{done:g}", planned=planned)


def _age(tx: Tx, caller: Caller, version: Version) -> str:
    return duration(caller.language, max(0, tx.now_ms - version.created_ms) / 1000)
