"""A sample world as files.

web.parquet                    url, caption: the web's table of URLs and texts
responses.parquet              what the web answers at each URL; `server` serves it
truth.parquet                  what lies at each URL and which texts are true (`TRUTH`)
human/ dev/ test/              pictures, and annotations.jsonl with their captions
tokenizer/                     a BERT tokenizer of the world's words
world.json                     the config that all this is a function of
"""

from __future__ import annotations

import json
import random
import shutil
import string
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from stages.errors import SourceError
from stages.scenes import language, texts
from stages.scenes.config import WorldConfig
from stages.scenes.plan import WebImage, WebRow, annotated_scenes, plan_web
from stages.scenes.render import encode, near_duplicate, render
from stages.scenes.scene import Scene

WORLD_VERSION = 1
"""Raise it with every change that makes another world of an equal config."""

WEB = pa.schema([("url", pa.string()), ("caption", pa.string())])
TRUTH = pa.schema(
    [
        ("url", pa.string()),
        ("caption", pa.string()),
        # Whether the caption is true of the scene, and how it was made (plan.TextKind).
        ("is_true", pa.bool_()),
        ("text_kind", pa.string()),
        # JSON of the scene (Scene.to_json); null for a tracking pixel.
        ("scene", pa.string()),
        # ok, redirect, or why the image cannot be had (plan.Fault).
        ("fault", pa.string()),
        # Equal for the exact and near duplicates of one picture; kind none for the original.
        ("duplicate_group", pa.int64()),
        ("duplicate_kind", pa.string()),
    ]
)
"""One row for each (url, caption) of the web table; repeated rows count once."""

RESPONSES = pa.schema(
    [
        ("url", pa.string()),
        # answer, hang (take the request and say nothing) or refuse (the connection).
        ("action", pa.string()),
        ("status", pa.int32()),
        ("headers", pa.string()),  # JSON object
        ("body", pa.binary()),
    ]
)

_PAGE = b"<!doctype html><title>Moved</title><p>This picture is no longer here.</p>"


def build_world(config: WorldConfig, folder: Path) -> None:
    """Write the world of ``config`` to ``folder``, unless it is there already.

    The folder appears as a whole: a kill at any moment leaves none, or the whole one. Equal
    configs give equal bytes.

    Raises:
        SourceError: ``folder`` holds something else.
    """
    identity = {"version": WORLD_VERSION, "config": config.model_dump()}
    description = json.dumps(identity, indent=2) + "\n"
    if folder.exists() and not _is_empty(folder):
        if _read_description(folder) == description:
            return
        raise SourceError(
            f"{folder}: holds another world or other files; name another folder, or remove it"
        )
    scratch = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    _write_web(config, scratch)
    _write_annotated(config, scratch)
    write_tokenizer(scratch / "tokenizer")
    (scratch / "world.json").write_text(description, encoding="utf-8")
    scratch.replace(folder)


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())


def _read_description(folder: Path) -> str | None:
    file = folder / "world.json"
    return file.read_text(encoding="utf-8") if file.is_file() else None


def _write_web(config: WorldConfig, folder: Path) -> None:
    rows = plan_web(config)
    web = {"url": [row.image.url for row in rows], "caption": [row.text for row in rows]}
    pq.write_table(pa.table(web, schema=WEB), folder / "web.parquet")
    unique = {(row.image.url, row.text): row for row in rows}
    truth = pa.Table.from_pylist([_truth(row) for row in unique.values()], schema=TRUTH)
    pq.write_table(truth, folder / "truth.parquet")
    images = {row.image.url: row.image for row in rows}
    responses = _responses(config, [images[url] for url in sorted(images)])
    pq.write_table(pa.Table.from_pylist(responses, schema=RESPONSES), folder / "responses.parquet")


def _truth(row: WebRow) -> dict[str, object]:
    image = row.image
    return {
        "url": image.url,
        "caption": row.text,
        "is_true": image.scene is not None and language.is_true(image.scene, row.text),
        "text_kind": row.kind,
        "scene": None if image.scene is None else image.scene.to_json(),
        "fault": image.fault,
        "duplicate_group": image.duplicate_group,
        "duplicate_kind": image.duplicate_kind,
    }


def _responses(config: WorldConfig, images: Sequence[WebImage]) -> list[dict[str, object]]:
    """What is answered at each URL, redirected-to ones included."""
    by_url = {image.url: image for image in images}
    answers: list[dict[str, object]] = []
    for image in images:
        if image.fault == "redirect":
            target = image.url.replace("//go.", "//images.")
            answers.append(_answer(image.url, 302, headers={"Location": target}))
            answers.append(_picture_answer(config, target, image))
        elif image.original is not None and image.duplicate_kind == "exact":
            answers.append(_picture_answer(config, image.url, by_url[image.original]))
        elif image.original is not None:
            picture, key = _render(config, by_url[image.original]), f"{config.seed} {image.key}"
            answers.append(_answer(image.url, 200, near_duplicate(picture, key), "jpg"))
        else:
            answers.append(_original_answer(config, image))
    return answers


