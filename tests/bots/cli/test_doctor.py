"""The doctor finds what is wrong, says what to do, and changes nothing."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from bots.cli.doctor import checks, machine, storage
from bots.cli.doctor.checks import examine
from bots.cli.doctor.findings import Finding, Level, Setup, report
from bots.cli.doctor.machine import has_wal_reset_bug
from bots.cli.doctor.model import is_private
from core.config.loader import read_config
from core.config.sections import EngineSettings, ModelSettings
from core.engine.cpu.compiled import compiled
from core.engine.diagnostics.benchmark import measure, random_adapters
from core.engine.local import LocalEngine
from core.engine.runtime.loading import load_for_serving
from core.model.base import BaseModel
from core.storage.cipher import Cipher
from core.storage.database import Database
from core.storage.home import Home, Lock
from tests.fakes.openai import FakeOpenAI
from tests.support.paths import ROOT
from tests.support.tiny import load_tiny, save_tiny, tiny_tokenizer

pytestmark = pytest.mark.slow

SCRIPTED = {"engine": {"kind": "scripted"}}


@pytest.fixture
def home(tmp_path: Path) -> Home:
    made = Home(tmp_path / "home")
    made.create()
    with Database(made.database, Cipher.open(made.key_file, create=True)):
        pass
    return made


def findings(home: Home, given: dict[str, object] | None = None) -> dict[str, Finding]:
    """What is not good, by the sentence's name."""
    setup = Setup(home, read_config(given or SCRIPTED, {}))
    return {one.name: one for one in examine(setup) if one.level is not Level.GOOD}


def test_a_healthy_home_has_no_bad_finding_and_stays_as_it_is(home):
    before = {path: path.stat().st_mtime_ns for path in home.path.rglob("*") if path.is_file()}
    found = findings(home)
    assert {name for name, one in found.items() if one.level is Level.BAD} == set()
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_home_that_is_not_there_yet_is_no_trouble(tmp_path):
    assert all(one.level is not Level.BAD for one in findings(Home(tmp_path / "none" / "yet")).values())
    assert not (tmp_path / "none").exists()


def test_an_open_key_and_an_open_home_are_told(home):
    home.key_file.chmod(0o644)
    home.path.chmod(0o755)
    found = findings(home)
    assert "chmod 600" in found["key"].action
    assert "chmod 700" in found["home"].action


def test_a_missing_key_is_told_once_and_no_backup_of_the_database_is_advised(home):
    home.key_file.unlink()
    found = findings(home)
    assert found["key"].level is Level.BAD
    assert not {"database", "books"} & set(found)


def test_a_damaged_database_is_bad(home):
    home.database.write_bytes(b"SQLite format 3\x00" + os.urandom(8192))
    assert findings(home)["database"].level is Level.BAD


def test_a_clock_behind_the_database_is_bad(home):
    os.utime(home.database, (time.time() + 7200,) * 2)
    assert "120 min" in findings(home)["clock"].text


def test_a_disk_without_room_is_bad(home, monkeypatch):
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**8))
    assert findings(home)["disk"].level is Level.BAD


def test_a_bot_that_is_not_installed_is_told_with_those_that_are(home):
    found = findings(home, {**SCRIPTED, "bots": {"telegrim": {}}})
    assert "terminal" in found["bots"].text


