"""The fake Telegram: chats, messages, drafts, updates and limits, behind the Bot API over HTTP on loopback.

Its clock can be moved by `skip`, for drafts that expire and for limits. It holds what a real one would hold, and a log
of every request with what came of it.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import ClientSession, web

from tests.fakes.telegram import people
from tests.fakes.telegram.people import DATE, Chat, Person
from tests.fakes.telegram.rules import Refused, check_buttons, check_text, read
from tests.support.waiting import DEADLINE_S

TOKEN = "4242:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"
DRAFT_S = 30.0
SENDS = {"sendMessage", "editMessageText", "editMessageMedia", "editMessageReplyMarkup", "sendMessageDraft"}


@dataclass
class Sent:
    """One message of the bot, as people see it. `texts` are all that it has been."""

    id: int
    chat: int
    text: str
    entities: list[Any]
    markup: Any
    topic: int | None
    reply_to: int | None
    texts: list[str] = field(default_factory=list)
    media: str = ""
    file: bytes = b""
    rich: str = ""

    @property
    def labels(self) -> list[str]:
        return [button.text for row in self.markup.inline_keyboard for button in row] if self.markup else []


@dataclass
class Draft:
    text: str
    until: float
    topic: int | None
    can_stop: bool


@dataclass
class Call:
    at: float
    method: str
    chat: int
    status: int
    text: str = ""


@dataclass
class Account:
    token: str
    username: str
    id: int
    pending: list[dict[str, Any]] = field(default_factory=list)
    next_update: int = 1000
    polling: int = 0
    webhook: dict[str, Any] | None = None
    came: asyncio.Event = field(default_factory=asyncio.Event)
    confirmed: list[int] = field(default_factory=list)
    poller: int = 0

    def take_over(self) -> int:
        """A new request for updates ends the one before it."""
        self.poller += 1
        self.came.set()
        return self.poller


class FakeTelegram:
    """`limits`: whether the pace of the real one is enforced. `url` is for the bot's `api` setting."""

    def __init__(self, *, limits: bool = False) -> None:
        self.limits = limits
        self.url = ""
        self.accounts: dict[str, Account] = {}
        self.chats: dict[int, Chat] = {}
        self.messages: dict[tuple[int, int], Sent] = {}
        self.said: dict[tuple[int, int], dict[str, Any]] = {}  # what people have
        self.drafts: dict[tuple[int, int], Draft] = {}
        self.drafted: list[str] = []
        self.calls: list[Call] = []
        self.commands: dict[str, list[str]] = {}
        self.files: dict[str, bytes] = {}
        self.answered: list[tuple[str, str]] = []
        self.faults: list[tuple[str, Callable[[], None] | str]] = []
        self.violations: list[str] = []
        self.repeat = False  # hand out what was handed out already, until it is confirmed
        self.changed = asyncio.Event()
        self._numbers: dict[int, int] = defaultdict(int)
        self._skipped = 0.0
        self._blocked: dict[int, float] = {}
        self._times: dict[int, list[float]] = defaultdict(list)
        self.storm: Callable[[], int] | None = None  # seconds to wait, or 0
        self.add_account(TOKEN, "acme_bot")

    def add_account(self, token: str, username: str) -> Account:
        account = self.accounts[token] = Account(token, username, int(token.split(":")[0]))
        return account

    @property
    def account(self) -> Account:
        return self.accounts[TOKEN]

    def now(self) -> float:
        return time.monotonic() + self._skipped

    def skip(self, seconds: float) -> None:
        self._skipped += seconds

    @asynccontextmanager
    async def open(self) -> AsyncIterator[FakeTelegram]:
        app = web.Application(client_max_size=60_000_000)
        app.router.add_route("*", "/bot{token}/{method}", self._handle)
        app.router.add_get("/file/bot{token}/{path:.*}", self._file)
        runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            yield self
        finally:
            for account in self.accounts.values():
                account.take_over()
            await runner.cleanup()

    # --- what people do ---

    def chat(self, id: int, type: str = "private", **more: Any) -> Chat:
        return self.chats.setdefault(id, Chat(id, type, **more))

    def says(self, person: Person, text: str = "", *, chat: Chat | None = None, **more: Any) -> int:
        """A message; its number in the chat."""
        chat = chat or self.chat(person.id)
        self._numbers[chat.id] += 1
        number = self._numbers[chat.id]
        self.said[chat.id, number] = people.message(chat, person, number, text, **more)
        self.update(message=self.said[chat.id, number])
        return number

    def presses(self, person: Person, message: Sent, label: str = "", *, data: str = "") -> None:
        if not data:
            buttons = [button for row in message.markup.inline_keyboard for button in row]
            data = next(button.callback_data for button in buttons if label in button.text)
        chat, bot = self.chats[message.chat], self.account
        shown = people.message(chat, Person(bot.id, "Acme", is_bot=True), message.id, message.text)
        if message.markup:
            shown["reply_markup"] = message.markup.model_dump(exclude_none=True)
        if message.topic:
            shown |= {"message_thread_id": message.topic, "is_topic_message": True}
        if message.reply_to:
            answered = (message.chat, message.reply_to)
            mine = self.messages.get(answered)
            shown["reply_to_message"] = self.mine(mine) if mine else self.said[answered]
        press = {"id": f"q{bot.next_update}", "from": person.json(), "chat_instance": "1", "data": data}
        self.update(callback_query=press | {"message": shown})

    def update(self, *, token: str = TOKEN, number: int | None = None, **kind: Any) -> int:
        """Put an update into the queue of an account."""
        account = self.accounts[token]
        number = account.next_update if number is None else number
        account.next_update = number + 1
        account.pending.append({"update_id": number, **kind})
        account.came.set()
        return number

    def mine(self, message: Sent) -> dict[str, Any]:
        """A message of the bot, as `reply_to_message` holds it."""
        bot = Person(self.account.id, "Acme", is_bot=True)
        return people.message(self.chats[message.chat], bot, message.id, message.text)

    def visible_draft(self, chat: int) -> str | None:
        """The text of the draft that is shown in a chat at the moment."""
        shown = [draft for (at, _), draft in self.drafts.items() if at == chat and draft.until > self.now()]
        return shown[-1].text if shown else None

    def held(self, chat: int) -> list[Sent]:
        """The bot's messages in a chat, oldest first."""
        return [message for (at, _), message in self.messages.items() if at == chat]

    async def until(self, met: Callable[[], object], seconds: float = DEADLINE_S) -> None:
        """Wait until something is so."""
        async with asyncio.timeout(seconds):
            while not met():
                self.changed.clear()
                try:
                    async with asyncio.timeout(0.1):
                        await self.changed.wait()
                except TimeoutError:
                    continue

    # --- HTTP ---

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        token, name = request.match_info["token"], request.match_info["method"]
        account = self.accounts.get(token)
        if account is None:
            return _refusal(Refused(401, "Unauthorized"))
        chat, text, cut = 0, "", False
        try:
            method, files = await read(request, name)
            given = getattr(method, "chat_id", 0)
            chat, text = given if isinstance(given, int) else 0, getattr(method, "text", "") or ""
            cut = self._fault(name)
            if name in SENDS:
                self._pace(chat, name)
            result = await getattr(self, f"_{name}", self._unknown)(account, method, files)
        except Refused as refused:
            self._note(name, chat, refused.code, text)
            return _refusal(refused)
        self._note(name, chat, 200, text)
        if cut:  # done, but nobody hears of it
            assert request.transport is not None
            request.transport.abort()
        return web.json_response({"ok": True, "result": result})

    def _note(self, name: str, chat: int, status: int, text: str) -> None:
        self.calls.append(Call(self.now(), name, chat, status, text))
        self.changed.set()

    def _fault(self, name: str) -> bool:
        """The next fault for this method; whether its connection is to be cut after it is done."""
        for fault in self.faults:
            if fault[0] == name:
                self.faults.remove(fault)
                if fault[1] == "cut":
                    return True
                assert not isinstance(fault[1], str)
                fault[1]()
        return False

    async def _unknown(self, account: Account, method: Any, files: dict[str, bytes]) -> Any:
        raise Refused(404, "Not Found: the fake does not know this method")

    async def _file(self, request: web.Request) -> web.Response:
        held = self.files.get(request.match_info["path"].removeprefix("documents/"))
        if request.match_info["token"] not in self.accounts or held is None:
            return web.Response(status=404)
        return web.Response(body=held)

    def _pace(self, chat: int, name: str) -> None:
        now = self.now()
        if now < self._blocked.get(chat, 0.0) - 0.05:
            self.violations.append(f"{name} to {chat} {self._blocked[chat] - now:.2f} s before retry_after was over")
        wait = self.storm() if self.storm else 0
        if self.limits and not wait and name != "sendMessageDraft":
            times = self._times[chat] = [at for at in self._times[chat] if at > now - 60]
            most = 20 if chat < 0 else 60 + 3
            burst = [at for at in times if at > now - 1]
            if len(times) >= most or (len(burst) >= 3 and chat > 0) or len(burst) >= 6:
                wait = 3
            else:
                times.append(now)
        if wait:
            self._blocked[chat] = now + wait
            raise Refused(429, f"Too Many Requests: retry after {wait}", retry_after=wait)

    def _open_chat(self, id: int, topic: int | None) -> Chat:
        chat = self.chats.get(id)
        if chat is None:
            raise Refused(400, "Bad Request: chat not found")
        if chat.moved_to:
            described = "Bad Request: group chat was upgraded to a supergroup chat"
            raise Refused(400, described, migrate_to_chat_id=chat.moved_to)
        if chat.blocked:
            blocked = chat.type == "private"
            raise Refused(
                403, f"Forbidden: bot was {'blocked by the user' if blocked else 'kicked from the group chat'}"
            )
        if topic is not None and topic not in chat.topics:
            raise Refused(400, "Bad Request: message thread not found")
        return chat

    # --- methods ---

    async def _getMe(self, account: Account, method: Any, files: dict[str, bytes]) -> Any:
        return {"id": account.id, "is_bot": True, "first_name": "Acme", "username": account.username}

    async def _getUpdates(self, account: Account, method: Any, files: dict[str, bytes]) -> Any:
        if account.webhook:
            raise Refused(409, "Conflict: can't use getUpdates method while webhook is active; use deleteWebhook first")
        if method.offset is not None:
            confirmed = [one["update_id"] for one in account.pending if one["update_id"] < method.offset]
            account.confirmed += confirmed
            account.pending = [one for one in account.pending if one["update_id"] >= method.offset]
        account.polling += 1
        mine = account.take_over()
        try:
            async with asyncio.timeout(min(method.timeout or 0, 5)):
                while not account.pending and account.poller == mine:
                    account.came.clear()
                    await account.came.wait()
        except TimeoutError:
            pass
        finally:
            account.polling -= 1
        if account.poller != mine:
            described = (
                "Conflict: terminated by other getUpdates request; make sure that only one bot instance is running"
            )
            raise Refused(409, described)
        allowed = method.allowed_updates or []
        waiting = [one for one in account.pending if not allowed or set(one) & set(allowed) or len(one) == 1]
        oldest = sorted(one["update_id"] for one in waiting)[: method.limit]
        return [one for one in waiting if one["update_id"] in oldest]

    async def _setWebhook(self, account: Account, method: Any, files: dict[str, bytes]) -> Any:
        account.webhook = {"url": method.url, "secret": method.secret_token}
        return True

    async def _deleteWebhook(self, account: Account, method: Any, files: dict[str, bytes]) -> Any:
        account.webhook = None
        return True

    async def post_webhook(self, url: str, session: ClientSession) -> int:
        """Hand the oldest update to the webhook, as Telegram does; it stays until the answer is 2xx."""
        account = self.account
        assert account.webhook is not None
        headers = {"X-Telegram-Bot-Api-Secret-Token": account.webhook["secret"]}
        async with session.post(url, json=account.pending[0], headers=headers) as response:
            if response.status == 200:
                account.confirmed.append(account.pending.pop(0)["update_id"])
            return response.status

    async def _sendMessage(self, account: Account, method: Any, files: dict[str, bytes]) -> Any:
        chat = self._open_chat(method.chat_id, method.message_thread_id)
        check_text(method.text, method.entities)
        check_buttons(method.reply_markup)
        self._numbers[chat.id] += 1
        number = self._numbers[chat.id]
        reply = method.reply_parameters.message_id if method.reply_parameters else None
        sent = Sent(
            number, chat.id, method.text.strip(), list(method.entities or []), method.reply_markup,
            method.message_thread_id, reply, [method.text],
        )  # fmt: skip
        self.messages[chat.id, number] = sent
        self.drafts = {key: draft for key, draft in self.drafts.items() if key[0] != chat.id}
        return self._json(account, sent)

    async def _sendMessageDraft(self, account: Account, method: Any, files: dict[str, bytes]) -> Any:
        chat = self._open_chat(method.chat_id, method.message_thread_id)
        if chat.type != "private":
            raise Refused(400, "Bad Request: drafts can be sent to private chats only")
        if not method.draft_id:
            raise Refused(400, "Bad Request: DRAFT_ID_INVALID")
        check_text(method.text, method.entities, empty=True)
        until = self.now() + DRAFT_S
        draft = Draft(method.text or "", until, method.message_thread_id, bool(method.can_stop))
        self.drafts[chat.id, method.draft_id] = draft
        self.drafted.append(method.text or "")
        return True

    async def _editMessageText(self, account: Account, method: Any, files: dict[str, bytes]) -> Any:
        self._open_chat(method.chat_id, None)
        sent = self._message(method)
        check_buttons(method.reply_markup)
        if method.rich_message is not None:
            sent.rich, sent.text = method.rich_message.markdown or "", method.rich_message.markdown or ""
            sent.markup = method.reply_markup
            return self._json(account, sent)
        check_text(method.text, method.entities)
        entities = list(method.entities or [])
        if (method.text.strip(), entities, method.reply_markup) == (sent.text, sent.entities, sent.markup):
            raise Refused(
                400,
                "Bad Request: message is not modified: specified new message content and reply markup are exactly the"
                " same as a current content and reply markup of the message",
            )
        sent.text, sent.entities, sent.markup = method.text.strip(), entities, method.reply_markup
        sent.texts.append(method.text)
        return self._json(account, sent)

    async def _editMessageMedia(self, account: Account, method: Any, files: dict[str, bytes]) -> Any:
        self._open_chat(method.chat_id, None)
        sent = self._message(method)
        name = str(method.media.media).removeprefix("attach://")
        sent.media, sent.file, sent.text, sent.markup = method.media.type, files[name], "", method.reply_markup
        return self._json(account, sent)

    async def _editMessageReplyMarkup(self, account: Account, method: Any, files: dict[str, bytes]) -> Any:
        sent = self._message(method)
        check_buttons(method.reply_markup)
        sent.markup = method.reply_markup
        return self._json(account, sent)

    def _message(self, method: Any) -> Sent:
        sent = self.messages.get((method.chat_id, method.message_id))
        if sent is None:
            raise Refused(400, "Bad Request: message to edit not found")
        return sent

    async def _sendChatAction(self, account: Account, method: Any, files: dict[str, bytes]) -> Any:
        chat = self._open_chat(method.chat_id, None)
        if method.message_thread_id not in (None, 1) and method.message_thread_id not in chat.topics:
            raise Refused(400, "Bad Request: message thread not found")
        return True

    async def _answerCallbackQuery(self, account: Account, method: Any, files: dict[str, bytes]) -> Any:
        self.answered.append((method.callback_query_id, method.text or ""))
        return True

    async def _setMyCommands(self, account: Account, method: Any, files: dict[str, bytes]) -> Any:
        names = [one.command for one in method.commands]
        if any(not 1 <= len(one.description) <= 256 for one in method.commands) or len(names) > 100:
            raise Refused(400, "Bad Request: BOT_COMMAND_DESCRIPTION_INVALID")
        self.commands[_scope(method)] = names
        return True

    async def _deleteMyCommands(self, account: Account, method: Any, files: dict[str, bytes]) -> Any:
        self.commands.pop(_scope(method), None)
        return True

    async def _getChatMember(self, account: Account, method: Any, files: dict[str, bytes]) -> Any:
        chat = self.chats[method.chat_id]
        status = "administrator" if method.user_id in chat.admins else "member"
        made = {"status": status, "user": Person(method.user_id).json()}
        rights = (
            "can_be_edited is_anonymous can_manage_chat can_delete_messages can_manage_video_chats can_restrict_members"
        )
        rights += (
            " can_promote_members can_change_info can_invite_users can_post_stories can_edit_stories can_delete_stories"
        )
        return made | (dict.fromkeys(rights.split(), False) if status == "administrator" else {})

    async def _getFile(self, account: Account, method: Any, files: dict[str, bytes]) -> Any:
        held = self.files.get(method.file_id)
        if held is None:
            raise Refused(400, "Bad Request: wrong file_id or the file is temporarily unavailable")
        if len(held) > 20_000_000:
            raise Refused(400, "Bad Request: file is too big")
        path = f"documents/{method.file_id}"
        return {"file_id": method.file_id, "file_unique_id": "u", "file_size": len(held), "file_path": path}

    def _json(self, account: Account, sent: Sent) -> dict[str, Any]:
        return {
            "message_id": sent.id,
            "date": DATE,
            "chat": self.chats[sent.chat].json(),
            "from": {"id": account.id, "is_bot": True, "first_name": "Acme"},
            "text": sent.text,
        }


def _scope(method: Any) -> str:
    scope = method.scope
    parts = [scope.type if scope else "default", str(getattr(scope, "chat_id", "")), method.language_code or ""]
    return " ".join(part for part in parts if part)


def _refusal(refused: Refused) -> web.Response:
    body: dict[str, Any] = {"ok": False, "error_code": refused.code, "description": refused.description}
    if refused.parameters:
        body["parameters"] = refused.parameters
    return web.Response(status=refused.code, text=json.dumps(body), content_type="application/json")
