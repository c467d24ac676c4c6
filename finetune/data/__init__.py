"""From a file of unknown origin to rows of tokens.

reader (rows and their report), lines (bounded lines, gzip), formats (JSON Lines, tables; one file each), sheets (CSV
dialects), records (record -> conversation), personal (detection), redact (a data
set without personal data), encode (conversation -> tokens and loss mask), plain_text, split (train, validation, test),
batches (steps and micro-batches), packed_layout (rows behind a shared prefix). Entry points: `reader.read`,
`encode.encode`, `split.split`, `batches.plan_epoch`. Imports no other package of finetune.
"""
