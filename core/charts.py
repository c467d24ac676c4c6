"""PNG charts of plain numbers: a loss curve and a bar chart of days.

The few words in a chart are English terms that every operator reads; the message around it is translated.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from core import files

WIDTH, HEIGHT, _SCALE = 900, 420, 2
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 24, 44, 44
_INK, _GRID, _BLUE, _ORANGE, _GREEN = "#1f2933", "#dde3ea", "#2563c9", "#e07a1f", "#2a9d63"
_SMOOTHING = 0.93  # decay of the running mean of the training loss
_CURVES_SHARE = 0.82  # of the width, where labels of the gate's losses stand beside the curves
_LABEL_PITCH = 17  # pixels between two labels

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class _Frame:
    """Maps values to pixels of the enlarged canvas; x runs from 0 to 1 over the width."""

    low: float
    high: float

    def y(self, value: float) -> float:
        share = (value - self.low) / ((self.high - self.low) or 1.0)
        return _SCALE * (HEIGHT - _BOTTOM - share * (HEIGHT - _TOP - _BOTTOM))

    @staticmethod
    def x(share: float) -> float:
        return _SCALE * (_LEFT + share * (WIDTH - _LEFT - _RIGHT))


def loss_curve(
    train: Sequence[Point], validation: Sequence[Point], gate: Mapping[str, float], path: Path
) -> Path | None:
    """Draw (step, loss) points of training, with their running mean, and of validation; None for too few points.

    `gate` maps the name of a model to its loss on the test rows, drawn as labelled dots at the right.
    """
    gate = {name: loss for name, loss in gate.items() if math.isfinite(loss)}
    values = [loss for loss in (*(loss for _, loss in (*train, *validation)), *gate.values()) if math.isfinite(loss)]
    if len(train) < 2 or not values:
        return None
    last = max(step for step, _ in (*train, *validation)) or 1
    end = _CURVES_SHARE if gate else 1.0
    train, validation = ([(end * step / last, loss) for step, loss in points] for points in (train, validation))
    frame, canvas, draw = _canvas(0.0 if min(values) < 1 else min(values) * 0.9, max(values) * 1.02)
    every = max(1, int(_round_step(int(last) / 6)))
    _x_marks(draw, [(end * step / last, str(step)) for step in range(0, int(last) + 1, every)])
    _line(draw, frame, train, "#b9cdf0", 2)
    _line(draw, frame, _smoothed(train), _BLUE, 5)
    _line(draw, frame, validation, _ORANGE, 5, dots=True)
    _line(draw, frame, [(end, loss) for loss in gate.values()], _GREEN, 3, dots=True)
    y = -math.inf
    for name, loss in sorted(gate.items(), key=lambda entry: -entry[1]):
        y = max(frame.y(loss), y + _LABEL_PITCH * _SCALE)
        draw.text((frame.x(end) + 20, y), f"{name} {loss:.2f}", fill=_GREEN, font=_font(), anchor="lm")
    x = _Frame.x(0)
    for label, colour in (("train", _BLUE), ("validation", _ORANGE), ("gate: test rows", _GREEN)):
        draw.rounded_rectangle((x, 30, x + 36, 42), radius=4, fill=colour)
        draw.text((x + 48, 36), label, fill=_INK, font=_font(), anchor="lm")
        x += 48 + draw.textlength(label, font=_font()) + 48
    return _save(canvas, path)


def day_bars(days: Sequence[tuple[str, int]], path: Path) -> Path:
    """Draw one bar a day for (YYYY-MM-DD, count), oldest first."""
    frame, canvas, draw = _canvas(0.0, max([1, *(count for _, count in days)]) * 1.05)
    width = 1 / max(len(days), 1)
    for index, (_, count) in enumerate(days):
        if count:
            left, right = frame.x((index + 0.15) * width), frame.x((index + 0.85) * width)
            draw.rounded_rectangle((left, frame.y(count), right, frame.y(0)), radius=4, fill=_BLUE)
    every = max(1, len(days) // 6)
    _x_marks(draw, [((index + 0.5) * width, day[5:]) for index, (day, _) in enumerate(days) if index % every == 0])
    return _save(canvas, path)


def _canvas(low: float, high: float) -> tuple[_Frame, Image.Image, ImageDraw.ImageDraw]:
    """A white canvas with grid lines at round values."""
    step = _round_step((high - low) / 4 or 1.0)
    low, high = math.floor(low / step) * step, math.ceil(high / step) * step
    canvas = Image.new("RGB", (WIDTH * _SCALE, HEIGHT * _SCALE), "white")
    draw, frame = ImageDraw.Draw(canvas), _Frame(low, high)
    value = low
    while value <= high + step / 2:
        y = frame.y(value)
        draw.line((frame.x(0), y, frame.x(1), y), fill=_GRID, width=2)
        draw.text((frame.x(0) - 16, y), f"{value:,.10g}", fill=_INK, font=_font(), anchor="rm")
        value += step
    return frame, canvas, draw


def _x_marks(draw: ImageDraw.ImageDraw, marks: Sequence[tuple[float, str]]) -> None:
    for share, label in marks:
        draw.text((_Frame.x(share), _SCALE * (HEIGHT - _BOTTOM + 14)), label, fill=_INK, font=_font(), anchor="mt")


def _line(
    draw: ImageDraw.ImageDraw, frame: _Frame, points: Sequence[Point], colour: str, width: int, *, dots: bool = False
) -> None:
    pixels = [(frame.x(share), frame.y(value)) for share, value in points if math.isfinite(value)]
    if len(pixels) > 1:
        draw.line(pixels, fill=colour, width=width, joint="curve")
    for x, y in pixels if dots else ():
        draw.ellipse((x - 8, y - 8, x + 8, y + 8), fill=colour)


def _smoothed(points: Sequence[Point]) -> list[Point]:
    """An exponential running mean, corrected for its start at zero (Kingma and Ba 2015, arXiv 1412.6980, 3)."""
    mean, weight, smoothed = 0.0, 0.0, []
    for share, value in points:
        if math.isfinite(value):
            mean, weight = _SMOOTHING * mean + (1 - _SMOOTHING) * value, _SMOOTHING * weight + 1 - _SMOOTHING
        if weight:
            smoothed.append((share, mean / weight))
    return smoothed


def _round_step(rough: float) -> float:
    """1, 2 or 5 times a power of ten, not below `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(26)


def _save(canvas: Image.Image, path: Path) -> Path:
    with files.replacing(path) as aside:
        canvas.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS).save(aside, "PNG")
    return path
