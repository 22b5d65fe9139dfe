"""The audit of a round on the sample world, as a stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from stages.base import Context, DatasetStage, read_tables
from stages.scenes.audit import audit
from stages.schemas import CLUSTERS, METRICS, check
from stages.select import SelectConfig


class AuditStage(DatasetStage):
    """Inputs: ``world`` (a world's folder), ``pairs``, ``download`` and, but for a raw round,
    ``clusters``. Writes the facts of `audit` to ``metrics.parquet`` (METRICS, split truth).

    A text passed the filter if its score reaches the threshold for its source, whatever
    deduplication did with it later; in a raw round nothing was filtered.
    """

    name = "audit"
    version = 1

    def __init__(self, config: SelectConfig) -> None:
        self.config = config

    def run(self, inputs: Mapping[str, Sequence[Path]], output_dir: Path, ctx: Context) -> None:
        truth = pq.read_table(inputs["world"][0] / "truth.parquet")
        pairs = pq.read_table(inputs["pairs"][0])
        columns = ["sample_id", "url", "status", "source"]
        download = pa.concat_tables(read_tables(inputs["download"], columns))
        clusters = self._clusters(download, inputs.get("clusters", ()))
        facts = audit(truth, pairs.append_column("passed", self._passed(pairs)), clusters)
        metrics = {
            "split": ["truth"] * len(facts),
            "model": ["data"] * len(facts),
            "metric": [fact.metric for fact in facts],
            "value": [fact.value for fact in facts],
            "n": [fact.n for fact in facts],
        }
        table = check(pa.table(metrics), METRICS, "audit")
        pq.write_table(table, output_dir / "metrics.parquet")

    def _passed(self, pairs: pa.Table) -> pa.Array:
        synthetic = pc.equal(pairs["source"], "synthetic")
        threshold = pc.if_else(synthetic, self.config.synthetic_threshold, self.config.threshold)
        passed = pc.greater_equal(pc.cast(pairs["itm_score"], pa.float64()), threshold)
        unfiltered = pc.is_in(pairs["state"], pa.array(["kept", "merged"]))
        return pc.if_else(pc.is_valid(pairs["itm_score"]), passed, unfiltered)

    def _clusters(self, download: pa.Table, files: Sequence[Path]) -> pa.Table:
        """url and cluster of every downloaded web image; in a raw round each stands alone."""
        mask = pc.and_(pc.equal(download["source"], "web"), pc.equal(download["status"], "success"))
        urls = download.filter(mask).group_by(["sample_id", "url"]).aggregate([])
        if not files:
            return urls.append_column("cluster_id", urls["sample_id"]).select(["url", "cluster_id"])
        clusters = pq.read_table(files[0], columns=["sample_id", "cluster_id"])
        return urls.join(clusters.cast(_KEYS), "sample_id").select(["url", "cluster_id"])


_KEYS = pa.schema([CLUSTERS.field("sample_id"), CLUSTERS.field("cluster_id")])
