"""Captioning and filtering: images a second, memory, and how far the hardware's limit is.

    python -m tests.bench.capfilt [--device cuda] [--dtype bfloat16] [--images N] [--batch N ...]
                                  [--threads N] [--resize-threads N] [--rounds N]
                                  [--exact | --store | --memory N] [--quick] [--json FILE]

One run, the same random BLIP-base weights (384 px, 20 new tokens, one caption by nucleus sampling,
two texts scored by ITM and ITC) for

- ours, the best of ``--batch``, and on a CPU ours with int8 linear layers;
- transformers one image at a time, as tutorials do it: `generate` of one image, the matching model
  called once for each text;
- transformers batched, in the same dtype, the best of ``--batch``: `generate` with its cache, and
  one call of the matching model for all pairs of a batch. It gives the ITM score only, which costs
  it less than what ours gives;
- data-juicer's operators, where ``py-data-juicer`` is installed, as they are: the captioner goes on
  to the end of the text or 128 tokens, and both read the pictures from files.

Each runs alone in a process of its own, which begins with a batch that is not timed, and all of
them in turn ``--rounds`` times, each at the ``--batch`` size that suits it best for captions, and
for scores, which its line says; on a CPU 2, 4 and 8 unless given, 8 otherwise.
Pictures are decoded already; resizing them is timed, and done ahead in ``--resize-threads`` (one on
a CPU; for a GPU as many as there are CPUs, 16 at most) for ours and for transformers batched. The
last lines say what captioning and scoring come to one after the other. The floor is
`tests.bench.floor`'s.

With ``--exact`` the script checks instead that decoding steps as CUDA graphs give the tokens of
eager ones, and counts the captions that another batch size, and on a CPU int8, change, over 500
pictures unless ``--images`` says otherwise, with ``--quick`` on tiny random weights, with
``--captioner`` on trained ones and with ``--pictures`` on those of a folder; with ``--store`` it
captions and scores shards from store to store through the engine;
with ``--memory N`` it watches the memory of caption, filter and embed stages over N images of
640x480.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from PIL import Image
from transformers import BlipConfig

from stages.models.captioner import Captioner
from stages.models.config import GenerationConfig
from tests.bench import blip, capfilt_engine, floor
from tests.bench.capfilt_contenders import (
    NEW_TOKENS,
    Setting,
    contenders,
    decoded,
    generation,
)

_ALTERNATIVE = "transformers, batched"


def measure(kind: str, name: str, setting: Setting, count: int, quick: bool) -> tuple[float, float]:
    """(images a second, GiB at most) in a process of its own; in this one where ``quick``."""
    if quick:
        return _measured(kind, name, setting, count, quick)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
        return alone.submit(_measured, kind, name, setting, count, quick).result()


def _measured(
    kind: str, name: str, setting: Setting, count: int, quick: bool
) -> tuple[float, float]:
    torch.set_num_threads(setting.threads)
    torch.manual_seed(0)
    images, run = decoded(count, quick), contenders(kind)[name](setting)
    run(images[: setting.batch])
    started = time.perf_counter()
    run(images)
    rate = count / (time.perf_counter() - started)
    if setting.device == "cuda":
        return rate, torch.cuda.max_memory_allocated() / 2**30
    # Not getrusage's: its maximum goes back to the process that started this one.
    lines = Path("/proc/self/status").read_text().splitlines()
    most = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    return rate, most / 2**20


@dataclass(frozen=True)
class Tried:
    """One contender in one round, at the batch size that suited it best."""

    rate: float
    """Images a second."""
    memory: float
    """GiB at most."""
    batch: str
    """Images at once."""
    floor: float
    """Images a second at the hardware's limit, as it was just then."""


def compare(options: argparse.Namespace, folder: Path) -> list[dict[str, object]]:
    """All contenders in turn, ``--rounds`` times over: machines change speed meanwhile, so ratios
    are taken within a round."""
    torch.set_num_threads(options.threads)
    rows: list[dict[str, object]] = []
    measured: dict[str, list[dict[str, Tried]]] = {}
    for kind in options.kinds:
        measured[kind] = _rounds(kind, options, folder)
        rows += _told(kind, measured[kind])
    if len(measured) > 1:
        both = list(zip(*measured.values(), strict=True))
        shared = [label for label in both[0][0] if all(label in kind for kind in both[0])]
        together = [{label: _after_another(*(kind[label] for kind in kinds)) for label in shared}
                    for kinds in both]  # fmt: skip
        rows += _told(" + ".join(measured), together)
    return rows


