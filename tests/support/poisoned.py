"""A service that one question kills: `python -m tests.support.poisoned HOME question|reply`.

It exits with 0 once all is settled. `question`: the process dies before the engine has started it; `reply`: while its
reply is shown.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from core.engine.protocol import Request
from core.types import Handle
from tests.support.running_service import running_service


async def main(folder: Path, where: str) -> None:
    def answer(request: Request) -> str:
        text = request.messages[-1].text
        if where == "question" and text == "poison":
            os._exit(9)
        return f"you said {text} " + "word " * 20

    async def show(handle: Handle, text: str) -> None:
        if where == "reply" and "poison" in text:
            os._exit(9)

    async with running_service(folder, answer, delay_s=0.005) as it:
        it.bot.show = show  # type: ignore[method-assign]
        await it.settled()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2]))
