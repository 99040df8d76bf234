"""What clients send and get: OpenAI's fields, as far as they are served.

Fields that other servers know and this one does not follow are taken where they ask for nothing;
whatever else is refused, so that nobody gets another answer than they think.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Count = Annotated[int, Field(ge=1, le=1 << 31)]
Token = Annotated[int, Field(ge=0, lt=1 << 31)]
StopString = Annotated[str, Field(min_length=1, max_length=1024)]
Zero = Annotated[float, Field(ge=0, le=0)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


class StreamOptions(_Body):
    """Of a stream of events."""

    include_usage: bool | None = None


class TextFormat(_Body):
    """The one format that there is."""

    type: Literal["text"]


class _Generation(_Body):
    """What completions and chats have in common."""

    model: str | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=16)] | None = None
    max_tokens: Count | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    user: str | None = None
    n: Literal[1] | None = None
    presence_penalty: Zero | None = None
    frequency_penalty: Zero | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    @model_validator(mode="after")
    def _check_stream_options(self) -> _Generation:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options are of a stream: set stream too")
        return self


class CompletionBody(_Generation):
    """`POST /v1/completions`."""

    prompt: (
        str
        | Annotated[list[Token], Field(min_length=1)]
        | Annotated[list[str], Field(min_length=1, max_length=1)]
        | Annotated[
            list[Annotated[list[Token], Field(min_length=1)]], Field(min_length=1, max_length=1)
        ]
    )
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    logprobs: None = None
    suffix: None = None


class TextPart(_Body):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(_Body):
    """One turn of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]
    name: str | None = None


class ChatBody(_Generation):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none"] | None = None
    response_format: TextFormat | None = None


class ScaleBody(_Body):
    """`POST /scale_elastic_ep`: vLLM's fields, and ours behind them.

    Attributes:
        new_data_parallel_size: ranks that there shall be.
        drain_timeout: seconds after which the call says 408; the change goes on. Requests need not
            be drained: they go on meanwhile.
        remove: names of ranks that shall leave; instead of a size.
        dry_run: only say what it would do.
    """

    new_data_parallel_size: Annotated[int, Field(ge=1, le=1 << 16)] | None = None
    drain_timeout: Annotated[int, Field(ge=1, le=86_400)] = 120
    remove: Annotated[list[str], Field(min_length=1)] | None = None
    dry_run: bool = False

    @model_validator(mode="after")
    def _check_one(self) -> ScaleBody:
        if (self.new_data_parallel_size is None) == (self.remove is None):
            raise ValueError("give new_data_parallel_size, or remove")
        return self


class ErrorDetail(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """An answer that says no."""

    error: ErrorDetail


class Usage(BaseModel):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionChoice(BaseModel):
    """The one there is."""

    index: int
    text: str
    logprobs: None
    finish_reason: Literal["stop", "length"] | None


class Completion(BaseModel):
    """Answer of `POST /v1/completions`."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class ChatMessage(BaseModel):
    """What the model says."""

    role: Literal["assistant"]
    content: str


class ChatChoice(BaseModel):
    """The one there is."""

    index: int
    message: ChatMessage
    logprobs: None
    finish_reason: Literal["stop", "length"] | None


class ChatCompletion(BaseModel):
    """Answer of `POST /v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Model(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(BaseModel):
    """Answer of `GET /v1/models`."""

    object: Literal["list"]
    data: list[Model]


class Health(BaseModel):
    """Whether the server lives, and whether it can serve."""

    live: bool
    ready: bool
    reason: str


class Done(BaseModel):
    """Answer of what changes the service."""

    message: str
    report: dict[str, Any] | None = None


class Scaling(BaseModel):
    """Answer of `POST /is_scaling_elastic_ep`."""

    is_scaling_elastic_ep: bool
