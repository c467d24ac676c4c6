"""The error tree. `key` of each error names the sentence of core/i18n that the person sees."""


class AppError(Exception):
    """`key` names the sentence in core/i18n, `fields` fill it; `detail` is for the log and the command line."""

    key = "error.internal"

    def __init__(self, key: str = "", detail: str = "", **fields: str | int | float) -> None:
        self.key = key or type(self).key
        self.fields = fields
        self.detail = detail
        super().__init__(detail or " ".join([self.key, *(f"{name}={value!r}" for name, value in fields.items())]))


class RetryLater(AppError):
    """Waiting helps: `retry_after_s` says how long."""

    def __init__(self, key: str = "", detail: str = "", *, retry_after_s: float, **fields: str | int | float) -> None:
        super().__init__(key, detail, **fields)
        self.retry_after_s = retry_after_s


class UserError(AppError):  # shown to the person as it is
    key = "error.bad_input"


class BadCommand(UserError):  # an unknown or malformed command
    key = "error.bad_command"


class NotAllowed(UserError):  # the person lacks the grant
    key = "error.not_allowed"


class LimitReached(RetryLater, UserError):  # of messages in a time
    key = "error.limit"


class PromptTooLong(UserError):  # the message exceeds the channel's or model's limit
    key = "error.prompt_too_long"


class UnknownThing(UserError):  # no channel, adapter, job, data set ... of that name
    key = "error.unknown"


class BadInput(UserError):  # any other input that cannot be used
    key = "error.bad_input"


class Overloaded(RetryLater):  # too many are waiting
    key = "error.overloaded"


class EngineError(AppError):  # people see a neutral sentence; the detail is in the log
    key = "error.engine"


class ModelLoadFailed(EngineError):
    key = "error.model_load"


class OutOfMemory(EngineError):
    key = "error.out_of_memory"


class AdapterUnusable(EngineError):  # missing, damaged, or trained on another base model
    key = "error.adapter_unusable"


class JobError(AppError):  # a fine-tune that cannot go on
    key = "error.job"


class BadDataset(JobError):  # carries line and reason
    key = "error.bad_dataset"


class StorageError(AppError):  # the home cannot be read or written
    key = "error.storage"


class StorageFull(StorageError):
    key = "error.storage_full"


class StorageRefused(StorageError):  # a constraint of the tables: a bug, not transient
    key = "error.internal"


class StoredUnreadable(StorageError):  # stored text is damaged or of another key: not transient
    key = "error.unreadable"


class HomeBusy(StorageError):  # another process owns the home
    key = "error.home_busy"


class BadConfig(AppError):  # a configuration file, key or value
    key = "error.config"
