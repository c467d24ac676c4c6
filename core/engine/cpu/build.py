"""Builds the library of kernels/ with this machine's compiler, for its processor, once.

The library lies in the user's cache folder under the hash of its sources, flags, compiler and processor features, its
own hash beside it. It is loaded only where nobody else can have written it and its bytes are those that were built;
else it is put aside and built anew. A build that failed is not tried again for a day.
"""

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import torch
from platformdirs import user_cache_path

from core import files

log = logging.getLogger(__name__)

SOURCES = Path(__file__).with_name("kernels")
COMPILERS = ("g++", "clang++", "c++")
# -fno-math-errno, -fno-trapping-math: errno and FP traps are never read and block vectorization.
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
DEADLINE_S = 300.0
FAILED_S = 86_400.0


def built_library() -> Path:
    """Path of the library for these sources and this processor. Raises OSError or subprocess.SubprocessError."""
    compiler = next((found for name in COMPILERS if (found := shutil.which(name))), None)
    if compiler is None:
        raise FileNotFoundError(f"no C++ compiler is installed ({', '.join(COMPILERS)})")
    features = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, text=True, timeout=DEADLINE_S)
    sources = sorted(SOURCES.iterdir())
    made_of = repr((version.stdout, FLAGS, platform.machine(), sorted(features.items()))).encode()
    key = b"".join((*(one.read_bytes() for one in sources), made_of))
    folder = user_cache_path("distributary") / "kernels"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    _check_private(folder)
    library = folder / f"{hashlib.sha256(key).hexdigest()[:32]}.so"
    if library.exists() and not _is_sound(library):
        log.warning("engine.library_put_aside", extra={"file": str(library)})
        library.replace(library.with_suffix(".bad"))
    if not library.exists():
        _build(compiler, sources, library)
    return library


def _build(compiler: str, sources: list[Path], library: Path) -> None:
    failed = library.with_suffix(".failed")
    if failed.exists() and time.time() - failed.stat().st_mtime < FAILED_S:
        raise OSError(
            f"the last build failed, and is tried again a day later or without {failed}: {failed.read_text()}"
        )
    with tempfile.TemporaryDirectory(dir=library.parent) as own:
        made = Path(own) / "kernels.so"
        command = [compiler, *FLAGS, *(str(one) for one in sources if one.suffix == ".cpp"), "-o", str(made)]
        try:
            subprocess.run(command, capture_output=True, check=True, text=True, timeout=DEADLINE_S)
            made.chmod(0o700)
            files.write(_sum_file(library), files.sha256(made).encode())
        except (OSError, subprocess.SubprocessError) as error:
            files.write(failed, str(getattr(error, "stderr", None) or error)[:2000].encode())
            raise
        files.move(made, library)  # in one step: another process may build it too


def _sum_file(library: Path) -> Path:
    return library.with_suffix(".sha256")


def _is_sound(library: Path) -> bool:
    try:
        _check_private(library)
        return files.sha256(library) == _sum_file(library).read_text("ascii")
    except (OSError, ValueError):
        return False


def _check_private(path: Path) -> None:
    """Raises PermissionError where another user could have written the file or folder: its code would run here."""
    found = path.lstat()
    if found.st_uid not in (0, os.geteuid()) or found.st_mode & 0o022:
        raise PermissionError(f"{path} belongs to another user, or others may write it: remove it")
