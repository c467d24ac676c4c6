"""Runs a command: checks grant and capacity, prepares it, runs its handler in one transaction, writes the audit log.

Every command that needs a grant leaves a row in the audit log: refused, or allowed with the state before and after.
Importing this module registers all handlers, and fails where a form of the command table has none.
"""

from collections.abc import Callable
from dataclasses import replace

from core.adapters import commands as _adapters
from core.channels import audit, directory, operators, personal_commands
from core.channels import commands as _channels
from core.chat import basics, comparisons, feedback
from core.commands.registry import CommandContext, Registered, check_complete, registered
from core.commands.table import Call
from core.errors import NotAllowed
from core.i18n.messages import say
from core.jobs import commands as _jobs
from core.jobs import importing
from core.privacy import commands as _privacy
from core.storage.database import Tx
from core.types import Body, Caller, Effect, Grant, Outcome
from core.usage import commands as _usage

_HANDLERS = (_adapters, _channels, _jobs, _privacy, _usage, basics, comparisons, feedback, importing, personal_commands)
_MAX_SHOWN = 80
check_complete()


async def dispatch(
    context: CommandContext,
    caller: Caller,
    call: Call,
    keep: Callable[[Tx, Outcome], None] = lambda _tx, _outcome: None,
) -> Outcome:
    """Run a command; `keep` stores its outcome in the same transaction.

    Raises the UserError of `check`, `prepare` or the handler; the command has then changed nothing.
    """
    entry = registered(call)
    allowed, prepared = True, None  # the authoritative check of the grant is in `run`
    if entry.prepare is not None:
        allowed = await context.database.read(lambda tx: _may(tx, caller, call) and _has_capacity(tx, caller, entry))
        prepared = await entry.prepare(context, caller, call) if allowed else None

    def work(tx: Tx) -> Outcome:
        outcome = run(tx, caller, call, prepared) if allowed else _denied(tx, caller, call)
        keep(tx, outcome)
        return outcome

    return await context.database.write(work)


def run(tx: Tx, caller: Caller, call: Call, prepared: object = None) -> Outcome:
    """Run a prepared command in a transaction. A refusal is audited, and worded the same for every target."""
    if not _may(tx, caller, call):
        return _denied(tx, caller, call)
    caller = replace(caller, grant=operators.grant_of(tx, caller.user, caller.channel.id))
    last = _last_audit(tx)
    tx.run("SAVEPOINT command")
    try:
        outcome = _handle(tx, caller, call, prepared)
    except NotAllowed:
        tx.run("ROLLBACK TO command")
        tx.run("RELEASE command")
        return _denied(tx, caller, call)
    tx.run("RELEASE command")
    if call.form.who > Grant.ANYONE and _last_audit(tx) == last:
        audit.record(tx, caller, call.action, _target(caller, call))
    return replace(outcome, after=(*outcome.after, Effect.CHOOSE)) if call.form.answers else outcome


def _handle(tx: Tx, caller: Caller, call: Call, prepared: object) -> Outcome:
    entry = registered(call)
    _has_capacity(tx, caller, entry)
    return entry.handler(tx, caller, call) if entry.prepare is None else entry.handler(tx, caller, call, prepared)


def _has_capacity(tx: Tx, caller: Caller, entry: Registered) -> bool:
    """True, or the UserError of the command's `check`."""
    if entry.check is not None:
        entry.check(tx, caller)
    return True


def _may(tx: Tx, caller: Caller, call: Call) -> bool:
    """Whether the caller holds the form's grant in the channel that the command names."""
    if call.form.who is Grant.ANYONE or operators.grant_of(tx, caller.user, caller.channel.id) is Grant.OWNER:
        return True
    named = call.arguments.get("channel", caller.channel.name)
    channel = directory.channel_by_name(tx, named)
    return channel is not None and operators.grant_of(tx, caller.user, channel.id) >= call.form.who


def _denied(tx: Tx, caller: Caller, call: Call) -> Outcome:
    audit.record(tx, caller, call.action, _target(caller, call), allowed=False)
    return Outcome(Body(say(caller.language, NotAllowed.key)))


def _target(caller: Caller, call: Call) -> str:
    """The first argument, or the channel of the message. Never free text, which would stay readable in the log."""
    given = (call.arguments.get(one.name) for one in call.form.parameters if not one.rest)
    return next((one for one in given if one), caller.channel.name)[:_MAX_SHOWN]


def _last_audit(tx: Tx) -> int:
    return int(tx.value("SELECT ifnull(max(id), 0) FROM audit"))
