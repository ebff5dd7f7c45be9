"""The rows that cross module borders, and nothing else.

    Sample -> GenerationRequest -> Completion -> Score

A `Sample` is a dataset row in the project's own terms, a `GenerationRequest` is what an engine is
asked, a `Completion` what it answers, a `Score` what one metric says of it. They hold plain values,
so they pickle, compare and print; between Ray stages the same values travel as Arrow columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypedDict

if TYPE_CHECKING:
    from PIL.Image import Image

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One question about any number of images, at the end of a conversation if it has one."""

    sample_id: str
    """Split and row index in the source (`test-000042`): the same whatever was sliced or sharded."""

    question: str

    answers: tuple[str, ...] = ()
    """Accepted answers, the best one counts; empty where the split publishes none."""

    images: tuple[bytes | str, ...] = ()
    """Encoded image bytes, URLs, paths or data URIs, in the order of their places."""

    messages: tuple[dict[str, Any], ...] = ()
    """The conversation that a row brings, up to the question, its last turn; empty where the prompt template
    words the question."""

    settings: dict[str, Any] = field(default_factory=dict)
    """How a row that is a request asks to be answered, as keywords of a `GenerationRequest`, and `model`."""

    choices: tuple[str, ...] = ()
    """Options of a multiple-choice question, in the order of their letters."""

    metric: str | None = None
    """How this row is scored, where that is not how its dataset is."""

    family: str | None = None
    """Group for breakdowns: human or augmented in ChartQA, the question family in the charts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """What an answer has to be; one of the fields is given."""

    schema: str | None = None
    """JSON that keeps this JSON schema, which is written as JSON itself."""

    choices: tuple[str, ...] = ()
    """One of these texts."""

    regex: str | None = None
    """A text that this expression matches from its beginning to its end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How an answer is drawn, and how long it may be."""

    max_new_tokens: int = 512

    min_new_tokens: int = 0
    """The answer neither ends nor stops before it has so many tokens."""

    temperature: float = 0.0
    """0 is greedy."""

    top_p: float = 1.0
    """Draw among the likeliest tokens that together have this probability."""

    top_k: int = 0
    """Draw among so many of the likeliest tokens; 0: among all."""

    min_p: float = 0.0
    """Draw among tokens of at least this share of the likeliest one's probability."""

    repetition_penalty: float | None = None
    """Divides the scores of tokens that prompt or answer hold; None: the model's own."""

    presence_penalty: float = 0.0
    """Taken off the scores of tokens that the answer holds."""

    frequency_penalty: float = 0.0
    """Taken off the score of a token for each time that the answer holds it."""

    seed: int = 0
    """Seeds this request alone: a sampled text does not depend on the batch it was drawn in."""

    form: Form | None = None
    """What the answer has to be; it ends where it is that, or unfinished where it has no tokens left."""

    num_logprobs: int | None = None
    """With each token of the answer, give its log-probability and those of so many of the likeliest tokens in
    its place, at most 20; None: give none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest(Sampling):
    """What an engine is asked: chat messages, their images, and how to sample."""

    request_id: str

    messages: list[dict[str, Any]]
    """Chat messages whose content is a list of parts; `{"type": "image"}` marks each image's place."""

    images: list[Image | bytes] = field(default_factory=list)
    """RGB images or encoded bytes, one for each placeholder, in order. An engine decodes bytes itself,
    ahead of the model; one that asks a server takes URLs too, which the server fetches."""

    stop: tuple[str, ...] = ()
    """The answer ends before the first of these texts."""

    stop_token_ids: tuple[int, ...] = ()
    """The answer ends with the first of these tokens, which is counted and is no text."""

    ignore_eos: bool = False
    """Go on where the model would end its answer."""

    add_generation_prompt: bool = True
    """Whether the prompt ends with the head of a new answer."""

    continue_final_message: bool = False
    """Whether the prompt ends within the last message, which the answer goes on with."""

    tools: tuple[dict[str, Any], ...] = ()
    """Functions that the answer may call, as OpenAI's API and chat templates write them."""

    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Variables for the model's chat template, as far as it knows them."""

    adapter: str | None = None
    """Name of a loaded adapter; None asks the base model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """A token and how likely the model held it, whatever it was drawn by.

    That is the logarithm of the softmax of the model's own scores, before penalties, temperature, top_p and
    what else changes them; of an answer that has a form, among the tokens that the form allows there.
    """

    token: str
    """As a text of its own."""

    data: bytes | None
    """What it adds to the text in UTF-8, which may be a part of a character; None: it is no text."""

    logprob: float
    top: tuple[TokenLogprob, ...] = ()
    """The likeliest tokens in its place, the likeliest first, as many as were asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What an engine answers to one request."""

    text: str
    prompt: str
    """The formatted prompt as the model's chat template wrote it, one placeholder an image."""

    num_prompt_tokens: int
    """Tokens the model read, visual ones included."""

    num_completion_tokens: int
    """Tokens the model wrote, the end token included."""

    finish_reason: FinishReason

    num_cached_tokens: int | None = field(default=None, compare=False)
    """Prompt tokens that the engine had from earlier requests; None where it does not say."""

    logprobs: tuple[TokenLogprob, ...] | None = field(default=None, compare=False)
    """Of each token that the model wrote, the end token included; None where they were not asked for, or the
    server that answers did not give them."""

    error: str | None = None
    """Why there is no answer; set exactly when `finish_reason` is "error"."""

    error_code: str | None = None
    """What programs know the error by, where it has a name: `context_length_exceeded`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What one metric says of one prediction, from 0 (wrong) to 1 (right)."""

    metric: str
    value: float


