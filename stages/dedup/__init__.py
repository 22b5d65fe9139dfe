"""Which images show the same picture: three nets, and the clusters they tie.

    exact       equal sha256 of the bytes, or of the decoded pixels
    perceptual  close 256-bit DCT hashes, and embeddings that agree (hashes alone collide)
    semantic    close embeddings

`hashes` and `search` find what each net ties (`search` by `sketches` and their `buckets`, or
`exhaustive`), `clusters` joins it, `contamination` looks for pictures of evaluation sets, `stage`
puts them together. Earlier, `copies` looks which images are
so much alike that one captioning does for all.
"""

from stages.dedup.config import DedupConfig, SearchConfig
from stages.dedup.copies import CopiesStage
from stages.dedup.stage import EVALUATION, DedupStage
from stages.dedup.ties import UnionFind

__all__ = ["EVALUATION", "CopiesStage", "DedupConfig", "DedupStage", "SearchConfig", "UnionFind"]
