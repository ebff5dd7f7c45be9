"""What is said of models over several datasets: better here, not worse there."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from vlmray.benchmark.scoreboard import GroupDifference, GroupMargin, Verdict
from vlmray.benchmark.verdicts import Results
from vlmray.metrics.significance import holm

SuiteVerdict = Literal["not worse", "not shown"] | Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A model against the first on one dataset; p-values are corrected for all models and datasets."""

    dataset: str
    difference: GroupDifference
    margin: GroupMargin | None
    """Where the dataset has a margin, that is what is asked."""

    @property
    def model(self) -> str:
        """The model."""
        return self.difference.model

    @property
    def verdict(self) -> SuiteVerdict:
        """Say what came of it."""
        if self.margin is None:
            return self.difference.verdict
        return "not worse" if self.margin.holds else "not shown"

    @property
    def p_value(self) -> float:
        """The p-value of what was asked."""
        return self.difference.p_corrected if self.margin is None else self.margin.p_corrected


@dataclass(frozen=True, kw_only=True)
class SuiteResults:
    """Several comparisons as one."""

    results: Mapping[str, Results]
    """Of each dataset, by its name."""

    findings: tuple[Finding, ...]
    elapsed_s: float
    options: Mapping[str, Any]

    @property
    def models(self) -> list[str]:
        """Names of the models, the one compared with first."""
        return list(next(iter(self.results.values())).models)

    @property
    def num_answered(self) -> int:
        """Answers to all datasets."""
        return sum(each.num_answered for each in self.results.values())

    @property
    def sentences(self) -> list[str]:
        """One sentence for each model."""
        return [_sentence(self.models[0], model, self.of(model)) for model in self.models[1:]]

    def of(self, model: str) -> list[Finding]:
        """Return what was found of a model."""
        return [finding for finding in self.findings if finding.model == model]

    def to_json(self) -> dict[str, Any]:
        """Return all figures as JSON values."""
        return {
            "verdicts": self.sentences,
            "findings": [
                {"dataset": each.dataset, "verdict": each.verdict, **_figures(each)} for each in self.findings
            ],
            "datasets": {name: each.to_json() for name, each in self.results.items()},
            "elapsed_s": self.elapsed_s,
        }


def find(results: Mapping[str, Results]) -> tuple[Finding, ...]:
    """Ask of every dataset whether models are better, or not worse where it has a margin (Holm over all)."""
    found = [
        Finding(
            dataset=name,
            difference=board.difference(model, board.metrics[0]),
            margin=next((each for each in board.margins if each.model == model), None),
        )
        for name, board in ((name, each.board) for name, each in results.items()) if board is not None
        for model in board.models[1:]
    ]  # fmt: skip
    corrected = holm([_alone(each) for each in found])
    return tuple(_corrected(each, p, len(found)) for each, p in zip(found, corrected, strict=True))


def _alone(finding: Finding) -> float:
    """Return the p-value as if nothing else had been asked."""
    return finding.difference.difference.p_value if finding.margin is None else finding.margin.test.p_value


def _corrected(finding: Finding, p_value: float, num_comparisons: int) -> Finding:
    if finding.margin is None:
        difference = dataclasses.replace(
            finding.difference, p_corrected=p_value, num_comparisons=num_comparisons
        )
        return dataclasses.replace(finding, difference=difference)
    return dataclasses.replace(finding, margin=dataclasses.replace(finding.margin, p_corrected=p_value))


def _figures(finding: Finding) -> dict[str, Any]:
    figures = dataclasses.asdict(finding)
    return {name: figures[name] for name in ("difference", "margin")}


def _sentence(base: str, model: str, findings: Sequence[Finding]) -> str:
    """Say of a model where it is what: worse first, for that decides."""
    said = {
        "worse": f"worse than {base} on",
        "not shown": f"not shown to be no worse than {base} by more than the margin on",
        "better": f"better than {base} on",
        "not worse": "not worse by more than the margin on",
        "no significant change": "not shown to differ on",
        "too few images": "compared with too few images on",
    }
    parts = [
        f"{words} {', '.join(names)}"
        for verdict, words in said.items()
        if (names := [each.dataset for each in findings if each.verdict == verdict])
    ]
    return f"{model} is {'; '.join(parts)}."
