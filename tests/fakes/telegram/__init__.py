"""A strict fake of Telegram's Bot API over HTTP: what it refuses, the real one refuses."""

from tests.fakes.telegram.people import Chat, Person
from tests.fakes.telegram.server import FakeTelegram, Sent

__all__ = ["Chat", "FakeTelegram", "Person", "Sent"]
