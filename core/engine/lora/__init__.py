"""LoRA adapters, any mix of them in one batch.

adapter_files.py   AdapterStore, load_adapter: a PEFT folder, checked, to weights in host memory
patterns.py        regular expressions of foreign adapter configurations, in linear time (RE2)
slots.py           AdapterSlots: which adapter is in which slot, and who uses it
layers.py          StackedLora: A and B of all slots, and the product of a mixed batch
segments.py        SegmentPlanner: the tokens of a pass grouped by adapter

Imports core.engine.cpu, core.i18n, core.types and core.errors.
"""
