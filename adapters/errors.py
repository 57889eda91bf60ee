"""The exception tree of `adapters`. Knows no HTTP status: `service.errors` chooses that in one table.

AdapterError
├── AdapterFormatError    a directory is not a servable LoRA adapter (`check` says which check failed)
│   ├── BaseMismatchError it was made for another base
│   │   └── StaleAdapterError  the base of its time was changed since
│   └── AdapterDamagedError  stored bytes are not what was published
├── AdapterNotFoundError  no such digest in the store
├── NoFreeSlotError       every slot is pinned by a running sequence
├── StoreError            the artifact store did not answer as it should
├── DatasetError          an example file is unusable (`line`, `code`, `param`)
├── DriftReferenceError   an adapter's drift reference cannot be read, or a monitor's state is not of it
│   └── TooFewPromptsError too few prompts to make one of
└── TrainingError         a run cannot go on (`code`)
"""

from __future__ import annotations


class AdapterError(Exception):
    """Base of everything `adapters` raises for somebody else's input."""

    code: str | None = None

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class AdapterFormatError(AdapterError):
    """The directory fails a named check: config, safetensors, shape, match, finite, rank, digest, …"""

    code = "invalid_adapter"

    def __init__(self, message: str, *, check: str, param: str | None = None) -> None:
        super().__init__(f"{message} (check: {check})", param=param)
        self.check = check


class BaseMismatchError(AdapterFormatError):
    """The adapter was trained for another base model than the one that is loaded."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message, check="base", param=param)


class StaleAdapterError(BaseMismatchError):
    """It was published for the base, or the quantization, that was loaded then; now there is another."""

    code = "stale_adapter"


class AdapterDamagedError(AdapterFormatError):
    """What is stored under `digest` is not what was published; it is set aside and never parsed."""

    code = "adapter_damaged"

    def __init__(self, digest: str, how: str) -> None:
        super().__init__(f"Adapter {digest} was damaged: {how}", check="digest")
        self.digest = digest


class AdapterNotFoundError(AdapterError):
    """No adapter with this digest."""

    code = "adapter_not_found"


class NoFreeSlotError(AdapterError):
    """Every adapter slot is pinned; the request has to wait."""

    code = "no_free_slot"


class StoreError(AdapterError):
    """Reading or writing the artifact store failed."""

    code = "store_error"


class DatasetError(AdapterError):
    """An example file is unusable. The message starts with the line where one is to blame."""

    def __init__(
        self,
        message: str,
        *,
        line: int | None = None,
        code: str = "invalid_training_file",
        param: str | None = "training_file",
    ) -> None:
        super().__init__(f"line {line}: {message}" if line is not None else message, param=param)
        self.line = line
        self.code = code


class DriftReferenceError(AdapterError):
    """A drift reference is torn or of another format, or a kept state does not belong to it."""

    code = "invalid_drift_reference"


class TooFewPromptsError(DriftReferenceError):
    """No drift reference can be made of so few prompts."""

    code = "too_few_prompts"


class TrainingError(AdapterError):
    """A training run cannot go on (non-finite loss, nothing to learn from, …)."""

    def __init__(self, message: str, *, code: str = "training_failed", param: str | None = None) -> None:
        super().__init__(message, param=param)
        self.code = code
