"""oneDNN caches a bounded number of kernels."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from core.model.onednn import KEPT, keep_few_kernels

pytestmark = pytest.mark.slow

GROWTH = """
from core.model.onednn import keep_few_kernels
keep_few_kernels()
import torch
from finetune.limits import held_bytes
weight = torch.randn(576, 576)
def multiply(lengths):
    for length in lengths:
        torch.ops.mkldnn._linear_pointwise(torch.zeros(length, 576), weight, None, "none", [], "")
multiply(range(1, 60))
before = held_bytes("VmRSS")
multiply(range(60, 260))
print((held_bytes("VmRSS") - before) >> 20)
"""


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
def test_memory_does_not_grow_with_each_length() -> None:
    ran = subprocess.run([sys.executable, "-c", GROWTH], capture_output=True, text=True, check=True)
    assert int(ran.stdout) < 40  # MiB; 140 where all are kept


def test_the_environments_values_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = KEPT
    monkeypatch.setattr(os, "environ", {first: "500"})
    keep_few_kernels()
    assert os.environ[first] == "500"
    assert os.environ[second] == KEPT[second]
