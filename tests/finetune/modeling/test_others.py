"""What Unsloth and Axolotl leave behind, as they leave it, is imported, or refused for the right reason.

tests/data/adapters holds their adapter_config.json and README.md, key by key as they write them; the weights are made
here for the tiny model. What TRL leaves is trained by TRL itself, in tests/drill/test_trl.py.
"""

from __future__ import annotations

import json
import shutil
import tarfile
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from core.errors import BadInput, JobError
from core.jobs import importing
from core.jobs.protocol import Judged, Spec, Warned
from finetune.imported import judge_imported
from tests.finetune.conftest import Heard, MakeJob
from tests.support.paths import DATA
from tests.support.tiny import save_adapter

CONFIG, WEIGHTS = importing.CONFIG, importing.WEIGHTS
LEFT = {  # what else lies in the folder
    "unsloth": ("chat_template.jinja", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"),
    "axolotl": ("chat_template.jinja", "config.json", "debug.log", "tokenizer.json", "tokenizer_config.json"),
}


def leave(folder: Path, tool: str, base: Path, **changes: object) -> Path:
    """The folder as this trainer leaves it, its checkpoints included."""
    shutil.copytree(DATA / "adapters" / tool, folder)
    config = json.loads((folder / CONFIG).read_text()) | changes
    made = save_adapter(base, folder.parent / "made", seed=1, std=0.05, r=config["r"], lora_alpha=config["lora_alpha"])
    kind = torch.bfloat16 if tool == "unsloth" else torch.float32
    save_file({name: one.to(kind) for name, one in load_file(made.folder / WEIGHTS).items()}, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config, indent=2))
    for name in LEFT[tool]:
        (folder / name).write_text("{}")
    for step in (10, 20):
        inner = folder / f"checkpoint-{step}"
        inner.mkdir()
        for name in (CONFIG, WEIGHTS):
            shutil.copy(folder / name, inner)
        (inner / "optimizer.pt").write_bytes(b"x")
    return folder


def pack(folder: Path, how: str) -> Path:
    if how == "folder":
        return folder
    path = folder.with_name(f"{folder.name}.{how}")
    if how == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for one in sorted(folder.rglob("*")):
                archive.write(one, one.relative_to(folder.parent))
    else:
        with tarfile.open(path, "w:gz") as tar:
            tar.add(folder, folder.name)
    return path


def examine(job: Path, packed: Path, model_name: str = "Tiny-Instruct") -> Heard:
    importing._unpack_path(packed, job / "candidate")
    heard = Heard()
    spec = replace(Spec.read(job), candidate="candidate", model_name=model_name)
    judge_imported(job, spec, heard, threading.Event())
    return heard


@pytest.mark.parametrize(("tool", "how"), [("unsloth", "folder"), ("unsloth", "zip"), ("axolotl", "tar.gz")])
def test_the_whole_output_folder_is_examined_and_published(
    make_job: MakeJob, tiny_folder: Path, tmp_path: Path, tool: str, how: str
) -> None:
    left = leave(tmp_path / "theirs", tool, tiny_folder)
    job = make_job()
    heard = examine(job, pack(left, how))
    assert heard.of(Judged)
    assert not heard.of(Warned)  # the names of the base model differ in whose it is and how it is packed alone
    assert (job / "out" / WEIGHTS).read_bytes() == (left / WEIGHTS).read_bytes()
    manifest = json.loads((job / "out" / "manifest.json").read_text())
    assert manifest["made_by"] == json.loads((left / CONFIG).read_text())["peft_version"]


def test_an_adapter_that_names_another_base_model_is_examined_and_that_is_said(
    make_job: MakeJob, tiny_folder: Path, tmp_path: Path
) -> None:
    left = leave(tmp_path / "theirs", "axolotl", tiny_folder)
    heard = examine(make_job(), left, model_name="Other-1B")
    (warned,) = heard.of(Warned)
    assert "example-org/Tiny-Instruct" in warned.text
    assert "Other-1B" in warned.text
    assert heard.of(Judged)


@pytest.mark.parametrize(
    ("tool", "changes", "reason"),
    [
        ("axolotl", {"modules_to_save": ["embed_tokens", "lm_head"]}, "modules_to_save"),  # lora_modules_to_save
        ("axolotl", {"use_dora": True}, "use_dora=True"),  # peft_use_dora
        ("axolotl", {"target_parameters": ["mlp.experts.down_proj"]}, "target_parameters"),
        ("unsloth", {"target_parameters": ["experts.gate_up_proj"]}, "target_parameters"),  # mixtures of experts
        ("unsloth", {"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ("unsloth", {"init_lora_weights": "loftq"}, "changes the base model"),
        ("unsloth", {"target_modules": "(?:(?!vision).)*proj"}, "cannot be matched in linear time"),
        ("unsloth", {"bias": "all"}, "bias=all"),
    ],
)
def test_what_cannot_be_served_as_it_was_trained_is_refused_by_its_name(
    make_job: MakeJob, tiny_folder: Path, tmp_path: Path, tool: str, changes: dict[str, object], reason: str
) -> None:
    left = leave(tmp_path / "theirs", tool, tiny_folder, **changes)
    job = make_job()
    with pytest.raises(JobError) as refused:
        examine(job, left)
    assert reason in refused.value.detail
    assert refused.value.fields["fault"] == "settings"  # the rows are fine
    assert not (job / "out").exists()


def test_embeddings_among_the_weights_are_named_with_the_way_out(
    make_job: MakeJob, tiny_folder: Path, tmp_path: Path
) -> None:
    """A trainer that adds tokens has PEFT save the whole embedding."""
    left = leave(tmp_path / "theirs", "axolotl", tiny_folder)
    tensors = load_file(left / WEIGHTS)
    save_file({**tensors, "base_model.model.model.embed_tokens.weight": torch.zeros(4, 4)}, left / WEIGHTS)
    with pytest.raises(JobError, match="save_embedding_layers=False"):
        examine(make_job(), left)


def test_a_merged_model_is_no_adapter(tmp_path: Path) -> None:
    """Unsloth's save_pretrained_merged, Axolotl's merge-lora."""
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "config.json").write_text("{}")
    (tmp_path / "merged" / "model.safetensors").write_bytes(b"")
    with pytest.raises(BadInput) as refused:
        importing._unpack_path(tmp_path / "merged", tmp_path / "aside")
    assert refused.value.key == "import.missing"
