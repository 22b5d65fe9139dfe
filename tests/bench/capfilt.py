"""Captioning and filtering: images a second, memory, and how far the hardware's limit is.

    python -m tests.bench.capfilt [--device cuda] [--dtype bfloat16] [--images N] [--batch N ...]
                                  [--threads N] [--rounds N] [--exact | --store | --memory N]
                                  [--quick] [--json FILE]

One run, the same random BLIP-base weights (384 px, 20 new tokens, one caption by nucleus sampling,
two texts scored by ITM and ITC) for

- ours, and on a CPU ours with int8 linear layers;
- transformers one image at a time, as tutorials do it: `generate` of one image, the matching model
  called once for each text;
- transformers batched, in the same dtype, the best of ``--batch``: `generate` with its cache, and
  one call of the matching model for all pairs of a batch. It gives the ITM score only, which costs
  it less than what ours gives;
- data-juicer's operators, where ``py-data-juicer`` is installed, as they are: the captioner goes on
  to the end of the text or 128 tokens, and both read the pictures from files.

Each runs alone in a process of its own, which begins with a batch that is not timed, and all of
them in turn ``--rounds`` times. Pictures are decoded already; resizing them is timed. The floor is
`tests.bench.floor`'s. With ``--exact`` the script checks instead that decoding steps as CUDA graphs
give the tokens of eager ones, and counts the captions that another batch size changes; with
``--store`` it captions shards from store to store through the engine; with ``--memory N`` it
watches the memory over N images.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from PIL import Image
from transformers import (
    AutoProcessor,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
)

from stages.models.captioner import Captioner
from stages.models.config import GenerationConfig
from stages.models.matcher import Matcher
from tests.bench import blip, capfilt_engine, floor

NEW_TOKENS = 20
_ALTERNATIVE = "transformers, batched"
Images = Sequence[Image.Image]
Run = Callable[[Images], object]


@dataclass(frozen=True)
class Setting:
    """What every contender is given."""

    folder: Path
    device: str
    dtype: torch.dtype
    batch: int
    threads: int
    int8: bool = False

    @property
    def captioner(self) -> Path:
        return self.folder / "captioner"

    @property
    def matcher(self) -> Path:
        return self.folder / "matcher"


def generation(prompt_tokens: int) -> GenerationConfig:
    """Exactly `NEW_TOKENS` tokens behind the prompt."""
    length = prompt_tokens + NEW_TOKENS
    return GenerationConfig(min_tokens=length, max_tokens=length)


def our_captions(setting: Setting) -> Run:
    captioner = Captioner(
        setting.captioner, setting.device, setting.dtype, setting.batch, int8=setting.int8
    )
    config = generation(len(captioner.prompt_ids(GenerationConfig())))
    return lambda images: captioner(images, config=config)


def our_scores(setting: Setting) -> Run:
    matcher = Matcher(
        setting.matcher, setting.device, setting.dtype, setting.batch, int8=setting.int8
    )
    return lambda images: matcher.match(images, blip.texts(len(images)))


def their_captions(setting: Setting) -> Run:
    processor = AutoProcessor.from_pretrained(setting.captioner)
    model: Any = BlipForConditionalGeneration.from_pretrained(
        setting.captioner, dtype=setting.dtype
    )
    model = model.to(setting.device).eval()

    def run(images: Images) -> object:
        text = ["a picture of"] * len(images)
        inputs = processor(images=list(images), text=text, return_tensors="pt")
        inputs = inputs.to(setting.device, setting.dtype)
        with torch.inference_mode():
            ids = model.generate(
                **inputs, do_sample=True, top_p=0.9, top_k=50, repetition_penalty=1.1,
                min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS,
            )  # fmt: skip
        return processor.batch_decode(ids, skip_special_tokens=True)

    return _by(setting.batch, run)


def their_scores(setting: Setting) -> Run:
    processor = AutoProcessor.from_pretrained(setting.matcher)
    model: Any = BlipForImageTextRetrieval.from_pretrained(setting.matcher, dtype=setting.dtype)
    model = model.to(setting.device).eval()

    def score(images: list[Image.Image], texts: list[str]) -> object:
        inputs = processor(images=images, text=texts, padding=True, return_tensors="pt")
        inputs = inputs.to(setting.device, setting.dtype)
        with torch.inference_mode():
            return model(**inputs).itm_score.softmax(dim=-1)[:, 1].tolist()

    def run(images: Images) -> object:
        texts = blip.texts(len(images))
        if len(images) == 1:
            return [score([images[0]], [text]) for text in texts[0]]
        return score([i for i in images for _ in texts[0]], [t for own in texts for t in own])

    return _by(setting.batch, run)


def _by(size: int, run: Run) -> Run:
    return lambda images: [run(images[at : at + size]) for at in range(0, len(images), size)]


def juicer(kind: str) -> Callable[[Setting], Run]:
    """data-juicer's operator for ``kind``, its model and batch size being the setting's."""

    def build(setting: Setting) -> Run:
        import data_juicer.ops.filter as filters
        import data_juicer.ops.mapper as mappers

        kept = Path(tempfile.mkdtemp())
        if kind == "captions":
            operator: Any = mappers.ImageCaptioningMapper(hf_img2seq=str(setting.captioner))
        else:
            operator = filters.ImageTextMatchingFilter(hf_blip=str(setting.matcher))

        def run(images: Images) -> object:
            files = [kept / f"{index}.png" for index in range(len(images))]
            for file, image in zip(files, images, strict=True):
                image.save(file)
            texts = [["a picture"]] if kind == "captions" else blip.texts(len(images))
            rows = [
                {"images": [str(file)], "text": f"<__dj__image> {text} <|__dj__eoc|>",
                 "__dj__stats__": {}}
                for file, own in zip(files, itertools.cycle(texts), strict=False)
                for text in own
            ]  # fmt: skip
            if kind == "scores":
                return [operator.compute_stats_single(row) for row in rows]
            return operator.process_batched({key: [row[key] for row in rows] for key in rows[0]})

        return _by(setting.batch, run)

    return build


def contenders(kind: str) -> dict[str, Callable[[Setting], Run]]:
    ours, theirs = (
        (our_captions, their_captions) if kind == "captions" else (our_scores, their_scores)
    )
    found = {"ours": ours, "transformers": theirs}
    if find_spec("data_juicer"):
        found["data-juicer"] = juicer(kind)
    return found


def decoded(count: int, quick: bool) -> list[Image.Image]:
    files = blip.pictures(count, (64, 48) if quick else (640, 480))
    return [Image.open(io.BytesIO(data)).convert("RGB") for data in files]


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
    batch: int
    floor: float
    """Images a second at the hardware's limit, as it was just then."""


