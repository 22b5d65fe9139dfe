"""Every Parquet table that capfilt writes: one schema a stage, one comment a column.

`check` holds a table against its schema at both ends of every stage.
"""

from __future__ import annotations

import pyarrow as pa

from stages.errors import ShardError


def _schema(*columns: tuple[str, pa.DataType, str]) -> pa.Schema:
    """A schema whose fields carry their comment, so that a Parquet file explains itself."""
    return pa.schema(
        [pa.field(name, kind, metadata={"comment": comment}) for name, kind, comment in columns]
    )


_TEXT = pa.string()
_ROW_ID = ("row_id", _TEXT, "hash of (source file's identity, row number); unique")
_SAMPLE_ID = ("sample_id", _TEXT, "hash of the image's URL, or of its bytes where it has none")
_PAIR_ID = ("pair_id", _TEXT, "hash of (sample_id, source, text)")
_SOURCE = ("source", _TEXT, "where the text comes from: web, synthetic or human")
_PAIR_TEXT = ("text", _TEXT, "the text of the pair, as it was read or generated")
_IMAGE = ("image", pa.binary(), "encoded image; null on failure. Kept in the tar, not in Parquet")
_SHA256 = ("sha256", _TEXT, "sha256 of the image bytes as downloaded, before resizing, in hex")
_DETAIL = ("detail", _TEXT, "what went wrong, in words; null where nothing did")
_MODEL = ("model", _TEXT, "hash of the weights that made this row")
_SHARD = ("shard", _TEXT, "six digits or more: the shard that the row belongs to")

SOURCES = _schema(
    _ROW_ID,
    _SAMPLE_ID,
    ("source", _TEXT, "web or human"),
    ("url", _TEXT, "address of the image; null where the image lies in a file (media)"),
    ("media", _TEXT, "<file> or <tar>#<member> that holds the image; null where it has a URL"),
    ("text", _TEXT, "alt text or human caption, cleaned (texts.clean_text); may be empty"),
    ("original_text", _TEXT, "the text as the source has it"),
    ("text_words", pa.int32(), "words of the cleaned text"),
    ("text_letters", pa.float32(), "letters among its characters that are no spaces, 0 to 1"),
    ("text_repetition", pa.float32(), "words that it has said before, 0 to 1"),
    ("text_boilerplate", pa.bool_(), "whether it is a file name or placeholder and nothing else"),
    (
        "text_language",
        _TEXT,
        "code of its language, as fastText's lid.176 has it; null if not asked",
    ),
    ("text_language_score", pa.float32(), "how sure that is, 0 to 1; null if not asked"),
    ("image_hash", _TEXT, "md5, sha1, sha256 or sha512 that the image must have, in hex; or null"),
    ("extra", _TEXT, "further columns of the source that were asked for, as a JSON object; null"),
    ("retry_of", _TEXT, "row_id of the row that this one tries again; null for a source's own"),
    ("repeat_of", _TEXT, "row_id of the first row with the same image and text; null if none"),
)

DOWNLOAD = _schema(
    _ROW_ID,
    _SAMPLE_ID,
    ("source", _TEXT, "web or human"),
    ("url", _TEXT, "address of the image; null where it came from a file"),
    ("text", _TEXT, "alt text or human caption, cleaned; may be empty"),
    ("status", _TEXT, "success, duplicate_row, or why not: dns, decode, … (stages/download.py)"),
    _DETAIL,
    ("http_code", pa.int32(), "status code of the last HTTP answer; null where there was none"),
    _SHA256,
    (
        "pixel_sha256",
        _TEXT,
        "sha256 of the decoded pixels, before resizing, in hex; null on failure",
    ),
    ("phash", _TEXT, "256-bit perceptual (DCT) hash of the image, in hex; null on failure"),
    ("width", pa.int32(), "pixels, after resizing; null on failure"),
    ("height", pa.int32(), "pixels, after resizing; null on failure"),
    ("original_width", pa.int32(), "pixels, as downloaded; null on failure"),
    ("original_height", pa.int32(), "pixels, as downloaded; null on failure"),
    # One image a sample: later rows of the same sample have null here and status success.
    _IMAGE,
)

IMAGES = _schema(_SAMPLE_ID, _SHA256, _IMAGE)

