"""What the engine raises instead of an answer. Knows no HTTP status: `service.errors` chooses that.

EngineError
├── RequestRejectedError   the request can never run (too long, unknown adapter, …); `code`, `param`
├── QueueFullError         too many wait already; try again after `retry_after` seconds
├── BaseModelError         the base model cannot be loaded as asked; stops start-up
├── ChatTemplateError      the base's chat template refuses these messages
├── AdapterUnavailableError the request's adapter cannot be loaded: `code` says why, `retry_after` when that may pass
├── EmbeddingFailedError   the engine gave up on a prompt it had accepted
├── GrammarError           what the answer shall follow cannot be followed
│   ├── InvalidGrammarError         malformed, unsupported or too complex
│   └── GrammarsUnavailableError    this base's tokenizer cannot be used with grammars
└── EngineDeadError        the loop has stopped; nothing will run any more
"""

from __future__ import annotations

from typing import Any


class EngineError(Exception):
    """Base of them all. The message may be shown to the client."""

    code: str | None = None

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code

    def __reduce__(self) -> tuple[Any, ...]:
        """For another process: as it is, whatever its constructor asks for."""
        return _restored, (type(self), self.args, self.__dict__)


def _restored(cls: type[EngineError], args: tuple[Any, ...], state: dict[str, Any]) -> EngineError:
    error = cls.__new__(cls, *args)
    error.__dict__.update(state)
    return error


class RequestRejectedError(EngineError):
    """The request can never run, whatever the load."""


class QueueFullError(EngineError):
    """`max_waiting` requests wait already."""

    code = "engine_overloaded"

    def __init__(self, message: str, *, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class EngineDeadError(EngineError):
    """The engine's thread has ended, or is ending."""

    code = "engine_unavailable"
    retry_after = 5.0


class AdapterUnavailableError(EngineError):
    """The request's adapter cannot be loaded. `code`: adapter_damaged, adapter_not_found, store_error, …"""

    def __init__(self, message: str, *, code: str, digest: str, retry_after: float | None) -> None:
        """`retry_after` is None where trying again does not help."""
        super().__init__(message, param="model", code=code)
        self.digest = digest
        self.retry_after = retry_after


class EmbeddingFailedError(EngineError):
    """The engine gave up on a prompt it had accepted; the message says why."""

    code = "embedding_failed"


class BaseModelError(EngineError):
    """The base model cannot be loaded as asked. The message names the way out."""

    code = "base_model_unusable"


class ChatTemplateError(RequestRejectedError):
    """The base's chat template refuses these messages (roles that must alternate, say)."""

    code = "invalid_messages"


class GrammarError(RequestRejectedError):
    """What the answer shall follow cannot be followed."""


class InvalidGrammarError(GrammarError):
    """A schema, pattern or grammar that is malformed, unsupported or too complex; `param` names the field."""

    code = "invalid_grammar"

    def __init__(self, reason: str, *, param: str) -> None:
        super().__init__(f"'{param}' cannot be kept to: {reason}.", param=param)
        self.reason = reason

    def of(self, param: str) -> InvalidGrammarError:
        """The same complaint about another field: two requests may share one compilation."""
        return InvalidGrammarError(self.reason, param=param)


class GrammarsUnavailableError(GrammarError):
    """This base's tokenizer cannot be used with grammars."""

    code = "structured_outputs_unavailable"
