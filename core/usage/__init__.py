"""Money and limits.

prices.py    the price of a channel, one row for each change
limits.py    what one person may use; checked before a reply begins
ledger.py    charges, written in the transaction that confirms a delivery; the check of the books' invariants
reports.py   sums by day and channel, as rows and as CSV
commands.py  /usage

May import: storage, charts, commands. Channels import it, not the other way round.
"""
