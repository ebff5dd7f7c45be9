"""Conversations to prompts and rows: what a chat template writes is structure, what people wrote is text.

    messages -> render -> prompt -> encode -> row

A template puts its special tokens and the texts of a conversation into one string, and a tokenizer that reads
it takes `<|im_end|>` in a question for the end of a turn. So special tokens in a text are written as marks
first, two private characters each, which template and processor pass on as they are. The tokenizer turns them
back into the characters of the token after it has looked for special tokens. A prompt without marks is
encoded by the processor itself, so its ids are what they always are.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tokenizers import normalizers

from vlmray.models.inputs import check_placeholders, encode_text, special_token_options
from vlmray.models.templates.tools import knows_tools, tell_plainly, word_tools
from vlmray.schema import GenerationRequest

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

_ESCAPE = "\U00100000"
"""What marks begin with; where a text itself has it, it is marked too."""

_FIRST = 0x100001


class ChatPrompts:
    """Writes prompts for a model.

    Args:
        processor: As `vlmray.models.processors.load_processor` gives it.
    """

    def __init__(self, processor: Any) -> None:
        self.special_tokens = find_special_tokens(processor)
        """What a text cannot hold as it is."""

        self._processor = processor
        self._marks = {
            token: _ESCAPE + chr(_FIRST + index)
            for index, token in enumerate([*sorted(self.special_tokens), _ESCAPE])
        }
        self._tokens = {mark: token for token, mark in self._marks.items()}
        self._special = match_any(self._marks)
        self._marked = match_any(self._tokens)

    def render(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """Format a conversation with the model's chat template; special tokens in its texts are marked.

        Args:
            messages: Their content is a text, or parts of which those with a `text` are marked.
            **options: Passed to the template.

        Raises:
            ValueError: A text holds a special token that this tokenizer cannot write as characters.
        """
        copies = [
            {**self._mark_all(message), "content": self._mark(message["content"])} for message in messages
        ]
        return str(self._processor.apply_chat_template(copies, **options))

    def render_request(self, request: GenerationRequest, chat_template: str | None = None) -> str:
        """Format what is asked; functions are worded by the template if it knows of any, else as text.

        Args:
            request: What is asked.
            chat_template: Is used in the place of the model's, where there is one.

        Raises:
            ValueError: As of `render`.
        """
        options = template_options(self._processor, request, chat_template)
        messages: Sequence[Mapping[str, Any]] = request.messages
        if request.tools or any("tool_calls" in each or each["role"] == "tool" for each in messages):
            if knows_tools(_template_text(self._processor, chat_template)):
                messages = tell_plainly(messages)
                options |= {"tools": self._mark_all(request.tools)} if request.tools else {}
            else:
                messages = word_tools(messages, request.tools)
        return self.render(messages, **options)

    def readable(self, prompt: str) -> str:
        """Return a prompt with the texts as people wrote them."""
        return self._marked.sub(lambda match: self._tokens[match[0]], prompt) if _ESCAPE in prompt else prompt

    def encode(
        self, prompt: str, images: Sequence[Image] = (), *, continues: bool = False
    ) -> dict[str, torch.Tensor]:
        """Turn a rendered prompt, or a stretch of one, into a row: `vlmray.models.inputs.encode_text`."""
        return encode_text(self.processor_for(prompt), prompt, images, continues=continues)

    def encode_behind_image(self, text: str) -> dict[str, torch.Tensor]:
        """Turn what stands behind an image into a row, as a tokenizer reads it there.

        Alone, some tokenizers would put a space before it.
        """
        image = self._processor.image_token
        ids = self.processor_for(text).tokenizer(
            image + text, add_special_tokens=False, return_tensors="pt", return_token_type_ids=False
        )
        row = {name: tensor[:, 1:] for name, tensor in ids.items()}
        check_placeholders(self._processor, row)
        return row

    def tokenize(self, prompt: str, *, continues: bool = False) -> list[int]:
        """Return the tokens of a rendered prompt, or a stretch of one, in which an image is one."""
        tokenizer = self.processor_for(prompt).tokenizer
        ids = tokenizer(prompt, **special_token_options(tokenizer, prompt, continues=continues))["input_ids"]
        return list(ids)

    def processor_for(self, *prompts: str) -> Any:
        """Return the processor that encodes rendered prompts, or stretches of them."""
        return self._unmarking if any(_ESCAPE in prompt for prompt in prompts) else self._processor

    def _mark(self, content: Any) -> Any:
        if isinstance(content, str):
            return self._special.sub(self._mark_of, content)
        if isinstance(content, Mapping):  # a part; the copy is the template's, which rewrites some
            return {**content, "text": self._mark(content["text"])} if "text" in content else dict(content)
        return content and [self._mark(part) for part in content]

    def _mark_all(self, value: Any) -> Any:
        """Mark all texts of a JSON value."""
        if isinstance(value, str):
            return self._mark(value)
        if isinstance(value, Mapping):
            kind: Any = type(value)  # to templates, arguments of calls are more than a mapping
            return kind((self._mark(name), self._mark_all(each)) for name, each in value.items())
        return [self._mark_all(each) for each in value] if isinstance(value, list | tuple) else value

    def _mark_of(self, match: re.Match[str]) -> str:
        if match[0] in self._unwritable:
            raise ValueError(
                f"a text holds the special token {match[0]!r}, which this model's tokenizer cannot write as "
                "characters; remove it"
            )
        return self._marks[match[0]]

    @functools.cached_property
    def _unwritable(self) -> set[str]:
        """What a tokenizer would find again after it has turned marks back."""
        tokenizer = self._processor.tokenizer
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            return set(self._marks)
        return {str(token) for token in tokenizer.added_tokens_decoder.values() if token.normalized}

    @functools.cached_property
    def _unmarking(self) -> Any:
        """The processor, with a tokenizer that turns marks back; made when a text first has one."""
        processor = copy.copy(self._processor)
        processor.tokenizer = copy.deepcopy(self._processor.tokenizer)
        backend = processor.tokenizer.backend_tokenizer
        steps = [normalizers.Replace(mark, token) for mark, token in self._tokens.items()]
        steps += [backend.normalizer] if backend.normalizer is not None else []
        backend.normalizer = normalizers.Sequence(steps)
        return processor


def template_options(
    processor: Any, request: GenerationRequest, chat_template: str | None = None
) -> dict[str, Any]:
    """Return what the chat template is told beside the messages, of variables those that it names.

    Args:
        processor: Has the model's template.
        request: Names variables.
        chat_template: Is used in the place of the model's, where there is one.
    """
    text = _template_text(processor, chat_template)
    known = {
        name: value
        for name, value in request.chat_template_kwargs.items()
        if re.search(rf"\b{re.escape(name)}\b", text)
    }
    return known | {
        "add_generation_prompt": request.add_generation_prompt,
        "continue_final_message": request.continue_final_message,
        **({"chat_template": chat_template} if chat_template else {}),
    }


def _template_text(processor: Any, chat_template: str | None) -> str:
    template = chat_template or processor.chat_template
    return str(template.get("default", "") if isinstance(template, dict) else template or "")


def find_special_tokens(processor: Any) -> set[str]:
    """Return the tokens that are no text to a model: its tokenizer's, and its processor's placeholders."""
    tokenizer = processor.tokenizer
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    placeholders = {value for name, value in vars(processor).items() if name.endswith("_token")}
    special = {*tokenizer.all_special_tokens, *(str(token) for token in added if token.special)}
    return {token for token in special | placeholders if isinstance(token, str) and token}


def match_any(texts: Mapping[str, object] | set[str]) -> re.Pattern[str]:
    """Match any of the texts, of two that start alike the longer one."""
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
