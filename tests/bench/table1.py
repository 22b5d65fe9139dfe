"""BLIP's Table 1 on the sample world: what captioner and filter are worth, alone and together.

    python -m tests.bench.table1 [--seeds 0 1 2] [--variants NAME ...] [--config FILE]
                                 [--set KEY=VALUE ...] [--threads N] [--work DIR] [--json FILE]

A seed is a world, a raw MED pretrained on its pairs as they came, and a captioner and a filter
fine-tuned from that. They are made once, and so are captions, scores and clusters; each variant
selects its pairs, pretrains a MED on them and the human pairs in equally many steps, and is
measured on the test probe:

    raw               web texts as they came (round 0: neither filtered nor deduplicated)
    filter            web texts that the filter keeps
    captioner         web and synthetic texts, none filtered
    captioner+filter  web and synthetic texts that the filter keeps
    replicated        raw, its web texts repeated (where that is too many: drawn) until there are
                      as many as captioner+filter has
    shared            captioner+filter, but both are one model, fine-tuned on LM + ITC + ITM
    beam              captioner+filter, but captions come from beam search
    continued         captioner+filter, but pretraining goes on from the raw MED

TR@1 and IR@1 are the pretrained MED's, re-ranked by ITM; CIDEr (0 to 10) is that of its own beam
captions, without prompt and fine-tuning. Noise: wrong texts among the web and synthetic ones
trained with. Synthetic: share of those that are synthetic. Right: synthetic ones that are true.

A line is printed as each variant is done; its seconds count what is shared if it came first.
Everything happens in this process and is published as a run publishes it: with ``--work``, what an
interrupted benchmark has finished is not done again. Records know configs and data, not code: take
a new folder after a change of code.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.errors import CapfiltError
from tests.bench.variants import MEASURES, VARIANTS, Figures, opened

COLUMNS = {
    "tr_at_1": ("TR@1", ".3f"),
    "ir_at_1": ("IR@1", ".3f"),
    "cider": ("CIDEr", ".2f"),
    "wrong_after": ("noise", ".3f"),
    "texts": ("texts", ".0f"),
    "synthetic_share": ("synthetic", ".3f"),
    "synthetic_right": ("right", ".3f"),
}
"""Figure → its heading in the table, and its form."""

LEAST_SYNTHETIC, LEAST_RIGHT = 0.2, 0.9

Found = Mapping[str, Sequence[Figures]]
"""Variant → its figures, seed by seed."""


def run(options: argparse.Namespace, work: Path) -> dict[str, list[Figures]]:
    """Every variant of every seed; a line as each is done."""
    found: dict[str, list[Figures]] = {variant: [] for variant in options.variants}
    given = [*options.set, *_threads(options.threads)]
    for number in options.seeds:
        started = time.monotonic()
        overrides = [*given, f"run={work / f'seed={number}'}", f"seed={number}"]
        with opened(options.config, overrides) as seed:
            for variant in options.variants:
                figures = seed.measure(variant)
                found[variant].append(figures)
                told = "  ".join(
                    f"{heading} {_told(figures[name], form)}"
                    for name, (heading, form) in COLUMNS.items()
                )
                seconds, started = time.monotonic() - started, time.monotonic()
                print(f"seed {number}  {variant:<16}  {told}  ({seconds:.0f} s)", flush=True)
    return found


def _threads(count: int | None) -> list[str]:
    stages = ("caption", "filter", "embed", "pretrain", "finetune.captioner", "finetune.filter")
    return [] if count is None else [f"{name}.threads={count}" for name in (*stages, "evaluate")]


def table(found: Found) -> str:
    """Mean ± sample standard deviation over the seeds, as Markdown; – where there is none."""
    headings = ["variant", *(heading for heading, _ in COLUMNS.values())]
    lines = [f"| {' | '.join(headings)} |", "| --- " * len(headings) + "|"]
    for variant, seeds in found.items():
        cells = [variant]
        for name, (_, form) in COLUMNS.items():
            mean, spread = _spread([figures[name] for figures in seeds])
            cells.append(f"{_told(mean, form)} ± {_told(spread, form)}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _told(value: float, form: str) -> str:
    return "–" if math.isnan(value) else format(value, form)


def _spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; the latter is NaN for one value."""
    known = [value for value in values if not math.isnan(value)]
    mean = statistics.fmean(known) if known else math.nan
    return mean, statistics.stdev(known) if len(known) > 1 else math.nan


