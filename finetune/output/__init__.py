"""The result of a job: publish (writes JOBDIR/out), report (manifest and model card).

Entry point: `publish.publish`. Imports everything in finetune but finetune.training.
"""
