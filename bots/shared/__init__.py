"""What several bots use.

- incoming.py: presses and notices as Incoming; first_messages.py: first messages whose response may be lost
- render.py: splitting text within a limit, Markdown blocks, plain text
- rate_limits.py: the token bucket; backoff.py: pauses between attempts; http.py: the server; errors.py

May import core.platform, core.types, core.errors, core.i18n and core.commands.
"""
