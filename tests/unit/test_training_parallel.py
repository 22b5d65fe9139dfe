"""Two workers, replicated or sharded, do what one does with the same global batch."""

import os
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed
import torch.multiprocessing

from stages.base import LocalContext, last_folder
from stages.finetune import (
    CaptionerFinetune,
    CaptionerLosses,
    FilterFinetune,
    FilterLosses,
    train_only,
)
from stages.models.med import Med
from stages.models.text import fitted_to, load_tokenizer
from stages.pretrain import PretrainLosses
from stages.training.config import TrainingConfig
from stages.training.data import Pairs
from stages.training.loop import CHECKPOINT, Losses, train
from stages.training.parallel import Replicated
from stages.training.swaps import WordSwaps
from tests.toy_pairs import COLOURS, png, sample, toy_med, toy_tokenizer, write_tar

COMMON: dict[str, Any] = {
    "batch_size": 8,
    "steps": 4,
    "lr": 1e-3,
    "augmentation": "none",
    "log_every": 1,
    "checkpoint_every_steps": 2,
    "data_threads": 0,
    "alpha_epochs": 0.5,
}
CASES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp2": {"parallel": "fsdp2"},
    "ddp, two batches a step, clipped": {"accumulate": 2, "clip_grad_norm": 0.5},
    "fsdp2, two batches a step, clipped": {
        "accumulate": 2,
        "clip_grad_norm": 0.5,
        "parallel": "fsdp2",
        "gradient_checkpointing": True,
    },
    "ddp, one line": {"log_every": 4},
    "ddp, near misses": {"near_misses": 2},
    "ddp, captions": {"captions": True},
    "fsdp2, captions, clipped": {"captions": True, "clip_grad_norm": 0.5, "parallel": "fsdp2"},
    "ddp, own negatives": {"global_negatives": False},
    "fsdp2, own negatives": {"global_negatives": False, "parallel": "fsdp2"},
}


class WorkerContext(LocalContext):
    """One of several workers that torch.distributed connects."""

    def __init__(self, rank: int, size: int, checkpoints: Path) -> None:
        super().__init__(checkpoints)
        self.rank, self.world_size = rank, size


def tar_of_uneven_texts(file: Path) -> Path:
    """Texts of two to seven words, some images with two of them."""
    samples = []
    for number in range(18):
        colour = list(COLOURS)[number % 6]
        texts = [f"{colour} square", f"a picture of a {colour} square on the wall"]
        chosen = texts if number % 3 == 0 else [texts[number % 2]]
        samples.append(sample(str(number), png(colour, number), chosen))
    return write_tar(file, samples)


Trained = dict[str, Any]


def trained(
    folder: Path, case: dict[str, Any], checkpoints: Path, rank: int = 0, size: int = 1
) -> Trained:
    """Losses by step and final weights, in double precision."""
    tokenizer = load_tokenizer(folder / "tokenizer")
    pairs = Pairs([folder / "web.tar"], tokenizer, max_tokens=12, max_words=30)
    options = {**COMMON, **case}
    near_misses, captions_only = options.pop("near_misses", 0), options.pop("captions", False)
    torch.manual_seed(0)
    config = toy_med(vision=toy_med().vision.model_copy(update={"layers": 2}))
    med = Med(config.model_copy(update={"text": fitted_to(config.text, tokenizer)})).double()
    losses: Losses = PretrainLosses(med)
    if near_misses:
        train_only(med, FilterFinetune.parts)
        captions = [ids.astype(np.int64) for ids in pairs.tokens]
        swaps = WordSwaps(captions, pairs.image_of.tolist(), frozenset(range(5)))
        losses = FilterLosses(med, swaps, near_misses, seed=0, rank=rank)
    if captions_only:
        train_only(med, CaptionerFinetune.parts)
        losses = CaptionerLosses(med, prompt_length=2)
    ctx = WorkerContext(rank, size, checkpoints)
    log = train("pretrain", ("itc", "itm", "lm"), losses, pairs, TrainingConfig(**options), ctx)
    assert all(type(parameter) is torch.nn.Parameter for parameter in med.parameters())
    return {
        "loss": [log[name].to_pylist() for name in ("loss", "loss_itc", "loss_itm", "loss_lm")],
        "state": {name: tensor.clone() for name, tensor in med.state_dict().items()},
    }


