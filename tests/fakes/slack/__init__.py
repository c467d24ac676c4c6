"""A strict fake of Slack on loopback: Web API, signed HTTP events, Socket Mode, OAuth, streams, files."""

from tests.fakes.slack.held import APP_TOKEN, CLIENT, CLIENT_SECRET, SIGNING, Held, Workspace
from tests.fakes.slack.server import FakeSlack

__all__ = ["APP_TOKEN", "CLIENT", "CLIENT_SECRET", "SIGNING", "FakeSlack", "Held", "Workspace"]
