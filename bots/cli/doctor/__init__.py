"""`distributary doctor`: looks for what is wrong and says what to do. It changes nothing.

command.py        the subcommand
checks.py         the table of checks, and the order of what they find
findings.py       Finding, Level, Setup (what is examined), the report as text and JSON
machine.py        Python, torch, the compiled operators, SQLite, the clock
storage.py        the home, disk space, the key, the database and its ledger
configuration.py  the configuration, its bots and their bindings
model.py          the model's files, the model server
benchmark.py      doctor --bench: how fast the model answers
"""
