"""The configuration: everything has a default, everything wrong is named together with what is allowed."""

from __future__ import annotations

import sqlite3
import tomllib
from contextlib import closing
from dataclasses import fields
from typing import get_args, get_type_hints

import pytest

from core.config.loader import config_table_markdown, load_config, read_config, show_config
from core.config.schema import KEYS, SECTIONS, Config
from core.config.sections import PRESETS, HyperParameters
from core.errors import BadConfig
from tests.bots.terminal.test_terminal import Program
from tests.support.paths import ROOT

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


def test_the_example_holds_every_key_with_its_default():
    text = EXAMPLE.read_text(encoding="utf-8")
    table = tomllib.loads(text)
    for section, keys in KEYS.items():
        if section.endswith(".NAME"):
            assert all(f"# {key} = " in text for key in keys), section
        else:
            assert list(table[section]) == list(keys), section
    assert read(text) == Config()


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
    tables = [
        line[2:]
        for line in lines
        if line.startswith("# [") or (line[:2] == "# " and line[2:].partition(" ")[2][:1] == "=")
    ]
    config = read("\n".join(tables), TELEGRAM_TOKEN="1:x", TELEGRAM_SECRET="a secret of some length")
    assert config.partners["acme"].share == 0.3
    assert config.channels["acme"].limits.per_minute == 20
    assert config.bots["telegram"].settings["token"] == "1:x"


@pytest.mark.parametrize("section", KEYS)
def test_every_field_has_its_key_and_every_key_its_field(section):
    assert {one.name for one in fields(SECTIONS[section])} == set(KEYS[section])


@pytest.mark.parametrize("section", [name for name in KEYS if not name.endswith(".NAME")])
def test_every_default_is_allowed(section):
    for name, key in KEYS[section].items():
        assert key.refuse(getattr(SECTIONS[section](), name)) == "", name


@pytest.mark.parametrize("section", KEYS)
def test_every_number_has_both_its_bounds(section):
    for name, hint in get_type_hints(SECTIONS[section]).items():
        if {int, float} & {hint, *get_args(hint)}:
            key = KEYS[section][name]
            assert None not in (key.high, key.above if key.low is None else key.low), name


ZOO = {
    "[modle]\n": ["[modle] is unknown", "did you mean model?"],
    "[model]\ndevise = 'cpu'": ["model.devise is unknown", "did you mean device?"],
    "[model]\ndevice = 'gpu'": ["model.device = 'gpu'", "auto|cpu|cuda"],
    "[model]\ndtype = 'float31'": ["model.dtype = 'float31'", "float32, bfloat16", "did you mean float32?"],
    "[engine]\nmax_rows = 0": ["engine.max_rows = 0", "at least 1"],
    "[engine]\nmax_rows = '8'": ["engine.max_rows = '8'", "a whole number"],
    "[engine]\nmax_rows = true": ["engine.max_rows = True", "a whole number"],
    "[engine]\nmax_rows = 1.5": ["a whole number"],
    "[engine]\nkind = 'remot'": ["local, remote, scripted", "did you mean remote?"],
    "[engine]\nkind = 'remote'": ["engine.url is empty"],
    "[engine]\nurl = 'model:8000'": ["engine.url = 'model:8000'", "https?"],
    "[engine]\napi_key = 12345678": ["engine.api_key = ***", "must be text"],
    "[generation]\ntemperature = nan": ["generation.temperature", "at least 0"],
    "[generation]\ntemperature = inf": ["at most 2"],
    "[generation]\ntop_p = 0": ["above 0"],
    "[generation]\nstop = 'x'": ["a list of texts"],
    "[generation]\nstop = [1]": ["a list of texts"],
    "[finetune]\ndropout = 1.2": ["finetune.dropout = 1.2", "at most 0.9"],
    "[finetune]\nschedule = 'linear'": ["cosine, constant"],
    "[privacy]\nconversation_hours = -1": ["above 0"],
    "[privacy]\nconversation_hours = inf": ["at most 876000"],
    "[privacy]\naudit_days = 1e12": ["at most 36500"],
    f"[privacy]\naudit_days = 1{'0' * 400}": ["privacy.audit_days", "too large"],
    "[limits]\nper_minute = 99999999999999999999": ["at most 1000000000"],
    "[log]\nlevel = 'loud'": ["debug, info, warning, error"],
    "model = 3": ["model = 3", "[model]"],
    "channels = 3": ["[channels.NAME]"],
    "[channels.'A B']": ["[channels.A B]", "small letters"],
    "[channels.acme]\nbind = ['telegram']": ["channels.acme.bind", "platform:account"],
    "[channels.a]\nbind = ['t:x', 't:y']\n[channels.b]\nbind = ['t:y']": [
        "channels.b.bind: 't:y'",
        "channels.a already",
    ],
    "[channels.acme]\ntitel = 'x'": ["channels.acme.titel is unknown", "did you mean title?"],
    '[channels.acme]\ntitle = "A\\u0000B"': ["channels.acme.title = 'A\\x00B'", "NUL"],
    '[channels.acme]\nquestions = ["How?", "\\u0000"]': ["channels.acme.questions", "NUL"],
    '[partners.acme]\ntitle = "\\u0000"': ["partners.acme.title", "NUL"],
    "[bots.slack]\nenabled = 'no'": ["bots.slack.enabled = 'no'", "true or false"],
    "[bots.slack]\nenabled = 0": ["bots.slack.enabled = 0", "true or false"],
    "[channels.acme.limits]\nper_minute = -1": ["channels.acme.limits.per_minute = -1", "at least 0"],
    "[partners.acme]\nshare = 30": ["partners.acme.share", "at most 1"],
    "[partners.acme]\nweight = 0": ["partners.acme.weight", "at least 0.01"],
    "[metrics]\nlisten = '9464'": ["metrics.listen = '9464'", "must look like"],
    "[bots.telegram]\ntoken = 'env:NO_SUCH'": ["bots.telegram.token", "NO_SUCH is not set"],
    "[bots.telegram]\nkind = 3": ["bots.telegram.kind"],
}


