"""Commands: what there is, how a line is parsed, which function handles it.

table.py      every command with its forms, parameters, lane and grant
parser.py     a line -> Call, or BadCommand with the nearest right form
registry.py   @command: handlers, each registered in the package that does its work
help.py       /help, and the right form in an error

core.chat.dispatch runs a Call. Imports i18n and storage. A new command is a row, a handler and its sentences.
"""
