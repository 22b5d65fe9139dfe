"""Muon beside AdamW: which parameters each moves, and that a killed run goes on with both."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from stages.base import LocalContext
from stages.models.med import Med
from stages.pretrain import PretrainLosses
from stages.training.config import TrainingConfig
from stages.training.loop import train
from stages.training.optimizer import Muon, Optimizers, hidden_matrices, orthogonal
from stages.training.parallel import Alone
from tests.toy_pairs import DyingContext, Killed
from tests.unit.test_training_loop import set_up


def names_of(med: Med, parameters: list[torch.Tensor]) -> set[str]:
    wanted = {id(p) for p in parameters}
    return {name for name, p in med.named_parameters() if id(p) in wanted}


def test_muon_is_torchs_to_its_bfloat16() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((24, 24), (24, 24), (48, 24), (24, 48), (48, 24))
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    ours, theirs = ([torch.nn.Parameter(m.clone()) for m in start] for _ in range(2))
    optimizers = (Muon(ours, 0.02, 0.1), torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1))
    for _ in range(4):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape, generator=generator)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for before, one, other in zip(start, ours, theirs, strict=True):
        moved = (one - before).norm()
        assert moved > 0.02
        assert (one - other).norm() < 0.02 * moved


def test_orthogonal_makes_singular_values_one() -> None:
    matrices = torch.randn(3, 40, 16, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonal(matrices))
    assert values.min() > 0.6
    assert values.max() < 1.3
    assert torch.equal(orthogonal(torch.zeros(1, 4, 8)), torch.zeros(1, 4, 8))


def test_hidden_matrices_are_the_layers_and_projections(tmp_path: Path) -> None:
    _, med, _ = set_up(tmp_path)
    found = hidden_matrices(med)
    names = names_of(med, found)
    assert len({id(p) for p in found}) == len(found)
    assert {"vision_proj.weight", "text_proj.weight"} <= names
    assert not any("embedding" in name or "itm_head" in name or "bias" in name for name in names)
    assert not any("predictions.decoder" in name for name in names)
    for part in ("self_attn.qkv", "mlp.fc1", "crossattention.self.key", "intermediate.dense"):
        assert any(part in name for name in names), part


def test_both_follow_the_schedule_and_frozen_weights_stay(tmp_path: Path) -> None:
    _, med, _ = set_up(tmp_path)
    before = {name: p.detach().clone() for name, p in med.named_parameters()}
    frozen = med.vision_model.encoder.layers[0].self_attn.qkv.weight.requires_grad_(False)
    parameters = [p for p in med.parameters() if p.requires_grad]
    optimizers = Optimizers(parameters, med, lr=1e-3, weight_decay=0.0, muon_lr=0.02)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    optimizers.step(5e-4)
    moved = {name: float((p.detach() - before[name]).norm()) for name, p in med.named_parameters()}
    hidden = names_of(med, hidden_matrices(med))
    # An orthogonal update of (m, n) has singular values of about 1: norm near sqrt(min(m, n)).
    for name, p in med.named_parameters():
        if p is frozen or not p.requires_grad:
            assert moved[name] == 0
        elif name in hidden:
            scale = max(1, p.shape[0] / p.shape[1]) ** 0.5 * min(p.shape) ** 0.5
            assert 0.6 < moved[name] / (0.01 * scale) < 1.3, name
        else:
            assert moved[name] == pytest.approx(5e-4 * p.numel() ** 0.5, rel=0.01), name
        assert p.grad is None


def test_without_muon_all_is_adamw(tmp_path: Path) -> None:
    _, med, _ = set_up(tmp_path)
    parameters = [p for p in med.parameters() if p.requires_grad]
    states = Optimizers(parameters, med, lr=1e-3, weight_decay=0.0).state(Alone(med), keep=True)
    assert len(states) == 1
    assert sum(len(group["params"]) for group in states[0]["param_groups"]) == len(parameters)


def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    found = []
    for at in (None, 7):
        pairs, med, config = set_up(tmp_path, muon_lr=0.02)
        if at is not None:
            with pytest.raises(Killed):
                dying = DyingContext(tmp_path / "checkpoints", at)
                train("pretrain", (), PretrainLosses(med), pairs, config, dying)
            pairs, med, config = set_up(tmp_path, muon_lr=0.02)
        ctx = LocalContext(tmp_path / "checkpoints") if at else LocalContext()
        train("pretrain", (), PretrainLosses(med), pairs, config, ctx)
        found.append(med.state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_parted_matrices_are_refused() -> None:
    with pytest.raises(ValidationError, match="muon_lr needs whole matrices"):
        TrainingConfig(muon_lr=0.02, parallel="fsdp2")
