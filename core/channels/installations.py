"""Installed apps: the tokens that a platform issues, encrypted, and the one-time OAuth states.

What is stored of an installation is the bot's own JSON.
"""

import json
import secrets
from collections.abc import Mapping

from core.channels import bindings
from core.storage.database import Database, Tx

STATE_MS = 10 * 60_000
INSTALL = "install"  # the account whose bindings are the defaults of new installations


class Installations:
    """All installations of this home."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def keep(self, platform: str, account: str, kept: Mapping[str, str], link: str | None = None) -> None:
        """Store an installation. With a `link` ("" is the default) the account is bound to the channel of that link."""

        def work(tx: Tx) -> None:
            sealed = tx.cipher.seal(json.dumps(dict(kept)))
            tx.run(
                "INSERT INTO installation VALUES (?, ?, ?, ?)"
                " ON CONFLICT DO UPDATE SET sealed = excluded.sealed, changed_ms = excluded.changed_ms",
                [platform, account, sealed, tx.now_ms],
            )
            if link is not None:
                _bind(tx, platform, account, link)

        await self._database.write(work)

    async def all(self, platform: str) -> dict[str, dict[str, str]]:
        """The stored installations of a platform, by account."""

        def work(tx: Tx) -> dict[str, dict[str, str]]:
            rows = tx.all("SELECT account, sealed FROM installation WHERE platform = ?", [platform])
            return {row["account"]: json.loads(tx.cipher.unseal(row["sealed"])) for row in rows}

        return await self._database.read(work)

    async def drop(self, platform: str, account: str) -> None:
        """Delete the tokens of an account. Its bindings and charges stay."""
        sql = "DELETE FROM installation WHERE platform = ? AND account = ?"
        await self._database.write(lambda tx: tx.run(sql, [platform, account]))

    async def begin(self, platform: str, link: str) -> str:
        """Create an OAuth state that is valid once, for ten minutes; `link` is the link that was followed."""
        state = secrets.token_urlsafe(32)

        def work(tx: Tx) -> None:
            tx.run("DELETE FROM install_state WHERE made_ms < ?", [tx.now_ms - STATE_MS])
            tx.insert("install_state", hash=tx.cipher.hash_code(state), platform=platform, link=link, made_ms=tx.now_ms)

        await self._database.write(work)
        return state

    async def use(self, platform: str, state: str) -> str | None:
        """Use up a state: its link, or None where it is unknown, used or expired."""
        return await self._database.write(
            lambda tx: tx.value(
                "DELETE FROM install_state WHERE hash = ? AND platform = ? AND made_ms >= ? RETURNING link",
                [tx.cipher.hash_code(state), platform, tx.now_ms - STATE_MS],
            )
        )


def _bind(tx: Tx, platform: str, account: str, link: str) -> None:
    """Bind the account to the link's channel; without a link to the default, unless it is bound already."""
    linked = bindings.channel_of_link(tx, platform, INSTALL, link) if link else None
    if linked is None and bindings.bound_to(tx, platform, account, ""):
        return
    channel = linked or bindings.channel_for(tx, platform, INSTALL, "")
    if channel is not None:
        bindings.bind(tx, platform, account, "", channel.id)
