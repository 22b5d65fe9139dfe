"""Batches as a function of seed and step."""

import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stages.errors import SourceError
from stages.models.images import decode
from stages.models.preprocessing import Preprocessing
from stages.models.text import load_tokenizer
from stages.training.data import Images, Loader, Pairs
from tests.toy_pairs import SIZE, png, sample, toy_tar, toy_tokenizer, write_tar

PLENTY = 1 << 30


def pairs_of(tmp_path: Path, *tars: Path, prompt: str = "") -> Pairs:
    tokenizer = load_tokenizer(toy_tokenizer(tmp_path / "tokenizer"))
    return Pairs(tars, tokenizer, max_tokens=12, max_words=30, prompt=prompt)


def loader(pairs: Pairs, cache: int = PLENTY, augmentation: str = "none", **kw: int) -> Loader:
    images = Images(pairs.shards, SIZE, augmentation, cache)  # type: ignore[arg-type]
    return Loader(pairs, images, **{"batch_size": 5, "seed": 3, **kw})  # type: ignore[arg-type]


def seen(loader: Loader, steps: int) -> list[int]:
    return [int(i) for step in range(steps) for i in loader.batch(step).image_ids]


def test_an_epoch_holds_every_pair_once_in_another_order_each_time(tmp_path: Path) -> None:
    pairs = pairs_of(tmp_path, toy_tar(tmp_path / "web.tar", images=12))
    images = seen(loader(pairs), steps=12)  # five epochs of 12 pairs in batches of 5
    epochs = [images[start : start + 12] for start in range(0, 60, 12)]
    assert all(sorted(epoch) == sorted(pairs.shards.image_ids) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5
    assert images != seen(loader(pairs, seed=4), steps=12)


def test_human_pairs_are_repeated(tmp_path: Path) -> None:
    web = toy_tar(tmp_path / "web.tar", images=6)
    human = toy_tar(tmp_path / "human.tar", images=3, source="human")
    pairs = pairs_of(tmp_path, web, human)
    loaded = loader(pairs, human_repeat=3)
    assert loaded.epoch_length == 6 + 9
    counts = Counter(seen(loaded, steps=3))
    assert sorted(counts.values()) == [1] * 6 + [3] * 3


def test_workers_share_the_global_batch(tmp_path: Path) -> None:
    pairs = pairs_of(tmp_path, toy_tar(tmp_path / "web.tar", images=10))
    whole = loader(pairs, batch_size=6)
    parts = [loader(pairs, batch_size=6, rank=rank, world_size=2) for rank in range(2)]
    for step in range(4):
        joined = torch.cat([part.batch(step).pixels for part in parts])
        assert torch.equal(joined, whole.batch(step).pixels)


def test_tars_that_do_not_divide_evenly_are_one_epoch_for_all_workers(tmp_path: Path) -> None:
    sizes = (7, 1, 5)
    tars = [toy_tar(tmp_path / f"web-{n}.tar", images=n) for n in sizes]
    pairs = pairs_of(tmp_path, *tars)
    workers = [loader(pairs, batch_size=4, rank=rank, world_size=2) for rank in range(2)]
    assert {worker.epoch_length for worker in workers} == {sum(sizes)}
    # Four epochs of 13 pairs are 13 batches of 4; epochs end within batches.
    parts = [[worker.batch(step).image_ids for step in range(13)] for worker in workers]
    images = torch.cat([torch.cat(step) for step in zip(*parts, strict=True)]).tolist()
    for epoch in range(4):
        assert sorted(images[13 * epoch : 13 * (epoch + 1)]) == sorted(pairs.shards.image_ids)


@pytest.mark.parametrize("augmentation", ["none", "blip"])
def test_cache_threads_and_order_of_asking_change_nothing(
    tmp_path: Path, augmentation: str
) -> None:
    pairs = pairs_of(tmp_path, toy_tar(tmp_path / "web.tar", images=9))
    expected = [loader(pairs, augmentation=augmentation).batch(step) for step in range(8)]
    uncached = loader(pairs, cache=0, augmentation=augmentation)
    half = loader(pairs, cache=4 * SIZE * SIZE * 3, augmentation=augmentation)
    threaded = list(half.batches(2, 8, threads=3))
    for step in range(8):
        assert torch.equal(uncached.batch(7 - step).pixels, expected[7 - step].pixels)
        if step >= 2:
            assert threaded[step - 2].step == step
            assert torch.equal(threaded[step - 2].pixels, expected[step].pixels)
            assert torch.equal(threaded[step - 2].input_ids, expected[step].input_ids)


def test_augmentation_differs_from_epoch_to_epoch(tmp_path: Path) -> None:
    pairs = pairs_of(tmp_path, toy_tar(tmp_path / "web.tar", images=1))
    pixels = [loader(pairs, augmentation="blip", batch_size=1).batch(s).pixels for s in range(6)]
    assert len({p.numpy().tobytes() for p in pixels}) > 3


def test_pixels_and_texts_are_those_of_inference(tmp_path: Path) -> None:
    large = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8))
    large.save(tmp_path / "large.png")
    data = (tmp_path / "large.png").read_bytes()
    tar = write_tar(tmp_path / "web.tar", [sample("a", data, ['A "red" square!!', "blue"])])
    pairs = pairs_of(tmp_path, tar, prompt="a picture of ")
    batch = loader(pairs, batch_size=2).batch(0)
    expected = Preprocessing(size=SIZE)([decode(data)])
    assert torch.allclose(batch.pixel_values(), expected.expand(2, -1, -1, -1), atol=1e-5)
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    texts = {tokenizer.decode(ids, skip_special_tokens=True) for ids in batch.input_ids}
    assert texts == {"a picture of a red square", "a picture of blue"}
    assert batch.input_ids.shape == batch.attention_mask.shape == (2, 8)
    assert (batch.attention_mask.sum(1) == (batch.input_ids != tokenizer.pad_token_id).sum(1)).all()


