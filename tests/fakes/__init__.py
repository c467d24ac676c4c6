"""Strict fake servers of the platforms, on loopback."""
