"""/start, /help, /new, /stop and /retry."""

from core.channels import bindings, people
from core.chat import conversations, inbox
from core.chat.stopping import may_stop_all
from core.commands.help import details, overview
from core.commands.parser import find
from core.commands.registry import command
from core.commands.table import Call
from core.errors import BadInput
from core.i18n.messages import duration, say
from core.privacy.retention import retention_of
from core.storage.database import Tx
from core.types import Body, Button, Caller, Effect, ForgetMemory, Outcome, StopReply


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
    """Raises BadInput where there is no question to answer again."""
    if not conversations.has_question(tx, caller.conversation_id):
        raise BadInput("service.nothing_to_retry")
    return Outcome(Body(""), (Effect.ANSWER_AGAIN,))
