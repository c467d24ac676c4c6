"""Sentences that people read, one TOML file for each language.

- messages.py: `say`, plural forms, durations, money; `Lazy` sentences and `Refusal`; `add_sentences` for bots of others
- en.toml, zh.toml: the languages. Adding one is adding its file; English stands in for what it lacks

May import the standard library and Babel only.
"""
