"""Bodies of requests: OpenAI's fields, and vLLM's for what OpenAI has no name for.

Every field may be null, which is as if it were left out.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

MOST_CHOICES = 16
MOST_STOPS = 16
MOST_PROMPTS = 64
MOST_SEED = 2**63 - 1 - MOST_CHOICES

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _prompts(value: Any) -> list[str | list[int]]:
    """Return the prompts of a text, texts, token ids, or lists of them."""
    several = isinstance(value, list) and bool(value) and isinstance(value[0], str | list)
    prompts = value if several else [value]
    for prompt in prompts:
        if not isinstance(prompt, str) and not (isinstance(prompt, list) and prompt and _are_ids(prompt)):
            raise ValueError("expected a text, a list of texts, token ids, or a list of lists of token ids.")
    if len(prompts) > MOST_PROMPTS:
        raise ValueError(f"there are {len(prompts)} prompts, at most {MOST_PROMPTS} are taken at once.")
    return prompts


def _are_ids(values: list[Any]) -> bool:
    return all(isinstance(value, int) and not isinstance(value, bool) and value >= 0 for value in values)


Ids = list[Annotated[int, Field(ge=0)]]
Texts = Annotated[list[Annotated[str, Field(min_length=1)]], BeforeValidator(_listed)]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class StreamOptions(Body):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class JsonSchema(Body):
    name: str = ""
    description: str | None = None
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("type is json_schema, but there is no 'json_schema' beside it.")
        return self


class StructuredOutputs(Body):
    """What the output must match, in vLLM's words; exactly one of them."""

    json_: dict[str, Any] | None = Field(default=None, alias="json")
    regex: str | None = None
    json_object: bool | None = None

    @model_validator(mode="after")
    def _is_one(self) -> StructuredOutputs:
        if sum(value is not None and value is not False for value in vars(self).values()) != 1:
            raise ValueError("expected exactly one of 'json', 'regex' and 'json_object'.")
        return self


class Thinking(Body):
    type: Literal["enabled", "disabled"]


class TemplateKwargs(Body):
    thinking: bool | None = None


class Generate(Body):
    """What both ways to generate take."""

    model: str | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    repetition_penalty: float | None = Field(default=None, gt=0)
    seed: int | None = Field(default=None, ge=0, le=MOST_SEED)
    n: int | None = Field(default=None, ge=1, le=MOST_CHOICES)
    stop: Texts | None = Field(default=None, max_length=MOST_STOPS)
    stop_token_ids: Ids | None = Field(default=None, max_length=MOST_STOPS)
    ignore_eos: bool | None = None
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] | None = None
    structured_outputs: StructuredOutputs | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Said by clients, and nothing to us.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    prompt_cache_options: Any = None

    @model_validator(mode="after")
    def _streams(self) -> Generate:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for answers with 'stream': true.")
        return self


class Conversation(Body):
    """What a prompt is made of besides its messages."""

    tools: list[Any] | None = None
    reasoning_effort: Effort | None = None
    thinking: Thinking | None = None
    chat_template_kwargs: TemplateKwargs | None = None


class ChatRequest(Generate, Conversation):
    """POST /v1/chat/completions."""

    messages: Any
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    tool_choice: Any = None
    response_format: ResponseFormat | None = None
    parallel_tool_calls: Any = None
    verbosity: Any = None
    # Refused with a sentence unless null.
    functions: Any = None
    function_call: Any = None
    audio: Any = None
    modalities: Any = None
    prediction: Any = None
    web_search_options: Any = None
    moderation: Any = None

    @model_validator(mode="after")
    def _asks_for_logprobs(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is for answers with 'logprobs': true.")
        return self


class CompletionRequest(Generate):
    """POST /v1/completions."""

    prompt: Annotated[Any, BeforeValidator(_prompts)]
    logprobs: int | None = Field(default=None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    # Refused with a sentence unless they ask for nothing.
    echo: Any = None
    best_of: Any = None
    suffix: Any = None


class TokenizeRequest(Conversation):
    """POST /tokenize: a prompt's text, or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: Any = None
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _is_one(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("expected exactly one of 'prompt' and 'messages'.")
        return self


class DetokenizeRequest(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: Ids
