"""The configuration: everything has a default, everything wrong is named together with what is allowed."""

from __future__ import annotations

import re
import sqlite3
import tomllib
from contextlib import closing

import pytest

from bots.terminal.bot import TerminalSettings
from core.config.keys import Key, keys
from core.config.loader import load_config, read_config
from core.config.schema import SECTIONS, Config, channel_keys
from core.config.sections import PRESETS, HyperParameters
from core.config.show import show_config
from core.errors import BadConfig
from core.i18n import messages
from core.jobs.protocol import Fresh
from tests.bots.terminal.test_terminal import Program
from tests.support.documents import configuration_table, example_toml
from tests.support.paths import ROOT
from tests.test_docs import BOT_TABLES

pytestmark = pytest.mark.slow

EXAMPLE = ROOT / "deploy" / "config.example.toml"


def read(text: str, **environment: str) -> Config:
    return read_config(tomllib.loads(text), environment)


def problems(text: str, **environment: str) -> str:
    with pytest.raises(BadConfig) as caught:
        read(text, **environment)
    return str(caught.value.fields["problems"])


def test_no_file_means_all_defaults():
    assert load_config(None, {}) == Config()
    assert read("") == Config()


def test_the_example_is_made_from_the_schema_and_holds_every_default():
    assert EXAMPLE.read_text(encoding="utf-8") == example_toml(BOT_TABLES), "run: python -m tests.test_docs"
    assert read(EXAMPLE.read_text(encoding="utf-8")) == Config()


def test_a_preset_sets_what_is_not_set():
    config = read('[finetune]\npreset = "card"\nepochs = 9\n')
    assert config.finetune.hyper == HyperParameters(**{**PRESETS["card"], "preset": "card", "epochs": 9})
    assert config.finetune.learning_rate == 1e-4
    assert config.finetune.dropout == 0.1
    thorough = config.finetune_presets["thorough"]
    assert (thorough.preset, thorough.rank, thorough.epochs) == ("thorough", 32, 9)
    assert read("").finetune_presets["auto"] == HyperParameters()
    assert "preset" in problems('[finetune]\npreset = "cards"\n')


def test_the_commented_part_of_the_example_is_right_too():
    lines = EXAMPLE.read_text(encoding="utf-8").splitlines()
    tables = [line[2:] for line in lines if re.match(r"# (\[|[a-z_]+ = )", line)]
    secrets = {"TELEGRAM_TOKEN": "1:x", "TELEGRAM_SECRET": "x" * 16, "SLACK_TOKEN": "x", "SLACK_APP_TOKEN": "y"}
    config = read("\n".join(tables), **secrets)
    assert config.partners["acme"].share == 30
    assert config.channels["acme"].partner == "acme"
    assert config.bots["telegram"].settings["token"] == "1:x"


def every_key() -> list[tuple[str, Key]]:
    sections = {**SECTIONS, "fresh": Fresh, **{f"bots.{name}": made for name, made in BOT_TABLES.items()}}
    return [(name, one) for name, made in sections.items() for one in keys(made).values() if one.section is None]


def test_every_default_is_allowed_and_every_number_has_both_its_bounds():
    for section, one in every_key():
        if (section, one.name) != ("bots.telegram", "token"):  # must be given
            assert one.read(one.default) == one.default, (section, one.name)
        if one.schema["type"] in ("integer", "number"):
            assert one.schema.keys() & {"minimum", "exclusiveMinimum"}, (section, one.name)
            assert "maximum" in one.schema, (section, one.name)
        assert not one.needs().render("en").startswith("setting."), (section, one.name)