def _original_answer(config: WorldConfig, image: WebImage) -> dict[str, object]:
    match image.fault:
        case "slow":
            answer = _answer(image.url, 0, action="hang")
        case "refused":
            answer = _answer(image.url, 0, action="refuse")
        case "not_found" | "gone":
            answer = _answer(image.url, 404 if image.fault == "not_found" else 410, _PAGE)
        case "html":
            answer = _answer(image.url, 200, _PAGE)
        case "corrupt":
            answer = _answer(image.url, 200, _corrupt(image), image.suffix)
        case "pixel":
            answer = _answer(image.url, 200, _pixel(), "png")
        case _:
            answer = _picture_answer(config, image.url, image)
    return answer


def _picture_answer(config: WorldConfig, url: str, image: WebImage) -> dict[str, object]:
    body = encode(_render(config, image), image.suffix)
    headers = {"X-Robots-Tag": "noai"} if image.fault == "opt_out" else None
    return _answer(url, 200, body, image.suffix, headers=headers)


def _render(config: WorldConfig, image: WebImage) -> Image.Image:
    assert image.scene is not None, f"{image.url} shows no scene"
    return render(image.scene, config.scenes, f"{config.seed} {image.key}")


def _pixel() -> bytes:
    return encode(Image.new("RGB", (1, 1), (255, 255, 255)), "png")


def _corrupt(image: WebImage) -> bytes:
    """Bytes that no decoder can make a picture of: a cut header, noise, or nothing at all."""
    rng = random.Random(image.url)
    whole = encode(Image.new("RGB", (8, 8)), image.suffix)
    return rng.choice((whole[:24], whole[:8] + rng.randbytes(500), rng.randbytes(500), b""))


_CONTENT_TYPES = {"png": "image/png", "jpg": "image/jpeg", "html": "text/html; charset=utf-8"}


def _answer(
    url: str,
    status: int,
    body: bytes = b"",
    suffix: str = "html",
    *,
    headers: dict[str, str] | None = None,
    action: str = "answer",
) -> dict[str, object]:
    every = {"Content-Type": _CONTENT_TYPES[suffix], **(headers or {})}
    return {
        "url": url,
        "action": action,
        "status": status,
        "headers": json.dumps(every),
        "body": body,
    }


def _write_annotated(config: WorldConfig, folder: Path) -> None:
    scenes = iter(annotated_scenes(config))
    _write_set(config, folder / "test", [*islice(scenes, config.test_images)])
    _write_set(config, folder / "dev", [*islice(scenes, config.dev_images)])
    _write_set(config, folder / "human", [*scenes])


def _write_set(config: WorldConfig, folder: Path, scenes: Sequence[Scene]) -> None:
    """Pictures and ``annotations.jsonl``: image, captions and, in a probe, a near miss of each."""
    folder.mkdir()
    probe = folder.name != "human"
    count = config.probe_captions if probe else config.human_captions
    rng = random.Random(f"{folder.name} set of {config.seed}")
    lines = []
    for number, scene in enumerate(scenes):
        name = f"{number:06}.png"
        picture = render(scene, config.scenes, f"{config.seed} {folder.name} {number}")
        (folder / name).write_bytes(encode(picture, "png"))
        chosen = rng.sample(language.full_captions(scene), count)
        line: dict[str, object] = {"image": name, "captions": chosen}
        if probe:
            line["wrong_captions"] = [language.near_miss(scene, text, rng) for text in chosen]
        lines.append(json.dumps(line) + "\n")
    (folder / "annotations.jsonl").write_text("".join(lines), encoding="utf-8")


def write_tokenizer(folder: Path) -> None:
    """A tokenizer folder as transformers reads it: the world's words whole, all else by letters.

    Holds BERT's five special tokens. BLIP's own two are added on loading, as in the original
    (models/blip.py, ``init_tokenizer``).
    """
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = [*_SPECIAL_TOKENS.values(), *dict.fromkeys([*language.WORDS, *texts.words()])]
    characters = [chr(code) for code in range(33, 127) if chr(code) not in string.ascii_uppercase]
    known = set(vocabulary)
    vocabulary += [character for character in characters if character not in known]
    vocabulary += [f"##{character}" for character in characters]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, **_SPECIAL_TOKENS}
    (folder / "tokenizer_config.json").write_text(
        json.dumps(settings, indent=2) + "\n", encoding="utf-8"
    )


_SPECIAL_TOKENS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
