"""The sink of one workspace: a stream or an edited message while a reply is generated, then the final text.

A handle names one message by channel and ts, and says whether it began as a stream. A stream starts without text, so
that its ts is committed first. An append with unknown outcome is never repeated: the stream is stopped and the message
updated with the whole text, which is idempotent. No reply has a second stream.
"""

import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Hashable, Mapping
from dataclasses import replace
from typing import Any

from cachetools import LRUCache
from slack_sdk.errors import SlackApiError

from bots.shared.first_messages import FirstMessages
from bots.slack.addresses import goes_to, is_dm, thread_of
from bots.slack.pages import blocks, text
from bots.slack.sending.api import ERRORS, SlackApi, SlackProblem, classify, error_name
from bots.slack.sending.handles import REMEMBERED, LiveMessage, Recipient, SlackHandle, SlackPart
from bots.slack.sending.streams import Sessions
from core.errors import AppError
from core.i18n.messages import say
from core.platform import Reopened, Unreachable
from core.types import Address, Attachment, Body, Handle, Receipt

log = logging.getLogger(__name__)
WAITING = "…"
_APPEND_S = 0.7  # between two appends
_EDIT_S = 3.0  # between two edits of one message


class SlackSink(FirstMessages):
    """`asked` names the person of a reply; without one, after a restart, the reply is posted instead of streamed.

    `on_dm` is called with the person after a reply in a DM.
    """

    def __init__(
        self,
        api: SlackApi,
        *,
        transport: str = "stream",
        clock: Callable[[], float] = time.monotonic,
        on_dm: Callable[[str], None],
    ) -> None:
        super().__init__()
        self._api, self._transport, self._clock, self._on_dm = api, transport, clock, on_dm
        self._sessions = Sessions(api)
        self._askers: LRUCache[Address, Recipient] = LRUCache(REMEMBERED)
        self._live: LRUCache[Handle, LiveMessage] = LRUCache(REMEMBERED)
        self._begun: LRUCache[Address, bool] = LRUCache(REMEMBERED)
        self._moved: LRUCache[Handle, Handle] = LRUCache(REMEMBERED)  # a deleted message -> its replacement
        self._pressed: LRUCache[str, tuple[str, Mapping[str, Any]]] = LRUCache(REMEMBERED)  # ts -> channel, message

    def asked(self, to: Address, asker: Recipient) -> None:
        self._askers[replace(to, account="")] = asker

    def pressed(self, channel: str, message: Mapping[str, Any]) -> None:
        """Keep a message whose button was pressed: `choose` needs its blocks."""
        if message.get("ts") and message.get("blocks"):
            self._pressed[str(message["ts"])] = (channel, message)

    # --- the contract ---

    def split(self, body: Body) -> tuple[Body, ...]:
        """Cut within Slack's limits; the last text has the buttons, each file is a message of its own.

        Commands get Slack's prefix, but for those in a model's reply (one with feedback buttons).
        """
        models = any(button.action == "feedback" for button in body.buttons)
        whole = body.text if models else text.spelled(body.text)
        pieces = text.split(whole)
        parts = [SlackPart(piece, shown=shown) for piece, shown in zip(pieces, text.whole(pieces), strict=True)]
        parts[-1] = replace(parts[-1], buttons=body.buttons, note=body.note)
        return (*parts, *(Body("", files=(path,)) for path in body.files))

    async def open(self, to: Address) -> Handle:
        asker = self._askers.get(replace(to, account=""))
        status = self._sessions.begin(to, _language(asker)) if to.reply_to and thread_of(to) else None
        where = await self._start(to, asker) if self._may_stream(to, asker) else None
        self._begun[replace(to, account="")] = True
        handle = (where or await self._post(to, asker)).handle()
        self._live[handle] = LiveMessage(below=_stop_row(to, asker), status=status)
        return handle

    async def show(self, handle: Handle, text_so_far: str) -> None:
        live, where = self._live.get(handle), SlackHandle.read(handle)
        if live is None:
            return
        now, streaming = self._clock(), where.stream and not live.broken
        if now - live.changed_at < (_APPEND_S if streaming else _EDIT_S):
            return
        of_model = bool(where.reply_to)  # a job's progress message answers no message
        shown = text.growing(text_so_far if of_model else text.spelled(text_so_far))
        if len(shown) > text.LIMIT:
            return
        async with live.busy:
            live.changed_at = now
            if streaming:
                await self._append(where, live, shown)
            elif shown.strip() and self._api.free("chat.update"):
                await self._edit(where, live, shown)

    async def finish(self, handle: Handle, body: Body) -> Receipt | Reopened:
        where, live, body = SlackHandle.read(handle), self._live.get(handle), _written(body)
        done = False
        if live is not None:
            async with live.busy:
                done = where.stream and await self._stop_with(where, live, body)
                live.broken = True
        if not done and not await self._settle(handle, body):
            return await self._reopened(handle)
        self._end_session(where, live, stream_ended=done)
        return Receipt(json.dumps(where.at))

    async def recover(self, handle: Handle) -> Handle:
        """A message of this run as it is; a stream of an earlier run is stopped and edited from then on."""
        where = SlackHandle.read(handle)
        self._begun[where.to] = True
        if handle in self._moved:
            return self._moved[handle]
        if handle in self._live:
            return handle
        if where.stream:
            await self._stop(where)
            handle = replace(where, stream=False).handle()
        self._live[handle] = LiveMessage()
        return handle

    async def fail(self, handle: Handle, body: Body) -> Reopened | None:
        where, live = SlackHandle.read(handle), self._live.get(handle)
        if live is not None:
            live.broken = True
        if not await self._settle(handle, _written(self.split(body)[0])):
            return await self._reopened(handle)
        self._end_session(where, live)
        return None

    async def choose(self, to: Address, label: str) -> None:
        """Only for a message pressed in this run, since Slack takes whole messages only."""
        channel, message = self._pressed.pop(to.reply_to, ("", {}))
        if not channel:
            return
        shown = blocks.chosen(message["blocks"], label)
        given: dict[str, Any] = {"text": str(message.get("text") or WAITING)[:3000], "blocks": shown}
        try:
            await self._api.write("chat.update", channel=channel, ts=to.reply_to, link_names=False, **given)
        except (*ERRORS, AppError) as error:
            log.info("slack.not_chosen", extra={"error": error_name(error)})

    def fetch(self, attachment: Attachment) -> AsyncIterator[bytes]:
        """Stream a file that a person shared. Raises BadInput."""
        return self._api.download(attachment.file_id, attachment.name, attachment.size_bytes)

    # --- beginning ---

    def _may_stream(self, to: Address, asker: Recipient | None) -> bool:
        return (
            self._transport == "stream"
            and bool(to.reply_to)
            and thread_of(to) is not None
            and replace(to, account="") not in self._begun
            and (asker is not None or is_dm(to.place))
            and self._api.free("chat.startStream")
            and self._api.free("chat.stopStream")
        )

    async def _start(self, to: Address, asker: Recipient | None) -> SlackHandle | None:
        """Start a stream without text; None where Slack refuses or the outcome is unknown."""
        given = {"channel": to.place, "thread_ts": to.conversation}
        if asker is not None and not is_dm(to.place):
            given |= {"recipient_team_id": asker.team, "recipient_user_id": asker.user}
        try:
            made = await self._api.once("chat.startStream", **given)
        except ERRORS as error:
            log.info("slack.no_stream", extra={"error": error_name(error)})
            if classify(error) is SlackProblem.AWAY:
                self.count_lost(replace(to, account=""))
            return None
        channel, ts = str(made.get("channel", to.place)), str(made["ts"])
        return SlackHandle(channel, ts, True, to.place, to.conversation, to.reply_to)

    async def _post(self, to: Address, asker: Recipient | None) -> SlackHandle:
        """Post a first message: in its place, or as a DM to the asker where Slack refuses to post in that place."""

        async def post() -> dict[str, Any]:
            below = _stop_row(to, asker)
            try:
                return await self._post_in(goes_to(to), thread_of(to), below)
            except Unreachable:
                if asker is None or asker.user in ("", goes_to(to)):
                    raise
                return await self._post_in(asker.user, None, below)

        made = await self.first(replace(to, account=""), lambda: self._api.write("auth.test"), post)
        return SlackHandle(str(made["channel"]), str(made["ts"]), False, to.place, to.conversation, to.reply_to)

    async def _post_in(self, channel: str, thread: str | None, below: list[blocks.Block]) -> dict[str, Any]:
        shown = [{"type": "markdown", "text": WAITING}, *below]
        quiet = {"unfurl_links": False, "unfurl_media": False}
        given = {"channel": channel, "thread_ts": thread, "text": WAITING, "blocks": shown, **quiet}
        return await self._api.write("chat.postMessage", repeatable=False, **given)

    async def _reopened(self, gone: Handle) -> Reopened:
        """The replacement of a deleted message; the same one when this is repeated."""
        if gone in self._moved:
            return Reopened(self._moved[gone])
        to, live = SlackHandle.read(gone).to, self._live.get(gone)
        made = (await self._post(to, self._askers.get(to))).handle()
        self._moved[gone] = made
        self._live[made] = LiveMessage(status=live.status if live else None)
        return Reopened(made)

    def count_lost(self, to: Hashable) -> int:
        log.warning("slack.orphan")
        return super().count_lost(to)

    def _end_session(self, where: SlackHandle, live: LiveMessage | None, *, stream_ended: bool = False) -> None:
        """Show that work is done. `stream_ended`: ending the stream has shown it already, if `status` was sent."""
        status = live.status if live else None
        if thread_of(where.to) and not (stream_ended and (status is None or status.done())):
            self._sessions.end(where.channel, where.conversation, status)
        if where.conversation[:1] == "@":
            self._on_dm(where.conversation[1:])

    # --- growing ---

    async def _append(self, where: SlackHandle, live: LiveMessage, shown: str) -> None:
        if not shown.startswith(live.sent):
            live.broken = True
            return
        new = shown[len(live.sent) :]
        if not new or not self._api.free("chat.appendStream"):
            return
        live.broken = True  # until Slack confirms the append
        try:
            await self._api.once("chat.appendStream", **where.at, markdown_text=new)
        except ERRORS as error:
            live.broken = classify(error) is not SlackProblem.WAIT
            log.info("slack.append_failed", extra={"error": error_name(error)})
            return
        live.broken, live.sent = False, shown

    async def _edit(self, where: SlackHandle, live: LiveMessage, shown: str) -> None:
        try:
            if where.stream and not live.ended:
                if not self._api.free("chat.stopStream"):
                    return
                try:
                    await self._api.once("chat.stopStream", **where.at)
                except SlackApiError as error:
                    if classify(error) is not SlackProblem.ENDED:
                        raise
                live.ended = True
            given = self._whole(where, Body(shown))
            await self._api.once("chat.update", **given | {"blocks": [*given["blocks"], *live.below]})
        except ERRORS as error:
            log.info("slack.edit_failed", extra={"error": error_name(error)})

    # --- final ---

    async def _stop_with(self, where: SlackHandle, live: LiveMessage, body: Body) -> bool:
        """End an intact stream with the rest of its text and its buttons; False where an update must write it all."""
        final = text.harmless(body.text)
        if live.broken or body.files or not final.startswith(live.sent):
            return False
        rest = final[len(live.sent) :]
        await self._api.turn("chat.stopStream")
        try:
            given = {"markdown_text": rest or None, "blocks": blocks.below(body, where.to) or None}
            await self._api.once("chat.stopStream", **where.at, **given, session_status="active")
        except ERRORS as error:
            log.info("slack.stop_failed", extra={"error": error_name(error)})
            live.ended = classify(error) is SlackProblem.ENDED
            return False
        return True

    async def _settle(self, handle: Handle, body: Body) -> bool:
        """Replace the message by the final text; idempotent. False where the message was deleted."""
        where, live = SlackHandle.read(handle), self._live.get(handle)
        if where.stream and not (live and live.ended):
            await self._stop(where)
        try:
            await self._update(where, body)
        except SlackApiError as error:
            if classify(error) is not SlackProblem.GONE:
                raise
            log.info("slack.gone", extra={"error": error_name(error)})
            return False
        return True

    async def _update(self, where: SlackHandle, body: Body) -> None:
        """Update in the best form that Slack accepts."""
        if where.elsewhere:
            notice = say(_language(self._askers.get(where.to)), "slack.elsewhere")
            body = replace(body, note=f"{body.note}\n{notice}".lstrip())
        given = self._whole(where, body)
        if body.files:
            given |= {"file_ids": [await self._api.upload(path) for path in body.files], "text": body.files[0].name}
        *better, last = blocks.forms(body, where.to)
        for form in better:
            try:
                await self._put(where, given | {"blocks": form})
                return
            except SlackApiError as error:
                if classify(error) is not SlackProblem.OTHER:
                    raise
                log.warning("slack.plainer", extra={"error": error_name(error)})
        await self._put(where, given | {"blocks": last})

    async def _put(self, where: SlackHandle, given: dict[str, Any]) -> None:
        try:
            await self._api.write("chat.update", **given)
        except SlackApiError as error:
            if classify(error) is not SlackProblem.OPEN:
                raise
            await self._stop(where)
            await self._api.write("chat.update", **given)

    async def _stop(self, where: SlackHandle) -> None:
        """End a stream; one that has ended or was deleted is fine."""
        try:
            await self._api.write("chat.stopStream", **where.at, session_status="active")
        except SlackApiError as error:
            if classify(error) not in (SlackProblem.ENDED, SlackProblem.GONE):
                raise

    def _whole(self, where: SlackHandle, body: Body) -> dict[str, Any]:
        """The arguments of chat.update. `text` is shown in notifications."""
        return {
            **where.at,
            "text": text.harmless(body.text)[:3000] or WAITING,
            "blocks": blocks.message(body, where.to),
            "link_names": False,
        }


def _written(body: Body) -> Body:
    return replace(body, text=body.shown) if isinstance(body, SlackPart) else body


def _stop_row(to: Address, asker: Recipient | None) -> list[blocks.Block]:
    """The stop button of a reply; a message that answers none has nothing to stop."""
    return blocks.stop_row(say(_language(asker), "slack.stop"), to) if to.reply_to else []


def _language(asker: Recipient | None) -> str:
    return (asker.language if asker else "") or "en"