def _rounds(kind: str, options: argparse.Namespace, folder: Path) -> list[dict[str, Tried]]:
    entered = _entered(kind, options, folder)
    rounds = [{label: _best(kind, *entered[label], options) for label in entered}]
    # Later rounds keep to the batch size that was best, and turn the order round each time.
    kept = {
        label: (name, [setting for setting in settings if str(setting.batch) == first.batch])
        for (label, (name, settings)), first in zip(
            entered.items(), rounds[0].values(), strict=True
        )
    }
    for number in range(1, options.rounds):
        order = list(kept)[:: -1 if number % 2 else 1]
        rounds.append({label: _best(kind, *kept[label], options) for label in order})
    return rounds


def _told(kind: str, rounds: list[dict[str, Tried]]) -> list[dict[str, object]]:
    rows = [_row(kind, label, rounds) for label in rounds[0]]
    for row in rows:
        print(_line(row), flush=True)
    return rows


def _after_another(*kinds: Tried) -> Tried:
    """What it comes to where every image goes through each kind in turn."""
    return Tried(
        rate=1 / sum(1 / tried.rate for tried in kinds),
        memory=max(tried.memory for tried in kinds),
        batch="/".join(dict.fromkeys(tried.batch for tried in kinds)),
        floor=1 / sum(1 / tried.floor for tried in kinds),
    )


def _entered(
    kind: str, options: argparse.Namespace, folder: Path
) -> dict[str, tuple[str, list[Setting]]]:
    """Label → contender and the settings that it tries."""
    dtype = getattr(torch, options.dtype)
    first = Setting(
        folder, options.device, dtype, options.batch[0], options.threads,
        resize_threads=options.resize_threads,
    )  # fmt: skip
    sized = [replace(first, batch=batch) for batch in options.batch]
    entered = {"transformers, one at a time": ("transformers", [replace(sized[0], batch=1)])}
    entered |= {f"{name}, batched": (name, sized) for name in contenders(kind) if name != "ours"}
    entered["ours"] = ("ours", sized)
    if options.device == "cpu" and options.dtype == "float32":
        entered["ours, int8"] = ("ours", [replace(s, int8=True) for s in sized])
    return entered


def _best(kind: str, name: str, settings: list[Setting], options: argparse.Namespace) -> Tried:
    found = []
    for setting in settings:
        rate, memory = measure(kind, name, setting, options.images, options.quick)
        least = _floor(kind, setting, options.quick)
        found.append(Tried(rate, memory, str(setting.batch), 1 / least))
    return max(found, key=lambda tried: tried.rate)


def _row(kind: str, label: str, rounds: list[dict[str, Tried]]) -> dict[str, object]:
    """Medians over the rounds; the ratio's least and most beside it."""
    mine = [tried[label] for tried in rounds]
    ratios = [tried[label].rate / tried[_ALTERNATIVE].rate for tried in rounds]
    return {
        "metric": f"{kind}: {label}",
        "value": median(tried.rate for tried in mine),
        "unit": "images/s",
        "batch": mine[0].batch,
        "memory_gib": max(tried.memory for tried in mine),
        "floor_images_s": median(tried.floor for tried in mine),
        "share_of_floor": median(tried.rate / tried.floor for tried in mine),
        "against": _ALTERNATIVE,
        "ratio": median(ratios),
        "ratios": ratios,
    }


