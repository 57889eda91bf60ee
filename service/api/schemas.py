"""What a generation request may say, and the bounds of it. Knows no engine.

A field this service does not know is a 400 that names it. A field of OpenAI's that is not supported yet is
accepted only at a value that asks for nothing (`tools: null`, `best_of: 1`), listed in `unsupported`.
Accepted and without effect, because nothing observable would differ: `metadata`, `prompt_cache_key` and
`prompt_cache_retention` (hints), `service_tier: auto | default`. `user` and `safety_identifier` say on which side of an
alias's canary a request is, and whose text it is where the tenant lets text be kept; `store: false` keeps none of it.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from service.api.structured import ResponseFormat, StructuredOutputs
from service.api.tools import ToolCall, ToolParams
from service.api.wire import Unsupported, WireModel, field_error

MAX_CHOICES = 128
MAX_STOP_STRINGS = 4
MAX_TIMEOUT_SECONDS = 86400.0
MAX_INT32 = 2**31 - 1
MAX_INT64 = 2**63 - 1
MAX_STOP_CHARACTERS = 4096
MAX_METADATA_CHARACTERS = 512
MAX_USER_CHARACTERS = 4096
MAX_BIASES = 300


def _one_or_many(value: object) -> object:
    """`"x"` as `["x"]`, so that a complaint names the field and no branch of a union."""
    return [value] if isinstance(value, str) else value


def _no_empty_string(value: list[str] | None) -> list[str] | None:
    if value is not None and "" in value:
        raise ValueError("a stop sequence may not be empty")
    return value


StopStrings = Annotated[
    list[Annotated[str, Field(max_length=MAX_STOP_CHARACTERS)]] | None,
    Field(max_length=MAX_STOP_STRINGS),
    BeforeValidator(_one_or_many),
    AfterValidator(_no_empty_string),
]


def _biases(value: object) -> object:
    """`{"50256": -100}` with the token ids as numbers."""
    if not isinstance(value, dict):
        raise ValueError("must be an object of token ids and biases")
    for token in value:
        if not isinstance(token, str) or not token.isdecimal() or not token.isascii() or len(token) > 10:
            raise ValueError(f"'{str(token)[:40]}' is not a token id")
    return {int(token): bias for token, bias in value.items()}


LogitBias = Annotated[
    dict[int, Annotated[float, Field(ge=-100, le=100)]] | None,
    Field(max_length=MAX_BIASES),
    BeforeValidator(lambda value: None if value is None else _biases(value)),
]


class StreamOptions(WireModel):
    include_usage: bool | None = None

    unsupported: ClassVar[Unsupported] = {"include_obfuscation": (False,)}


class GenerationParams(WireModel):
    """What chat and completions share: OpenAI's sampling parameters, then the extensions of vLLM."""

    model: str = Field(min_length=1, max_length=512)
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    max_tokens: int | None = Field(None, ge=1, le=MAX_INT32)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    seed: int | None = Field(None, ge=-MAX_INT64 - 1, le=MAX_INT64)
    stop: StopStrings = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, max_length=MAX_USER_CHARACTERS)
    store: bool | None = None
    logit_bias: LogitBias = None
    response_format: ResponseFormat | None = None

    top_k: int | None = Field(None, ge=0, le=MAX_INT32)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    ignore_eos: bool | None = None
    priority: int | None = Field(None, ge=-1000, le=1000)
    timeout: float | None = Field(None, gt=0, le=MAX_TIMEOUT_SECONDS)
    structured_outputs: StructuredOutputs | None = None

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise field_error("stream_options", "only allowed when 'stream' is true")
        return self

    @model_validator(mode="after")
    def _one_shape(self) -> Self:
        if self.structured_outputs is not None and self.response_format and self.response_format.type != "text":
            raise field_error("structured_outputs", "give either 'response_format' or 'structured_outputs', not both")
        return self

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def expects_json(self) -> bool:
        """Whether the request itself says that the answer is JSON."""
        if self.structured_outputs is not None:
            return self.structured_outputs.is_json
        return self.response_format is not None and self.response_format.type != "text"

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class TextPart(WireModel):
    type: Literal["text"]
    text: str


def _text_parts(value: object) -> object:
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    if value is None:
        return None
    if not isinstance(value, list):
        raise ValueError("must be a string or a list of text parts")
    return value


