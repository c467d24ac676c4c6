"""The audit log: who changed what, or was refused. A code, a key or what people write is never in it."""

import json

from core.storage import lifecycle
from core.storage.database import Tx
from core.storage.lifecycle import Periods, Prune
from core.types import Caller, Json


def record(
    tx: Tx,
    caller: Caller,
    action: str,
    target: str = "",
    before: Json = None,
    after: Json = None,
    *,
    allowed: bool = True,
) -> None:
    tx.insert(
        "audit",
        at_ms=tx.now_ms,
        actor=caller.user,
        platform=caller.address.platform,
        action=action,
        target=target,
        allowed=int(allowed),
        before=_dump(before),
        after=_dump(after),
    )


def refused_since(tx: Tx, actor: str, action: str, since_ms: int) -> int:
    """How often this person was refused this action."""
    sql = "SELECT count(*) FROM audit WHERE action = ? AND actor = ? AND NOT allowed AND at_ms > ?"
    return int(tx.value(sql, [action, actor, since_ms]))


def _dump(value: Json) -> str:
    return "" if value is None else json.dumps(value, ensure_ascii=False, sort_keys=True)


@lifecycle.prunes
def _prunes(kept: Periods) -> list[Prune]:
    return [lifecycle.batch("DELETE FROM audit", "at_ms <= ?", kept.audit)]
