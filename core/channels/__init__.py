"""Who is served where: partners, channels and the people in them.

directory.py             channels: look up, create, change, archive
bindings.py              the channel of a place: a chat, a workspace, a link
partners.py              who owns channels and gets a share of their charges
adapter_names.py         adapter names and their champions
people.py                language and last visit of a person
operators.py             operators, grants, invitations
audit.py                 the audit log
installations.py         tokens of installed apps, encrypted
terminal.py              the channel of the home's own terminal
training_permission.py   whether a platform lets its messages be trained on
settings.py              the settings of a channel: show, parse, store
commands.py, personal_commands.py   /channel, /operator; /whoami, /language, /claim

May import: config, storage, commands, usage.prices.
"""