def test_a_broken_image_gives_its_place_to_the_next_pair(tmp_path: Path) -> None:
    groups = [sample(str(n), png("red", n) if n != 2 else b"broken", ["red"]) for n in range(4)]
    pairs = pairs_of(tmp_path, write_tar(tmp_path / "web.tar", groups))
    for cache in (0, PLENTY):
        loaded = loader(pairs, cache=cache, batch_size=4)
        counts = Counter(seen(loaded, steps=1))
        ids = pairs.shards.image_ids.tolist()
        assert counts == {ids[0]: 1, ids[1]: 1, ids[3]: 2}
        assert loaded.images.broken == {2}


def test_hostile_texts_are_read_and_empty_ones_counted(tmp_path: Path) -> None:
    texts = [
        "",
        " \t. !",
        "\ud800 half",
        "word " * 10_000,
        "[SEP] [PAD] red",
        "🔴\u202e",
        "x" * 10**6,
    ]
    tar = write_tar(tmp_path / "web.tar", [sample("a", png("red"), texts)])
    pairs = pairs_of(tmp_path, tar)
    assert len(pairs) == 5 and pairs.skipped["empty"] == 2
    assert pairs.lengths.max() <= 12
    batch = loader(pairs).batch(0)
    assert (batch.input_ids[:, 0] == load_tokenizer(tmp_path / "tokenizer").cls_token_id).all()


def test_texts_are_read_the_same_a_few_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["red", "", "a blue square on the wall", "...", "!", "a white wall", "red picture"]
    tar = write_tar(tmp_path / "web.tar", [sample("a", png("red"), texts)])
    whole = pairs_of(tmp_path, tar, prompt="a picture of ")
    monkeypatch.setattr("stages.training.data._TEXTS_AT_ONCE", 2)
    parted = pairs_of(tmp_path, tar, prompt="a picture of ")
    assert len(whole) == len(parted) == 4
    assert whole.tokens.dtype == parted.tokens.dtype == np.uint16
    assert whole.tokens.tolist() == parted.tokens.tolist()
    assert whole.lengths.tolist() == parted.lengths.tolist() == [6, 11, 8, 7]
    assert whole.image_of.tolist() == parted.image_of.tolist() == [0] * 4
    assert whole.skipped == parted.skipped == {"empty": 3}


def test_a_vocabulary_beyond_two_bytes_keeps_its_ids(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tar = toy_tar(tmp_path / "web.tar", images=3)
    small = pairs_of(tmp_path, tar)
    monkeypatch.setattr("stages.training.data._IDS_OF_TWO_BYTES", 4)
    large = pairs_of(tmp_path, tar)
    assert large.tokens.dtype == np.int32
    assert large.tokens.tolist() == small.tokens.tolist()


def test_texts_are_held_once_while_tokens_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 100 million texts, each copy of them is some ten GB a worker."""
    text = "a red square " * 400
    texts = [f"{text}{number}" for number in range(20)]
    groups = [sample(str(number), png("red"), texts) for number in range(50)]
    tar = write_tar(tmp_path / "web.tar", groups)
    monkeypatch.setattr("stages.training.data._TEXTS_AT_ONCE", 20)
    tokenizer = load_tokenizer(toy_tokenizer(tmp_path / "tokenizer"))
    Pairs([tar], tokenizer, max_tokens=12, max_words=9999)  # what is imported counts no more
    tracemalloc.start()
    try:
        pairs = Pairs([tar], tokenizer, max_tokens=12, max_words=9999)
        kept, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    once = len(pairs) * len(text)
    assert most < 1.5 * once
    assert kept < 0.1 * once


def test_nothing_to_train_on_is_said(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no image with a text"):
        pairs_of(tmp_path, write_tar(tmp_path / "web.tar", []))
    groups = [sample("a", b"broken", ["red"])]
    with pytest.raises(SourceError, match="no image can be decoded"):
        loader(pairs_of(tmp_path, write_tar(tmp_path / "b.tar", groups))).batch(0)
