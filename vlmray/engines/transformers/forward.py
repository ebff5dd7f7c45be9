"""What the model does with a batch: what knows its cache, and when rows leave it.

Shapes: `B` rows of a batch, `G` beginnings among them, `T` tokens of the longest row, `P` patches or images
of all rows.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.cache_utils import Cache

from vlmray.engines.base import failed_completion
from vlmray.engines.forms import explain
from vlmray.engines.logprobs import TokenTexts
from vlmray.engines.rows import Listener, end_ids, read_token
from vlmray.engines.streamed_text import Answer
from vlmray.engines.transformers.batching import have_common_heads
from vlmray.engines.transformers.cache import make_cache
from vlmray.engines.transformers.grammars import Grammars
from vlmray.engines.transformers.in_flight import InFlight
from vlmray.engines.transformers.sampling import RowwiseLogitsProcessor, RowwiseStoppingCriteria
from vlmray.engines.transformers.settings import least_new_tokens, own_processors, plain_config
from vlmray.models.adapters import base_of, use_adapters
from vlmray.models.families.base import Family
from vlmray.models.inputs import join_rows
from vlmray.models.vision import count_levels, encode_images, replace_pixels

_FULL = "full_attention"  # what the cache is made for
_ROOM = 64  # answer tokens that the cache has room for, before it has to be copied


class Forward:
    """Generates for the encoded rows of a batch.

    Args:
        model: An image-text-to-text model in eval mode, or a `PeftModel` around one.
        processor: Its processor.
        family: What is known of the model.
    """

    def __init__(self, model: Any, processor: Any, family: Family) -> None:
        self.model = model
        self._family = family
        self.copies_rows = family.shares_prefix and _attends_to_all(model.config.get_text_config())
        """Whether rows that begin alike go through the model once up to there, and ended ones leave it."""

        self.grammars = Grammars(processor.tokenizer, end_ids(model.generation_config))
        self._processor = processor
        self._texts = TokenTexts(processor.tokenizer)

    def run(self, rows: list[InFlight], listener: Listener) -> None:
        """Generate for rows that share a forward pass; those that have ended leave it."""
        own = self.model.generation_config
        for row in rows:
            self._start_answer(row, own)
        with torch.inference_mode(), self._plain_generation() as config:
            inputs = self._begin(rows)
            while rows:
                self._generate_some(rows, inputs, config, own, listener)
                left = [place for place, row in enumerate(rows) if row.completion is None]
                rows = [rows[place] for place in left]
                self._select(inputs, left)

    def score(self, rows: list[InFlight]) -> torch.Tensor:
        """Return the scores (B, V) of the first token of rows that share a forward pass."""
        with torch.inference_mode(), self._plain_generation() as config:
            inputs = self._begin(rows)
            config.update(max_new_tokens=1, return_dict_in_generate=True, output_logits=True)
            with use_adapters([row.adapter for row in rows]):
                found = self.model.generate(**inputs, generation_config=config)
        scores: torch.Tensor = found.logits[0].float().log_softmax(-1).cpu()
        return scores

    def _start_answer(self, row: InFlight, own: GenerationConfig) -> None:
        """Give a row an answer without a token yet, and the processors of those to come."""
        request = row.request
        row.logprobs.clear()  # of a row that is tried again
        ends = {*(() if request.ignore_eos else end_ids(own)), *request.stop_token_ids}
        least = max(request.min_new_tokens, least_new_tokens(own, row.num_prompt_tokens))
        row.answer = Answer(
            self._processor.tokenizer, row.max_new_tokens, ends, request.stop, request.min_new_tokens
        )
        row.processors = own_processors(
            own, end_ids=ends, num_prompt_tokens=row.num_prompt_tokens, min_new_tokens=least,
            device=self.model.device,
        )  # fmt: skip
        row.matcher = None if request.form is None else self.grammars.matcher(request.form)

    @contextlib.contextmanager
    def _plain_generation(self) -> Iterator[GenerationConfig]:
        """Keep the model's own settings from `generate`, which takes over all that it is not told."""
        model = base_of(self.model)
        own, plain = model.generation_config, plain_config(model.generation_config)
        model.generation_config = plain
        try:
            yield copy.deepcopy(plain)
        finally:
            model.generation_config = own

    def _generate_some(
        self,
        rows: list[InFlight],
        inputs: dict[str, Any],
        config: GenerationConfig,
        own: GenerationConfig,
        listener: Listener,
    ) -> None:
        """Generate until half the rows have ended, or all where none can leave; update the inputs."""
        answers = [row.answer for row in rows if row.answer is not None]
        config.max_new_tokens = max(
            row.max_new_tokens - answer.num_tokens for row, answer in zip(rows, answers, strict=True)
        )
        mask = inputs["attention_mask"]
        choose = RowwiseLogitsProcessor(
            [row.request for row in rows],
            mask,
            own.repetition_penalty or 1.0,
            [answer.num_tokens for answer in answers],
            [row.processors for row in rows],
            [row.matcher for row in rows],
        )
        stop = RowwiseStoppingCriteria(
            len(rows),
            functools.partial(self._read_token, rows, listener, choose),
            num_to_end=-(-len(rows) // 2) if "past_key_values" in inputs else len(rows),
            is_finite=lambda: choose.is_finite,
            note=choose.note,
        )
        with use_adapters([row.adapter for row in rows]):
            ids = self.model.generate(
                **inputs,
                generation_config=config,
                logits_processor=LogitsProcessorList([choose]),
                stopping_criteria=StoppingCriteriaList([stop]),
            )
        inputs["input_ids"] = ids
        inputs["attention_mask"] = pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)

    def _read_token(
        self,
        rows: list[InFlight],
        listener: Listener,
        choose: RowwiseLogitsProcessor,
        index: int,
        token_id: int | None,
    ) -> bool:
        """Add a row's next token to its answer, and have its form follow; tell whether it ends there."""
        row = rows[index]
        if row.matcher is not None and row.matcher.is_error():
            problem = ValueError(explain(row.matcher.get_error()))
            listener.end(row, failed_completion(problem, prompt=row.prompt))
            return True
        found, logprob = choose.logprobs[index], None
        if found is not None and token_id is not None:
            logprob = self._texts.describe(token_id, *found)
        ended = read_token(rows, listener, index, token_id, logprob)
        if row.matcher is not None and token_id is not None and not ended:
            row.matcher.consume_token(token_id)
        return ended

    def _select(self, inputs: dict[str, Any], places: list[int]) -> None:
        """Keep some rows of what `generate` goes on from."""
        if not places:
            return
        kept = torch.tensor(places, device=self.model.device)
        cache = inputs["past_key_values"]
        cache.batch_select_indices(kept)
        self._family.keep_rows(base_of(self.model), kept)
        ids, mask = inputs["input_ids"][kept], inputs["attention_mask"][kept]
        inputs.clear()  # pixels are in the cache by now
        inputs.update(input_ids=ids, attention_mask=mask, past_key_values=cache)

    def _begin(self, rows: list[InFlight]) -> dict[str, Any]:
        """Return what `generate` starts from."""
        if not self.copies_rows:
            return self._join(rows)
        longest = max(row.tail_inputs["input_ids"].shape[1] for row in rows)
        cache = make_cache(longest + min(_ROOM, max(row.max_new_tokens for row in rows)))
        if not have_common_heads(rows):
            with use_adapters([row.adapter for row in rows]):
                return {**self._encode_images(self._join(rows)), "past_key_values": cache}
        return self._prefill(rows, cache)

    def _join(
        self, rows: list[InFlight], part: Callable[[InFlight], Any] = lambda row: row.inputs
    ) -> dict[str, Any]:
        """Pad rows, or a part of each, on the left, and put them on the model's device."""
        pad_id = self._processor.tokenizer.pad_token_id
        inputs = join_rows(
            [part(row) for row in rows], pad_id=pad_id, side="left", layout=self._family.layout
        )
        return {name: tensor.to(self.model.device) for name, tensor in inputs.items()}

    def _encode_images(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Run images through the tower, a few at a time: a batch of many would take far more memory."""
        if "pixel_values" not in inputs or not self._family.takes_image_features:
            return inputs
        model = base_of(self.model)
        features = encode_images(model, inputs["pixel_values"], inputs["image_grid_thw"])
        return replace_pixels(inputs, features, count_levels(model.config))

    def _positions(self, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the positions of padded beginnings, for a model that would count the padding too."""
        if self._family.counts_positions(base_of(self.model)):
            return {}
        return {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}

    def _prefill(self, rows: list[InFlight], cache: Cache) -> dict[str, Any]:
        """Run what rows begin with through the model, once each; return what `generate` goes on from.

        Every row is its beginning, padded on the left, and its rest, padded in between: attention skips
        the padding, and positions are counted without it.
        """
        leaders = list({row.head: row for row in reversed(rows)}.values())
        place = {row.head: index for index, row in enumerate(leaders)}
        heads = self._join(leaders, lambda row: row.head_inputs)
        tails = self._join(rows, lambda row: row.tail_inputs)
        with use_adapters([row.adapter for row in leaders]):
            heads = self._encode_images(heads)
            positions = self._positions(heads["attention_mask"])
            self.model(**heads, **positions, past_key_values=cache, use_cache=True, logits_to_keep=1)
        inputs = {**heads, "past_key_values": cache}
        self._select(inputs, [place[row.head] for row in rows])
        for name in ("input_ids", "attention_mask"):
            inputs[name] = torch.cat([inputs[name], tails[name]], dim=1)
        return inputs


def _attends_to_all(config: Any) -> bool:
    """Tell whether every layer of a language model has full attention, which padding does not disturb."""
    kinds = getattr(config, "layer_types", None)
    return set(kinds) == {_FULL} if kinds else not getattr(config, "sliding_window", None)
