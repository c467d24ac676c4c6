"""Measures a candidate against the champion and the base model, and gives the verdict.

evaluator (runs the measurements), gate (the statistics behind the verdict), row_losses (loss per row), retention_set
(the base model's own answers, prompts in prompts.toml), sanity (endings, loops, leaked instructions).
Entry point: `evaluator.Evaluator`. Imports finetune.data, finetune.modeling and top-level files.
"""