WRONG = {
    "[modle]\n": ["[modle] is unknown", "did you mean model?"],
    "[model]\ndevise = 'cpu'": ["model.devise is unknown", "did you mean device?"],
    "[model]\ndevice = 'gpu'": ['model.device = "gpu"', "auto, cpu, cuda or cuda:N"],
    "[model]\ndtype = 'float31'": ['model.dtype = "float31"', "float32, bfloat16", "did you mean float32?"],
    "[engine]\nmax_rows = 0": ["engine.max_rows = 0", "from 1 to 1024"],
    "[engine]\nmax_rows = '8'": ['engine.max_rows = "8"', "a whole number"],
    "[engine]\nmax_rows = true": ["engine.max_rows = true", "a whole number"],
    "[engine]\nmax_rows = 1.5": ["a whole number"],
    "[engine]\nkind = 'remote'": ["engine.url is empty"],
    "[engine]\nurl = 'model:8000'": ['engine.url = "model:8000"', "http://"],
    "[engine]\napi_key = 12345678": ["engine.api_key = ***", "must be text"],
    "[generation]\ntemperature = nan": ["generation.temperature", "from 0 to 2"],
    "[generation]\ntop_p = 0.001": ["generation.top_p = 0.001", "from 0.01 to 1"],
    "[generation]\nstop = 'x'": ["a list of texts"],
    "[generation]\nstop = [1]": ["a list of texts"],
    "[finetune]\ndropout = 1.2": ["finetune.dropout = 1.2", "auto or a number from 0 to 0.9"],
    "[finetune]\nschedule = 'linear'": ["cosine, constant"],
    "[finetune]\nmax_tokens = 200000": ["finetune.max_tokens = 200000", "from 16 to 131072"],
    "[privacy]\nconversation_hours = -1": ["above 0"],
    "[privacy]\naudit_days = inf": ["at most 36500"],
    f"[privacy]\naudit_days = 1{'0' * 400}": ["privacy.audit_days", "at most 36500"],
    "[limits]\nper_minute = 99999999999999999999": ["from 0 to 1000000000"],
    "model = 3": ["model = 3", "[model]"],
    "channels = 3": ["[channels.NAME]"],
    "[channels.'A B']": ["[channels.A B]", "small letters"],
    "[channels.all]": ["[channels.all]", "reserved"],
    "[channels.acme]\nbind = ['telegram']": ["channels.acme.bind", "platform:account"],
    "[channels.a]\nbind = ['t:x', 't:y']\n[channels.b]\nbind = ['t:y']": [
        'channels.b.bind: "t:y"',
        "channels.a already",
    ],
    "[channels.acme]\ntitel = 'x'": ["channels.acme.titel is unknown", "did you mean title?"],
    '[channels.acme]\ntitle = "A\\u0000B"': ["channels.acme.title", "NUL"],
    '[channels.acme]\nquestions = ["How?", "\\u0000"]': ["channels.acme.questions", "NUL"],
    f"[channels.acme]\ntitle = '{'x' * 500}'": ["channels.acme.title", "at most 80 characters"],
    f"[channels.acme]\ninstructions = '{'x' * 50_000}'": ["channels.acme.instructions", "at most 8000 characters"],
    f"[channels.acme]\nquestions = {['x' * 300] * 12}": ["channels.acme.questions", "at most 4", "at most 60"],
    f"[channels.acme]\nquestions = {['x'] * 12}": ["channels.acme.questions", "at most 4", "at most 60"],
    "[channels.acme]\nlanguage = 'klingon'": ['channels.acme.language = "klingon"', "en, zh"],
    "[channels.acme]\ntop_p = 0.001": ["channels.acme.top_p = 0.001", "from 0.01 to 1"],
    "[channels.acme]\nprice_in = 3": ["channels.acme.price_in is unknown"],
    "[channels.acme.limits]\nper_minute = -1": ["channels.acme.limits.per_minute = -1", "from 0"],
    "[channels.acme]\npartner = 'acne'\n[partners.acme]": [
        'channels.acme.partner = "acne"',
        "owner, acme",
        "did you mean acme?",
    ],
    "[partners.acme]\nshare = 0.3": ["partners.acme.share = 0.3", "write 30 for 30 %", '"0.3%" for 0.3 %'],
    "[partners.acme]\nshare = 130": ["partners.acme.share = 130", "from 0 to 100"],
    "[partners.acme]\nweight = 0": ["partners.acme.weight", "from 0.01"],
    "[metrics]\nlisten = '9464'": ['metrics.listen = "9464"', "host:port"],
    "[bots.slack]\nenabled = 0": ["bots.slack.enabled = 0", "true or false"],
    "[bots.telegram]\ntoken = 'env:NO_SUCH'": ["bots.telegram.token", "NO_SUCH is not set"],
    "[bots.telegram]\nkind = 3": ["bots.telegram.kind"],
}


