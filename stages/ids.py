"""Names that depend on content alone: the same row, image or text has the same id everywhere."""

from __future__ import annotations

import hashlib


def digest(*parts: str) -> str:
    """128 bits of BLAKE2b over the parts, as 32 hex digits. Parts cannot run into each other."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        state.update(len(data).to_bytes(8, "little"))
        state.update(data)
    return state.hexdigest()


def row_id(file_identity: str, row_number: int) -> str:
    """Id of one line of a source: unique, the ledger's key for rows."""
    return digest("row", file_identity, str(row_number))


def sample_id(url: str) -> str:
    """Id of one image: from its URL, or from `media_url` of its bytes where there is none."""
    return digest("sample", url)


def media_url(image_sha256: str) -> str:
    """What stands for the URL of an image that came without one."""
    return f"sha256:{image_sha256}"


def pair_id(sample: str, source: str, text: str) -> str:
    """Id of one image with one text; ``source`` is web, synthetic or human."""
    return digest("pair", sample, source, text)


def failed_caption_id(sample: str, caption_index: int) -> str:
    """Id of a pair whose synthetic text could not be written: it has no text to be known by."""
    return pair_id(sample, "synthetic", f"#{caption_index}")
