"""The home folder and its SQLite database.

home.py        the home's folders, and the lock that gives one process the home
cipher.py      encryption of messages, keyed hashes of ids
database.py    Database and Tx: one writer thread, read connections
migrations.py  schema steps; their SQL is in m001_schema.sql
clock.py       a clock that never goes back; state.py key-value facts of the home
lifecycle.py   registry: how each owner of a table erases, prunes and sweeps what it keeps

A table is written only by its owner, a module of the package named in the schema. May import: files, types, errors.
"""
