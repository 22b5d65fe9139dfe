import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import BlipForConditionalGeneration
from transformers.generation import logits_process as theirs

from stages.errors import CheckpointError, ConfigError
from stages.models import captioner as captioner_module
from stages.models.absorbed import few_queries
from stages.models.captioner import Captioner
from stages.models.config import GenerationConfig
from stages.models.preprocessing import Preprocessing
from stages.models.sampling import Rules, draw, nucleus, uniforms
from tests import tiny_models

IMAGES = 200


def random_images(count: int, seed: int = 0) -> list[Image.Image]:
    generator = np.random.default_rng(seed)
    return [
        Image.fromarray(generator.integers(0, 256, (24, 30, 3), dtype=np.uint8))
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def model() -> BlipForConditionalGeneration:
    model = tiny_models.captioner_model()
    with torch.no_grad():  # make [SEP] likely enough that captions end at different lengths
        model.text_decoder.cls.predictions.bias[tiny_models.tokenizer().sep_token_id] += 3.0
    return model


@pytest.fixture(scope="module")
def folder(model: BlipForConditionalGeneration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_blip(model, tmp_path_factory.mktemp("models") / "captioner")


@pytest.fixture(scope="module")
def opened(folder: Path) -> Captioner:
    return Captioner(folder, batch_size=64)


@pytest.fixture(params=["tokens", "keys"])
def captioner(
    opened: Captioner, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Captioner:
    """Its decoding steps read image tokens, or keys and values: so do those of all in the test."""
    most = 1000 if request.param == "tokens" else 0
    monkeypatch.setattr(captioner_module, "few_queries", lambda *_: most)
    return opened


def generated(
    model: BlipForConditionalGeneration, images: list[Image.Image], **options: object
) -> torch.Tensor:
    """transformers' ``generate``, which overwrites the prompt's first id and drops its last."""
    prompt = torch.tensor(tiny_models.tokenizer()("a picture of ")["input_ids"])
    return model.generate(
        Preprocessing(size=32)(images), input_ids=prompt.repeat(len(images), 1), **options
    )


def padded(ids: torch.Tensor, length: int) -> torch.Tensor:
    """(N, ``length``) with 0 behind the first [SEP]: transformers fills up with [SEP] or [PAD]."""
    ids = torch.nn.functional.pad(ids, (0, length - ids.shape[1]))
    is_sep = (ids == tiny_models.tokenizer().sep_token_id).int()
    return ids.masked_fill((is_sep.cumsum(dim=1) - is_sep) > 0, 0)


@pytest.mark.parametrize("penalty", [1.0, 1.5])
@pytest.mark.parametrize("beams", [1, 3])
def test_greedy_and_beam_equal_transformers(
    captioner: Captioner, model: BlipForConditionalGeneration, beams: int, penalty: float
) -> None:
    images = random_images(IMAGES)
    options = {"max_length": 20, "min_length": 5, "do_sample": False}
    expected = generated(model, images, num_beams=beams, repetition_penalty=penalty, **options)
    config = GenerationConfig(
        method="greedy" if beams == 1 else "beam", num_beams=beams, repetition_penalty=penalty
    )
    keys = [b""] * len(images)
    ours = captioner.generate(Preprocessing(size=32)(images), keys, config)
    assert torch.equal(ours[:, 0], padded(expected, 20))
    lengths = (ours[:, 0] != 0).sum(dim=1)
    assert len(lengths.unique()) > 4 and lengths.min() >= 6


def test_several_beams_equal_transformers(
    captioner: Captioner, model: BlipForConditionalGeneration
) -> None:
    images = random_images(40, seed=1)
    options = {"max_length": 17, "min_length": 9, "do_sample": False}
    expected = generated(model, images, num_beams=4, num_return_sequences=3, **options)
    config = GenerationConfig(
        method="beam", num_beams=4, captions_per_image=3, min_tokens=9, max_tokens=17
    )
    ours = captioner.generate(Preprocessing(size=32)(images), [b""] * 40, config)
    assert torch.equal(ours.flatten(0, 1), padded(expected, 17))


def their_distribution(logits: torch.Tensor, ids: torch.Tensor, sep: int) -> torch.Tensor:
    """Nucleus sampling's distribution as transformers' processors leave it, CapFilt's settings."""
    for processor in (
        theirs.RepetitionPenaltyLogitsProcessor(1.1),
        theirs.MinLengthLogitsProcessor(5, sep, device="cpu"),
        theirs.TopKLogitsWarper(50),
        theirs.TopPLogitsWarper(0.9),
    ):
        logits = processor(ids, logits)
    return logits.softmax(dim=-1)


@torch.inference_mode()
def test_nucleus_draws_from_transformers_distributions(
    captioner: Captioner, model: BlipForConditionalGeneration
) -> None:
    """Cached decoding steps against transformers' forward over the whole text, all the way."""
    images, keys = random_images(12, seed=2), [bytes([i]) for i in range(12)]
    config = GenerationConfig(captions_per_image=2, seed=5)
    pixels, sep = Preprocessing(size=32)(images), captioner.tokenizer.sep_token_id
    ids = captioner.generate(pixels, keys, config).flatten(0, 1)
    noise = torch.from_numpy(uniforms(5, keys, 2, 20)).flatten(0, 1)
    tokens = model.vision_model(pixels).last_hidden_state.repeat_interleave(2, dim=0)
    decoding = captioner._decoding(captioner.vision(pixels), 2, 20)
    logits = decoding.start(ids[0, :4])
    going = torch.ones(24, dtype=torch.bool)
    for length in range(4, 20):
        past = ids[:, :length]
        whole = model.text_decoder(past, encoder_hidden_states=tokens).logits[:, -1]
        expected = their_distribution(whole, past, sep)
        scores = Rules(min_tokens=5, max_tokens=20, penalty=1.1, eos=sep, pad=0).apply(logits, past)
        found, order = nucleus(scores, 50, 0.9)
        ours = torch.zeros_like(expected).scatter(1, order, found)
        assert (ours - expected)[going].abs().max() < 1e-5
        ranked, ranks = expected.sort(dim=-1, descending=True, stable=True)
        drawn = draw(ranked, ranks, noise[:, length])
        assert torch.equal(drawn[going], ids[going, length])
        going = going & (ids[:, length] != sep)
        logits = decoding.step(ids[:, length])
    assert not going.all()


def test_same_image_same_caption_in_any_order_and_batch(folder: Path, captioner: Captioner) -> None:
    images = random_images(40, seed=3)
    keys = [hashlib.sha256(image.tobytes()).digest() for image in images]
    config = GenerationConfig(captions_per_image=3)
    captions = captioner(images, keys, config)
    assert captioner(images, None, config) == captions  # keys default to the pixels' sha256
    torch.manual_seed(123)
    assert captioner(images, keys, config) == captions
    assert captioner(images[::-1], keys[::-1], config) == captions[::-1]
    assert Captioner(folder, batch_size=7)(images, keys, config) == captions
    assert captioner(images[5:6], keys[5:6], config) == captions[5:6]


def test_seed_key_and_caption_index_change_the_caption(captioner: Captioner) -> None:
    image = random_images(1)
    keys = [bytes([i]) for i in range(20)]
    twenty = captioner(image * 20, keys, GenerationConfig())
    assert len({texts[0] for texts in twenty}) > 15
    three = captioner(image * 20, keys, GenerationConfig(captions_per_image=3))
    assert [texts[:1] for texts in three] == twenty
    assert sum(len(set(texts)) == 3 for texts in three) > 15
    other = captioner(image * 20, keys, GenerationConfig(seed=1))
    assert sum(a != b for a, b in zip(twenty, other, strict=True)) > 15


def test_few_queries_of_an_image_read_its_tokens(folder: Path) -> None:
    captioner = Captioner(folder)
    tokens = captioner.vision(Preprocessing(size=32)(random_images(3)))
    few = int(few_queries(tokens.shape[1], captioner.decoder.config))
    assert few > 4
    assert captioner._decoding(tokens, 1, few).image_kv is tokens
    assert isinstance(captioner._decoding(tokens, 1, few + 1).image_kv, list)
    assert isinstance(captioner._decoding(tokens, 3, few // 2).image_kv, list)
    captioner.graphed = True
    assert isinstance(captioner._decoding(tokens, 1, few).image_kv, list)
    int8 = Captioner(folder, int8=True)
    assert isinstance(int8._decoding(tokens, 1, few).image_kv, list)
    half = Captioner(folder, dtype=torch.bfloat16)
    assert isinstance(half._decoding(tokens.bfloat16(), 1, few).image_kv, list)


@pytest.mark.parametrize("method", ["nucleus", "beam", "greedy"])
def test_texts_have_no_prompt_and_no_special_tokens(captioner: Captioner, method: str) -> None:
    config = GenerationConfig(method=method)
    images = random_images(30, seed=4)
    texts = [text for (text,) in captioner(images, config=config)]
    assert sum(bool(text) for text in texts) > 20
    for text in texts:
        assert text == text.strip()
        assert not text.startswith(("a picture of", "##"))
        assert "[" not in text
        assert len(captioner.tokenizer(text)["input_ids"]) <= 20 - 4 + 2
    ids = captioner.generate(Preprocessing(size=32)(images), [b"k"] * 30, config)
    words = captioner.tokenizer.batch_decode(ids[:, 0], skip_special_tokens=True)
    assert all(line.startswith("a picture of") for line in words)


def test_the_prompt_may_be_empty(captioner: Captioner) -> None:
    config = GenerationConfig(prompt="", max_tokens=8)
    assert captioner.prompt_ids(config) == [captioner.tokenizer.bos_token_id]
    assert all(texts[0] for texts in captioner(random_images(5), config=config))


def test_without_keys_equal_pixels_get_equal_captions(captioner: Captioner) -> None:
    images = random_images(6)
    twice = captioner([*images, images[0], *(image.copy() for image in images)])
    assert twice[:6] == twice[7:] and twice[6] == twice[0]
    keys = [hashlib.sha256(image.tobytes()).digest() for image in images]
    assert captioner(images, keys) == twice[:6]
    tensor = Preprocessing(size=32)(images)
    assert captioner(tensor) == captioner(tensor[[0, 1, 2, 3, 4, 5]])


def test_keys_for_other_images_are_refused(captioner: Captioner) -> None:
    with pytest.raises(ValueError, match="2 keys for 3 images"):
        captioner(random_images(3), [b"a", b"b"])


def test_no_images(captioner: Captioner) -> None:
    assert captioner([]) == []


def test_odd_sizes_are_captioned(captioner: Captioner) -> None:
    images = [Image.new("RGB", size, "red") for size in [(1, 1), (5000, 3), (3, 5000)]]
    assert len(captioner(images)) == 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"min_tokens": 30}, "min_tokens 30 exceeds max_tokens 20"),
        ({"method": "greedy", "captions_per_image": 2}, "captions_per_image 2 needs"),
        ({"method": "beam", "captions_per_image": 4}, "captions_per_image 4 needs"),
        ({"top_p": 1.5}, "top_p"),
        ({"method": "magic"}, "method"),
    ],
)
def test_bad_settings_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        GenerationConfig(**fields)


def test_settings_that_the_model_cannot_follow(captioner: Captioner) -> None:
    with pytest.raises(ConfigError, match="max_tokens 41 exceeds the model's 40 positions"):
        captioner(random_images(1), config=GenerationConfig(max_tokens=41))
    long = GenerationConfig(prompt="a picture of " * 7)
    with pytest.raises(ConfigError, match="leaves no room"):
        captioner(random_images(1), config=long)


def test_default_penalty_is_the_originals() -> None:
    assert GenerationConfig().penalty == 1.1
    assert GenerationConfig(method="beam").penalty == 1.0
    assert GenerationConfig(method="beam", repetition_penalty=1.3).penalty == 1.3


def test_either_name_of_a_tied_tensor_will_do(
    folder: Path, captioner: Captioner, tmp_path: Path
) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    prefix = "text_decoder.cls.predictions."
    present = [name for name in tensors if name.startswith(prefix) and name.endswith("bias")]
    bias = next(tensors[n] for n in (f"{prefix}bias", f"{prefix}decoder.bias") if n in present)
    for name in (f"{prefix}bias", f"{prefix}decoder.bias"):
        tensors.pop(name, None)
    images = random_images(4)
    for name in (f"{prefix}bias", f"{prefix}decoder.bias"):
        save_file(tensors | {name: bias}, tmp_path / "model.safetensors", metadata={"format": "pt"})
        assert Captioner(tmp_path)(images) == captioner(images)


def test_a_matcher_is_refused(tmp_path: Path) -> None:
    folder = tiny_models.save_blip(tiny_models.matcher_model(), tmp_path / "matcher")
    with pytest.raises(CheckpointError, match=r"found model_type 'blip' without .*text_decoder"):
        Captioner(folder)


def test_bfloat16_captions_are_mostly_the_same(folder: Path, captioner: Captioner) -> None:
    images = random_images(30, seed=6)
    config = GenerationConfig(method="greedy")
    half = Captioner(folder, dtype=torch.bfloat16)(images, config=config)
    whole = captioner(images, config=config)
    assert sum(a == b for a, b in zip(half, whole, strict=True)) >= 15
