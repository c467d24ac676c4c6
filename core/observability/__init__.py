"""Logs and metrics.

logs.py     one line an event; masks secrets and leaves out people's text
metrics.py  Prometheus families by prometheus-client; Counts, counters with bounded labels

May import: engine.protocol (what an engine measures).
"""
