"""Writes answers into Slack: one stream or one edited message while they grow, then a final text. Knows no event.

A handle is one message: channel and ts, and whether it began as a stream. A stream is started without text, so that
its ts is committed before anything is said. An append with unknown outcome is never repeated: the stream is stopped
and the message updated with the whole text, which may be repeated for ever. No answer has a second stream.
"""

from __future__ import annotations

import json
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import replace
from typing import Any

from slack_sdk.errors import SlackApiError

from bots.slack.addresses import goes_to, is_dm, thread_of
from bots.slack.pages import blocks, text
from bots.slack.sending.api import ERRORS, SlackApi, SlackProblem, Unsure, name_of, trouble
from bots.slack.sending.handles import LiveMessage, Recipient, SlackHandle, SlackPart, remember
from bots.slack.sending.streams import Sessions
from core.errors import AppError
from core.i18n.messages import say
from core.platform import Reopened, Unreachable
from core.types import Address, Attachment, Body, Handle, Receipt

log = logging.getLogger(__name__)
WAITING = "…"
_PAINT_S = 0.7  # between two appends
_EDIT_S = 3.0  # between two edits of one message


class SlackSink:
    """One workspace's. The intake tells who asks; of whom nobody is known, after a restart, the answer is posted.

    `told` is called with the person to whom something was said by themselves.
    """

    def __init__(
        self,
        api: SlackApi,
        *,
        transport: str = "stream",
        clock: Callable[[], float] = time.monotonic,
        told: Callable[[str], None] = lambda _user: None,
    ) -> None:
        self._api, self._transport, self._clock, self._told = api, transport, clock, told
        self._sessions = Sessions(api)
        self.orphans = 0
        self._askers: OrderedDict[Address, Recipient] = OrderedDict()
        self._sights: OrderedDict[Handle, LiveMessage] = OrderedDict()
        self._begun: OrderedDict[Address, None] = OrderedDict()
        self._unsure: OrderedDict[Address, int] = OrderedDict()  # first messages of which nobody knows, in a row
        self._moved: OrderedDict[Handle, Handle] = OrderedDict()  # a message that is gone -> one for it
        self._pressed: OrderedDict[str, tuple[str, Mapping[str, Any]]] = OrderedDict()  # ts -> channel, message

    def asked(self, to: Address, asker: Recipient) -> None:
        remember(self._askers, replace(to, account=""), asker)

    def pressed(self, channel: str, message: Mapping[str, Any]) -> None:
        """A button below this message was pressed: what it says is needed to take its buttons away."""
        if message.get("ts") and message.get("blocks"):
            remember(self._pressed, str(message["ts"]), (channel, message))

    # --- the contract ---

    def split(self, body: Body) -> tuple[Body, ...]:
        """Cut within Slack's limits; buttons below the last text, files as messages of their own.

        Commands in our own sentences are spelled as they are typed in Slack; the model's words, which alone have
        thumbs below them, stay as they are.
        """
        models = any(button.action == "feedback" for button in body.buttons)
        whole = body.text if models else text.spelled(body.text)
        pieces = text.split(whole)
        parts = [SlackPart(piece, shown=shown) for piece, shown in zip(pieces, text.whole(pieces), strict=True)]
        parts[-1] = replace(parts[-1], buttons=body.buttons, note=body.note)
        return (*parts, *(Body("", files=(path,)) for path in body.files))

    async def open(self, to: Address) -> Handle:
        asker = self._askers.get(replace(to, account=""))
        where, status = None, None
        if to.reply_to and thread_of(to):
            status = self._sessions.begin(to, _language(asker))
        if self._may_stream(to, asker):
            where = await self._start(to, asker)
        remember(self._begun, replace(to, account=""), None)
        if where is None:
            where = await self._post(to, asker)
        handle = where.handle()
        below = self._stop_row(to, asker) if to.reply_to else []
        remember(self._sights, handle, LiveMessage(below=below, status=status))
        return handle

    async def show(self, handle: Handle, text_so_far: str) -> None:
        sight, where = self._sights.get(handle), SlackHandle.read(handle)
        if sight is None:
            return
        now, streaming = self._clock(), where.stream and not sight.broken
        if now - sight.painted < (_PAINT_S if streaming else _EDIT_S):
            return
        of_model = bool(where.reply_to)  # what has no message to answer is a job's
        shown = text.growing(text_so_far if of_model else text.spelled(text_so_far))
        if len(shown) > text.LIMIT:
            return
        async with sight.busy:
            sight.painted = now
            if streaming:
                await self._append(where, sight, shown)
            elif shown.strip() and self._api.free("chat.update"):
                await self._edit(where, sight, shown)

    async def finish(self, handle: Handle, body: Body) -> Receipt | Reopened:
        where, sight, body = SlackHandle.read(handle), self._sights.get(handle), _written(body)
        if sight is not None:
            async with sight.busy:
                done = where.stream and await self._stop_with(where, sight, body)
                sight.broken = True
        else:
            done = False
        if not done and not await self._settle(handle, body):
            return await self._reopened(handle)
        self._over(where, sight, told=done)
        return Receipt(json.dumps({"channel": where.channel, "ts": where.ts}))

    async def recover(self, handle: Handle) -> Handle:
        """What this run began is written on; a stream of an earlier run is stopped, and edited from then on."""
        where = SlackHandle.read(handle)
        remember(self._begun, where.to, None)
        if handle in self._moved:
            return self._moved[handle]
        if handle in self._sights:
            return handle
        if not where.stream:
            remember(self._sights, handle, LiveMessage())
            return handle
        await self._stop(where)
        made = replace(where, stream=False).handle()
        remember(self._sights, made, LiveMessage())
        return made

    async def fail(self, handle: Handle, body: Body) -> Reopened | None:
        where, sight = SlackHandle.read(handle), self._sights.get(handle)
        if sight is not None:
            sight.broken = True
        if not await self._settle(handle, _written(self.split(body)[0])):
            return await self._reopened(handle)
        self._over(where, sight)
        return None

    async def choose(self, to: Address, label: str) -> None:
        """Of a message that was pressed in this run: Slack takes the whole message or nothing."""
        channel, message = self._pressed.pop(to.reply_to, ("", {}))
        if not channel:
            return
        given = {"text": str(message.get("text") or WAITING)[:3000], "blocks": blocks.chosen(message["blocks"], label)}
        try:
            await self._api.write("chat.update", channel=channel, ts=to.reply_to, link_names=False, **given)
        except (*ERRORS, AppError) as error:
            log.info("slack.not_chosen", extra={"error": name_of(error)})

    def fetch(self, attachment: Attachment) -> AsyncIterator[bytes]:
        """The bytes of a file that a person shared. Raises BadInput."""
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
        """A stream without text; None where there is none to be had, or nobody knows whether there is."""
        given = {"channel": to.place, "thread_ts": to.conversation}
        if asker is not None and not is_dm(to.place):
            given |= {"recipient_team_id": asker.team, "recipient_user_id": asker.user}
        try:
            made = await self._api.once("chat.startStream", **given)
        except ERRORS as error:
            log.info("slack.no_stream", extra={"error": name_of(error)})
            if trouble(error) is SlackProblem.AWAY:
                self._doubt(to)
            return None
        return SlackHandle(
            str(made.get("channel", to.place)), str(made["ts"]), True, to.place, to.conversation, to.reply_to
        )

    async def _post(self, to: Address, asker: Recipient | None) -> SlackHandle:
        """A first message: where it belongs; where Slack does not let us write there, to who asked by themselves."""
        key = replace(to, account="")
        if self._unsure.get(key, 0) > 1:
            del self._unsure[key]
            raise Unreachable(detail="whether a first message was posted is not known")
        below = self._stop_row(to, asker) if to.reply_to else []
        try:
            made = await self._post_in(goes_to(to), thread_of(to), to, below)
        except Unreachable:
            if asker is None or asker.user in ("", goes_to(to)):
                raise
            made = await self._post_in(asker.user, None, to, below)
        self._unsure.pop(key, None)
        return SlackHandle(str(made["channel"]), str(made["ts"]), False, to.place, to.conversation, to.reply_to)

    async def _post_in(
        self, channel: str, thread: str | None, to: Address, below: list[blocks.Block]
    ) -> dict[str, Any]:
        """Where nobody knows whether it is there, there is one more, and no third."""
        while True:
            if replace(to, account="") in self._unsure:
                await self._api.write("auth.test")  # a Slack that is away is waited for with what may be repeated
            try:
                return await self._api.post(
                    channel=channel,
                    thread_ts=thread,
                    text=WAITING,
                    blocks=[{"type": "markdown", "text": WAITING}, *below],
                    unfurl_links=False,
                    unfurl_media=False,
                )
            except Unsure:
                if self._doubt(to) > 1:
                    raise

    async def _reopened(self, gone: Handle) -> Reopened:
        """Another message for one that is gone; the same one where this is repeated."""
        if gone in self._moved:
            return Reopened(self._moved[gone])
        to, sight = SlackHandle.read(gone).to, self._sights.get(gone)
        made = (await self._post(to, self._askers.get(to))).handle()
        remember(self._moved, gone, made)
        remember(self._sights, made, LiveMessage(status=sight.status if sight else None))
        return Reopened(made)

    def _doubt(self, to: Address) -> int:
        """Note a first message that may stand there, its handle lost; how many in a row."""
        log.warning("slack.orphan")
        self.orphans += 1
        count = self._unsure.get(replace(to, account=""), 0) + 1
        remember(self._unsure, replace(to, account=""), count)
        return count

    def _stop_row(self, to: Address, asker: Recipient | None) -> list[blocks.Block]:
        return blocks.stop_row(say(_language(asker), "slack.stop"), to)

    def _over(self, where: SlackHandle, sight: LiveMessage | None, *, told: bool = False) -> None:
        """The session is no longer at work. `told`: the end of the stream said so, after all that was said before."""
        status = sight.status if sight else None
        if thread_of(where.to) and not (told and (status is None or status.done())):
            self._sessions.end(where.channel, where.conversation, status)
        if where.conversation[:1] == "@":
            self._told(where.conversation[1:])

    # --- growing ---

    async def _append(self, where: SlackHandle, sight: LiveMessage, shown: str) -> None:
        if not shown.startswith(sight.sent):
            sight.broken = True
            return
        new = shown[len(sight.sent) :]
        if not new or not self._api.free("chat.appendStream"):
            return
        sight.broken = True  # until Slack has said that it was taken
        try:
            await self._api.once("chat.appendStream", channel=where.channel, ts=where.ts, markdown_text=new)
        except ERRORS as error:
            sight.broken = trouble(error) is not SlackProblem.WAIT
            log.info("slack.append_failed", extra={"error": name_of(error)})
            return
        sight.broken, sight.sent = False, shown

    async def _edit(self, where: SlackHandle, sight: LiveMessage, shown: str) -> None:
        try:
            if where.stream and not sight.ended:
                if not self._api.free("chat.stopStream"):
                    return
                await self._stop_once(where)
                sight.ended = True
            given = self._whole(where, Body(shown))
            await self._api.once("chat.update", **given | {"blocks": [*given["blocks"], *sight.below]})
        except ERRORS as error:
            log.info("slack.edit_failed", extra={"error": name_of(error)})

    # --- final ---

    async def _stop_with(self, where: SlackHandle, sight: LiveMessage, body: Body) -> bool:
        """End a whole stream with the rest of its text and its buttons; False where an update has to say it all."""
        final = text.harmless(body.text)
        if sight.broken or body.files or not final.startswith(sight.sent):
            return False
        rest = final[len(sight.sent) :]
        await self._api.turn("chat.stopStream")
        try:
            await self._api.once(
                "chat.stopStream",
                channel=where.channel,
                ts=where.ts,
                markdown_text=rest or None,
                blocks=blocks.below(body, where.to) or None,
                session_status="active",
            )
        except ERRORS as error:
            log.info("slack.stop_failed", extra={"error": name_of(error)})
            sight.ended = trouble(error) is SlackProblem.ENDED
            return False
        return True

    async def _settle(self, handle: Handle, body: Body) -> bool:
        """Write the whole final text over whatever is there; repeatable. False where the message is gone."""
        where, sight = SlackHandle.read(handle), self._sights.get(handle)
        if where.stream and not (sight and sight.ended):
            await self._stop(where)
        try:
            await self._update(where, body)
        except SlackApiError as error:
            if trouble(error) is not SlackProblem.GONE:
                raise
            log.info("slack.gone", extra={"error": name_of(error)})
            return False
        return True

    async def _update(self, where: SlackHandle, body: Body) -> None:
        """In its best form; then, where Slack does not take that, in plainer ones."""
        if where.elsewhere:
            told = say(_language(self._askers.get(where.to)), "slack.elsewhere")
            body = replace(body, note=f"{body.note}\n{told}".lstrip())
        given = self._whole(where, body)
        if body.files:
            given |= {"file_ids": [await self._api.upload(path) for path in body.files], "text": body.files[0].name}
        *better, last = blocks.forms(body, where.to)
        for form in better:
            try:
                await self._put(where, given | {"blocks": form})
                return
            except SlackApiError as error:
                if trouble(error) is not SlackProblem.OTHER:
                    raise
                log.warning("slack.plainer", extra={"error": name_of(error)})
        await self._put(where, given | {"blocks": last})

    async def _put(self, where: SlackHandle, given: dict[str, Any]) -> None:
        try:
            await self._api.write("chat.update", **given)
        except SlackApiError as error:
            if trouble(error) is not SlackProblem.OPEN:
                raise
            await self._stop(where)
            await self._api.write("chat.update", **given)

    async def _stop(self, where: SlackHandle) -> None:
        """End a stream as it stands; one that has ended, or is gone, is as good."""
        try:
            await self._api.write("chat.stopStream", channel=where.channel, ts=where.ts, session_status="active")
        except SlackApiError as error:
            if trouble(error) not in (SlackProblem.ENDED, SlackProblem.GONE):
                raise

    async def _stop_once(self, where: SlackHandle) -> None:
        try:
            await self._api.once("chat.stopStream", channel=where.channel, ts=where.ts)
        except SlackApiError as error:
            if trouble(error) is not SlackProblem.ENDED:
                raise

    def _whole(self, where: SlackHandle, body: Body) -> dict[str, Any]:
        """A message that says exactly this. `text` is what notifications show."""
        return {
            "channel": where.channel,
            "ts": where.ts,
            "text": text.harmless(body.text)[:3000] or WAITING,
            "blocks": blocks.message(body, where.to),
            "link_names": False,
        }


def _written(body: Body) -> Body:
    return replace(body, text=body.shown) if isinstance(body, SlackPart) else body


def _language(asker: Recipient | None) -> str:
    return (asker.language if asker else "") or "en"
