"""A trainer without torch, with the contract of core.jobs.protocol: what it does follows from a word in its data.

    python tests/support/fake_trainer.py check|train JOBDIR

Its checkpoint is the number of steps done. Words that begin with a letter are looked for in the data's first line:

    pause         the first life stops at the second step, until it is told to go or killed
    crash-once    the first life kills itself after the second step; crash-always every one, before its first step
    mute          exit status 1 without a word           gives-up   exit status 3 without being asked
    yours, ours   an event `failed`                      garbage    lines that are no events, and one of 2 MiB
    ours-once     the first life says after the second step that it has failed; lost, that what it learned is of no use
    stubborn      hears neither the end of its input nor SIGTERM
    silent        the first life says nothing, for ever
    environment   tells the names in its environment
    other-base, other-data, no-weights                   a result that must not be used
    worse, style, few                                    a result that does not pass the gate
    keeps-lock    the first life passes its lock on, then kills itself
    personal      personal data is found, until it is asked to take it out
    slow-check    the check waits until it is told to go
    long          more is trained than the check has said
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import asdict
from pathlib import Path

from core.jobs.protocol import (
    EXIT_FAILED,
    EXIT_FINISHED,
    EXIT_INTERRUPTED,
    PREVIEW,
    Checked,
    Done,
    Estimated,
    Evaluated,
    Failed,
    JobEvent,
    Judged,
    Preview,
    Progress,
    Redacted,
    Spec,
    Verdict,
    Warned,
    dump_event,
)

COMMAND = (sys.executable, str(Path(__file__).resolve()))
STEPS = 4
WEIGHTS = b"\0" * 16


def main(action: str, folder: Path) -> int:
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.set_inheritable(lock, True)
    spec = Spec.read(folder)
    word = json.loads((folder / spec.data).read_bytes().splitlines()[0])["word"]
    if (folder / "out").exists():
        return finish(word)
    told = threading.Event()
    watch(told, stubborn=word == "stubborn")
    if action == "check":
        return check(word, folder, spec, told)
    if end := before(word, folder, lock):
        return end
    return steps(word, folder, spec, told)


def check(word: str, folder: Path, spec: Spec, told: threading.Event) -> int:
    if word == "slow-check":
        told.wait()
        return EXIT_INTERRUPTED
    if end := before(word, folder, -1):
        return end
    if spec.redact:
        left = json.dumps({"word": word, "q": "[phone]", "a": "b"}).encode() + b"\n"
        (folder / "redacted.jsonl").write_bytes(left)
        say(Redacted("redacted.jsonl", hashlib.sha256(left).hexdigest(), 10, 2))
    found = ("phone numbers: 2",) if word == "personal" and not spec.redact else ()
    say(Checked(12, 10, 1, 500, 8, 1, 1, rejected=("line 3: not JSON",), personal=found, missing=70))
    row = Preview(1, ((False, "<user>a question<assistant>"), (True, "an answer<end>")), "a question", "an answer")
    (folder / PREVIEW).write_text(Preview.dump([row]))
    say(Estimated(8, 2, 2, 6, 1_200, *((125.0, 1536) if spec.warm_up else ())))
    return EXIT_FINISHED


def before(word: str, folder: Path, lock: int) -> int:
    """What happens before the first step; an exit status other than 0 ends it."""
    first = not (folder / "checkpoint").exists()
    if word == "silent" and first:
        keep(folder, 0)
        signal.pause()
    if word == "crash-always":
        os.kill(os.getpid(), signal.SIGKILL)
    if word == "mute":
        return EXIT_FAILED
    if word == "keeps-lock" and first:
        keep(folder, 0)
        subprocess.Popen(["sleep", "0.3"], stdout=subprocess.DEVNULL, pass_fds=[lock], start_new_session=True)
        os.kill(os.getpid(), signal.SIGKILL)
    if word in ("yours", "ours"):
        say(Failed("yours" if word == "yours" else "ours", "a reason", line=7 if word == "yours" else 0))
        return EXIT_FAILED
    if word == "garbage":
        for line in (
            b"{",
            b"hello",
            b"[]",
            b'{"kind": "nonsense"}',
            b"\xff\xfe",
            b'{"kind": "progress"}',
            b"x" * 2**21,
        ):
            sys.stdout.buffer.write(line + b"\n")
        sys.stdout.buffer.flush()
    if word == "environment":
        say(Warned(" ".join(sorted(os.environ))))
    return EXIT_FINISHED


def steps(word: str, folder: Path, spec: Spec, told: threading.Event) -> int:
    say(Checked(12, 10, 1, 500, 8, 1, 1, rejected=("line 3: not JSON",)))
    done = int((folder / "checkpoint").read_text()) if (folder / "checkpoint").exists() else 0
    if done:
        say(Warned(f"goes on from step {done}"))
    for step in range(done + 1, STEPS + 1):
        keep(folder, step)
        say(Progress(step, STEPS, 1, 1, 3.0 / step, 100.0, 60.0 * (STEPS - step), first_loss=3.0))
        if step == 2 and not done and not pause(word, told):
            return EXIT_INTERRUPTED
        if told.is_set():
            return EXIT_INTERRUPTED
    say(Evaluated(STEPS, "validation", 1.25, 1))
    publish(word, folder, spec)
    return finish(word)


def pause(word: str, told: threading.Event) -> bool:
    """In the middle of the first life; False where it was told to go."""
    if word == "crash-once":
        os.kill(os.getpid(), signal.SIGKILL)
    if word in ("ours-once", "lost"):
        say(Failed("ours", "a reason", of_use=word == "ours-once"))
    if word in ("gives-up", "ours-once", "lost"):
        return False
    if word in ("pause", "stubborn"):
        told.wait()
        return False
    return True


def finish(word: str) -> int:
    say(judged(word))
    say(Done(STEPS, 61.0, 3.0, 0.75, 2.5, judged(word).loss))
    return EXIT_FINISHED


def judged(word: str) -> Judged:
    verdicts: dict[str, Verdict] = {"worse": "no_better", "style": "style_only", "few": "too_few"}
    return Judged(
        verdict=verdicts.get(word, "passed"),
        rows=40,
        better=39,
        champion="base",
        loss_champion=2.5,
        loss=2.75 if word == "worse" else 1.5,
        low=-1.25,
        high=-0.75,
        lift_champion=0.25,
        lift=0.5,
        worst=((1, 1.5, 2.5),) if word == "worse" else (),
    )


def publish(word: str, folder: Path, spec: Spec) -> None:
    aside = folder / "out.new"
    aside.mkdir(exist_ok=True)
    (aside / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1}))
    header = json.dumps({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, len(WEIGHTS)]}}).encode()
    if word != "no-weights":
        (aside / "adapter_model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + WEIGHTS)
    manifest = {
        "judged": asdict(judged(word)),
        "label": spec.label,
        "job": spec.job,
        "tokens": 5_000 if word == "long" else 900,
        "base_fingerprint": "another" if word == "other-base" else spec.fingerprint,
        "data_sha256": "0" * 64 if word == "other-data" else spec.data_sha256,
    }
    (aside / "manifest.json").write_text(json.dumps(manifest))
    aside.rename(folder / "out")


def keep(folder: Path, step: int) -> None:
    (folder / "checkpoint.new").write_text(str(step))
    (folder / "checkpoint.new").replace(folder / "checkpoint")


def say(event: JobEvent) -> None:
    print(dump_event(event), flush=True)


def watch(told: threading.Event, *, stubborn: bool) -> None:
    if stubborn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return
    signal.signal(signal.SIGTERM, lambda *_: told.set())

    def read_to_end() -> None:
        while os.read(0, 4096):
            pass
        told.set()

    threading.Thread(target=read_to_end, daemon=True).start()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
