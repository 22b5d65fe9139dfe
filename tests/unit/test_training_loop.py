"""The loop itself: what it logs, when it stops, and two workers that act as one."""

import os
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
import torch.multiprocessing

from stages.base import LocalContext
from stages.errors import ConfigError, TrainingError
from stages.finetune import CaptionerFinetune, CaptionerLosses, FilterLosses
from stages.models.losses import MedLosses
from stages.models.med import Med
from stages.models.text import fitted_to, load_tokenizer
from stages.models.workers import Workers
from stages.pretrain import PretrainLosses, PretrainStage
from stages.schemas import TRAINING_LOG
from stages.training.config import CaptionerFinetuneConfig, PretrainConfig, TrainingConfig
from stages.training.data import Batch, Images, Loader, Pairs
from stages.training.loop import CHECKPOINT, Losses, train
from tests.toy_pairs import SIZE, DyingContext, Killed, toy_med, toy_tar, toy_tokenizer

CONFIG = TrainingConfig(
    batch_size=6,
    steps=12,
    lr=1e-3,
    augmentation="none",
    log_every=5,
    checkpoint_every_steps=4,
    data_threads=0,
)


def set_up(
    tmp_path: Path, *, images: int = 24, **changes: Any
) -> tuple[Pairs, Med, TrainingConfig]:
    tokenizer = load_tokenizer(toy_tokenizer(tmp_path / "tokenizer"))
    tar = toy_tar(tmp_path / "web.tar", images)
    pairs = Pairs([tar], tokenizer, max_tokens=12, max_words=30)
    config = toy_med()
    torch.manual_seed(0)
    med = Med(config.model_copy(update={"text": fitted_to(config.text, tokenizer)}))
    return pairs, med, CONFIG.model_copy(update=changes)


class PoisonedLosses(PretrainLosses):
    """Turns the loss of one step into something else."""

    def __init__(self, med: Med, step: int, factor: float) -> None:
        super().__init__(med)
        self.step, self.factor = step, factor

    def forward(self, batch: Batch, alpha: float, workers: Workers | None) -> MedLosses:
        losses = super().forward(batch, alpha, workers)
        if batch.step < self.step:
            return losses
        return MedLosses(losses.itc * self.factor, losses.itm, losses.lm)


def test_the_log_says_what_was_trained(tmp_path: Path) -> None:
    pairs, med, config = set_up(tmp_path)
    log = train("pretrain", ("itc", "lm"), PretrainLosses(med), pairs, config, LocalContext())
    assert log.schema == TRAINING_LOG
    rows = log.to_pylist()
    assert [row["step"] for row in rows] == [5, 10, 12]
    assert all(row["loss_itm"] is None and row["loss_lm"] > 0 for row in rows)
    assert all(row["images_per_second"] > 0 for row in rows)
    assert rows[0]["lr"] > rows[-1]["lr"] > 0


def test_it_learns(tmp_path: Path) -> None:
    pairs, med, config = set_up(tmp_path, steps=80, lr=3e-3, batch_size=12)
    log = train("pretrain", ("lm",), PretrainLosses(med), pairs, config, LocalContext())
    losses = log["loss_lm"].to_pylist()
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(("factor", "said"), [(float("nan"), "is nan"), (1e6, "the loss rose")])
def test_a_loss_that_goes_wrong_stops_training(tmp_path: Path, factor: float, said: str) -> None:
    pairs, med, config = set_up(tmp_path, steps=30)
    ctx = LocalContext(tmp_path / "checkpoints")
    with pytest.raises(TrainingError, match=said) as caught:
        train("pretrain", (), PoisonedLosses(med, 13, factor), pairs, config, ctx)
    message = str(caught.value)
    assert "\n" not in message and "lower lr" in message
    if said == "is nan":
        assert "step 14 of 30" in message
    last = ctx.resume_from()
    assert last is not None
    state = torch.load(last / CHECKPOINT, weights_only=True)
    assert state["step"] == 12
    assert all(t.isfinite().all() for t in state["model"].values() if t.is_floating_point())


