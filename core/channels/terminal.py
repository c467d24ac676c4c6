"""The channel of the home's own terminal, whose user operates everything."""

import time
from collections.abc import Callable
from pathlib import Path

from core import files
from core.channels import bindings, directory, operators, partners
from core.config.schema import OWNER_PARTNER
from core.storage import lifecycle
from core.storage.database import Tx
from core.storage.home import Home
from core.storage.lifecycle import Periods
from core.types import Limits

TERMINAL, LOCAL_USER = "terminal", "local"
HOME_ACCOUNT = "home"  # of the terminal that writes the history file


def ensure_terminal(tx: Tx, account: str) -> None:
    """Create the terminal's partner, channel and binding where they are missing, and make its user an operator."""
    if partners.find(tx, OWNER_PARTNER) is None:
        partners.create(tx, OWNER_PARTNER, title="Owner")
    channel = directory.channel_by_name(tx, TERMINAL)
    if channel is None:
        channel = directory.create_channel(tx, TERMINAL, title="Terminal", limits=Limits(per_minute=0, per_hour=0))
    if not bindings.bound_to(tx, TERMINAL, account, ""):
        bindings.bind(tx, TERMINAL, account, "", channel.id)
    operators.grant(tx, tx.cipher.hash_user(TERMINAL, account, LOCAL_USER), None, "terminal", "")


@lifecycle.sweeps
def _sweep(tx: Tx, kept: Periods) -> Callable[[Home], None]:
    """The history of typed lines is pruned like conversations, and erased by /forget."""
    local = tx.cipher.hash_user(TERMINAL, HOME_ACCOUNT, LOCAL_USER)
    forgotten = int(tx.value("SELECT ifnull(max(at_ms), 0) FROM erasure WHERE user_hash = ?", [local]))
    oldest_ms = max(tx.now_ms - kept.conversation, forgotten + 1000)
    return lambda home: prune_history(home.path / "history", oldest_ms)


def prune_history(path: Path, oldest_ms: int) -> None:
    """Remove entries older than that, to the second; an entry begins with a blank line and its local time."""
    if not path.exists():
        return
    oldest = time.strftime("# %Y-%m-%d %H:%M:%S", time.localtime(oldest_ms // 1000))
    text = path.read_text(encoding="utf-8", errors="replace")
    entries = [entry.strip("\n") for entry in text.split("\n\n")]
    kept = "".join(f"\n{entry}\n" for entry in entries if entry[: len(oldest)] >= oldest)
    if kept != text:
        files.write(path, kept.encode("utf-8"))