class Message(WireModel):
    """A message of the conversation; `content` as a string or as text parts."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[list[TextPart] | None, Field(min_length=1), BeforeValidator(_text_parts)] = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = Field(None, min_length=1, max_length=128)

    unsupported: ClassVar[Unsupported] = {
        "name": (),
        "refusal": (),
        "function_call": (),
        "audio": (),
        "annotations": ([],),
    }

    @model_validator(mode="after")
    def _fields_fit_the_role(self) -> Self:
        if self.tool_calls and self.role != "assistant":
            raise field_error("tool_calls", "only the assistant calls")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            raise field_error("tool_call_id", "a message of the role 'tool' answers a call, and no other does")
        if self.content is None and not self.tool_calls:
            raise field_error("content", "must be a string or a list of text parts")
        return self

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.content or ())

    @property
    def template_role(self) -> str:
        """`developer` is OpenAI's newer name for `system`; templates know the older one."""
        return "system" if self.role == "developer" else self.role


class ChatRequest(GenerationParams, ToolParams):
    """Body of POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_INT32)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)

    metadata: dict[str, Annotated[str, Field(max_length=MAX_METADATA_CHARACTERS)]] | None = Field(None, max_length=16)
    safety_identifier: str | None = Field(None, max_length=MAX_USER_CHARACTERS)
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    service_tier: Literal["auto", "default"] | None = None

    unsupported: ClassVar[Unsupported] = {
        "audio": (),
        "function_call": ("none",),
        "functions": ([],),
        "modalities": (["text"],),
        "moderation": (),
        "prediction": (),
        "prompt_cache_options": (),
        "reasoning_effort": ("none",),
        "verbosity": (),
        "web_search_options": (),
    }

    @model_validator(mode="after")
    def _fields_fit_together(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise field_error("top_logprobs", "only allowed when 'logprobs' is true")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise field_error("max_tokens", "set either 'max_tokens' or 'max_completion_tokens', not both")
        if self.structured_outputs is not None and self.may_call:
            raise field_error("structured_outputs", "cannot be kept to where a tool may be called")
        return self

    @model_validator(mode="after")
    def _results_answer_calls(self) -> Self:
        called: set[str] = set()
        for index, message in enumerate(self.messages):
            called |= {call.id for call in message.tool_calls or ()}
            if message.tool_call_id is not None and message.tool_call_id not in called:
                raise field_error(f"messages[{index}].tool_call_id", "no message before it makes this call")
        return self


def _prompts(value: object) -> object:
    """Every way to write prompts as a list of strings or of token lists."""
    if isinstance(value, str) or (isinstance(value, list) and value and _is_token(value[0])):
        return [value]
    return value


def _is_token(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_prompts(value: object) -> list[str] | list[list[int]]:
    if not isinstance(value, list) or not value:
        raise ValueError("must be a string, a list of strings, a list of tokens or a list of lists of tokens")
    if all(isinstance(prompt, str) for prompt in value):
        return value
    for prompt in value:
        if not isinstance(prompt, list) or not prompt or not all(_is_token(token) for token in prompt):
            raise ValueError("must hold either strings only or non-empty lists of tokens only")
    return value


MAX_INPUTS = 2048


class EmbeddingsRequest(WireModel):
    """Body of POST /v1/embeddings."""

    model: str = Field(min_length=1, max_length=512)
    input: Any
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, ge=1)
    user: str | None = None

    @model_validator(mode="after")
    def _every_input_can_be_embedded(self) -> Self:
        if not isinstance(self.input, str | list) or not self.input:
            reason = "must be a string, a list of strings, a list of tokens or a list of lists of tokens, and not empty"
            raise field_error("input", reason)
        if len(self.inputs) > MAX_INPUTS:
            raise field_error("input", f"may hold at most {MAX_INPUTS} inputs")
        kind = type(self.inputs[0])
        for index, one in enumerate(self.inputs):
            if kind not in (str, list) or type(one) is not kind or not (kind is str or all(map(_is_token, one))):
                raise field_error(self.name_of(index), "must hold either strings only or lists of tokens only")
            if not one:
                raise field_error(self.name_of(index), "may not be empty")
        return self

    @property
    def inputs(self) -> list[str] | list[list[int]]:
        """One for each embedding."""
        single = isinstance(self.input, str) or _is_token(self.input[0])
        return [self.input] if single else self.input

    def name_of(self, index: int) -> str:
        """How a complaint names one of the inputs."""
        return "input" if self.inputs[index] is self.input else f"input[{index}]"


class CompletionRequest(GenerationParams):
    """Body of POST /v1/completions, OpenAI's legacy endpoint."""

    prompt: Annotated[Any, BeforeValidator(_prompts), AfterValidator(_check_prompts)]
    logprobs: int | None = Field(None, ge=0, le=5)

    unsupported: ClassVar[Unsupported] = {"best_of": (1,), "echo": (False,), "suffix": ("",)}