@pytest.mark.parametrize("text", ZOO)
def test_what_is_wrong_is_named_with_what_is_allowed(text):
    said = problems(text)
    assert all(part in said for part in ZOO[text]), said


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
    config = read("[channels.acme]\ntitle = 'A \"b\"'\nbind = ['telegram:x/y']\n[partners.p]\nshare = 0.25")
    assert read(show_config(config)) == config


def test_the_table_for_the_readme_names_every_key():
    table = config_table_markdown()
    assert all(f"`{section}.{key}`" in table for section, keys in KEYS.items() for key in keys)
    assert "| `finetune.learning_rate` | `0.001` |" in table


# --- what it makes of the directory ---


def test_a_start_makes_what_is_missing_and_only_apply_changes_what_exists(tmp_path):
    program = Program(
        tmp_path, extra="[partners.acme]\nshare = 0.25\n[channels.acme]\npartner = 'acme'\ntitle = 'One'\n"
    )
    assert program.run("chat").returncode == 0
    program = Program(
        tmp_path, extra="[channels.acme]\npartner = 'acme'\ntitle = 'Two'\n[partners.acme]\nshare = 0.5\n"
    )
    program.run("chat")
    assert titles(program) == {"acme": "One"}
    applied = program.run("config", "apply")
    assert "channel acme: title = 'One' -> 'Two'" in applied.stdout
    assert "partner acme: share_bps = 2500 -> 5000" in applied.stdout
    assert titles(program) == {"acme": "Two"}
    assert program.run("config", "apply").stdout == "Nothing to change.\n"
    with closing(sqlite3.connect(program.home / "distributary.db")) as database:
        rows = database.execute("SELECT target, before, after FROM audit WHERE action = 'config apply'").fetchall()
    assert ("channel acme", '{"title": "One"}', '{"title": "Two"}') in rows


def test_what_is_drawn_from_stays_what_the_file_says_when_it_is_applied(tmp_path):
    program = Program(tmp_path, extra="[channels.acme]\ntitle = 'One'\n[generation]\ntemperature = 0.7\n")
    program.run("chat")
    assert program.run("config", "apply").stdout == "Nothing to change.\n"


def test_a_channel_stays_with_its_partner_and_nothing_else_is_applied(tmp_path):
    program = Program(tmp_path, extra="[channels.acme]\ntitle = 'One'\n")
    assert program.run("config", "apply").returncode == 0
    program = Program(tmp_path, extra="[partners.kim]\nshare = 0.3\n[channels.acme]\ntitle = 'Two'\npartner = 'kim'\n")
    refused = program.run("config", "apply")
    assert refused.returncode != 0
    assert "channels.acme.partner = 'kim': acme belongs to 'owner'" in refused.stdout + refused.stderr
    assert titles(program) == {"acme": "One"}


def titles(program: Program) -> dict[str, str]:
    with closing(sqlite3.connect(program.home / "distributary.db")) as database:
        return dict(database.execute("SELECT name, title FROM channel WHERE name <> 'terminal'").fetchall())
