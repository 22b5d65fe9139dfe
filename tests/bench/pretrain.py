"""One pretraining step: ours against the original's order of work on transformers' own modules.

    python -m tests.bench.pretrain [--device cuda] [--size S|B] [--batch N] [--rounds N]
                                   [--threads N] [--json FILE]

The alternative computes the same losses with separate forwards, as the original release does:
image encoder, text encoder, image-grounded encoder on the pairs, again on both kinds of negatives,
decoder, and the momentum encoders. Same weights, batch and hard negatives; losses must agree to
1e-4 (bf16: 2e-2) before anything is timed. A step is forward, backward, AdamW and the momentum
copies. Rounds alternate in one process, medians count; each side's peak memory is taken in a
process of its own. On a GPU both run under bf16 autocast. The matrix rate is that of one large
product in the same run; a step's FLOPs are those that torch counts in ours.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import BlipTextConfig, BlipVisionConfig
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel, BlipTextModel

from stages.models.config import MedConfig, TextConfig, VisionConfig
from stages.models.losses import MedLosses
from stages.models.med import Med
from tests.bench.memory import Peak

ALPHA = 0.4
WEIGHT_DECAY = 0.05
# name: width, layers, heads, pixels, patch, vocabulary, queue
SIZES = {
    "tiny": (32, 2, 2, 32, 8, 200, 64),
    "S": (384, 12, 6, 224, 16, 30524, 57_600),
    "B": (768, 12, 12, 224, 16, 30524, 57_600),
}
SIDES = ("ours", "separate forwards")


class Inputs(NamedTuple):
    pixels: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    image_index: Tensor
    text_index: Tensor


def med_config(size: str) -> MedConfig:
    width, layers, heads, pixels, patch, vocabulary, queue = SIZES[size]
    vision = VisionConfig(
        image_size=pixels,
        patch_size=patch,
        width=width,
        layers=layers,
        heads=heads,
        mlp_width=4 * width,
    )
    # Without dropout, or the sides would draw other masks.
    text = TextConfig(
        vocab_size=vocabulary,
        width=width,
        layers=layers,
        heads=heads,
        mlp_width=4 * width,
        vision_width=width,
        dropout=0.0,
        dec_token_id=vocabulary - 2,
        enc_token_id=vocabulary - 1,
    )
    return MedConfig(vision=vision, text=text, queue_size=queue, mask_same_image=False)


def make_inputs(config: MedConfig, batch: int, device: torch.device) -> Inputs:
    """Random pictures and texts of 8 to 20 tokens, padded to the longest, as loaders give them."""
    random = torch.Generator().manual_seed(1)
    size = config.vision.image_size
    lengths = torch.randint(8, 21, (batch,), generator=random)
    ids = torch.randint(104, config.text.vocab_size - 2, (batch, 20), generator=random)
    mask = torch.arange(20) < lengths[:, None]
    order = torch.arange(batch)
    made = Inputs(
        torch.randn(batch, 3, size, size, generator=random),
        (ids * mask)[:, : lengths.max()],
        mask.long()[:, : lengths.max()],
        order.roll(1),
        order.roll(2),
    )
    return Inputs(*(part.to(device) for part in made))


class Separate(nn.Module):
    """BLIP's pretraining step (models/blip_pretrain.py of the release) on transformers' modules."""

    def __init__(self, config: MedConfig) -> None:
        super().__init__()
        self.config = config
        vision, text = _vision_config(config), _text_config(config)
        self.vision_model, self.vision_model_m = BlipVisionModel(vision), BlipVisionModel(vision)
        self.text_encoder = BlipTextModel(text, add_pooling_layer=False)
        self.text_encoder_m = BlipTextModel(text, add_pooling_layer=False)
        self.text_decoder = BlipTextLMHeadModel(text)
        self.text_decoder.bert.embeddings = self.text_encoder.embeddings
        layers = zip(
            self.text_decoder.bert.encoder.layer, self.text_encoder.encoder.layer, strict=True
        )
        for ours, theirs in layers:
            for part in ("crossattention", "intermediate", "output"):
                setattr(ours, part, getattr(theirs, part))
        head = self.text_decoder.cls.predictions
        head.decoder.weight = self.text_encoder.embeddings.word_embeddings.weight
        head.decoder.bias = head.bias
        width, size = config.text.width, config.projection_dim
        for name in ("vision_proj", "text_proj", "vision_proj_m", "text_proj_m"):
            setattr(self, name, nn.Linear(width, size))
        self.itm_head = nn.Linear(width, 2)
        self.temp = nn.Parameter(torch.tensor(config.temperature))
        self.register_buffer("image_queue", torch.empty(size, config.queue_size))
        self.register_buffer("text_queue", torch.empty(size, config.queue_size))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.int64))
        for name in ("vision_model", "text_encoder", "vision_proj", "text_proj"):
            getattr(self, f"{name}_m").requires_grad_(False)

    @torch.no_grad()
    def begin_step(self) -> None:
        self.temp.clamp_(0.001, 0.5)
        for name in ("vision_model", "vision_proj", "text_encoder", "text_proj"):
            online, copy = getattr(self, name), getattr(self, f"{name}_m")
            for new, old in zip(online.parameters(), copy.parameters(), strict=True):
                old.mul_(self.config.momentum).add_(new, alpha=1 - self.config.momentum)

    def forward(self, inputs: Inputs) -> MedLosses:
        images = self.vision_model(inputs.pixels).last_hidden_state
        itc = self._itc(images, inputs)
        return MedLosses(itc, self._itm(images, inputs), self._lm(images, inputs))

    def _itc(self, images: Tensor, inputs: Inputs) -> Tensor:
        ids, mask = inputs.input_ids, inputs.attention_mask
        texts = self.text_encoder(ids, attention_mask=mask).last_hidden_state
        image = F.normalize(self.vision_proj(images[:, 0]).float(), dim=-1)
        text = F.normalize(self.text_proj(texts[:, 0]).float(), dim=-1)
        with torch.no_grad():
            images_m = self.vision_model_m(inputs.pixels).last_hidden_state
            texts_m = self.text_encoder_m(ids, attention_mask=mask).last_hidden_state
            image_m = F.normalize(self.vision_proj_m(images_m[:, 0]).float(), dim=-1)
            text_m = F.normalize(self.text_proj_m(texts_m[:, 0]).float(), dim=-1)
        with torch.autocast(images.device.type, enabled=False):
            all_images = torch.cat([image_m.T, self.image_queue.detach().clone()], dim=1)
            all_texts = torch.cat([text_m.T, self.text_queue.detach().clone()], dim=1)
            with torch.no_grad():
                hard = torch.zeros(len(image), all_texts.shape[1], device=image.device)
                hard.fill_diagonal_(1)
                soft_i = F.softmax(image_m @ all_texts / self.temp, dim=1)
                soft_t = F.softmax(text_m @ all_images / self.temp, dim=1)
            i2t, t2i = image @ all_texts / self.temp, text @ all_images / self.temp
            targets = [ALPHA * soft + (1 - ALPHA) * hard for soft in (soft_i, soft_t)]
            losses = [
                -(F.log_softmax(scores, dim=1) * target).sum(1).mean()
                for scores, target in zip((i2t, t2i), targets, strict=True)
            ]
        start = int(self.queue_ptr)
        self.image_queue[:, start : start + len(image)] = image_m.T
        self.text_queue[:, start : start + len(text)] = text_m.T
        self.queue_ptr[0] = (start + len(image)) % self.config.queue_size
        return (losses[0] + losses[1]) / 2

    def _itm(self, images: Tensor, inputs: Inputs) -> Tensor:
        ids, mask = inputs.input_ids.clone(), inputs.attention_mask
        ids[:, 0] = self.config.text.enc_token_id

        def grounded(texts: Tensor, masks: Tensor, seen: Tensor) -> Tensor:
            states: Tensor = self.text_encoder(
                texts, attention_mask=masks, encoder_hidden_states=seen
            ).last_hidden_state
            return states[:, 0]

        positive = grounded(ids, mask, images)
        negative = grounded(
            torch.cat([ids, ids[inputs.text_index]]),
            torch.cat([mask, mask[inputs.text_index]]),
            torch.cat([images[inputs.image_index], images]),
        )
        labels = torch.zeros(3 * len(ids), dtype=torch.int64, device=ids.device)
        labels[: len(ids)] = 1
        return F.cross_entropy(self.itm_head(torch.cat([positive, negative])), labels)

    def _lm(self, images: Tensor, inputs: Inputs) -> Tensor:
        ids = inputs.input_ids.clone()
        ids[:, 0] = self.config.text.dec_token_id
        labels = ids.masked_fill(inputs.attention_mask == 0, -100)
        loss: Tensor = self.text_decoder(
            ids,
            attention_mask=inputs.attention_mask,
            encoder_hidden_states=images,
            labels=labels,
        ).loss
        return loss


def _vision_config(config: MedConfig) -> BlipVisionConfig:
    vision = config.vision
    return BlipVisionConfig(
        hidden_size=vision.width,
        intermediate_size=vision.mlp_width,
        num_hidden_layers=vision.layers,
        num_attention_heads=vision.heads,
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        layer_norm_eps=vision.eps,
    )


def _text_config(config: MedConfig) -> BlipTextConfig:
    text = config.text
    return BlipTextConfig(
        vocab_size=text.vocab_size,
        hidden_size=text.width,
        encoder_hidden_size=text.vision_width,
        intermediate_size=text.mlp_width,
        num_hidden_layers=text.layers,
        num_attention_heads=text.heads,
        max_position_embeddings=text.max_positions,
        layer_norm_eps=text.eps,
        hidden_dropout_prob=text.dropout,
        attention_probs_dropout_prob=text.dropout,
        label_smoothing=config.label_smoothing,
        pad_token_id=text.pad_token_id,
        bos_token_id=text.dec_token_id,
        sep_token_id=text.sep_token_id,
        eos_token_id=text.sep_token_id,
    )


Step = Callable[[], MedLosses]


def make_step(side: str, size: str, batch: int, device: torch.device) -> Step:
    """A whole training step of one side; every call moves the weights on."""
    config = med_config(size)
    torch.manual_seed(0)
    med = Med(config)
    model: Med | Separate = med
    if side != "ours":
        model = Separate(config)
        missing, unexpected = model.load_state_dict(med.state_dict(), strict=False)
        assert not missing and unexpected == ["image_id_queue"], (missing, unexpected)
        del med
    model = model.to(device).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=1e-4, weight_decay=WEIGHT_DECAY, fused=True if side == "ours" else None
    )
    inputs = make_inputs(config, batch, device)

    def step() -> MedLosses:
        model.begin_step()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            if isinstance(model, Med):
                negatives = inputs.image_index, inputs.text_index
                losses: MedLosses = model(*inputs[:3], ALPHA, negatives=negatives)
            else:
                losses = model(inputs)
        losses.total.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return MedLosses(*(loss.detach() for loss in losses))

    return step


def check_equal(sides: dict[str, MedLosses], tolerance: float) -> None:
    """Stop unless each loss of both sides is the same to ``tolerance``."""
    ours, other = (torch.stack(list(sides[name])).cpu() for name in SIDES)
    if not torch.allclose(ours, other, atol=tolerance, rtol=0):
        sys.exit(f"the losses differ: {ours.tolist()} against {other.tolist()}")


def seconds(step: Step, device: torch.device) -> float:
    started = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def matrix_rate(device: torch.device, rounds: int) -> float:
    """FLOP/s of one large matrix product, bf16 on a GPU and float32 on a CPU."""
    cuda = device.type == "cuda"
    width, dtype = (8192, torch.bfloat16) if cuda else (1536, torch.float32)
    left, right = (torch.randn(width, width, device=device, dtype=dtype) for _ in range(2))

    def product() -> MedLosses:
        return MedLosses(left @ right, left, right)

    product()
    return 2 * width**3 / statistics.median(seconds(product, device) for _ in range(rounds))


def peak_memory(side: str, options: argparse.Namespace) -> float:
    """Peak bytes of one side alone: of the process on a CPU, of the GPU's memory otherwise."""
    command = [sys.executable, "-m", "tests.bench.pretrain", "--side", side]
    for name in ("device", "size", "batch", "threads"):
        command += [f"--{name}", str(getattr(options, name))]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE) as process,
        Peak(process.pid) as peak,
    ):
        output = process.communicate()[0]
    if process.returncode != 0:
        sys.exit(f"{side}: ended with {process.returncode}")
    return float(output) or peak.bytes


