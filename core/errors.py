"""The error tree. Every error names a sentence of core/i18n for the person who caused it; knows no sentence itself.

AppError
├── UserError            shown to the person as it is
│   ├── BadCommand           not in the command table, or not in its right form
│   ├── NotAllowed           the person has no grant for it
│   ├── LimitReached         too fast, or too much; carries retry_after_s
│   ├── PromptTooLong        the message alone exceeds what this channel or model takes in
│   ├── UnknownThing         a channel, adapter, job, data set ... of that name does not exist
│   └── BadInput             any other thing that a person sent and that cannot be used
├── Overloaded           too many waiting; carries retry_after_s
├── EngineError          users see one neutral line; operators see the detail in the log
│   ├── ModelLoadFailed
│   ├── OutOfMemory
│   └── AdapterUnusable      the pinned adapter is missing, damaged or made for another base model
├── JobError             a fine-tune that cannot go on; `fault` says whose it is: "yours" (the data), "settings", "ours"
│   └── BadDataset           carries line and reason
├── StorageError         the home cannot be read or written
│   ├── StorageFull
│   ├── StorageRefused       a rule of the tables forbids it: a bug of ours, which does not pass
│   ├── StoredUnreadable     a stored text is damaged or of another key: that does not pass
│   └── HomeBusy             another program owns the home
└── BadConfig            a configuration file, key or value
"""

from __future__ import annotations


class AppError(Exception):
    """`key` names the sentence in core/i18n; `fields` fill it; `detail` is for the log and the command line only."""

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
