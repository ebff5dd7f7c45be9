"""What a tiny model of any family is made of: a tokenizer, processor files, a template and random weights."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig, PreTrainedTokenizerFast

VOCAB_SIZE = 400  # the placeholder tokens included
TEXT = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}  # fmt: skip
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
CHATML = ("<|im_start|>", "<|im_end|>")

_WORDS = "What Which How many people color is the of in a value red blue green bar year yes no total"


@dataclass(frozen=True, kw_only=True)
class Tiny:
    """A tiny checkpoint of a family, before it is written."""

    config: Mapping[str, Any]
    """Of the model, `model_type` included; names of tokens in braces stand for their ids."""

    preprocessor: Mapping[str, Any]
    processor: Mapping[str, Any] = field(default_factory=dict)
    template: str | None
    tokens: Sequence[str]
    """Special ones, beside those named."""

    named: Mapping[str, str] = field(default_factory=dict)
    """Special tokens that the processor asks the tokenizer for."""

    bos: str | None = None
    """Written by the tokenizer too, where it is named."""

    eos: str
    pad: str
    embedding_scale: float = 1.0
    ends: Sequence[str] = ()
    """What the generation config says beside `eos`."""


def chat(user: str, assistant: str, *, image: str, prompt: str, head: str = "", system: str = "") -> str:
    """Write a template: `user` and `assistant` have a `{}` where the text is, and images stand before it."""
    text = (
        "{% if m['content'] is string %}{{ m['content'] }}{% else %}"
        "{% for p in m['content'] %}{% if p['type'] == 'image' %}" + image + "{% elif p['type'] == 'text' %}"
        "{{ p['text'] }}{% endif %}{% endfor %}{% endif %}"
    )
    turns = f"{{% if m['role'] == 'assistant' %}}{assistant.replace('{}', text)}"
    turns += f"{{% else %}}{user.replace('{}', text)}{{% endif %}}"
    ending = f"{{% if add_generation_prompt %}}{prompt}{{% endif %}}"
    return f"{head}{{% for m in messages %}}{turns}{{% endfor %}}{ending}"


def chatml(*, image: str, space: str = "\n") -> str:
    """Write the template of those who took it from Qwen."""
    return chat(
        f"<|im_start|>user{space}{{}}<|im_end|>\n", "<|im_start|>assistant\n{}<|im_end|>\n",
        image=image, prompt="<|im_start|>assistant\n",
    )  # fmt: skip


def template_of_trl(name: str) -> str:
    """Read the copy of a hub's template that TRL has."""
    spec = importlib.util.find_spec("trl")
    assert spec is not None
    assert spec.origin is not None
    return (Path(spec.origin).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


def make_tokenizer(tiny: Tiny) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on a few words."""
    trained = Tokenizer(BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    named = {"bos_token": tiny.bos, "eos_token": tiny.eos, "pad_token": tiny.pad}
    special = dict.fromkeys(
        token for token in (*named.values(), *tiny.named.values(), *tiny.ends, *tiny.tokens) if token
    )
    trainer = BpeTrainer(
        vocab_size=VOCAB_SIZE, show_progress=False, special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    texts = [f"{word} {word}" for word in _WORDS.split()]
    texts += [" ".join(f"w{chr(97 + n % 26)}{chr(97 + n // 26)}" for n in range(100))] * 2
    trained.train_from_iterator(texts, trainer=trainer)
    if tiny.bos is not None:
        trained.post_processor = TemplateProcessing(
            single=f"{tiny.bos} $A", pair=f"{tiny.bos} $A $B",
            special_tokens=[(tiny.bos, trained.token_to_id(tiny.bos))],
        )  # fmt: skip
    others = [token for token in special if token not in named.values() and token not in tiny.named.values()]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained, **named, **tiny.named, extra_special_tokens=others
    )
    for name, token in tiny.named.items():
        assert getattr(tokenizer, name) == token
    return tokenizer


def write(tiny: Tiny, folder: Path) -> Path:
    """Write a checkpoint folder as the hub has them."""
    tokenizer = make_tokenizer(tiny)
    assert len(tokenizer) <= VOCAB_SIZE
    tokenizer.save_pretrained(folder)
    ids = tokenizer.get_vocab()
    config = AutoConfig.for_model(**_with_ids(tiny.config, ids))
    for part in (config, config.get_text_config()):
        part.bos_token_id = ids.get(tiny.bos) if tiny.bos else None
        part.eos_token_id, part.pad_token_id = ids[tiny.eos], ids[tiny.pad]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
        _draw(model, ids, tiny.embedding_scale)
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, pad_token_id=ids[tiny.pad],
        eos_token_id=[ids[token] for token in (tiny.eos, *tiny.ends)],
    )  # fmt: skip
    model.save_pretrained(folder)
    for name, content in (("preprocessor", tiny.preprocessor), ("processor", tiny.processor)):
        if content:
            (folder / f"{name}_config.json").write_text(json.dumps(content), encoding="utf-8")
    if tiny.template is not None:
        (folder / "chat_template.jinja").write_text(tiny.template, encoding="utf-8")
    return folder


def _with_ids(value: Any, ids: Mapping[str, int]) -> Any:
    if isinstance(value, Mapping):
        return {name: _with_ids(each, ids) for name, each in value.items()}
    return ids[value[1:-1]] if isinstance(value, str) and value.startswith("{") else value


def _draw(model: Any, ids: Mapping[str, int], embedding_scale: float) -> None:
    """Draw weights that keep the scale of what passes through, so that answers differ; some end."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate" in name and parameter.numel() == 1:
                parameter.fill_(1.0)
            elif parameter.dim() > 1:
                parameter.normal_(
                    std=embedding_scale if "embed_tokens" in name else 1.5 / parameter[0].numel() ** 0.5
                )
        head = model.get_output_embeddings().weight
        special = [number for token, number in ids.items() if token[0] in "<[" and len(token) > 2]
        head[special] *= 0.1
        head[model.config.get_text_config().eos_token_id] *= 12
        head *= 2
