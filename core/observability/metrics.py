"""Numbers in Prometheus' text format, and what there is to say of an engine. Knows no store, no server and no person.

The format: https://prometheus.io/docs/instrumenting/exposition_formats/#text-based-format. Numbers are read where they
lie at the moment of a scrape, so there is no registry; `Counts` holds those that lie nowhere else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate

from core.engine.protocol import EngineInfo, EngineStats, Histogram

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
MAX_LABELS = 500  # different label sets of one family; what comes later is counted as "other"
OTHER = "other"

Labels = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Family:
    """One metric: its samples are (what follows the name, labels, value)."""

    name: str
    kind: str
    help: str
    samples: tuple[tuple[str, Labels, float], ...]


def gauge(name: str, help: str, *samples: tuple[Labels, float]) -> Family:
    """Something that goes up and down."""
    return Family(f"distributary_{name}", "gauge", help, tuple(("", labels, value) for labels, value in samples))


def counter(name: str, help: str, *samples: tuple[Labels, float]) -> Family:
    """Something that only goes up; its name ends in _total."""
    return Family(f"distributary_{name}", "counter", help, tuple(("", labels, value) for labels, value in samples))


def histogram(name: str, help: str, spread: Histogram) -> Family:
    """How often something took how long."""
    edges = [*(f"{bound:g}" for bound in spread.bounds), "+Inf"]
    samples: list[tuple[str, Labels, float]] = [
        ("_bucket", {"le": edge}, count) for edge, count in zip(edges, accumulate(spread.counts), strict=True)
    ]
    samples += [("_sum", {}, spread.total_s), ("_count", {}, spread.count)]
    return Family(f"distributary_{name}", "histogram", help, tuple(samples))


def render(families: Iterable[Family]) -> str:
    lines = []
    for family in families:
        lines += [f"# HELP {family.name} {_escaped(family.help)}", f"# TYPE {family.name} {family.kind}"]
        lines += [f"{family.name}{suffix}{_labels(labels)} {value:.17g}" for suffix, labels, value in family.samples]
    return "\n".join(lines) + "\n"


def _labels(labels: Labels) -> str:
    pairs = ",".join(f'{name}="{_escaped(value, quote=True)}"' for name, value in labels.items())
    return f"{{{pairs}}}" if pairs else ""


def _escaped(text: str, *, quote: bool = False) -> str:
    text = text.replace("\\", "\\\\").replace("\n", "\\n")
    return text.replace('"', '\\"') if quote else text


class Counts:
    """Events by labels, counted since the start of the process on one thread. The number of label sets is bounded."""

    def __init__(self, *names: str) -> None:
        self.names = names
        self._counts: Counter[tuple[str, ...]] = Counter()

    def add(self, *values: str) -> None:
        if len(self._counts) >= MAX_LABELS and values not in self._counts:
            values = (OTHER, *values[1:])
        self._counts[values] += 1

    def samples(self) -> list[tuple[Labels, float]]:
        return [(dict(zip(self.names, values, strict=True)), count) for values, count in self._counts.items()]


def engine_families(info: EngineInfo, stats: EngineStats) -> list[Family]:
    """Of any engine. What it cannot know of its machine is left out."""
    tokens = {"generated": stats.generated_tokens, "prompt": stats.prompt_tokens, "reused": stats.reused_tokens}
    families = [
        gauge("engine_info", "What is loaded.", ({"model": info.model, "device": info.device}, 1)),
        gauge("engine_rows", "Replies that are being generated.", ({}, stats.running)),
        gauge("engine_waiting", "Replies that wait for a row.", ({}, stats.waiting)),
        gauge("engine_adapters_resident", "Adapters that rows can run with at once.", ({}, stats.resident_adapters)),
        gauge("engine_adapters_in_memory", "Adapters kept ready in host memory.", ({}, stats.adapters_in_memory)),
        counter(
            "engine_tokens_total",
            "Tokens generated, of prompts taken in, and of prompts reused from an earlier turn.",
            *(({"kind": kind}, count) for kind, count in tokens.items()),
        ),
        counter(
            "engine_requests_total",
            "Requests that ended, by their reason or error.",
            *(({"outcome": outcome}, count) for outcome, count in sorted(stats.ended.items())),
        ),
        histogram("engine_queue_seconds", "From submit to a row.", stats.waited_s),
        histogram("engine_first_token_seconds", "From submit to the first token.", stats.first_token_s),
        histogram("engine_inter_token_seconds", "Between two tokens of one reply.", stats.inter_token_s),
    ]
    if stats.positions_read:
        families += [
            counter("engine_kv_positions_read_total", "Keys and values read by passes.", ({}, stats.positions_read)),
            counter(
                "engine_kv_positions_held_total",
                "Of the keys and values read, those that hold a token of their row.",
                ({}, stats.positions_held),
            ),
            gauge(
                "engine_padding_waste_ratio",
                "Share of the keys and values read that no row needed, since the start.",
                ({}, stats.padding_waste),
            ),
        ]
    if stats.bandwidth:
        families += [
            counter("engine_decode_seconds_total", "In passes that take one token of each row.", ({}, stats.decode_s)),
            counter(
                "engine_decode_bytes_total",
                "That such passes cannot do without: weights, adapters, keys and values.",
                ({}, stats.decode_bytes),
            ),
            gauge("engine_bandwidth_bytes_per_second", "Memory bandwidth, measured at load.", ({}, stats.bandwidth)),
            gauge(
                "engine_bandwidth_floor_ratio",
                "Time that decoding takes at least, by its bytes and the bandwidth, over the time that it took.",
                ({}, stats.roofline_fraction),
            ),
        ]
    return families
