"""/adapter import: archives are unpacked safely, refused with a reason, and become a job that only examines."""

from __future__ import annotations

import errno
import gzip
import io
import json
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from core.errors import BadInput
from core.i18n.messages import say
from core.jobs import datasets, importing
from core.jobs.importing import CONFIG, WEIGHTS
from core.jobs.protocol import Spec
from core.types import Attachment
from tests.support.fake_trainer import COMMAND
from tests.support.running_service import OWNER, RunningService, running_service

pytestmark = pytest.mark.slow

HEADER = json.dumps({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
GOOD = {
    CONFIG: json.dumps({"peft_type": "LORA", "r": 4}).encode(),
    WEIGHTS: len(HEADER).to_bytes(8, "little") + HEADER + b"\0" * 16,
}


def zipped(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return out.getvalue()


def tarred(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return out.getvalue()


def unpack(parent: Path, content: bytes) -> Path:
    folder = parent / "unpacked"
    importing._unpack_archive(io.BytesIO(content), "mine.zip", folder)
    return folder


@pytest.mark.parametrize(("pack", "inside"), [(zipped, ""), (tarred, "outputs/run-3/")])
def test_the_two_files_are_taken_and_nothing_else(
    tmp_path: Path, pack: Callable[[dict[str, bytes]], bytes], inside: str
) -> None:
    more = {f"{inside}README.md": b"x", f"{inside}tokenizer.json": b"{}", "../../evil": b"x", f"/{CONFIG}.bak": b"x"}
    folder = unpack(tmp_path, pack({**{inside + name: content for name, content in GOOD.items()}, **more}))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == GOOD
    assert [path.name for path in tmp_path.iterdir()] == ["unpacked"]


@pytest.mark.parametrize(("pack", "first"), [(zipped, True), (tarred, False)])
def test_of_a_trainers_whole_output_the_outermost_adapter_is_taken(
    tmp_path: Path, pack: Callable[[dict[str, bytes]], bytes], first: bool
) -> None:
    early = {CONFIG: b'{"peft_type": "LORA", "r": 8}', WEIGHTS: GOOD[WEIGHTS][:-1] + b"x"}
    steps = {f"run/checkpoint-{n}/{name}": content for n in (10, 20) for name, content in early.items()}
    last = {f"run/{name}": content for name, content in GOOD.items()}
    folder = unpack(tmp_path, pack({**steps, **last} if first else {**last, **steps}))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == GOOD


def test_what_is_passed_over_counts_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importing, "MOST_UNPACKED", 2**20)
    with pytest.raises(BadInput) as refused:
        unpack(tmp_path, tarred({**GOOD, "optimizer.pt": b"\0" * 2**21}))
    assert refused.value.key == "import.many"


def test_links_in_a_tar_are_not_followed(tmp_path: Path) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        member = tarfile.TarInfo(CONFIG)
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(member)
    with pytest.raises(BadInput) as refused:
        unpack(tmp_path, out.getvalue())
    assert refused.value.key == "import.missing"


def test_a_header_that_would_be_read_whole_is_refused_before(tmp_path: Path) -> None:
    for kind, size, sparse in (
        (tarfile.XHDTYPE, 2**15, ""),
        (tarfile.XGLTYPE, 2**15, ""),
        (tarfile.GNUTYPE_LONGNAME, 2**15, ""),
        (tarfile.GNUTYPE_LONGLINK, 2**15, ""),
        (tarfile.GNUTYPE_SPARSE, 0, ""),
        (tarfile.XHDTYPE, 0, "22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n"),
    ):
        header = tarfile.TarInfo("long")
        header.type, header.size = kind, size or len(sparse)
        with gzip.open(io.BytesIO(tarred(GOOD))) as members:
            content = header.tobuf() + sparse.encode().ljust(max(size, 512 if sparse else 0), b"\0") + members.read()
        with pytest.raises(BadInput) as refused:
            unpack(tmp_path, gzip.compress(content))
        assert refused.value.key == "import.unreadable"
        assert list(tmp_path.iterdir()) == []


def test_a_long_name_is_no_long_header(tmp_path: Path) -> None:
    folder = unpack(tmp_path, tarred({f"{'folder/' * 100}{name}": content for name, content in GOOD.items()}))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == GOOD


def test_what_is_no_adapter_is_refused_with_its_reason_and_leaves_nothing(tmp_path: Path) -> None:
    for content, key in (
        (b"no archive at all", "import.unreadable"),
        (b"", "import.unreadable"),
        (zipped(GOOD)[:200], "import.unreadable"),
        (zipped({CONFIG: GOOD[CONFIG]}), "import.missing"),
        (zipped({CONFIG: GOOD[CONFIG], "adapter_model.bin": b"x"}), "import.missing"),
        (zipped({f"{run}/{name}": GOOD[name] for run in "ab" for name in GOOD}), "import.two"),
        (zipped({CONFIG: GOOD[CONFIG], f"checkpoint-3/{WEIGHTS}": GOOD[WEIGHTS]}), "import.missing"),
        (zipped({f"a/{CONFIG}": GOOD[CONFIG], f"b/{WEIGHTS}": GOOD[WEIGHTS]}), "import.two"),
        (zipped({**GOOD, CONFIG: b"{"}), "import.no_json"),
        (zipped({**GOOD, CONFIG: b"[" * 100_000}), "import.no_json"),
        (zipped({**GOOD, CONFIG: b'{"peft_type": "IA3"}'}), "import.no_lora"),
        (zipped({**GOOD, WEIGHTS: GOOD[WEIGHTS][:-1]}), "import.no_tensors"),
        (zipped({**GOOD, CONFIG: b" " * (2**20 + 1)}), "import.too_large"),
        (tarred({f"{n}": b"" for n in range(importing.MOST_MEMBERS + 1)}), "import.many"),
    ):
        with pytest.raises(BadInput) as refused:
            unpack(tmp_path, content)
        assert refused.value.key == key
        assert list(tmp_path.iterdir()) == []


def test_a_bomb_is_cut_at_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(importing.MOST_BYTES, WEIGHTS, 2**20)
    bomb = zipped({CONFIG: GOOD[CONFIG], WEIGHTS: b"\0" * (50 * 2**20)})
    assert len(bomb) < 2**18
    with pytest.raises(BadInput) as refused:
        unpack(tmp_path, bomb)
    assert refused.value.key == "import.too_large"
    assert list(tmp_path.iterdir()) == []


# --- the whole way ---


def fetching(content: bytes):
    async def fetch(*_: object):
        yield content

    return fetch


async def bring(w: RunningService, content: bytes, text: str = "/adapter import", user: str = OWNER) -> str:
    w.bot.fetch = fetching(content)  # type: ignore[attr-defined]
    return await w.ask(text, user=user, attachments=(Attachment("F", "mine.zip", 1, "application/zip"),))


async def with_dataset(w: RunningService) -> None:
    data = json.dumps({"word": "plain", "q": "a", "a": "b"}).encode() + b"\n"
    sha256 = "e" * 64
    (w.home.datasets / sha256).write_bytes(data)
    await w.database.write(
        lambda tx: datasets.keep_dataset(
            tx, sha256, "faq.jsonl", source="file", size_bytes=1, brought_by=tx.cipher.hash_user("fake", "bot", OWNER)
        )
    )


async def test_a_sent_archive_becomes_a_job_that_examines_it(tmp_path: Path) -> None:
    async with running_service(tmp_path, trainer=COMMAND, running=False) as w:
        await with_dataset(w)
    seen: list[Spec] = []
    real = Spec.write

    def write(self: Spec, folder: Path) -> None:
        seen.append(self)
        assert {path.name for path in (folder / self.candidate).iterdir()} == set(GOOD)
        real(self, folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Spec, "write", write)
        async with running_service(tmp_path, trainer=COMMAND) as w:
            told = await bring(w, zipped(GOOD), "/adapter import faq.jsonl")
            assert "acme@1" in told
            assert any("mine.zip becomes acme@1" in said for said in w.bot.said())
            assert await w.count("adapter") == 1
            assert await w.count("audit", "action = 'adapter import'") == 1
    assert [spec.candidate for spec in seen] == ["candidate"]
    assert not list((tmp_path / "jobs").iterdir())


async def test_without_a_data_set_it_says_what_is_missing(tmp_path: Path) -> None:
    async with running_service(tmp_path, trainer=COMMAND) as w:
        assert "this channel has none yet" in await bring(w, zipped(GOOD))
        assert await w.count("job") == 0
        assert not list((tmp_path / "jobs").iterdir())


async def test_strangers_bring_nothing(tmp_path: Path) -> None:
    async with running_service(tmp_path, trainer=COMMAND) as w:
        await with_dataset(w)
        await bring(w, zipped(GOOD), "/adapter import faq.jsonl", user="stranger")
        assert await w.count("job") == 0
        assert await w.count("audit", "allowed = 0") == 1


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EACCES])
async def test_a_home_that_takes_in_no_adapter_says_so(
    tmp_path: Path, error: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(error, "no")

    async with running_service(tmp_path) as w:
        await with_dataset(w)
        monkeypatch.setattr(importing, "_copy", refuse)
        key = "error.storage_full" if error == errno.ENOSPC else "error.storage"
        assert await bring(w, zipped(GOOD), "/adapter import faq.jsonl") == say("en", key)
        assert not [path.name for path in w.home.jobs.iterdir()]


@pytest.mark.parametrize("folder", [False, True])
def test_a_path_that_may_not_be_read_is_named(tmp_path: Path, folder: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, flags: int) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(importing.os.path, "isdir", lambda _: folder)
    monkeypatch.setattr(importing.os, "open", refuse)
    with pytest.raises(BadInput, match="Permission denied") as refused:
        importing._unpack_path(tmp_path / "mine.zip", tmp_path / "unpacked")
    assert refused.value.key == "import.unreadable"


def test_a_path_that_no_file_can_have_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="not_found"):
        importing._unpack_path(tmp_path / ("a" * 300), tmp_path / "unpacked")
