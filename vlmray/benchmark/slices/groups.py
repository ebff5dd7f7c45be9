"""What samples are broken down by: everything that is known of them before anybody answers."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from vlmray.benchmark.samples import SampleFacts
from vlmray.reports.errors import NO_FAMILY

Groups = dict[str, list[int]]
"""Places of samples by the name of their group."""

_NUMBER = re.compile(r"[-+]?[$€£]?\s*\d[\d,.]*\s*%?")


def break_down(samples: Sequence[SampleFacts]) -> dict[str, Groups]:
    """Return the groups of each kind that tells samples apart, in order."""
    kinds = {
        "family": _by_name(samples, lambda sample: sample.family or NO_FAMILY),
        "answer": _by_name(samples, lambda sample: answer_type(sample.answers)),
        "question": _by_thirds([len(sample.question) for sample in samples], "characters"),
        "image size": _by_thirds([sample.num_pixels for sample in samples], "pixels"),
    }
    return {kind: groups for kind, groups in kinds.items() if len(groups) > 1}


def answer_type(answers: Sequence[str]) -> str:
    """Tell what kind of answer is expected, by the first accepted one."""
    text = answers[0].strip()
    if text.lower() in ("yes", "no"):
        return "yes or no"
    return "number" if _NUMBER.fullmatch(text) else "words"


def _by_name(samples: Sequence[SampleFacts], name_of: Callable[[SampleFacts], str]) -> Groups:
    """Sort by name, what has none last."""
    groups: Groups = {}
    for place, sample in enumerate(samples):
        groups.setdefault(name_of(sample), []).append(place)
    return dict(sorted(groups.items(), key=lambda item: (item[0] == NO_FAMILY, item[0])))


def _by_thirds(values: Sequence[int | None], unit: str) -> Groups:
    """Cut where thirds of the samples end; those without a value are in no group, those alike in one."""
    known = [value for value in values if value is not None]
    if not known:
        return {}
    cuts = np.quantile(known, (1 / 3, 2 / 3), method="inverted_cdf").astype(int).tolist()
    bounds = sorted({*cuts, max(known)})
    names = [f"up to {bounds[0]:,} {unit}"]
    names += [f"{low + 1:,} to {high:,} {unit}" for low, high in pairwise(bounds)]
    groups: Groups = {name: [] for name in names}
    for place, value in enumerate(values):
        if value is not None:
            groups[names[int(np.searchsorted(bounds, value))]].append(place)
    return groups
