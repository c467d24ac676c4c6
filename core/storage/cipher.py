"""Encryption of people's messages and keyed hashes of their ids. The key is a file beside the database."""

import os
import secrets
from pathlib import Path
from typing import Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes, hmac
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from core import files
from core.errors import StorageError, StoredUnreadable

_NONCE_BYTES = 12


class Cipher:
    """Encrypts messages, and hashes ids of people and messages, with a key that is not in the database.

    AES-256-GCM with the random nonce in front; HMAC-SHA256 for ids. Both keys are derived from one secret (HKDF).
    """

    def __init__(self, secret: bytes) -> None:
        self._box = AESGCM(_derive(secret, b"text"))
        self._id_key = _derive(secret, b"user")

    @classmethod
    def open(cls, key_file: Path, *, create: bool) -> Self:
        """Read the key; with `create`, make a missing one. Raises StorageError where it is missing or damaged."""
        try:
            if create and not key_file.exists():
                files.write(key_file, f"{secrets.token_hex(32)}\n".encode())
            secret = bytes.fromhex(key_file.read_text(encoding="ascii").strip())
        except (OSError, ValueError) as error:
            detail = f"{key_file} cannot be read: {error}"
            raise StorageError("error.key_unreadable", detail, path=str(key_file)) from error
        if len(secret) != 32:
            raise StorageError("error.key_unreadable", f"{key_file} is not 64 hex digits", path=str(key_file))
        return cls(secret)

    def seal(self, text: str) -> bytes:
        nonce = os.urandom(_NONCE_BYTES)
        return nonce + self._box.encrypt(nonce, text.encode("utf-8"), None)

    def unseal(self, sealed: bytes) -> str:
        """Raises StoredUnreadable where the bytes are damaged or of another key."""
        try:
            return self._box.decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], None).decode("utf-8")
        except (InvalidTag, ValueError) as error:
            raise StoredUnreadable(detail="a stored text is damaged, or of another key") from error

    def hash_user(self, platform: str, account: str, user: str) -> str:
        """The keyed hash of a person: 32 hex digits, stable per account."""
        return self._hash("\x1f".join((platform, account, user)))[:32]

    def hash_message(self, key: str) -> str:
        """The keyed hash of a message's platform key, which may contain its author's id."""
        return self._hash(f"message\x1f{key}")[:32]

    def hash_code(self, code: str) -> str:
        """The keyed hash of a one-time code."""
        return self._hash(f"code\x1f{code}")

    def _hash(self, text: str) -> str:
        digest = hmac.HMAC(self._id_key, hashes.SHA256())
        digest.update(text.encode("utf-8"))
        return digest.finalize().hex()


def _derive(secret: bytes, purpose: bytes) -> bytes:
    return HKDFExpand(algorithm=hashes.SHA256(), length=32, info=b"distributary " + purpose).derive(secret)