@dataclass(frozen=True)
class Check:
    """One demand on the figures. ``holds`` is None where they do not allow to say."""

    holds: bool | None
    demand: str
    figures: str

    def __str__(self) -> str:
        word = "cannot say" if self.holds is None else "yes" if self.holds else "NO"
        return f"{word:<10} {self.demand}: {self.figures}"


def verdict(found: Found) -> list[Check]:
    """What captioner+filter must reach, judged from means over the seeds.

    A difference of two variants is told in their pooled standard deviation, the root of the mean of
    both sample variances over the seeds. Empty without captioner+filter.
    """
    if not found.get("captioner+filter"):
        return []
    checks = [
        _difference(found, other, measure, least)
        for other, least in (("raw", 2), ("filter", -1))
        if found.get(other)
        for measure in MEASURES
    ]
    ours = {
        name: _spread([figures[name] for figures in found["captioner+filter"]])[0]
        for name in ("synthetic_share", "synthetic_share_with_human", "synthetic_right")
    }
    share, right = ours["synthetic_share"], ours["synthetic_right"]
    with_human = f"{ours['synthetic_share_with_human']:.1%} with human pairs counted"
    return [
        *checks,
        Check(
            share >= LEAST_SYNTHETIC,
            f"at least {LEAST_SYNTHETIC:.0%} of the kept web and synthetic pairs are synthetic",
            f"{share:.1%} ({with_human})",
        ),
        Check(
            right >= LEAST_RIGHT,
            f"at least {LEAST_RIGHT:.0%} of the kept synthetic texts are right",
            f"{right:.1%}",
        ),
    ]


def _difference(found: Found, other: str, measure: str, least: int) -> Check:
    """Whether captioner+filter lies above ``other`` by more than ``least`` standard deviations;
    where that is negative, not below it by more."""
    heading, form = COLUMNS[measure]
    ours, spread = _spread([figures[measure] for figures in found["captioner+filter"]])
    theirs, other_spread = _spread([figures[measure] for figures in found[other]])
    pooled = math.sqrt((spread**2 + other_spread**2) / 2)
    above = ours - theirs
    holds = above > least * pooled if least > 0 else above >= least * pooled
    verb = "beats" if least > 0 else "is not below"
    return Check(
        None if math.isnan(pooled) else holds,  # one seed has no spread
        f"{heading} {verb} {other} by more than {abs(least)} sd",
        f"{ours:{form}} against {theirs:{form}}, sd {_told(pooled, form)}",
    )


def rows(found: Found) -> list[dict[str, Any]]:
    """The figures and the verdict for ``--json``."""
    made: list[dict[str, Any]] = []
    for variant, seeds in found.items():
        for name in seeds[0]:
            values = [figures[name] for figures in seeds]
            mean, spread = _spread(values)
            base = _spread([figures[name] for figures in found.get("raw", ())])[0]
            compared = variant != "raw" and name in MEASURES and base > 0
            made.append(
                {
                    "metric": f"{variant} {name}",
                    "value": _known(mean),
                    "spread": _known(spread),
                    "unit": {"texts": "texts", "cider": "CIDEr"}.get(name, "share"),
                    "values": [_known(value) for value in values],
                    "against": "raw" if compared else None,
                    "ratio": mean / base if compared else None,
                }
            )
    for check in verdict(found):
        value = None if check.holds is None else float(check.holds)
        made.append({"metric": check.demand, "value": value, "unit": "holds",
                     "figures": check.figures, "against": None, "ratio": None})  # fmt: skip
    return made


def _known(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else value


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--config", default="configs/quickstart.yaml", help="whose settings count")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="in the config")
    parser.add_argument("--threads", type=int, help="of torch; default: what the config says")
    parser.add_argument("--work", type=Path, help="folder that keeps what is finished")
    parser.add_argument("--json", type=Path)
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> None:
    options = arguments(given)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            found = run(options, options.work or Path(scratch))
        except CapfiltError as error:
            sys.exit(str(error))
    print(f"\n{table(found)}\n\nVerdict on captioner+filter:")
    for check in verdict(found):
        print(check)
    if options.json:
        options.json.write_text(json.dumps(rows(found), indent=1))


if __name__ == "__main__":
    main()