def _floor(kind: str, setting: Setting, quick: bool) -> float:
    """Seconds an image of ``kind`` at the least."""
    config = BlipConfig.from_pretrained(setting.captioner)
    machine = floor.measure(setting.device, setting.dtype, setting.int8, quick=quick)
    if kind == "captions":
        prompt = len(Captioner(setting.captioner).prompt_ids(GenerationConfig()))
        whole = setting.dtype.itemsize  # of what attention reads, which stays in floats
        sizes = prompt, NEW_TOKENS, setting.batch, 1 if setting.int8 else whole, whole
        ways = (floor.caption_work(config, *sizes, absorbed=way) for way in (False, True))
        return min(map(machine.floor, ways))
    # Words of the benchmark's texts are one token each; [CLS] and [SEP] come on top.
    lengths = tuple(len(text.split()) + 2 for text in blip.texts(1)[0])
    return machine.floor(floor.filter_work(config, lengths))


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['metric']:<40} {row['value']:9.3f} images/s  batch {row['batch']:>7}  "
        f"{row['memory_gib']:6.2f} GiB  {row['share_of_floor']:6.1%} of the floor's "
        f"{row['floor_images_s']:.2f} images/s  "
        f"x{row['ratio']:.2f} ({min(row['ratios']):.2f} to {max(row['ratios']):.2f})"
    )


def _pictures(folder: Path | None, count: int, quick: bool) -> list[Image.Image]:
    if folder is None:
        return decoded(count, quick)
    files = sorted(file for file in folder.rglob("*") if file.suffix in (".jpg", ".png"))
    return [Image.open(file).convert("RGB") for file in files[:count]]


def exact(options: argparse.Namespace, folder: Path) -> list[dict[str, object]]:
    """Graphs against eager steps, one batch size against another, and on a CPU int8 layers."""
    images = _pictures(options.pictures, options.images, options.quick)
    size = options.batch[0]
    small, rounds = max(1, size // 3), (options.device, options.dtype) == ("cpu", "float32")
    where = options.captioner or folder / "captioner", options.device, getattr(torch, options.dtype)
    captioner = Captioner(*where, size)
    rows: list[dict[str, object]] = []
    for method in ("nucleus", "beam", "greedy"):
        config = GenerationConfig(method=method)  # type: ignore[arg-type]
        found = {}
        for graphed in (True, False):
            captioner.graphed = graphed
            found[graphed] = captioner(images, config=config)
        others = {"eager": found[False]}
        others[f"batch {small}"] = Captioner(*where, small)(images, config=config)
        if rounds:
            others["int8"] = Captioner(*where, size, int8=True)(images, config=config)
        for name, texts in others.items():
            differ = sum(a != b for a, b in zip(found[True], texts, strict=True))
            row = {"metric": f"{method}: captions that differ", "value": differ / len(images),
                   "unit": "share", "against": name, "ratio": None}  # fmt: skip
            rows.append(row)
            kinds = len({text for own in found[True] for text in own})
            print(f"{method:<8} graphs, batch {size} / {name}: {differ} of {len(images)} differ; "
                  f"{kinds} different captions")  # fmt: skip
    return rows


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--images", type=int)
    parser.add_argument("--captioner", type=Path, help="a folder of trained weights, for --exact")
    parser.add_argument("--pictures", type=Path, help="a folder of pictures, for --exact")
    parser.add_argument("--batch", type=int, nargs="+", metavar="N")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--resize-threads", type=int, metavar="N")
    parser.add_argument("--rounds", type=int, default=1, metavar="N")
    kinds = ["captions", "scores"]
    parser.add_argument("--kinds", nargs="+", default=kinds, choices=kinds)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--exact", action="store_true", help="compare captions instead of speed")
    mode.add_argument("--store", action="store_true", help="from store to store")
    mode.add_argument("--memory", type=int, metavar="N", help="watch the memory over N images")
    parser.add_argument("--quick", action="store_true", help="tiny weights, to see that it runs")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(given)
    many = options.device == "cpu" and not (options.exact or options.store or options.memory)
    if options.batch is None:
        options.batch = [2, 4, 8] if many else [8]
    if options.images is None:
        options.images = 500 if options.exact else 8 if many else 16
    if options.resize_threads is None:
        options.resize_threads = min(16, os.cpu_count() or 1) if options.device == "cuda" else 1
    return options


def main(given: Sequence[str] | None = None) -> None:
    options = arguments(given)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        blip.save(folder, tiny=options.quick)
        if options.exact:
            rows = exact(options, folder)
        elif options.store or options.memory:
            run = capfilt_engine.store_to_store if options.store else capfilt_engine.memory
            prompt = Captioner(folder / "captioner").prompt_ids(GenerationConfig())
            rows = run(options, folder, generation(len(prompt)))
        else:
            rows = compare(options, folder)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
