"""Builds the library of kernels/ with this machine's compiler, for its processor, once.

The library lies in the user's cache folder under the hash of its sources, flags, compiler and processor features.
"""

import hashlib
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from platformdirs import user_cache_path

from core import files

SOURCES = Path(__file__).with_name("kernels")
COMPILERS = ("g++", "clang++", "c++")
# -fno-math-errno, -fno-trapping-math: errno and FP traps are never read and block vectorization.
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
DEADLINE_S = 300.0


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
    library = folder / f"{hashlib.sha256(key).hexdigest()[:32]}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=folder) as own:
            made = Path(own) / "kernels.so"
            command = [compiler, *FLAGS, *(str(one) for one in sources if one.suffix == ".cpp"), "-o", str(made)]
            subprocess.run(command, capture_output=True, check=True, text=True, timeout=DEADLINE_S)
            files.move(made, library)  # in one step: another process may build it too
    return library