@pytest.mark.parametrize("stage", ["pretrain", "finetune_filter"])
def test_weights_that_are_not_finite_stop_training_by_its_own_error(
    tmp_path: Path, stage: str
) -> None:
    """Features that are NaN come to the draw of hard negatives before there is a loss."""
    pairs, med, config = set_up(tmp_path)
    losses = PretrainLosses(med) if stage == "pretrain" else FilterLosses(med, None, 0, 0, 0)
    with torch.no_grad():
        med.vision_proj.weight.fill_(float("nan"))
    with pytest.raises(TrainingError, match=rf"{stage}: step 1 of 12: the loss is nan; lower lr"):
        train(stage, (), losses, pairs, config, LocalContext())


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(tmp_path: Path) -> None:
    class Exploding(PretrainLosses):
        def forward(self, batch: Batch, alpha: float, workers: Workers | None) -> MedLosses:
            losses = super().forward(batch, alpha, workers)
            if batch.step == 7:
                losses.lm.register_hook(lambda grad: grad * float("inf"))
            return losses

    pairs, med, config = set_up(tmp_path)
    ctx = LocalContext(tmp_path / "checkpoints")
    with pytest.raises(TrainingError, match=r"step 8 .* gradient"):
        train("pretrain", (), Exploding(med), pairs, config, ctx)
    last = ctx.resume_from()
    assert last is not None
    assert torch.load(last / CHECKPOINT, weights_only=True)["step"] == 4
    assert all(p.isfinite().all() for p in med.parameters())


def test_clipping_and_bfloat16_run(tmp_path: Path) -> None:
    pairs, med, config = set_up(tmp_path, precision="bfloat16", clip_grad_norm=0.1)
    log = train("pretrain", ("lm",), PretrainLosses(med), pairs, config, LocalContext())
    assert log["loss"].to_pylist()[-1] < log["loss"].to_pylist()[0]
    assert med.vision_proj.weight.dtype == torch.float32


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_computing_layers_again_changes_no_bit(tmp_path: Path, precision: str) -> None:
    found = []
    for again in (False, True):
        pairs, med, config = set_up(
            tmp_path, gradient_checkpointing=again, precision=precision, seed=4
        )
        for part in med.modules():
            for name in ("dropout", "drop_path"):
                if hasattr(part, name):
                    setattr(part, name, 0.1)
        train("pretrain", (), PretrainLosses(med), pairs, config, LocalContext())
        found.append(med.state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_computing_layers_again_keeps_less(tmp_path: Path) -> None:
    def kept(again: bool) -> int:
        pairs, med, _ = set_up(tmp_path)
        for stack in (med.vision_model, med.text_encoder, med.text_decoder.bert):
            stack.checkpointing = again
        sizes: list[int] = []

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            sizes.append(tensor.nbytes)
            return tensor

        batch = Loader(pairs, Images(pairs.shards, SIZE, "none", 0), batch_size=6, seed=0).batch(0)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            PretrainLosses(med)(batch, 0.4, None)
        return sum(sizes)

    assert kept(again=True) < 0.7 * kept(again=False)


@pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="torch.compile needs a C++ compiler"
)
def test_compiled_layers_train_the_same_model(tmp_path: Path) -> None:
    logs = []
    for compiled in (False, True):
        pairs, med, config = set_up(tmp_path, compile=compiled, steps=3, log_every=1)
        losses = CaptionerLosses(med, prompt_length=1)
        logs.append(train("captioner", ("lm",), losses, pairs, config, LocalContext()))
        assert list(med.state_dict()) == list(set_up(tmp_path)[1].state_dict())
    torch._dynamo.reset()
    assert logs[0]["loss"].to_pylist() == pytest.approx(logs[1]["loss"].to_pylist(), rel=1e-4)


def test_a_step_in_several_batches(tmp_path: Path) -> None:
    """LM alone is a mean over pairs, all texts being as long: cut or whole, it is the same."""
    logs, weights = [], []
    for parts in (1, 3):
        pairs, med, config = set_up(tmp_path, accumulate=parts, steps=4, log_every=1)
        losses = CaptionerLosses(med.double(), prompt_length=1)
        logs.append(train("captioner", ("lm",), losses, pairs, config, LocalContext()))
        weights.append(med.state_dict())
    for name in ("step", "loss", "loss_lm", "lr"):
        assert logs[0][name].to_pylist() == pytest.approx(logs[1][name].to_pylist(), rel=1e-6)
    assert all(torch.allclose(weights[0][n], weights[1][n], atol=1e-9) for n in weights[0])


def test_a_step_in_several_batches_moves_momentum_once_and_queues_all(tmp_path: Path) -> None:
    pairs, med, config = set_up(tmp_path, accumulate=3, steps=1, lr=1e-9)
    with torch.no_grad():
        med.text_proj_m.weight.zero_()
    online = med.text_proj.weight.detach().clone()
    train("pretrain", (), PretrainLosses(med), pairs, config, LocalContext())
    torch.testing.assert_close(med.text_proj_m.weight, online * 0.005)
    assert med.queue_ptr.item() == 6