def test_what_is_wrong_is_named_with_its_value_and_what_is_allowed():
    for text, parts in WRONG.items():
        said = problems(text)
        assert all(part in said for part in parts), said


@pytest.mark.parametrize(
    ("written", "percent"), [("30", 30), ("33.3333", 33.33), ('"30%"', 30), ('"0.3%"', 0.3), ("0", 0)]
)
def test_a_share_is_a_number_of_percent(written, percent):
    assert read(f"[partners.acme]\nshare = {written}").partners["acme"].share == percent


def test_all_problems_of_a_file_are_reported_together():
    said = problems("[model]\nnam = 'x'\ndtype = 'y'\n[engine]\nmax_rows = 0")
    assert len(said.splitlines()) == 3


def test_a_file_that_is_missing_or_no_toml_is_named(tmp_path):
    with pytest.raises(BadConfig, match="cannot be read: No such file"):
        load_config(tmp_path / "none.toml", {})
    (tmp_path / "bad.toml").write_text("[model\n")
    with pytest.raises(BadConfig, match=r"bad\.toml"):
        load_config(tmp_path / "bad.toml", {})
    (tmp_path / "long.toml").write_text(f"x = {'1' * 5000}")
    with pytest.raises(BadConfig, match="is not TOML"):
        load_config(tmp_path / "long.toml", {})
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(BadConfig, match="is not TOML"):
        load_config(tmp_path / "bytes.toml", {})


def test_a_whole_number_is_a_number_and_auto_is_none():
    config = read("[generation]\ntemperature = 1\n[finetune]\ndropout = 'auto'\nrank = 4")
    assert config.generation.temperature == 1.0
    assert config.finetune.dropout is None
    assert config.finetune.hyper.rank == 4


def test_a_channel_takes_the_limits_that_it_does_not_set():
    config = read("[limits]\nper_minute = 3\nper_hour = 4\n[channels.acme.limits]\nper_hour = 9")
    limits = config.channels["acme"].limits
    assert (limits.per_minute, limits.per_hour) == (3, 9)


def test_a_bot_that_is_not_enabled_is_left_out():
    config = read("[bots.a]\nenabled = false\n[bots.b]\nkind = 'telegram'\nx = 1")
    assert list(config.bots) == ["b"]
    assert (config.bots["b"].kind, config.bots["b"].settings) == ("telegram", {"x": 1})


def test_secrets_are_in_no_repr_and_masked_when_shown():
    config = read(
        "[bots.t]\ntoken = 'env:T'\nsigning_secret = 'abc'\nname = 'x'\nmore = { api_key = 'k1' }", T="s3cr3t"
    )
    assert config.bots["t"].settings["token"] == "s3cr3t"
    shown = show_config(config)
    for secret in ("s3cr3t", "abc", "k1"):
        assert secret not in repr(config)
        assert secret not in shown
    assert 'token = "***"' in shown
    assert 'name = "x"' in shown


def test_what_is_shown_reads_back_as_the_same():
    config = read("[channels.acme]\ntitle = 'A \"b\"'\nbind = ['telegram:x/y']\n[partners.p]\nshare = 25")
    assert read(show_config(config)) == config


def test_the_reference_table_names_every_key_of_a_file():
    table = configuration_table(BOT_TABLES)
    known = [(section, one) for section, one in every_key() if one.file and section != "fresh"]
    assert all(f"`{section}.{one.name}`" in table for section, one in known)
    assert "| `finetune.learning_rate` | `0.001` |" in table


