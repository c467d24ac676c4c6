"""Platforms whose messages may be trained on: what their bots declare, and the owner's exceptions.

Consent is needed in any case; the terms of a platform may forbid training in addition.
"""

import json
from collections.abc import Collection

from core.storage import state
from core.storage.database import Tx

_FORBIDDEN, _EXCEPTIONS = "training_forbidden", "training_exceptions"


def declare(tx: Tx, platform: str, *, allowed: bool) -> None:
    """Store what a bot declares for its platform; it holds while the bot is not running, too."""
    known = _get(tx, _FORBIDDEN) - {platform}
    state.put(tx, _FORBIDDEN, json.dumps(sorted(known if allowed else known | {platform})))


def set_exceptions(tx: Tx, platforms: Collection[str]) -> None:
    """Store the platforms on which the owner has other terms (`finetune.allow_training_on`)."""
    state.put(tx, _EXCEPTIONS, json.dumps(sorted(platforms)))


def forbidden(tx: Tx) -> tuple[str, ...]:
    """The platforms whose messages must not be trained on."""
    return tuple(sorted(_get(tx, _FORBIDDEN) - _get(tx, _EXCEPTIONS)))


def _get(tx: Tx, key: str) -> set[str]:
    return set(json.loads(state.get(tx, key) or "[]"))
