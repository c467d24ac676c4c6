"""A strict fake of Slack on loopback: Web API, signed HTTP events, Socket Mode, OAuth, streams, files."""

from tests.fakes.slack.server import FakeSlack, Held, Workspace

__all__ = ["FakeSlack", "Held", "Workspace"]
