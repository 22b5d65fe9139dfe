import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BlipForImageTextRetrieval

from stages.errors import CheckpointError, ConfigError
from stages.models.embedder import Embedder
from stages.models.matcher import Matcher
from stages.models.preprocessing import Preprocessing
from tests import tiny_models

TEXTS = [
    "a red cat",
    "the picture of two dogs in water near a small tree",
    "",
    "A BIG blue, blue car!",
    "zzz unknown words 🙂 שלום",
    "a man and a woman on the street " * 20,
    "[SEP] <script>alert(1)</script>",
]


def random_images(count: int, seed: int = 0) -> list[Image.Image]:
    generator = np.random.default_rng(seed)
    return [
        Image.fromarray(generator.integers(0, 256, (24, 30, 3), dtype=np.uint8))
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def model() -> BlipForImageTextRetrieval:
    return tiny_models.matcher_model()


@pytest.fixture(scope="module")
def folder(model: BlipForImageTextRetrieval, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_blip(model, tmp_path_factory.mktemp("models") / "matcher")


@pytest.fixture(scope="module")
def matcher(folder: Path) -> Matcher:
    return Matcher(folder, batch_size=4)


@torch.inference_mode()
def transformers_scores(
    model: BlipForImageTextRetrieval, matcher: Matcher, image: Image.Image, text: str
) -> tuple[torch.Tensor, float]:
    """ITM logits and ITC cosine of one pair by transformers' modules, fed BLIP's ids."""
    encoded = matcher.encode_texts([text])
    ids, mask = encoded.input_ids, encoded.mask
    pixels = Preprocessing(size=32)([image])
    cosine = model(ids, pixels, use_itm_head=False, attention_mask=mask).itm_score
    enc = ids.clone()
    enc[:, 0] = matcher.tokenizer.convert_tokens_to_ids("[ENC]")
    return model(enc, pixels, attention_mask=mask).itm_score[0], float(cosine)


def test_scores_equal_transformers_modules_fed_the_same_ids(
    matcher: Matcher, model: BlipForImageTextRetrieval
) -> None:
    images = random_images(9)
    texts = [TEXTS[: i % 4] if i % 2 else TEXTS[i % 7 : i % 7 + 3] for i in range(9)]
    scores = matcher.match(images, texts)
    assert [len(row) for row in scores] == [len(row) for row in texts]
    for image, own, row in zip(images, texts, scores, strict=True):
        for text, (itm, itc) in zip(own, row, strict=True):
            logits, cosine = transformers_scores(model, matcher, image, text)
            assert itm == pytest.approx(float(logits.softmax(0)[1]), abs=1e-4)
            assert itc == pytest.approx(cosine, abs=1e-4)
    flat = [itm for row in scores for itm, _ in row]
    assert max(flat) - min(flat) > 0.1  # scores that say something


@pytest.mark.parametrize("texts_per_image", [2, 40])
def test_logits_of_any_pairs_equal_transformers(
    matcher: Matcher, model: BlipForImageTextRetrieval, texts_per_image: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    images, texts = random_images(6, seed=1), TEXTS * 2
    pairs = torch.cartesian_prod(torch.arange(6), torch.arange(14)).repeat(4, 1)
    pairs = pairs[torch.randperm(len(pairs), generator=generator)[: 6 * texts_per_image]]
    encoded, words = matcher.encode_images(images), matcher.encode_texts(texts)
    ours = matcher.itm_logits(encoded, words, pairs)
    assert ours.shape == (len(pairs), 2) and ours.dtype == torch.float32
    for logits, (image, text) in list(zip(ours, pairs.tolist(), strict=True))[:24]:
        expected, _ = transformers_scores(model, matcher, images[image], texts[text])
        assert (logits - expected).abs().max() < 1e-4
    same = (pairs == pairs[0]).all(dim=1)
    assert (ours[same] - ours[0]).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_were_saved_in_half_precision_open_in_any(
    model: BlipForImageTextRetrieval, matcher: Matcher, tmp_path: Path, dtype: torch.dtype
) -> None:
    half = copy.deepcopy(model).to(torch.float16)
    folder = tiny_models.save_blip(half, tmp_path / "half")
    images, texts = random_images(3), [["a red cat"], ["two dogs", "a boat"], []]
    exact, found = matcher.match(images, texts), Matcher(folder, dtype=dtype).match(images, texts)
    for own, other in zip(exact, found, strict=True):
        assert [a for pair in own for a in pair] == pytest.approx(
            [b for pair in other for b in pair], abs=0.05
        )
    embedder = Embedder(folder, dtype=dtype)
    assert embedder.embed_images(images).dtype == embedder.embed_texts(["a cat"]).dtype


def test_the_matching_head_sees_enc(matcher: Matcher, model: BlipForImageTextRetrieval) -> None:
    """Fed [CLS], as transformers' own forward does, the scores are others."""
    image = random_images(1)
    [[(itm, _)]] = matcher.match(image, [["a red cat"]])
    encoded = matcher.encode_texts(["a red cat"])
    with torch.inference_mode():
        cls = model(encoded.input_ids, Preprocessing(size=32)(image), attention_mask=encoded.mask)
    assert abs(float(cls.itm_score.softmax(-1)[0, 1]) - itm) > 1e-3


def test_blocks_hold_equal_counts_and_every_pair_once(matcher: Matcher) -> None:
    owners = [0, 1, 2, 8, 9, *[5] * 2, *[6] * 2, *[7] * 33]
    sizes, blocks, start = [owners.count(image) for image in owners], [], 0
    while start < len(owners):
        blocks.append(owners[start : matcher._block_end(sizes, start)])
        start += len(blocks[-1])
    assert [image for block in blocks for image in block] == owners
    assert [len(block) for block in blocks] == [5, 4, 16, 16, 1]
    for block in blocks:
        assert len({block.count(image) for image in block}) == 1


def test_texts_and_pairs_that_do_not_fit_are_halved(folder: Path) -> None:
    """Called directly, as evaluation does, and with an image of many texts cut up on the way."""
    images, texts = random_images(9), TEXTS * 3
    pairs = torch.cartesian_prod(torch.arange(8), torch.arange(3))
    pairs = torch.cat([pairs, torch.cartesian_prod(torch.tensor([8]), torch.arange(21))])
    matcher = Matcher(folder, batch_size=8)
    encoded, words = matcher.encode_images(images), matcher.encode_texts(texts)
    expected = matcher.itm_logits(encoded, words, pairs)
    encode, tried = matcher.encoder.forward, []

    def small_machine(ids: torch.Tensor, *args: object, **options: object) -> torch.Tensor:
        tried.append(len(ids))
        if len(ids) > 8:
            raise MemoryError
        return encode(ids, *args, **options)

    matcher.encoder.forward = small_machine
    again = matcher.encode_texts(texts)
    assert (again.features - words.features).abs().max() < 1e-5
    assert tried == [21, 16, 8, 8, 5] and matcher.batch_size == 2
    matcher.batch_size = 8
    found = matcher.itm_logits(encoded, words, pairs)
    assert (found - expected).abs().max() < 1e-5
    # 8 images of 3 pairs: 24, then 15, then 6 at a time; the image of 21: 8, 8 and 5.
    assert tried[5:] == [24, 15, 6, 6, 6, 6, 8, 8, 5]


def test_scores_do_not_depend_on_the_batch(folder: Path, matcher: Matcher) -> None:
    images = random_images(10, seed=2)
    texts = [[TEXTS[i % 7], TEXTS[(i + 1) % 7]] for i in range(10)]
    together = np.array(Matcher(folder, batch_size=64).match(images, texts))
    alone = np.array([matcher.match([i], [t])[0] for i, t in zip(images, texts, strict=True)])
    assert np.abs(together - alone).max() < 1e-5


def test_long_texts_are_cut_at_max_tokens(folder: Path) -> None:
    short = Matcher(folder, max_tokens=6)
    assert short.encode_texts(TEXTS).input_ids.shape[1] == 6
    image = random_images(1)
    words = "a red cat on the street"
    assert short.match(image, [[words]]) == short.match(image, [["a red cat on"]])
    for wrong in (2, 41):
        with pytest.raises(ConfigError, match=f"max_tokens {wrong} is not between 3 and the 40"):
            Matcher(folder, max_tokens=wrong)


def test_texts_are_cleaned(matcher: Matcher) -> None:
    image = random_images(1)
    assert matcher.match(image, [["A Red: CAT!"]]) == matcher.match(image, [["a red cat"]])


def test_no_images_and_no_texts(matcher: Matcher) -> None:
    assert matcher.match([], []) == []
    assert matcher.match(random_images(2), [[], []]) == [[], []]
    mixed = matcher([*random_images(1), Image.new("RGB", (1, 1))], [[], ["a cat"]])
    assert mixed[0] == [] and 0 <= mixed[1][0][0] <= 1 and -1 <= mixed[1][0][1] <= 1


def test_a_captioner_is_refused(tmp_path: Path) -> None:
    folder = tiny_models.save_blip(tiny_models.captioner_model(), tmp_path / "captioner")
    with pytest.raises(CheckpointError, match=r"without any tensor 'text_encoder"):
        Matcher(folder)


def test_bfloat16_is_close(folder: Path, matcher: Matcher) -> None:
    images, texts = random_images(6), [TEXTS[:2]] * 6
    half = np.array(Matcher(folder, dtype=torch.bfloat16).match(images, texts))
    assert np.abs(half - np.array(matcher.match(images, texts))).max() < 0.1
