"""How long tests wait. A wait ends by its condition; the deadline only ends a test that hangs."""

DEADLINE_S = 240.0
