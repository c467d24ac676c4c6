"""The error tree. `key` of each error names the sentence of core/i18n that the person sees.

AppError
├── UserError            shown to the person as it is
│   ├── BadCommand           unknown, or malformed
│   ├── NotAllowed           the person lacks the grant
│   ├── LimitReached         rate limit; carries retry_after_s
│   ├── PromptTooLong        the message exceeds the channel's or model's limit
│   ├── UnknownThing         no channel, adapter, job, data set ... of that name
│   └── BadInput             any other input that cannot be used
├── Overloaded           too many waiting; carries retry_after_s
├── EngineError          users see a neutral sentence; the detail is in the log
│   ├── ModelLoadFailed
│   ├── OutOfMemory
│   └── AdapterUnusable      missing, damaged or trained on another base model
├── JobError             a fine-tune that cannot go on
│   └── BadDataset           carries line and reason
├── StorageError         the home cannot be read or written
│   ├── StorageFull
│   ├── StorageRefused       a constraint of the tables: a bug, not transient
│   ├── StoredUnreadable     stored text is damaged or of another key: not transient
│   └── HomeBusy             another process owns the home
└── BadConfig            a configuration file, key or value
"""

from __future__ import annotations


class AppError(Exception):
    """`key` names the sentence in core/i18n, `fields` fill it; `detail` is for the log and the command line."""

    key = "error.internal"

    def __init__(self, key: str = "", detail: str = "", **fields: str | int | float) -> None:
        self.key = key or type(self).key
        self.fields = fields
        self.detail = detail
        super().__init__(detail or " ".join([self.key, *(f"{name}={value!r}" for name, value in fields.items())]))


class UserError(AppError):
    key = "error.bad_input"


class BadCommand(UserError):
    key = "error.bad_command"


class NotAllowed(UserError):
    key = "error.not_allowed"


class LimitReached(UserError):
    key = "error.limit"

    def __init__(self, key: str = "", detail: str = "", *, retry_after_s: float, **fields: str | int | float) -> None:
        super().__init__(key, detail, **fields)
        self.retry_after_s = retry_after_s


class PromptTooLong(UserError):
    key = "error.prompt_too_long"


class UnknownThing(UserError):
    key = "error.unknown"


class BadInput(UserError):
    key = "error.bad_input"


class Overloaded(AppError):
    key = "error.overloaded"

    def __init__(self, key: str = "", detail: str = "", *, retry_after_s: float, **fields: str | int | float) -> None:
        super().__init__(key, detail, **fields)
        self.retry_after_s = retry_after_s


class EngineError(AppError):
    key = "error.engine"


class ModelLoadFailed(EngineError):
    key = "error.model_load"


class OutOfMemory(EngineError):
    key = "error.out_of_memory"


class AdapterUnusable(EngineError):
    key = "error.adapter_unusable"


class JobError(AppError):
    key = "error.job"


class BadDataset(JobError):
    key = "error.bad_dataset"


class StorageError(AppError):
    key = "error.storage"


class StorageFull(StorageError):
    key = "error.storage_full"


class StorageRefused(StorageError):
    key = "error.internal"


class StoredUnreadable(StorageError):
    key = "error.unreadable"


class HomeBusy(StorageError):
    key = "error.home_busy"


class BadConfig(AppError):
    key = "error.config"
