"""What several bots use.

- render.py: splitting text within a limit, Markdown blocks, plain text
- rate_limits.py: the token bucket
- errors.py: OutcomeUnknown
- backoff.py: pauses between attempts

May import core.platform, core.types, core.errors, core.i18n and core.commands.
"""
