"""The App Home of a person.

A button runs a command, which is answered in a DM, or opens a modal. Operators see the channel's usage, version, jobs
and settings; others see the questions they have left.
"""

from typing import Any

from bots.slack.pages import blocks, modals
from bots.slack.pages.blocks import Block
from bots.slack.pages.text import escaped, spelled
from core.i18n.messages import Lazy, duration, say
from core.platform import Overview
from core.types import Address, Button, Grant

_EVERYONE = ("/usage", "/privacy", "/help")
_OPERATORS = ("/usage chart", "/usage csv", "/channel show", "/operator list", "/privacy", "/help")
_BARS = "▁▂▃▄▅▆▇█"
_SHOWN = 600
_RUNNING = ("queued", "running")


def view(shown: Overview | None, place: str, user: str, *, charts: bool = True) -> dict[str, Any]:
    """The view for `views.publish`. `place` is that of the commands; `charts`: use Slack's chart block."""
    if shown is None:
        return {"type": "home", "blocks": [_section(spelled(say("en", "service.no_channel")))]}
    at = Address("slack", "", place, f"@{user}")
    language = shown.language
    head = [
        {"type": "header", "text": {"type": "plain_text", "text": shown.channel.title[:150]}},
        _section(say(language, "slack.home")),
    ]
    if shown.left_hour is not None:
        head.append(_section(say(language, "slack.home_left", left=shown.left_hour)))
    body = _operated(shown, at, charts=charts) if shown.grant >= Grant.OPERATOR else _row(shown, at, _EVERYONE, 0)
    return {"type": "home", "blocks": [*head, *body]}


def _operated(shown: Overview, at: Address, *, charts: bool) -> list[Block]:
    parts = [[_chart(shown) if charts else _bars(shown)], _version(shown, at), _jobs(shown, at), _settings(shown, at)]
    divider = {"type": "divider"}
    return [*(block for part in parts for block in (divider, *part)), divider, *_row(shown, at, _OPERATORS, 3)]


def _chart(shown: Overview) -> Block:
    days = [day[5:] for day, _ in shown.days]
    data = [{"label": day[5:], "value": count} for day, count in shown.days]
    replies = say(shown.language, "slack.home_replies")
    chart = {"type": "bar", "series": [{"name": replies, "data": data}], "axis_config": {"categories": days}}
    title = say(shown.language, "slack.home_chart", days=len(days))
    return {"type": "data_visualization", "title": title, "chart": chart}


def _bars(shown: Overview) -> Block:
    """The chart as text, for workspaces without that block."""
    counts = [count for _, count in shown.days]
    most = max([1, *counts])
    bars = "".join(_BARS[round(count / most * (len(_BARS) - 1))] for count in counts)
    title = say(shown.language, "slack.home_chart", days=len(counts))
    text = say(shown.language, "slack.home_most", sum=sum(counts), most=max([0, *counts]))
    return _section(f"*{title}*\n`{bars}`\n{text}")


def _version(shown: Overview, at: Address) -> list[Block]:
    language = shown.language
    key = "slack.home_version" if shown.age_s is not None else "slack.home_version_always"
    text = say(language, key, version=shown.version, age=duration(language, shown.age_s or 0))
    buttons = [Button(say(language, "slack.version_title"), modals.VERSION)] if shown.choices else []
    if shown.age_s is not None:
        buttons.append(Button(say(language, "slack.home_rollback"), "command", "/adapter rollback"))
    buttons.append(Button(say(language, "slack.home_adapter_list"), "command", "/adapter list"))
    rows = blocks.rows(buttons, at, first=0)
    _ask_first(rows, "/adapter rollback", language, "slack.home_rollback_sure")
    return [_section(text), *rows]


def _jobs(shown: Overview, at: Address) -> list[Block]:
    """The newest jobs; an open one has a button to cancel it."""
    language = shown.language
    lines = []
    for job in shown.jobs:
        state, age = Lazy(f"training.state_{job.state}"), duration(language, job.age_s)
        line = say(language, "training.line", id=job.id, label=job.label, name=job.dataset, state=state, age=age)
        lines.append(f"• {line}")
    text = "\n".join(lines) or say(language, "slack.home_no_jobs")
    buttons = [Button(say(language, "slack.dataset_title"), modals.DATASET)]
    open_ = next((job for job in shown.jobs if job.state in _RUNNING), None)
    if open_:
        status = Button(say(language, "slack.home_job"), "command", f"/finetune status {open_.id}")
        cancel = Button(say(language, "slack.home_cancel", id=open_.id), "command", f"/finetune cancel {open_.id}")
        buttons += [status, cancel]
    rows = blocks.rows(buttons, at, first=1)
    if open_ is not None:
        sure = "slack.home_cancel_sure" if open_.lasting else "slack.home_cancel_for_good"
        _ask_first(rows, f"/finetune cancel {open_.id}", language, sure)
    return [_section(f"*{say(language, 'slack.home_jobs')}*\n{escaped(text)}"), *rows]


def _settings(shown: Overview, at: Address) -> list[Block]:
    language, channel = shown.language, shown.channel
    none = say(language, "slack.home_no_limit")
    limits = [
        f"*{modals.limit_label(language, key)}*\n{getattr(channel.limits, name) or none}"
        for name, key in modals.LIMIT_KEYS.items()
    ]
    text = channel.instructions if len(channel.instructions) <= _SHOWN else f"{channel.instructions[:_SHOWN]}…"
    buttons = [Button(say(language, f"slack.{name}_title"), name) for name in (modals.LIMITS, modals.INSTRUCTIONS)]
    return [
        {"type": "section", "fields": [{"type": "mrkdwn", "text": limit} for limit in limits]},
        _section(f"*{say(language, 'slack.instructions_label')}*"),
        {"type": "section", "text": {"type": "plain_text", "text": text or say(language, "operators.none")}},
        *blocks.rows(buttons, at, first=2),
    ]


def _row(shown: Overview, at: Address, commands: tuple[str, ...], first: int) -> list[Block]:
    names = {command: f"slack.home_{command[1:].replace(' ', '_')}" for command in commands}
    buttons = [Button(say(shown.language, name), "command", command) for command, name in names.items()]
    return blocks.rows(buttons, at, first=first)


def _ask_first(rows: list[Block], command: str, language: str, sure: str) -> None:
    """Add a confirmation dialog to the button of `command`."""
    for element in (one for row in rows for one in row["elements"] if one.get("value") == command):
        texts = {"title": element["text"]["text"], "text": say(language, sure)}
        texts |= {"confirm": say(language, "slack.yes"), "deny": say(language, "slack.close")}
        element["confirm"] = {part: {"type": "plain_text", "text": text} for part, text in texts.items()}


def _section(mrkdwn: str) -> Block:
    return {"type": "section", "text": {"type": "mrkdwn", "text": mrkdwn[:3000]}}