def compare(options: argparse.Namespace, folder: Path) -> list[dict[str, object]]:
    """All contenders in turn, ``--rounds`` times over: machines change speed meanwhile, so ratios
    are taken within a round."""
    torch.set_num_threads(options.threads)
    rows: list[dict[str, object]] = []
    for kind in options.kinds:
        entered = _entered(kind, options, folder)
        rounds = [{label: _best(kind, *entered[label], options) for label in entered}]
        # Later rounds keep to the batch size that was best, and turn the order round each time.
        kept = {
            label: (name, [setting for setting in settings if setting.batch == first.batch])
            for (label, (name, settings)), first in zip(
                entered.items(), rounds[0].values(), strict=True
            )
        }
        for number in range(1, options.rounds):
            order = list(kept)[:: -1 if number % 2 else 1]
            rounds.append({label: _best(kind, *kept[label], options) for label in order})
        for label in entered:
            rows.append(_row(kind, label, rounds))
            print(_line(rows[-1]), flush=True)
    return rows


def _entered(
    kind: str, options: argparse.Namespace, folder: Path
) -> dict[str, tuple[str, list[Setting]]]:
    """Label → contender and the settings that it tries."""
    dtype = getattr(torch, options.dtype)
    sized = [Setting(folder, options.device, dtype, b, options.threads) for b in options.batch]
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
        found.append(Tried(rate, memory, setting.batch, 1 / least))
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
    itemsize = 1 if setting.int8 else setting.dtype.itemsize
    if kind == "captions":
        prompt = Captioner(setting.captioner).prompt_ids(GenerationConfig())
        work = floor.caption_work(config, len(prompt), NEW_TOKENS, setting.batch, itemsize)
    else:
        # Words of the benchmark's texts are one token each; [CLS] and [SEP] come on top.
        lengths = tuple(len(text.split()) + 2 for text in blip.texts(1)[0])
        work = floor.filter_work(config, lengths)
    return machine.floor(work)


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['metric']:<40} {row['value']:9.3f} images/s  batch {row['batch']:>4}  "
        f"{row['memory_gib']:6.2f} GiB  {row['share_of_floor']:6.1%} of the floor's "
        f"{row['floor_images_s']:.2f} images/s  "
        f"x{row['ratio']:.2f} ({min(row['ratios']):.2f} to {max(row['ratios']):.2f})"
    )


def exact(options: argparse.Namespace, folder: Path) -> list[dict[str, object]]:
    """Graphs against eager steps, and one batch size against another."""
    images = decoded(options.images, options.quick)
    size = options.batch[0]
    where = folder / "captioner", options.device, getattr(torch, options.dtype)
    captioner = Captioner(*where, size)
    rows: list[dict[str, object]] = []
    for method in ("nucleus", "beam", "greedy"):
        config = GenerationConfig(method=method)  # type: ignore[arg-type]
        found = {}
        for graphed in (True, False):
            captioner.graphed = graphed
            found[graphed] = captioner(images, config=config)
        other = Captioner(*where, max(1, size // 3))(images, config=config)
        for name, texts in (("eager", found[False]), (f"batch {max(1, size // 3)}", other)):
            differ = sum(a != b for a, b in zip(found[True], texts, strict=True))
            row = {"metric": f"{method}: captions that differ", "value": differ / len(images),
                   "unit": "share", "against": name, "ratio": None}  # fmt: skip
            rows.append(row)
            print(f"{method:<8} graphs, batch {size} / {name}: {differ} of {len(images)} differ")
    return rows


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--batch", type=int, nargs="+", default=[8])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1, metavar="N")
    parser.add_argument("--kinds", nargs="+", default=["captions", "scores"])
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--exact", action="store_true", help="compare captions instead of speed")
    mode.add_argument("--store", action="store_true", help="from store to store")
    mode.add_argument("--memory", type=int, metavar="N", help="watch the memory over N images")
    parser.add_argument("--quick", action="store_true", help="tiny weights, to see that it runs")
    parser.add_argument("--json", type=Path)
    return parser.parse_args(given)


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
