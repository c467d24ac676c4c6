"""The home: its folders, its lock, its secret. Knows nothing of what is in the database."""

from __future__ import annotations

import fcntl
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes, hmac
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from core import files
from core.errors import HomeBusy, StorageError, StoredUnreadable

_NONCE_BYTES = 12


@dataclass(frozen=True, slots=True)
class Home:
    """Where everything is kept. Only `Lock` may write below it, one process at a time."""

    path: Path

    @property
    def database(self) -> Path:
        return self.path / "distributary.db"

    @property
    def adapters(self) -> Path:
        return self.path / "adapters"

    @property
    def datasets(self) -> Path:
        return self.path / "datasets"

    @property
    def jobs(self) -> Path:
        return self.path / "jobs"

    @property
    def models(self) -> Path:
        return self.path / "models"

    @property
    def sent(self) -> Path:
        """Pictures and tables on their way to a chat."""
        return self.path / "sent"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def control_socket(self) -> Path:
        return self.path / "control.sock"

    @property
    def key_file(self) -> Path:
        return self.path / "secret.key"

    def create(self) -> None:
        """Make the folders, for this user's eyes only. Raises StorageError naming the folder that cannot be made."""
        for folder in (self.path, self.adapters, self.datasets, self.jobs, self.models, self.sent, self.logs):
            try:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            except OSError as error:
                raise StorageError(
                    "error.home_unwritable", f"{folder} cannot be made: {error.strerror}", path=str(folder)
                ) from error
        if not os.access(self.path, os.W_OK):
            raise StorageError("error.home_unwritable", f"{self.path} cannot be written", path=str(self.path))


class Lock:
    """One process owns a home. The lock ends with the process, also after SIGKILL."""

    def __init__(self, home: Home) -> None:
        self._home = home
        self._file = -1

    def __enter__(self) -> Self:
        path = self._home.path / "lock"
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StorageError(
                "error.home_unwritable", f"{path} cannot be opened: {error.strerror}", path=str(path)
            ) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.pread(self._file, 32, 0).decode(errors="replace").strip() or "?"
            os.close(self._file)
            raise HomeBusy(
                detail=f"{self._home.path} is in use by process {owner}", path=str(self._home.path), pid=owner
            ) from error
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, f"{os.getpid()}\n".encode(), 0)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)


class Cipher:
    """Encrypts people's text and hashes people's ids, and those of messages, with a key that is not in the database.

    AES-256-GCM with a random nonce in front; HMAC-SHA256 for ids. Two keys are derived from the one secret (HKDF).
    """

    def __init__(self, secret: bytes) -> None:
        self._box = AESGCM(_derive(secret, b"text"))
        self._id_key = _derive(secret, b"user")

    @classmethod
    def open(cls, key_file: Path, *, create: bool) -> Cipher:
        """Read the key; make it where `create` and none is there. Raises StorageError when it is missing or damaged."""
        try:
            if create and not key_file.exists():
                files.write(key_file, f"{secrets.token_hex(32)}\n".encode())
            secret = bytes.fromhex(key_file.read_text(encoding="ascii").strip())
        except (OSError, ValueError) as error:
            raise StorageError(
                "error.key_unreadable", f"{key_file} cannot be read: {error}", path=str(key_file)
            ) from error
        if len(secret) != 32:
            raise StorageError("error.key_unreadable", f"{key_file} is not 64 hex digits", path=str(key_file))
        return cls(secret)

    def seal(self, text: str) -> bytes:
        nonce = os.urandom(_NONCE_BYTES)
        return nonce + self._box.encrypt(nonce, text.encode("utf-8"), None)

    def unseal(self, sealed: bytes) -> str:
        """Raises StoredUnreadable where the key is another or the bytes are damaged."""
        try:
            return self._box.decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], None).decode("utf-8")
        except (InvalidTag, ValueError) as error:
            raise StoredUnreadable(detail="a stored text is damaged, or of another key") from error

    def hash_user(self, platform: str, account: str, user: str) -> str:
        """A person as the database knows them: the same id on the same account is always the same hash."""
        digest = hmac.HMAC(self._id_key, hashes.SHA256())
        digest.update("\x1f".join((platform, account, user)).encode("utf-8"))
        return digest.finalize().hex()[:32]

    def hash_message(self, key: str) -> str:
        """A message as the database knows it: what a platform calls it may name the person who wrote it."""
        digest = hmac.HMAC(self._id_key, hashes.SHA256())
        digest.update(b"message\x1f" + key.encode("utf-8"))
        return digest.finalize().hex()[:32]

    def hash_code(self, code: str) -> str:
        """A one-time code as the database knows it."""
        digest = hmac.HMAC(self._id_key, hashes.SHA256())
        digest.update(b"code\x1f" + code.encode("utf-8"))
        return digest.finalize().hex()


def _derive(secret: bytes, purpose: bytes) -> bytes:
    return HKDFExpand(algorithm=hashes.SHA256(), length=32, info=b"distributary " + purpose).derive(secret)