def test_a_language_that_has_a_file_is_a_language_everywhere(monkeypatch):
    for module in ("core.config.keys", "core.i18n.messages"):
        monkeypatch.setattr(f"{module}.languages", lambda: ("en", "de", "zh"))
    messages._names.cache_clear()
    try:
        assert read("[channels.acme]\nlanguage = 'de'").channels["acme"].language == "de"
        assert channel_keys()["language"].parse("Deutsch") == "de"
        assert keys(TerminalSettings)["language"].read("de_AT") == "de"
    finally:
        monkeypatch.undo()
        messages._names.cache_clear()


# --- the file and the database ---


def test_a_start_creates_what_is_missing_tells_what_differs_and_only_apply_changes_it(tmp_path):
    first = "[partners.acme]\nshare = 25\n[channels.acme]\npartner = 'acme'\ntitle = 'One'\n"
    assert Program(tmp_path, extra=first).run("chat").returncode == 0
    other = "bind = ['telegram:acme_bot']\nlimits = { per_minute = 3 }\n"
    edited = first.replace("One", "Two").replace("25", '"50%"') + other
    program = Program(tmp_path, extra=edited)
    assert program.run("channel", "set", "acme", "per_hour=7", "instructions=Be brief.").returncode == 0
    told = program.run("chat").stderr
    assert "channel acme: title is Two in the file and One in the database" in told
    assert "`distributary config apply`" in told
    assert [word in told for word in ("share is 50", "per_minute is 3", "bind telegram:acme_bot", "per_hour")] == [
        True,
        True,
        True,
        False,
    ]
    shown = program.run("config", "apply")
    assert (shown.returncode, titles(program)) == (1, {"acme": "One"})
    assert "channel acme: title = One → Two" in shown.stdout
    applied = program.run("config", "apply", "--yes")
    assert "partner acme: share = 25 → 50" in applied.stdout
    assert titles(program) == {"acme": "Two"}
    assert program.run("config", "apply").stdout == "Nothing to change.\n"
    assert program.run("chat").stderr == ""
    with closing(sqlite3.connect(program.home / "distributary.db")) as database:
        rows = database.execute("SELECT target, before, after FROM audit WHERE action = 'config apply'").fetchall()
        kept = database.execute("SELECT per_minute, per_hour, instructions FROM channel WHERE name = 'acme'").fetchone()
        share = database.execute("SELECT share_bps FROM price ORDER BY id DESC").fetchone()
    assert kept == (3, 7, "Be brief.")
    assert share == (5000,)
    assert ("partner acme", '{"share": 25.0}', '{"share": 50.0}') in rows


def test_a_channel_stays_with_its_partner_and_nothing_else_is_applied(tmp_path):
    program = Program(tmp_path, extra="[channels.acme]\ntitle = 'One'\n")
    assert program.run("config", "apply", "--yes").returncode == 0
    program = Program(tmp_path, extra="[partners.kim]\n[channels.acme]\ntitle = 'Two'\npartner = 'kim'\n")
    refused = program.run("config", "apply", "--yes")
    assert refused.returncode != 0
    assert "channels.acme.partner = 'kim': acme belongs to 'owner'" in refused.stdout + refused.stderr
    assert titles(program) == {"acme": "One"}


def test_config_check_tells_every_mistake_of_the_file_and_of_the_bots_tables(tmp_path):
    wrong = (
        "[finetune]\nmax_tokens = 200000\n[channels.acme]\ntop_p = 0.001\n[bots.kim]\nkind = 'telegram'\ntoken = 'x'\n"
    )
    ran = Program(tmp_path, extra=wrong).run("config", "check")
    assert ran.returncode == 2
    for part in ("finetune.max_tokens = 200000", "channels.acme.top_p = 0.001", "bots.kim.token = ***"):
        assert part in ran.stderr
    good = Program(tmp_path, extra="").run("config", "check")
    assert (good.returncode, good.stderr) == (0, "")


def titles(program: Program) -> dict[str, str]:
    with closing(sqlite3.connect(program.home / "distributary.db")) as database:
        return dict(database.execute("SELECT name, title FROM channel WHERE name <> 'terminal'").fetchall())
