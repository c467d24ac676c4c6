"""Operators need nothing but Slack: files up, progress in one message, verdicts, pictures and tables."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path

import pytest
from PIL import Image

from bots.slack.pages.manifest import EVENTS, SCOPES, command, manifest, manifest_json
from bots.slack.settings import read_settings
from core.adapters.commands import promote_button
from core.config.loader import load_config
from core.i18n.messages import say
from tests.bots.slack.talk import Talk, talk
from tests.fakes.slack import Held
from tests.support.fake_trainer import COMMAND
from tests.support.paths import ROOT

pytestmark = pytest.mark.slow

ROW = b'{"word": "%s"}\n'


def document(name: str = "faq.jsonl", size: int = 17) -> dict[str, object]:
    return {"id": "F0", "name": name, "size": size, "mimetype": "application/json"}


async def upload(it: Talk, user: str, word: str = "plain") -> Held:
    it.there.files["F0"] = ROW % word.encode()
    return await it.ask(user, "finetune yes", subtype="file_share", files=[document()])


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("http", [False, True], ids=["socket", "http"])
async def test_a_shared_file_becomes_a_version_in_service(tmp_path: Path, http: bool, language: str) -> None:
    async with talk(tmp_path, trainer=COMMAND, http=http) as it:
        if language == "zh":
            await it.ask("UOWNER", "/language zh")
        before = len(it.there.messages)
        started = await upload(it, "UOWNER")
        assert "faq.jsonl" in started.said
        _, job, *rest = list(it.there.messages.values())[before:]
        assert "acme@1" in job.said
        assert len(job.history) >= 2  # one message, edited while the job runs
        shown = [call.body for call in it.there.called("chat.update") if call.body["ts"] == job.ts]
        assert not any(block["type"] == "actions" for body in shown[:-1] for block in body["blocks"])
        assert job.labels[1] == promote_button(language, "acme@1").text
        (picture,) = [one for one in rest if one.files]
        assert Image.open(io.BytesIO(it.there.files[picture.files[0]])).size == (900, 420)
        verdict = await it.answer(it.there.press("UOWNER", job, job.labels[1]))
        assert "acme@1" in verdict.said
        assert await it.here.database.read(lambda tx: tx.value("SELECT champion FROM adapter_name WHERE name = 'acme'"))
        assert "base" in (await it.ask("UOWNER", "/adapter rollback")).said


async def test_strangers_are_refused(tmp_path: Path) -> None:
    async with talk(tmp_path, trainer=COMMAND) as it:
        assert (await upload(it, "UANN")).said == say("en", "error.not_allowed")
        assert await it.here.count("job") == 0
        assert await it.here.count("audit", "allowed = 0") == 1


@pytest.mark.parametrize(("size", "key"), [(300_000_000, "file_too_large"), (10, "file_gone")])
async def test_a_file_that_cannot_be_had_is_named_with_the_way_out(tmp_path: Path, size: int, key: str) -> None:
    async with talk(tmp_path, trainer=COMMAND) as it:
        held = await it.ask("UOWNER", "finetune", subtype="file_share", files=[document(size=size)])
        assert held.said == say("en", f"slack.{key}", name="faq.jsonl", limit=200)
        assert await it.here.count("job") == 0


async def test_usage_comes_as_a_chart_and_as_a_table(tmp_path: Path) -> None:
    async with talk(tmp_path) as it:
        for number in range(3):
            await it.ask("UANN", f"question {number}")
        usage = await it.ask("UOWNER", "/usage")
        assert usage.labels == [say("en", "users.usage_chart"), say("en", "users.usage_csv")]
        found = []
        for label in usage.labels:
            await it.answer(it.there.press("UOWNER", usage, label))
            found.append(it.there.files[list(it.there.messages.values())[-1].files[0]])
        assert Image.open(io.BytesIO(found[0])).format == "PNG"
        rows = list(csv.DictReader(io.StringIO(found[1].decode())))
        assert rows[-1]["replies"] == "3"


async def test_an_operator_is_known_by_their_id(tmp_path: Path) -> None:
    async with talk(tmp_path) as it:
        refused = await it.answer(it.there.command("UANN", "channel list"))
        assert refused.said == say("en", "error.not_allowed")
        assert "acme" in (await it.answer(it.there.command("UOWNER", "channel list"))).said


def test_the_manifest_is_current() -> None:
    kept = (ROOT / "deploy" / "slack-manifest.json").read_text(encoding="utf-8")
    assert kept == manifest_json(), "run: distributary slack manifest > deploy/slack-manifest.json"


def test_the_manifest_holds_what_slack_takes() -> None:
    for url in ("", "https://bot.example.org"):
        made = manifest(url)
        assert "assistant_view" not in made["features"]
        assert len(made["features"]["agent_view"]["agent_description"]) <= 300
        assert len(made["display_information"]["description"]) <= 140
        (command,) = made["features"]["slash_commands"]
        assert all(name in command["usage_hint"] for name in ("help", "usage", "forget"))
        assert "finetune" not in command["usage_hint"]
        assert made["settings"]["event_subscriptions"]["bot_events"] == sorted(EVENTS)
        assert made["oauth_config"]["scopes"]["bot"] == sorted(SCOPES)
        assert made["settings"]["socket_mode_enabled"] == (not url)
        assert json.dumps(made).count("bot.example.org") == (4 if url else 0)


DOCS = [ROOT / "deploy" / "slack.md", ROOT / "README.md"]


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_what_the_docs_say_can_be_typed(path: Path, tmp_path: Path) -> None:
    """The manifest's command as it stands there; every configuration of Slack is one."""
    text = path.read_text(encoding="utf-8")
    typed = re.findall(r"`(?:\.venv/bin/)?distributary slack (manifest[^`]*)`", text)
    assert typed
    for words in typed:
        assert json.loads(command(words.split()))["features"]["agent_view"]
    env = {"SLACK_TOKEN": "xoxb-1-abcdef", "SLACK_APP_TOKEN": "xapp-1-abcdef"}
    env |= {"SLACK_SIGNING_SECRET": "s3cret", "SLACK_CLIENT_SECRET": "cl13nt"}
    blocks = [one for one in re.findall(r"```toml\n(.*?)```", text, re.DOTALL) if "slack" in one]
    assert blocks
    for number, block in enumerate(blocks):
        file = tmp_path / f"{number}.toml"
        file.write_text(block, encoding="utf-8")
        for table in load_config(file, env).bots.values():
            assert read_settings(table.settings).url or "url" not in block