def run_side(options: argparse.Namespace) -> None:
    """Three steps of one side; prints the peak of the GPU's memory, 0 on a CPU."""
    device = torch.device(options.device)
    step = make_step(options.side, options.size, options.batch, device)
    for _ in range(3):
        step()
    print(torch.cuda.max_memory_allocated() if device.type == "cuda" else 0)


def measure(options: argparse.Namespace) -> list[dict[str, object]]:
    """One row a metric, ours against the other."""
    device = torch.device(options.device)
    steps = {side: make_step(side, options.size, options.batch, device) for side in SIDES}
    first = {side: step() for side, step in steps.items()}
    check_equal(first, tolerance=2e-2 if device.type == "cuda" else 1e-4)
    rate = matrix_rate(device, 10)
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(options.rounds):
        for side, step in steps.items():
            times[side].append(seconds(step, device))
    with FlopCounterMode(display=False) as counter:
        steps["ours"]()
    speed = {side: options.batch / statistics.median(times[side]) for side in SIDES}
    steps.clear()
    memory = {side: peak_memory(side, options) / 2**30 for side in SIDES}
    flops = counter.get_total_flops() * speed["ours"] / options.batch
    return [
        _row("images/s", speed, "images/s"),
        _row("peak memory", memory, "GiB"),
        {"metric": "rate of the step", "value": flops / 1e12, "unit": "TFLOP/s",
         "against": f"one matrix product, {rate / 1e12:.3g} TFLOP/s", "ratio": flops / rate},
    ]  # fmt: skip


def _row(metric: str, values: dict[str, float], unit: str) -> dict[str, object]:
    ours, other = (values[side] for side in SIDES)
    return {"metric": metric, "value": ours, "unit": unit,
            "against": f"{SIDES[1]}, {other:.3g} {unit}", "ratio": ours / other}  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--size", choices=SIZES, help="default: S on a CPU, B on a GPU")
    parser.add_argument("--batch", type=int, help="default: 16 on a CPU, 128 on a GPU")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    cuda = options.device == "cuda"
    options.size = options.size or ("B" if cuda else "S")
    options.batch = options.batch or (128 if cuda else 16)
    torch.set_num_threads(options.threads)
    if options.side:
        run_side(options)
        return
    table = measure(options)
    for row in table:
        print(
            f"{row['metric']:<18} {row['value']:8.3f} {row['unit']:<9} "
            f"{row['ratio']:.2f} × {row['against']}"
        )
    if options.json:
        options.json.write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