CAPTIONS = _schema(
    _SAMPLE_ID,
    ("caption_index", pa.int32(), "0, 1, … when several captions are written for one image"),
    ("text", _TEXT, "the synthetic text; null unless status is success"),
    ("status", _TEXT, "success, failed or quarantined"),
    _DETAIL,
    _MODEL,
)

IMAGES_WITH_TEXTS = _schema(
    _SAMPLE_ID,
    _SHA256,
    _IMAGE,
    ("owners", pa.list_(_TEXT), "of each text: sample_id that it belongs to, this or a copy"),
    ("sources", pa.list_(_TEXT), "of each text: web or synthetic"),
    ("texts", pa.list_(_TEXT), "the texts to score against the image"),
)

SCORES = _schema(
    _PAIR_ID,
    _SAMPLE_ID,
    _SOURCE,
    _PAIR_TEXT,
    ("itm_score", pa.float32(), "probability that text and image match (ITM head), 0 to 1"),
    ("itc_score", pa.float32(), "cosine of the contrastive features (ITC), -1 to 1"),
    ("status", _TEXT, "success, failed or quarantined"),
    _DETAIL,
    _MODEL,
)

EMBEDDINGS = _schema(
    _SAMPLE_ID,
    ("embedding", pa.list_(pa.float16()), "image embedding of length 1; null unless success"),
    ("status", _TEXT, "success, failed or quarantined"),
    _DETAIL,
    _MODEL,
)

SHARED = _schema(
    ("sample_id", _TEXT, "sample that another captions, and perhaps scores, as the same picture"),
    ("text", _TEXT, "text of it to be scored in this shard; null where it lies here itself"),
    ("captioned_as", _TEXT, "sample_id whose captions serve it"),
    ("scored_with", _TEXT, "sample_id whose image scores its texts; null for its own"),
)

CLUSTERS = _schema(
    _SAMPLE_ID,
    ("cluster_id", _TEXT, "the smallest sample_id of the cluster; equal for all duplicates"),
    ("chain_id", _TEXT, "the same before chains that join unlike images were cut"),
    ("net", _TEXT, "the first net that tied it to another: exact, perceptual, semantic; or null"),
    ("copy_of", _TEXT, "exact net: smallest sample_id of equal bytes or pixels; null if unique"),
    (
        "hamming",
        pa.int16(),
        "perceptual net: fewest differing bits to an image it is tied to; null",
    ),
    ("similarity", pa.float32(), "highest cosine found to an image it is tied to; null if to none"),
)

CONTAMINATED = _schema(
    ("sample_id", _TEXT, "web or human sample that shows a picture of an evaluation set"),
    ("collides_with", _TEXT, "<set>/<file>, or <set>/<row> of a file of embeddings"),
    ("net", _TEXT, "the first net that found it: exact, perceptual or semantic"),
    ("similarity", pa.float32(), "cosine to it, 1 for copies; null without embeddings"),
)

DEDUP = _schema(
    ("net", _TEXT, "before_caption, or exact, perceptual, semantic, clusters, contamination"),
    ("metric", _TEXT, "copies, pairs, recall, tables, widest_cosine, …"),
    ("value", pa.float64(), "the figure; shares and recalls are 0 to 1"),
)

PAIR_STATES = (
    "kept",
    "merged",
    "rejected",
    "duplicate",
    "failed",
    "quarantined",
    "contaminated",
    "removed",
)

PAIRS = _schema(
    _PAIR_ID,
    _SAMPLE_ID,
    _SOURCE,
    _PAIR_TEXT,
    ("itm_score", pa.float32(), "probability that text and image match; null where not scored"),
    ("itc_score", pa.float32(), "cosine of the contrastive features; null where not scored"),
    ("state", _TEXT, ", ".join(PAIR_STATES)),
    ("carried_by", _TEXT, "sample_id of the survivor: of merged texts, and of their duplicates"),
    ("cluster_id", _TEXT, "duplicate cluster of the sample; null for human pairs"),
    ("url", _TEXT, "address of the image; null where it came from a file"),
    _SHARD,
    _DETAIL,
)

TEXTS = _schema(
    ("text", _TEXT, "normal form of texts that are alike: letters alone, case folded"),
    ("source", _TEXT, "web or synthetic"),
    ("images", pa.int64(), "distinct samples that have such a text"),
    ("good", pa.int64(), "pairs with it that no other rule refused"),
    ("capped", pa.int64(), "of these, rejected as more than select.text_cap"),
)

