"""/start, /help, /new, /stop and /retry, and /inbox for operators: messages that were given up."""

from core.channels import bindings, operators, people
from core.chat import conversations, inbox
from core.chat.inbox import InboxRow
from core.chat.stopping import may_stop_all
from core.commands.help import details, overview
from core.commands.parser import find
from core.commands.registry import command
from core.commands.table import Call
from core.delivery import deliveries
from core.errors import BadInput, UnknownThing
from core.i18n.messages import duration, say
from core.privacy.retention import retention_of
from core.storage.database import Tx
from core.types import Body, Button, Caller, Effect, ForgetMemory, Grant, Outcome, StopReply

_LISTED = 20


@command("start")
def start(tx: Tx, caller: Caller, call: Call) -> Outcome:
    """Introduce the channel. The payload of a channel's link moves the person to that channel."""
    at, payload = caller.address, call.arguments.get("link", "")
    own = tx.cipher.hash_user(at.platform, at.account, at.place) == caller.user
    linked = bindings.channel_of_link(tx, at.platform, at.account, payload) if payload and own else None
    if linked is not None and linked.id != caller.channel.id:
        people.came_by_link(tx, caller.user, at.platform, linked.id)
    channel = linked or caller.channel
    language = people.language_of(tx, caller.user) or caller.language
    kept = duration(language, retention_of(tx).conversation_hours * 3600)
    questions = tuple(Button(question, "say", question) for question in channel.questions)
    return Outcome(Body(say(language, "users.hello", title=channel.title, kept=kept), questions))


@command("help")
def show_help(tx: Tx, caller: Caller, call: Call) -> Outcome:
    """All commands, one command, or one form of it: `/help channel set`. Raises BadCommand for an unknown command."""
    name, _, word = call.arguments.get("command", "").partition(" ")
    if not name:
        return Outcome(Body(overview(caller.language, caller.grant)))
    return Outcome(Body(details(caller.language, caller.grant, find(name), word.strip().lower())))


@command("new")
def new(tx: Tx, caller: Caller, call: Call) -> Outcome:
    conversations.restart(tx, caller.conversation_id)
    forget = ForgetMemory(caller.channel.name, str(caller.conversation_id))
    return Outcome(Body(say(caller.language, "users.new")), (forget,))


@command("stop")
def stop(tx: Tx, caller: Caller, call: Call) -> Outcome:
    """Stop the reply that is being written in this conversation (core.chat.stopping says whose)."""
    asked_by = inbox.running_user(tx, caller.address)
    everybody = may_stop_all(tx, caller.user, caller.channel.id, moderates=caller.moderates)
    if asked_by is None:
        key = "users.nothing_to_stop"
    else:
        key = "users.stop" if everybody or asked_by == caller.user else "users.not_yours_to_stop"
    return Outcome(Body(say(caller.language, key)), (StopReply("" if everybody else caller.user),))


@command("retry")
def retry(tx: Tx, caller: Caller, call: Call) -> Outcome:
    """Another answer to the last question, or a first one where it was refused. Raises BadInput where there is none."""
    refused = inbox.unanswered(tx, caller.inbox_id, caller.address, caller.user)
    if refused is not None:
        inbox.take_over(tx, caller.inbox_id, refused.id)
        return Outcome(Body(""), (Effect.ANSWER_UNANSWERED,))
    if not conversations.has_question(tx, caller.conversation_id):
        raise BadInput("service.nothing_to_retry")
    return Outcome(Body(""), (Effect.ANSWER_AGAIN,))


@command("inbox", "list")
def list_given_up(tx: Tx, caller: Caller, call: Call) -> Outcome:
    """Messages that were given up, of the channels that the person operates; never their text."""
    found = _given_up(tx, caller)
    if not found:
        return Outcome(Body(say(caller.language, "inbox.none")))
    lines = [
        say(caller.language, "inbox.line", id=row.id, channel=channel, age=duration(caller.language, age_s))
        for row, channel, age_s in found[:_LISTED]
    ]
    return Outcome(Body("\n- ".join([say(caller.language, "inbox.list", n=len(found)) + "\n", *lines])))


@command("inbox", "retry")
def retry_given_up(tx: Tx, caller: Caller, call: Call) -> Outcome:
    """Handle a message that was given up once more, alone. Raises UnknownThing."""
    typed = call.arguments["message"]
    row = next((row for row, _, _ in _given_up(tx, caller) if str(row.id) == typed), None)
    if row is None:
        raise UnknownThing("inbox.unknown", typed=typed[:40])
    inbox.reopen(tx, row.id)
    deliveries.renew(tx, inbox_id=row.id)
    return Outcome(Body(say(caller.language, "inbox.retried", id=row.id)))


def _given_up(tx: Tx, caller: Caller) -> list[tuple[InboxRow, str, float]]:
    """(row, channel, age in seconds), newest first."""
    found = []
    for row in inbox.given_up(tx):
        at = row.address
        channel = bindings.channel_of_person(tx, at.platform, at.account, at.place, row.user_hash)
        if channel is not None and operators.grant_of(tx, caller.user, channel.id) >= Grant.OPERATOR:
            found.append((row, channel.name, (tx.now_ms - row.received_ms) / 1000))
    return found
