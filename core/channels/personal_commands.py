"""/whoami, /language and /claim: a person's own settings and grants."""

from core.channels import audit, operators, people
from core.commands.registry import command
from core.commands.table import Call
from core.errors import BadInput, LimitReached
from core.i18n.messages import language_name, languages, resolve, say
from core.storage.database import Tx
from core.types import Body, Caller, Outcome

_MOST_CLAIMS, _CLAIMS_MS = 5, 600_000  # wrong codes of one person


@command("whoami")
def whoami(tx: Tx, caller: Caller, call: Call) -> Outcome:
    text = say(
        caller.language,
        "users.whoami",
        user=caller.user[:12],
        platform=caller.address.platform,
        title=caller.channel.title,
        channel=caller.channel.name,
        rights=say(caller.language, f"users.rights_{caller.grant.name.lower()}"),
        language=language_name(caller.language),
    )
    return Outcome(Body(text.strip()))


@command("language")
def language(tx: Tx, caller: Caller, call: Call) -> Outcome:
    """Raises BadInput for a language that there is no file of."""
    typed = call.arguments.get("language", "")
    codes = ", ".join((*languages(), "auto"))
    if not typed:
        name = language_name(caller.language)
        return Outcome(Body(say(caller.language, "users.language_is", name=name, codes=codes)))
    chosen = resolve(typed)
    if not chosen and typed.lower() != "auto":
        raise BadInput("users.language_unknown", typed=typed[:40], codes=codes)
    people.set_language(tx, caller.user, caller.address.platform, chosen)
    if not chosen:
        return Outcome(Body(say(resolve(caller.channel.language) or caller.language, "users.language_auto")))
    return Outcome(Body(say(chosen, "users.language_set", name=language_name(chosen))))


@command("claim")
def claim(tx: Tx, caller: Caller, call: Call) -> Outcome:
    """Refuses a code that is wrong, used or expired, without saying which. Raises LimitReached after some of them."""
    if audit.refused_since(tx, caller.user, "claim", tx.now_ms - _CLAIMS_MS) >= _MOST_CLAIMS:
        raise LimitReached("error.limit_claims", retry_after_s=_CLAIMS_MS / 1000, limit=_MOST_CLAIMS)
    claimed = operators.claim(tx, call.arguments["code"], caller.user)
    if claimed is None:
        audit.record(tx, caller, "claim", allowed=False)
        return Outcome(Body(say(caller.language, "users.claim_bad")))
    channel = tx.value("SELECT name FROM channel WHERE id = ?", [claimed.channel_id])
    audit.record(tx, caller, "claim", channel or "all", None, {"operator": caller.user, "label": claimed.label})
    key = "users.claim_all" if claimed.channel_id is None else "users.claim_channel"
    return Outcome(Body(say(caller.language, key, title=claimed.title)))
