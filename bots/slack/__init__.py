"""The Slack bot: the one folder that imports slack_bolt and slack_sdk."""