def test_a_killed_run_of_several_batches_goes_on_bit_for_bit(tmp_path: Path) -> None:
    found = []
    for at in (None, 7):
        pairs, med, config = set_up(tmp_path, accumulate=2, log_every=1)
        if at is not None:
            with pytest.raises(Killed):
                dying = DyingContext(tmp_path / "checkpoints", at)
                train("pretrain", (), PretrainLosses(med), pairs, config, dying)
            pairs, med, config = set_up(tmp_path, accumulate=2, log_every=1)
        ctx = LocalContext(tmp_path / "checkpoints") if at else LocalContext()
        train("pretrain", (), PretrainLosses(med), pairs, config, ctx)
        found.append(med.state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_losses_that_are_not_defined_are_a_bug(tmp_path: Path) -> None:
    _, med, _ = set_up(tmp_path)
    with pytest.raises(TypeError, match="abstract"):
        Losses(med)


class WorkerContext(LocalContext):
    """One of several workers that torch.distributed connects."""

    def __init__(self, rank: int, world_size: int) -> None:
        super().__init__()
        self.rank, self.world_size = rank, world_size


def test_a_batch_that_cannot_be_shared_out_is_refused(tmp_path: Path) -> None:
    pairs, med, config = set_up(tmp_path)
    with pytest.raises(ConfigError, match=r"pretrain\.batch_size: 6 pairs .* 4 workers"):
        train("pretrain", (), PretrainLosses(med), pairs, config, WorkerContext(0, 4))


def test_texts_that_the_model_cannot_hold_are_refused(tmp_path: Path) -> None:
    _, med, config = set_up(tmp_path)
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    tar = toy_tar(tmp_path / "long.tar", words="a {} square" + " on the wall" * 20)
    pairs = Pairs([tar], tokenizer, max_tokens=50, max_words=60)
    with pytest.raises(ConfigError, match="50 tokens do not fit the model's 40 positions"):
        train("pretrain", (), PretrainLosses(med), pairs, config, LocalContext())


def pretrain_config(tmp_path: Path) -> PretrainConfig:
    return PretrainConfig(
        **CONFIG.model_dump(), tokenizer=str(tmp_path / "tokenizer"), model=toy_med()
    )


def captioner_config() -> CaptionerFinetuneConfig:
    return CaptionerFinetuneConfig(**CONFIG.model_dump(), image_size=SIZE, dropout=0.0)


def worker(rank: int, tmp_path: Path, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    ctx = WorkerContext(rank, 2)
    out = tmp_path / f"rank{rank}"
    out.mkdir()
    tars = [tmp_path / "web.tar"]
    CaptionerFinetune(captioner_config()).run({"med": [tmp_path / "med"], "train": tars}, out, ctx)
    pairs, med, config = set_up(out)
    train("pretrain", (), PretrainLosses(med), pairs, config, ctx)
    torch.save(med.state_dict(), out / "pretrained.pt")
    torch.distributed.destroy_process_group()


def worker_of_its_own_pairs(rank: int, tmp_path: Path, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    pairs, med, config = set_up(tmp_path / f"rank{rank}", images=24 - rank)
    try:
        train("pretrain", (), PretrainLosses(med), pairs, config, WorkerContext(rank, 2))
    except TrainingError as error:
        (tmp_path / f"rank{rank}" / "error").write_text(str(error))
    torch.distributed.destroy_process_group()


def test_workers_that_do_not_hold_the_same_pairs_are_stopped(tmp_path: Path) -> None:
    for rank in range(2):
        (tmp_path / f"rank{rank}").mkdir()
    torch.multiprocessing.spawn(worker_of_its_own_pairs, (tmp_path, free_port()), nprocs=2)
    for rank in range(2):
        said = (tmp_path / f"rank{rank}" / "error").read_text()
        assert said.startswith("pretrain: the workers read from 23 to 24 pairs")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_two_workers_train_one_model(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    toy_tokenizer(tmp_path / "tokenizer")
    tar = toy_tar(tmp_path / "web.tar")
    made, alone = tmp_path / "made", tmp_path / "alone"
    for folder in (made, alone):
        folder.mkdir()
    PretrainStage(pretrain_config(tmp_path)).run({"train": [tar]}, made, LocalContext())
    (made / "med").rename(tmp_path / "med")
    CaptionerFinetune(captioner_config()).run(
        {"med": [tmp_path / "med"], "train": [tar]}, alone, LocalContext()
    )
    torch.multiprocessing.spawn(worker, (tmp_path, free_port()), nprocs=2)

    # LM looks at each pair alone and all texts are as long: two workers do what one does.
    one = load_file(alone / "captioner" / "model.safetensors")
    two = load_file(tmp_path / "rank0" / "captioner" / "model.safetensors")
    assert one.keys() == two.keys()
    assert all(torch.allclose(one[name], two[name], atol=2e-5) for name in one)
    assert not (tmp_path / "rank1" / "captioner").exists()

    first, second = (
        torch.load(tmp_path / f"rank{rank}" / "pretrained.pt", weights_only=True)
        for rank in range(2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first["queue_ptr"].item() == 12 * 6 % 24, "each worker queues what all have seen"
