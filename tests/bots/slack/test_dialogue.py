"""What people live through in Slack, by Socket Mode and over HTTP alike."""

from __future__ import annotations

from pathlib import Path

import pytest

from core.texts import say
from tests.bots.slack.talk import talk

both_ways = pytest.mark.parametrize("http", [False, True], ids=["socket", "http"])


@both_ways
async def test_a_question_in_a_dm_is_answered_once_in_its_thread(tmp_path: Path, http: bool) -> None:
    async with talk(tmp_path, http=http) as it:
        asked = it.there.message("UANN", "What is a permit?")
        held = await it.answer(asked)
        assert held.said == "you said What is a permit?"
        assert held.thread == asked["event"]["ts"]
        assert held.streamed
        assert not held.streaming
        assert held.labels == [say("en", "service.again")]
        assert len(it.there.messages) == 1
        assert await it.here.count("ledger") == 1
