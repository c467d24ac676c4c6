"""Consent, erasure and retention.

commands.py    /privacy, /consent, /forget
consent.py     who lets their messages become training data, per channel
erasure.py     erase: a person's data, in one transaction; reapply: after a restore
tombstones.py  who was erased when, in the database and in a file beside it
retention.py   keep_clean: prune rows and sweep files once a minute

The rows of other packages are erased and pruned by steps that their owners register with core.storage.lifecycle.
May import: config, storage, channels.
"""