class Row(TypedDict, total=False):
    """A question on its way from a dataset to a result; every stage adds its columns."""

    sample_id: str
    row_index: int
    question: str
    choices: list[str]
    answers: list[str]
    family: str | None
    prompt: str | None
    prediction: str | None
    parsed: str | None
    """The answer where JSON was asked for and it is that."""

    keeps_form: bool | None
    """Whether the answer is what was asked for; None where any text would do."""

    metric: str | None
    score: float | None
    samples: list[str] | None
    """All answers, where several were drawn; the prediction is the first of those that most of them say."""

    sample_scores: list[float] | None
    """What each of them is worth."""

    agreement: float | None
    """Share of them that say what the prediction says."""

    num_prompt_tokens: int | None
    num_completion_tokens: int | None
    """Tokens of all answers that were drawn."""

    confidence: float | None
    """Probability of the whole answer: that of all its tokens together; None where it is not known."""

    min_token_probability: float | None
    """That of the answer's least likely token."""

    logprobs: str | None
    """Log-probabilities of its tokens as JSON, where the row is a request that asks for them."""

    finish_reason: FinishReason | None
    error: str | None
    """Why there is no answer; the last column of a result. What follows is left behind on the way."""

    num_cached_tokens: int | None
    taken_from: Literal["run", "cache"] | None
    """Where the answer is from, where the row itself was not asked: of the run, or of an earlier one."""

    images: list[bytes | None]
    """Encoded, in the order of their places; None for one that is still to be fetched."""

    image_urls: list[str | None]
    """Of images that are URLs; None for the others."""

    jpegs: list[bytes | None]
    """The images as they are kept; None for one that no JPEG can hold."""

    conversation: str | None
    """The messages that the row brings, as JSON."""

    own_metric: str | None
    """How this row is scored, where that is not how its dataset is."""

    settings: str | None
    """What the row says of its answer, as JSON."""

    messages: str | None
    """What is asked, as JSON."""


def text_of(turn: Mapping[str, Any]) -> str:
    """Return the text of a turn: its images apart, all parts together."""
    return "".join(part["text"] for part in parts_of(turn) if part["type"] == "text")


def parts_of(turn: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the parts of a turn, of which a text alone is one."""
    content = turn["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content
