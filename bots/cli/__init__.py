"""The `distributary` command, on click.

main.py           the group of commands, errors as sentences, exit codes
options.py        --home, --config and --verbose; the home and the configuration that they name
run.py            chat, serve
owner_commands.py channel, operator, finetune, adapter, inbox: chat commands, through the control socket
configuration.py  config show, config apply
usage.py          usage
doctor/           doctor

Entry point: main.main. Imports bots.app, bots.control and core.
"""