def worker(rank: int, folder: Path, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    results = {}
    for name, case in CASES.items():
        results[name] = trained(folder, case, folder / name, rank, 2)
        torch.distributed.barrier()
    # The checkpoint in the middle of a run is still there: go on from it, the other way.
    for before, after in (("ddp", "fsdp2"), ("fsdp2", "ddp")):
        case = CASES[after]
        results[f"{before}, then {after}"] = trained(folder, case, folder / before, rank, 2)
    # A line of the log that began before the checkpoint.
    results["one line, resumed"] = trained(
        folder, CASES["ddp, one line"], folder / "ddp, one line", rank, 2
    )
    torch.save(results, folder / f"rank{rank}.pt")
    torch.save(gradients_by_batch(rank), folder / f"gradients{rank}.pt")
    torch.distributed.destroy_process_group()


def gradients_by_batch(rank: int) -> list[float]:
    """Of a replicated weight, after each of a step's two batches."""
    linear = torch.nn.Linear(1, 1, bias=False)
    strategy, seen = Replicated(linear), []
    for last in (False, True):
        with strategy.batch(last):
            strategy.model(torch.tensor([[rank + 1.0]])).sum().backward()
        assert linear.weight.grad is not None
        seen.append(linear.weight.grad.item())
    return seen


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two workers made of every case."""
    folder = tmp_path_factory.mktemp("world")
    toy_tokenizer(folder / "tokenizer")
    tar_of_uneven_texts(folder / "web.tar")
    torch.multiprocessing.spawn(worker, (folder, free_port()), nprocs=2)
    return folder


def assert_same(one: Trained, other: Trained) -> None:
    np.testing.assert_allclose(one["loss"], other["loss"], rtol=1e-6)
    assert one["state"].keys() == other["state"].keys()
    for name, tensor in one["state"].items():
        torch.testing.assert_close(tensor, other["state"][name], rtol=0, atol=1e-8, msg=name)


ALIKE = [name for name in CASES if "own" not in name] + ["ddp, then fsdp2", "fsdp2, then ddp"]


@pytest.mark.parametrize("name", ALIKE)
def test_two_workers_do_what_one_does(world: Path, tmp_path: Path, name: str) -> None:
    alone = trained(world, CASES.get(name, {}), tmp_path)
    for rank in range(2):
        assert_same(alone, torch.load(world / f"rank{rank}.pt")[name])


def test_a_resumed_run_logs_what_all_workers_lost(world: Path) -> None:
    for rank in range(2):
        results = torch.load(world / f"rank{rank}.pt")
        assert_same(results["ddp, one line"], results["one line, resumed"])


def test_own_negatives_are_another_loss_that_both_strategies_share(world: Path) -> None:
    results = [torch.load(world / f"rank{rank}.pt") for rank in range(2)]
    replicated = results[0]["ddp, own negatives"]
    assert_same(replicated, results[0]["fsdp2, own negatives"])
    assert_same(replicated, results[1]["ddp, own negatives"])
    assert replicated["loss"][1][0] != pytest.approx(results[0]["ddp"]["loss"][1][0], rel=1e-5)


def test_a_checkpoint_is_the_same_file_either_way(world: Path) -> None:
    def state(name: str) -> dict[str, Any]:
        folder = last_folder(world / name)
        assert folder is not None
        return dict(torch.load(folder / CHECKPOINT, weights_only=True))

    one, other = state("ddp"), state("fsdp2")
    assert one.keys() == other.keys() and one["step"] == other["step"] == 2
    torch.testing.assert_close(one["model"], other["model"], rtol=0, atol=1e-8)
    states = [[entry["state"] for entry in found["optimizers"]] for found in (one, other)]
    assert states[0]
    torch.testing.assert_close(*states, rtol=0, atol=1e-8)
    sizes = [(last_folder(world / name) or world).joinpath(CHECKPOINT) for name in ("ddp", "fsdp2")]
    assert abs(sizes[0].stat().st_size - sizes[1].stat().st_size) < 10_000, "tied tensors once"


def test_gradients_travel_once_a_step(world: Path) -> None:
    assert [torch.load(world / f"gradients{rank}.pt") for rank in range(2)] == [[1, 3], [2, 3]]