def test_a_model_folder_needs_a_configuration_a_tokenizer_and_weights(home, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for file, said in (
        (None, "no config.json"),
        ("config.json", "no tokenizer"),
        ("tokenizer.json", "no weights"),
        ("model.safetensors", "not known to transformers"),
    ):
        if file:
            (folder / file).write_text("{}", encoding="utf-8")
        assert said in findings(home, {"model": {"name": str(folder)}})["model"].text
    assert "model" not in findings(home, {"model": {"name": str(save_tiny(tmp_path / "good"))}})
    found = findings(home, {"model": {"name": str(folder / "config.json")}})["model"]
    assert "is a file" in found.text


def test_a_bot_that_is_bound_to_no_channel_is_told(home):
    bots = {"bots": {"telegram": {"token": "123456:" + "a" * 35}}}
    assert "bound to no channel" in findings(home, {**SCRIPTED, **bots})["bots"].text
    bound = {"channels": {"acme": {"bind": ["telegram:acme_bot"]}}}
    assert "bots" not in findings(home, {**SCRIPTED, **bots, **bound})
    assert "none is enabled" in findings(home)["bots"].text


def test_a_check_that_fails_hides_no_other(home, monkeypatch):
    def breaks(_: Setup) -> list[Finding]:
        raise RuntimeError("no")

    monkeypatch.setattr(checks, "CHECKS", (breaks, *checks.CHECKS))
    found = examine(Setup(home, read_config(SCRIPTED, {})))
    assert "breaks" in found[0].text
    assert len(found) > 5


@pytest.mark.parametrize("version", ["3.7.0", "3.40.1", "3.44.5", "3.45.0", "3.50.6", "3.51.2"])
def test_these_sqlites_have_the_wal_reset_bug(version):
    assert has_wal_reset_bug(tuple(map(int, version.split("."))))


@pytest.mark.parametrize("version", ["3.6.9", "3.44.6", "3.50.7", "3.51.3", "3.52.0"])
def test_these_sqlites_do_not(version):
    assert not has_wal_reset_bug(tuple(map(int, version.split("."))))


def test_the_worst_comes_first_and_columns_stand_below_each_other():
    told = report([Finding(Level.BAD, "a", "b", "c"), Finding(Level.GOOD, "long name", "x")])
    assert told == "✗ a           b   c\n✓ long name   x\n"


def test_every_message_exists_in_every_language():
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "bots" / "cli" / "doctor").glob("*.py"))
    used = set(re.findall(r'finding\(\s*Level\.(\w+), "(\w+)", "(\w+)"', source))
    assert len(used) > 30
    for language in ("en", "zh"):
        texts = tomllib.loads((ROOT / "core" / "i18n" / f"{language}.toml").read_text(encoding="utf-8"))["doctor"]
        for level, name, key in used:
            assert {name, key, *([f"{key}_do"] if level != "GOOD" else [])} <= set(texts), (language, key)


def test_the_command_ends_with_1_if_something_is_bad(home):
    command = [sys.executable, "-m", "bots", "--home", str(home.path), "doctor"]
    (home.path / "config.toml").write_text('[engine]\nkind = "scripted"\n', encoding="utf-8")
    good = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert (good.returncode, good.stderr) == (0, ""), good.stdout
    (home.path / "config.toml").write_text("[engin]\n", encoding="utf-8")
    bad = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert bad.returncode == 1
    assert bad.stdout.startswith("✗ ")
    assert "did you mean engine?" in bad.stdout
    (home.path / "config.toml").write_text('[engine]\napi_key = "env:NOT_THERE"\n', encoding="utf-8")
    unset = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    first, *_ = unset.stdout.splitlines()
    assert first.startswith("✗ configuration   engine.api_key")
    assert "NOT_THERE is not set" in first


async def _doctor_over(fake: FakeOpenAI, home: Home, **engine: str) -> dict[str, Finding]:
    async with fake.open():
        given = {"engine": {"kind": "remote", "url": fake.url, **engine}}
        return await asyncio.to_thread(lambda: {one.name: one for one in examine(Setup(home, read_config(given, {})))})


async def test_the_model_server_is_looked_at(home):
    found = (await _doctor_over(FakeOpenAI(tiny_tokenizer()), home))["model server"]
    assert found.level is Level.GOOD
    assert found.text.endswith("serves acme/base, up to 512 tokens; adapters loaded: 0")
    found = (await _doctor_over(FakeOpenAI(tiny_tokenizer(), loads=False), home))["model server"]
    assert (found.level, "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1" in found.action) == (Level.WARNING, True)
    found = (await _doctor_over(FakeOpenAI(tiny_tokenizer(), healthy=False), home))["model server"]
    assert (found.level, "is busy (503)" in found.text) == (Level.BAD, True)
    found = (await _doctor_over(FakeOpenAI(tiny_tokenizer(), api_key="right"), home, api_key="wrong"))["model server"]
    assert "set engine.api_key" in found.text


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "10.1.2.3", "gpu", "gpu.lan", "8.8.8.8", "model.example.org"])
def test_an_unencrypted_way_out_of_the_private_network_is_told(host):
    assert is_private(host) == (host not in ("8.8.8.8", "model.example.org"))


# --- how fast it answers ---


