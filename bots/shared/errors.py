"""Errors that several bots raise."""

from core.errors import AppError, BadConfig


class OutcomeUnknown(AppError):
    """The response to a request that creates a message was lost; repeating it could create a second one."""


def bad_config(bot: str, detail: str) -> BadConfig:
    """A table [bots.NAME] that the platform or the machine refuses."""
    return BadConfig(detail=detail, file=f"[bots.{bot}]", problems=detail)
