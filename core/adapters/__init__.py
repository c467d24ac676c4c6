"""Adapter versions: checked folders, and the rows that say which version answers.

folders.py   inspect, place and verify folders; Candidate is a checked one
registry.py  publish, promote, undo and unpublish versions
commands.py  /adapter

A folder is complete under adapters/<sha256> before its row is written. May import: files, model, storage, channels.
"""