ROWS = _schema(
    _ROW_ID,
    _SAMPLE_ID,
    ("state", _TEXT, "downloaded, duplicate_row, removed, retried, or the reason of failure"),
    _SHARD,
)

HOSTS = _schema(
    ("host", _TEXT, "host name of the URL, lower case; null for rows without one"),
    ("status", _TEXT, "as in the download table"),
    ("http_code", pa.int32(), "status code of the last HTTP answer; null where there was none"),
    ("count", pa.int64(), "how many rows ended so"),
    ("detail", _TEXT, "of one of them, what went wrong in words"),
)

TOMBSTONES = _schema(
    ("sample_id", _TEXT, "sample that must not be used again; null for a hash not seen yet"),
    ("sha256", _TEXT, "sha256 of image bytes that must not be used, whatever their URL; or null"),
    ("kind", _TEXT, "url, id or hash: what was asked for"),
    ("asked", _TEXT, "the URL, id or hash as it was given"),
)

LEDGER = _schema(
    ("account", _TEXT, "rows or pairs"),
    ("source", _TEXT, "web, synthetic or human"),
    ("state", _TEXT, "final state"),
    ("count", pa.int64(), "how many rows or pairs ended in it"),
)

TRAINING_INDEX = _schema(
    _PAIR_ID,
    ("sample_id", _TEXT, "the sample whose image the pair is trained with (the survivor)"),
    _SOURCE,
    _PAIR_TEXT,
    ("itm_score", pa.float32(), "probability that text and image match; null for human pairs"),
    ("origin", _TEXT, "sample_id that the text was found with; differs where it was merged"),
    ("tar", _TEXT, "name of the training shard, beside this file"),
    ("key", _TEXT, "key of the sample in that tar"),
)

METRICS = _schema(
    ("split", _TEXT, "dev, test, train, or truth (the sample world's own facts)"),
    ("model", _TEXT, "med, captioner, filter, or data"),
    ("metric", _TEXT, "name, e.g. tr_at_1, ir_at_1, bleu4, cider, auc, precision"),
    ("value", pa.float64(), "the figure; shares and recalls are 0 to 1"),
    ("n", pa.int64(), "over how many items it was computed"),
)

OUTCOMES = _schema(
    ("split", _TEXT, "dev or test"),
    ("model", _TEXT, "med, captioner or filter"),
    ("metric", _TEXT, "as in METRICS, where it is a mean over images"),
    ("item", _TEXT, "file name of the probe image"),
    ("value", pa.float64(), "the metric on this image alone"),
)

PROBE_CAPTIONS = _schema(
    ("split", _TEXT, "dev or test"),
    ("item", _TEXT, "file name of the probe image"),
    ("text", _TEXT, "the captioner's best beam"),
    ("cider", pa.float64(), "CIDEr of the text against the probe's captions, 0 to 10"),
)

TRAINING_LOG = _schema(
    ("stage", _TEXT, "pretrain, captioner or filter"),
    ("step", pa.int64(), "optimiser step, from 1"),
    ("loss", pa.float32(), "sum of the losses below"),
    ("loss_itc", pa.float32(), "image-text contrastive loss, nats; null where not trained"),
    ("loss_itm", pa.float32(), "image-text matching loss, nats; null where not trained"),
    ("loss_lm", pa.float32(), "language modelling loss, nats a token; null where not trained"),
    ("lr", pa.float32(), "learning rate of the step"),
    ("images_per_second", pa.float32(), "since the last line"),
)


def check(table: pa.Table, schema: pa.Schema, where: str) -> pa.Table:
    """``table`` with exactly the columns of ``schema``, in its order.

    Raises:
        ShardError: a column is missing, unexpected, or of another type.
    """
    if set(table.column_names) != set(schema.names):
        missing = sorted(set(schema.names) - set(table.column_names))
        extra = sorted(set(table.column_names) - set(schema.names))
        raise ShardError(f"{where}: columns missing {missing}, unexpected {extra}")
    try:
        return table.select(schema.names).cast(schema)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, ValueError) as error:
        raise ShardError(f"{where}: {error}") from error
