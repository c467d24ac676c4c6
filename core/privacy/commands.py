"""/privacy, /consent and /forget."""

from dataclasses import replace

from core.channels import audit
from core.commands.registry import command
from core.commands.table import Call
from core.i18n.messages import Lazy, duration, say
from core.privacy import consent
from core.privacy.erasure import erase
from core.privacy.retention import retention_of
from core.storage.database import Tx
from core.types import Body, Button, Caller, Effect, Outcome, StopReply

ERASED = "erased"  # the actor in the audit log of what an erasure did


@command("privacy")
def privacy(tx: Tx, caller: Caller, call: Call) -> Outcome:
    kept = retention_of(tx)
    language = caller.language
    text = say(
        language,
        "privacy.what",
        title=caller.channel.title,
        conversation=duration(language, kept.conversation_hours * 3600),
        payload=duration(language, kept.payload_minutes * 60),
        consent=_consent_state(tx, caller),
    )
    return Outcome(Body(text))


@command("consent")
def set_consent(tx: Tx, caller: Caller, call: Call) -> Outcome:
    """Per person and channel; without a choice, show the current one."""
    choice = call.arguments.get("choice", "")
    if not choice:
        state = _consent_state(tx, caller).render(caller.language)
        return Outcome(Body(f"{state} {say(caller.language, 'privacy.consent_how')}"))
    title = caller.channel.title
    if choice == "on":
        consent.give(tx, caller.user, caller.channel.id)
        return Outcome(Body(say(caller.language, "privacy.consent_on", title=title)))
    after = consent.withdraw(tx, caller.user, caller.channel.id)
    return Outcome(Body(say(caller.language, "privacy.consent_off", title=title)), after)


@command("forget")
def forget(tx: Tx, caller: Caller, call: Call) -> Outcome:
    """Erase the caller; asks first."""
    if call.arguments.get("choice") != "yes":
        button = Button(say(caller.language, "privacy.forget_button"), "command", "/forget yes")
        return Outcome(Body(say(caller.language, "privacy.forget_ask"), (button,)))
    erased = erase(tx, caller.user, tx.now_ms, keep_row=caller.inbox_id)
    for label, now in erased.unpublished:
        audit.record(tx, replace(caller, user=ERASED), "adapter unpublish", label, label, now)
    effects = (StopReply(caller.user), *erased.after, Effect.ERASE_FILES, Effect.WAKE_TRAINING, Effect.CHOOSE)
    return Outcome(Body(say(caller.language, "privacy.forgotten")), effects)


def _consent_state(tx: Tx, caller: Caller) -> Lazy:
    if consent.is_given(tx, caller.user, caller.channel.id):
        return Lazy("privacy.consent_is_on")
    shared = consent.shared_replies(tx, caller.user, caller.channel.id)
    return Lazy("privacy.consent_is_for_some", n=shared) if shared else Lazy("privacy.consent_is_off")