def bench(home: Home, *more: str) -> subprocess.CompletedProcess[str]:
    """`distributary doctor --bench` on a home whose answers stand in a table: the numbers are of no matter."""
    config = home.path / "config.toml"
    config.write_text(f'[engine]\nkind = "scripted"\nscript = "{home.path}/script.json"\n', encoding="utf-8")
    (home.path / "script.json").write_text('{"delay_s": 0.001}', encoding="utf-8")
    command = [sys.executable, "-m", "bots", "--home", str(home.path), "doctor", "--bench", *more]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def test_bench_measures_one_reply_and_many(home):
    ran = bench(home)
    assert ran.returncode == 0, ran.stderr
    rates = r"\d+ tokens/s for one, \d+ tokens/s for 8 at once"
    assert re.search(rf"✓ model +scripted, answers from a table: {rates}", ran.stdout)
    assert re.search(r"✓ speed +8 replies: first word after \d\.\d\d s", ran.stdout)


def test_bench_as_json_has_findings_and_numbers(home):
    told = json.loads(bench(home, "--json").stdout)
    assert {"level", "name", "text", "action"} == set(told["findings"][0])
    assert told["bench"]["one"]["tokens_per_s"] > 0
    assert told["bench"]["many"]["rows"] == 8
    assert told["bench"]["adapted"] is None


def test_bench_leaves_a_running_program_alone_and_says_what_to_do(home):
    with Lock(home):
        ran = bench(home)
    assert ran.returncode == 0
    assert f"process {os.getpid()} has the home" in ran.stdout
    assert "stop it for a minute" in ran.stdout


@pytest.mark.parametrize(("wanted", "there"), [("cuda", True), ("cuda:0", True), ("cuda:1", False), ("auto", True)])
def test_a_gpu_that_is_not_there_is_told(home, monkeypatch, wanted, there):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_name", "GPU {}".format)
    setup = Setup(home, read_config({"model": {"device": wanted}}, {}))
    (found,) = machine.torch(setup)
    assert (found.level is Level.GOOD) is there
    assert ("GPU 0" if there else wanted) in found.text


@pytest.mark.parametrize(
    ("gpus", "language", "text", "action"),
    [
        (0, "en", "no GPU is found, but model.device is cuda:4", 'set model.device to "auto", or repair the driver'),
        (2, "en", "model.device is cuda:4, but the GPUs found are cuda:0, cuda:1", 'one of these, or to "auto"'),
        (2, "zh", "model.device 为 cuda:4，但找到的 GPU 只有 cuda:0, cuda:1", "把 model.device 设为其中之一"),
    ],
)
def test_a_gpu_beyond_the_last_is_told_with_those_that_are_there(home, monkeypatch, gpus, language, text, action):
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpus > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    setup = Setup(home, read_config({"model": {"device": "cuda:4"}}, {}), language=language)
    (found,) = machine.torch(setup)
    assert (found.level, found.text) == (Level.BAD, text)
    assert action in found.action


@pytest.mark.parametrize(("language", "said"), [("en", "could not be built"), ("zh", "无法为本机处理器编译")])
def test_without_a_compiler_it_says_what_to_install(home, monkeypatch, language, said):
    monkeypatch.setattr("core.engine.cpu.compiled.unavailable_reason", lambda: "no C++ compiler is installed\nmore")
    setup = Setup(home, read_config({"model": {"device": "cpu"}}, {}), language=language)
    _, found = machine.torch(setup)
    assert found.level is Level.WARNING
    assert said in found.text
    assert "no C++ compiler is installed" in found.text
    assert "more" not in found.text
    assert "apt install g++" in found.action


def load_gpt2(folder: Path) -> BaseModel:
    config = GPT2Config(vocab_size=259, n_embd=32, n_layer=2, n_head=4, n_positions=256, bos_token_id=1, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return load_for_serving(ModelSettings(name=str(folder), device="cpu"), folder)


@pytest.mark.parametrize("load", [load_tiny, load_gpt2])
async def test_the_trial_runs_adapters_of_its_own(tmp_path, load):
    """Whatever the layers are called."""
    model = load(tmp_path / "model")
    async with LocalEngine(ModelSettings(), EngineSettings(max_rows=2), tmp_path, model=model) as engine:
        (tmp_path / "adapters").mkdir()
        adapters = random_adapters(tmp_path / "adapters", engine.base, 4, 3)
        trial = await measure(engine, 2, adapters)
    assert trial.adapted is not None
    assert (trial.adapted.rows, trial.adapted.adapters) == (2, 3)
    assert trial.bandwidth > 1e8
    assert 0 < trial.many.roofline_fraction < 1
    assert 0 <= trial.many.padding_waste < 1
    assert (trial.many.padding_waste > 0) is (load is load_gpt2 or compiled() is None)  # in one call nothing is padded
    assert 0 < trial.one.inter_token_p50_s <= trial.one.inter_token_p95_s
