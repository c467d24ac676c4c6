"""The home folder and its lock."""

import fcntl
import os
from pathlib import Path
from typing import Self

from core.errors import HomeBusy, StorageError


class Home:
    """The folders and files of a home. One process at a time writes to it, the holder of `Lock`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.database, self.key_file = path / "distributary.db", path / "secret.key"
        self.control_socket = path / "control.sock"
        self.adapters, self.datasets, self.jobs = path / "adapters", path / "datasets", path / "jobs"
        self.models, self.logs = path / "models", path / "logs"
        self.sent = path / "sent"  # charts and tables that are sent to a chat

    def create(self) -> None:
        """Create the folders with mode 0700. Raises StorageError naming the folder that cannot be made."""
        for folder in (self.path, self.adapters, self.datasets, self.jobs, self.models, self.sent, self.logs):
            try:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            except OSError as error:
                detail = f"{folder} cannot be made: {error.strerror}"
                raise StorageError("error.home_unwritable", detail, path=str(folder)) from error
        if not os.access(self.path, os.W_OK):
            raise StorageError("error.home_unwritable", f"{self.path} cannot be written", path=str(self.path))

    def check_complete(self) -> None:
        """Raises StorageError for an empty or missing database beside the key of an earlier one."""
        if self.key_file.exists() and not (self.database.exists() and self.database.stat().st_size):
            detail = f"{self.database} is missing or empty, but {self.key_file} is the key of an earlier one"
            raise StorageError("error.database_gone", detail, path=str(self.database), secret=str(self.key_file))


class Lock:
    """Exclusive lock of a home; released when the process ends, also by SIGKILL. Raises HomeBusy, StorageError."""

    def __init__(self, home: Home) -> None:
        self._home = home
        self._file = -1

    def __enter__(self) -> Self:
        path = self._home.path / "lock"
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            detail = f"{path} cannot be opened: {error.strerror}"
            raise StorageError("error.home_unwritable", detail, path=str(path)) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.pread(self._file, 32, 0).decode(errors="replace").strip() or "?"
            os.close(self._file)
            detail = f"{self._home.path} is in use by process {owner}"
            raise HomeBusy(detail=detail, path=str(self._home.path), pid=owner) from error
        except OSError as error:  # ENOLCK, EOPNOTSUPP: some network file systems
            os.close(self._file)
            detail = f"{path} cannot be locked: {error.strerror}"
            raise StorageError("error.home_no_locks", detail, path=str(self._home.path)) from error
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, f"{os.getpid()}\n".encode(), 0)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)
