"""``capfilt report``: one self-contained HTML page about a run.

The page asks nothing of any network and holds no script: styles and charts are inline, pictures
are data URIs, and its Content-Security-Policy allows nothing else. Web text is escaped by the
template and made harmless by `pipeline.report.safe`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from pipeline.report import page
from pipeline.report.charts import histogram, swatch
from pipeline.report.collect import RoundFacts, RunFacts, read_facts, read_histogram
from pipeline.report.duplicates import read_duplicates
from pipeline.report.funnel import accounts, funnels, reasons
from pipeline.report.hosts import read_hosts
from pipeline.report.metrics import loss_charts, splits
from pipeline.report.safe import plain
from pipeline.report.samples import Samples, read_samples
from pipeline.runfolder import write_output
from pipeline.store import Store

_CAPTION = 180
"""Characters of a text on the page."""


def write_report(store: Store, output: Path | None = None) -> Path:
    """Write the report of the run in ``store``, finished or not; returns where it is.

    ``output`` None means report.html in the run folder, or in the working directory where the
    run folder is remote. The file is replaced as a whole.

    Raises:
        StoreError: the run cannot be read.
        UserError: a table cannot be read, or ``output`` not be written.
    """
    if output is None:
        output = Path(store.path("report.html")) if store.is_local else Path("report.html")
    html = render(store)
    return write_output(output, html, "report")


def render(store: Store) -> str:
    """The page itself.

    Raises:
        StoreError: the run cannot be read.
        UserError: a table cannot be read.
    """
    facts = read_facts(store)
    shown = next((f for f in reversed(facts.rounds) if "pairs" in f.views), None)
    samples = read_samples(store, shown) if shown is not None else Samples({}, ())
    return (
        _environment()
        .get_template("page.html")
        .render(
            **_whole_run(facts),
            shown=shown,
            samples=samples,
            hosts=read_hosts(store, facts.rounds),
            searched=read_duplicates(store, facts.rounds),
            histograms=_histograms(store, shown, facts.config) if shown is not None else [],
        )
    )


def _whole_run(facts: RunFacts) -> dict[str, Any]:
    numbers = [round_.number for round_ in facts.rounds]
    return {
        "head": page.head(facts),
        "rounds": numbers,
        "funnels": funnels(facts.rounds),
        "reasons": reasons(facts.rounds),
        "accounts": accounts(facts.rounds),
        "splits": splits(facts.rounds),
        "losses": loss_charts(facts.rounds),
        "verdicts": page.verdicts(facts.rounds),
        "times": page.times(facts.rounds),
        "settings": page.settings(facts.config),
        "config": page.whole_config(facts.config),
        "versions": [(plain(k, 40), plain(v, 40)) for k, v in facts.versions.items()],
        "swatches": {source: swatch(source) for source in ("web", "synthetic", "human")},
    }


def _histograms(
    store: Store, shown: RoundFacts, config: Mapping[str, Any]
) -> Sequence[tuple[str, Markup, int]]:
    """(source, drawing, texts) of the scores of one round."""
    found = read_histogram(store, shown)
    names = {"web": "select.threshold", "synthetic": "select.synthetic_threshold"}
    drawn = []
    for source, path in names.items():
        counts = found.get(source)
        if counts:
            threshold = page.setting(config, path)
            limit = float(threshold) if isinstance(threshold, int | float) else None
            title = f"ITM scores of {source} texts"
            drawn.append((source, histogram(title, counts, source, limit), sum(counts)))
    return drawn


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pipeline.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["caption"] = lambda text: plain(text, _CAPTION)
    environment.filters["score"] = lambda score: f"{score:.3f}"
    environment.globals["style"] = Markup(_style())
    return environment


def _style() -> str:
    return Path(__file__).with_name("style.css").read_text(encoding="utf-8")
