"""Muon with AdamW behaves as one optimizer: to schedules, checkpoints and the trainer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from helpers.finetuning import curve, make_config, train
from vlmray.training.optimizers import MuonAdamW, build_muon


class Model(nn.Module):
    """An embedding, two hidden layers with biases, a norm and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(10, 8)
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 10)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.second(self.first(self.embedding(ids)).relu())
        return self.head(self.norm(hidden))


IDS = torch.tensor([1, 2, 3, 4, 5])


def step(model: Model, optimizer: MuonAdamW) -> float:
    loss = nn.functional.cross_entropy(model(IDS), IDS.flip(0))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def test_hidden_matrices_go_to_muon_and_everything_else_to_adamw() -> None:
    model = Model()
    model.second.weight.requires_grad_(False)
    matrices, others = (group["params"] for group in build_muon(model, lr=0.1).param_groups)
    assert [id(p) for p in matrices] == [id(model.first.weight)]
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for p in matrices + others} == trained
    assert len(matrices + others) == len(trained)


def test_a_schedule_reaches_both_parts() -> None:
    model = Model()
    optimizer = build_muon(model, lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 0.0)
    step(model, optimizer)
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    schedule.base_lrs = [0.1, 0.1]
    schedule.lr_lambdas = [lambda _: 1.0, lambda _: 1.0]
    schedule.step()
    step(model, optimizer)
    assert not any(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_it_goes_on_from_a_saved_state() -> None:
    model = Model()
    optimizer = build_muon(model, lr=0.05, weight_decay=0.01, betas=(0.9, 0.95))
    for _ in range(3):
        step(model, optimizer)
    saved = {name: value.clone() for name, value in model.state_dict().items()}, optimizer.state_dict()
    saved = torch.load(_stored(saved), weights_only=True)
    expected = [step(model, optimizer) for _ in range(5)]
    other = Model()
    other.load_state_dict(saved[0])
    resumed = build_muon(other, lr=0.9)
    resumed.load_state_dict(saved[1])
    assert [step(other, resumed) for _ in range(5)] == expected
    assert expected[-1] < expected[0]


def _stored(state: Any) -> Any:
    import io

    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return buffer


@pytest.mark.parametrize(("use_peft", "learning_rate"), [(True, 3e-2), (False, 3e-3)])
def test_it_trains_a_model(tiny_model: Any, use_peft: bool, learning_rate: float) -> None:
    config = make_config(
        tiny_model, use_peft=use_peft, optim="muon", learning_rate=learning_rate, max_steps=12
    )
    losses = curve(train(config))
    assert losses[-1] < 0.8 * losses[0]
