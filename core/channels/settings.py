"""The settings of a channel as /channel show and /channel set know them; core.config.schema defines each.

A setting is a column of the table `channel`, except a price, which is a new row of `price`, and a binding.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from core.channels import adapter_names, bindings, directory
from core.config import keys
from core.config.keys import Key, refusal, refused
from core.config.schema import PRICES, channel_keys
from core.errors import BadInput
from core.i18n.messages import Refusal, say
from core.storage.database import Tx
from core.types import Channel, Json, Limits
from core.usage import prices

Settings = Mapping[str, Any]


def owners() -> frozenset[str]:
    """Those that an operator of one channel may not change."""
    return frozenset(name for name, one in channel_keys().items() if one.chat == "owner")


def current(tx: Tx, channel: Channel) -> dict[str, Any]:
    """Every setting but the bindings, by name; `share` in percent."""
    price = prices.price_now(tx, channel.id)
    sold = {
        "price_in": price.in_nano,
        "price_out": price.out_nano,
        "price_train": price.train_nano,
        "share": price.share_bps / 100,
    }
    found: dict[str, Any] = {}
    for name in channel_keys():
        holder = next((one for one in (channel, channel.limits, channel.sampling) if hasattr(one, name)), None)
        if name in sold or name in channel.settings:
            found[name] = sold.get(name, channel.settings.get(name))
        elif holder is not None:
            found[name] = getattr(holder, name)
    return found


def parse(tx: Tx, channel: Channel, texts: Mapping[str, str]) -> dict[str, Any]:
    """The typed values of what a person typed. Raises BadInput naming the setting, its value and what it must be."""
    found = {name: _parse(channel_keys()[name], text) for name, text in texts.items()}
    if "adapter" in found and not adapter_names.belongs_to(tx, found["adapter"], channel.partner):
        raise _refused(channel_keys()["adapter"], texts["adapter"], Refusal("setting.adapter"))
    return found


def parse_title(text: str) -> str:
    """Raises BadInput."""
    return str(_parse(channel_keys()["title"], text))


def _parse(key: Key, text: str) -> Any:
    try:
        value = key.parse(text)
        if value is None:
            raise refusal(key.needs(), text)
        if key.name == "title" and not value:
            raise Refusal("setting.empty")
    except Refusal as error:
        raise _refused(key, text, error) from None
    return value


def _refused(key: Key, text: str, error: Refusal) -> BadInput:
    return BadInput("setting.sentence", clause=refused(key, text, error))


def store(tx: Tx, channel: Channel, changed: Settings) -> None:
    """Write checked values; a price is a new row, and the earlier ones stay."""
    if columns := stored({name: value for name, value in changed.items() if name not in PRICES}):
        directory.set_channel(tx, channel.id, **columns)
    if changed.keys() & set(PRICES):
        now = {**current(tx, channel), **changed}
        share_bps = round(now["share"] * 100)
        prices.set_price(tx, channel.id, now["price_in"], now["price_out"], share_bps, now["price_train"])


def moved(tx: Tx, channel: Channel, places: Iterable[str]) -> tuple[dict[str, Json], dict[str, Json]]:
    """Bind each place to the channel. For each that another channel, or none, held: whose it was, and whose it is."""
    before: dict[str, Json] = {}
    for place in places:
        held = bindings.bound_to(tx, *bindings.split(place))
        if held != channel.name:
            before[f"bind {place}"] = held
            bindings.bind(tx, *bindings.split(place), channel.id)
    return before, dict.fromkeys(before, channel.name)


def stored(settings: Settings) -> dict[str, Any]:
    """The values as columns and the audit log hold them: lists as lines."""
    return {name: "\n".join(value) if isinstance(value, tuple) else value for name, value in settings.items()}


def brief(value: object) -> str | int:
    """A value in one line of a message."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return value if isinstance(value, int) else f"{value:g}"
    return keys.brief(" | ".join(value) if isinstance(value, tuple) else str(value)) or "–"


def limits_line(language: str, limits: Limits) -> str:
    """The limits in one line; a limit without a sentence of its own is told as name=value."""
    told = []
    for name, value in asdict(limits).items():
        sentence = say(language, key := f"limits.{name}", n=value)
        told.append(f"{name}={value}" if sentence == key else sentence)
    return ", ".join(told)
