"""The HTTP server of a bot."""

from aiohttp import web

from bots.shared.errors import bad_config


async def serve(app: web.Application, host: str, port: int, bot: str) -> web.AppRunner:
    """Raises BadConfig when the address cannot be bound."""
    runner = web.AppRunner(app, access_log=None, handle_signals=False)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
    except OSError as error:
        await runner.cleanup()
        raise bad_config(bot, f"bots.{bot}.listen = '{host}:{port}' cannot be used: {error.strerror}") from error
    return runner
