"""Prometheus metrics: families built at each scrape, counters of events, and what there is to report of an engine.

Numbers are read where they are kept, at the moment of a scrape; `Counts` holds those that are kept nowhere else.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import accumulate

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from core.engine.protocol import EngineInfo, EngineStats, Histogram

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
MAX_LABELS = 500  # label sets of one family; later ones are counted as "other"
OTHER = "other"

Labels = Mapping[str, str]


def gauge(name: str, help: str, *samples: tuple[Labels, float]) -> Metric:
    """A value that goes up and down."""
    family = GaugeMetricFamily(f"distributary_{name}", help)
    for labels, value in samples:
        family.add_sample(family.name, dict(labels), value)
    return family


def counter(name: str, help: str, *samples: tuple[Labels, float]) -> Metric:
    """A value that only goes up; its name ends in _total."""
    family = CounterMetricFamily(f"distributary_{name}", help)
    for labels, value in samples:
        family.add_sample(f"{family.name}_total", dict(labels), value)
    return family


def histogram(name: str, help: str, seen: Histogram) -> Metric:
    """Counts of durations, each bucket with those below it."""
    edges = [*(f"{bound:g}" for bound in seen.bounds), "+Inf"]
    family = HistogramMetricFamily(f"distributary_{name}", help)
    family.add_metric([], list(zip(edges, accumulate(seen.counts), strict=True)), seen.total_s)
    return family


def render(families: Iterable[Metric]) -> bytes:
    """Prometheus' text format."""
    return generate_latest(_Families(families))


class _Families(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


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


def engine_families(info: EngineInfo, stats: EngineStats) -> list[Metric]:
    """Metrics of any engine; what an engine does not measure is left out."""
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
