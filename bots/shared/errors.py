"""Errors that several bots raise."""

from __future__ import annotations

from core.errors import AppError


class OutcomeUnknown(AppError):
    """The response to a request that creates a message was lost; repeating it could create a second one."""
