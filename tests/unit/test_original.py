"""Checkpoints under the original's names, imported and opened by plain transformers.

Their tensors are the reference fixture's: with them the original itself computed the losses.
"""

from __future__ import annotations

import io
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoProcessor,
    BertTokenizer,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipProcessor,
)

from pipeline.cli import main
from stages.errors import CheckpointError
from stages.models.captioner import Captioner
from stages.models.checkpoints import load_med, resized_positions
from stages.models.config import GenerationConfig, MedConfig
from stages.models.matcher import Matcher
from stages.models.med import Med
from stages.models.original import import_checkpoint, original_name
from tests.images import jpeg

FIXTURE = Path(__file__).parent.parent / "fixtures" / "reference" / "blip_pretrain.json"
FACTS = json.loads(FIXTURE.read_text())
PHOTO = Image.open(io.BytesIO(jpeg(0)))
HEADS = {"vision_heads": 4, "text_heads": 4}
NAMES = [
    (r"^vision_model(_m)?\.embeddings\.class_embedding$", r"visual_encoder\1.cls_token"),
    (r"^vision_model(_m)?\.embeddings\.position_embedding$", r"visual_encoder\1.pos_embed"),
    (r"^vision_model(_m)?\.embeddings\.patch_embedding\.", r"visual_encoder\1.patch_embed.proj."),
    (r"^vision_model(_m)?\.post_layernorm\.", r"visual_encoder\1.norm."),
    (r"^vision_model(_m)?\.encoder\.layers\.(\d+)\.mlp\.", r"visual_encoder\1.blocks.\2.mlp."),
    (
        r"^vision_model(_m)?\.encoder\.layers\.(\d+)\.layer_norm(\d)\.",
        r"visual_encoder\1.blocks.\2.norm\3.",
    ),
    (
        r"^vision_model(_m)?\.encoder\.layers\.(\d+)\.self_attn\.qkv\.",
        r"visual_encoder\1.blocks.\2.attn.qkv.",
    ),
    (
        r"^vision_model(_m)?\.encoder\.layers\.(\d+)\.self_attn\.projection\.",
        r"visual_encoder\1.blocks.\2.attn.proj.",
    ),
]


def renamed(name: str) -> str:
    for pattern, original in NAMES:
        name = re.sub(pattern, original, name)
    return name


@pytest.fixture(scope="module")
def stored() -> dict[str, Tensor]:
    return load_file(FIXTURE.with_suffix(".safetensors"))


@pytest.fixture(scope="module")
def released(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """A pretraining checkpoint's ``model``, tied tensors under both names as `state_dict` has
    them, momentum copies and position ids included."""
    model = {renamed(name): t for name, t in stored.items() if not name.startswith("step")}
    decoder = {
        name.replace("text_encoder.", "text_decoder.bert.", 1): tensor
        for name, tensor in model.items()
        if name.startswith("text_encoder.") and ".attention." not in name
    }
    copies = {
        re.sub(r"^(visual_encoder|text_encoder|vision_proj|text_proj)\.", r"\1_m.", name): tensor
        for name, tensor in model.items()
        if name.startswith(("visual_encoder.", "text_encoder.", "vision_proj.", "text_proj."))
    }
    head = "text_decoder.cls.predictions"
    tied = {
        f"{head}.decoder.weight": model["text_encoder.embeddings.word_embeddings.weight"],
        f"{head}.decoder.bias": model[f"{head}.bias"],
        "text_encoder.embeddings.position_ids": torch.arange(64)[None],
    }
    return {**model, **decoder, **copies, **tied}


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("words")
    vocabulary = {word: number for number, word in enumerate(FACTS["vocab"])}
    BertTokenizer(vocab=vocabulary).save_pretrained(str(folder))
    return str(folder)


def written(model: object, file: Path, **more: object) -> Path:
    torch.save({"model": model, "epoch": 19, **more}, file)
    return file


@pytest.fixture(scope="module")
def out(released: dict[str, Tensor], words: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("released")
    file = written(released, folder / "model_base.pth")
    imported = import_checkpoint(file, folder / "new" / "out", tokenizer=words, **HEADS)
    assert imported.notes == ()
    assert sorted(imported.folders) == ["captioner", "filter", "med"]
    assert sorted(path.name for path in (folder / "new").iterdir()) == ["out"]
    return folder / "new" / "out"


def step(stored: dict[str, Tensor], number: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    names = ("pixel_values", "input_ids", "attention_mask")
    pixels, ids, mask = (stored[f"step{number}.{name}"].clone() for name in names)
    return pixels, ids, mask


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("vision_model.embeddings.class_embedding", "visual_encoder.cls_token"),
        ("vision_model_m.embeddings.position_embedding", "visual_encoder_m.pos_embed"),
        ("vision_model.post_layernorm.bias", "visual_encoder.norm.bias"),
        (
            "vision_model.encoder.layers.11.self_attn.projection.weight",
            "visual_encoder.blocks.11.attn.proj.weight",
        ),
        ("vision_proj.weight", "vision_proj.weight"),
        (
            "text_encoder.encoder.layer.0.output.dense.bias",
            "text_encoder.encoder.layer.0.output.dense.bias",
        ),
    ],
)
def test_names(ours: str, theirs: str) -> None:
    assert original_name(ours) == theirs


def test_every_tensor_of_a_med_has_the_originals_name() -> None:
    with torch.device("meta"):
        names = list(Med(MedConfig()).state_dict())
    assert all(original_name(name) == renamed(name) for name in names)


def test_the_med_has_the_originals_losses(out: Path, stored: dict[str, Tensor]) -> None:
    config = load_med(out / "med").config
    sizes = config.model_copy(update={"queue_size": 16, "mask_same_image": False})
    text = config.text.model_copy(update={"dropout": 0.0})
    med = load_med(out / "med", sizes.model_copy(update={"text": text})).train()
    facts = FACTS["steps"][0]
    negatives = facts["negative_image_index"], facts["negative_text_index"]
    drawn = (torch.tensor(negatives[0]), torch.tensor(negatives[1]))
    losses = med(*step(stored), facts["alpha"], negatives=drawn)
    for name, loss in zip(("itc", "itm", "lm"), losses, strict=True):
        assert loss.item() == pytest.approx(facts[f"loss_{name}"], rel=1e-5), name


def test_momentum_copies_and_queues_come_along(
    released: dict[str, Tensor], words: str, out: Path, tmp_path: Path
) -> None:
    trained = dict(released)
    trained["text_proj_m.weight"] = trained["text_proj.weight"] + 1
    imported = import_checkpoint(
        written(trained, tmp_path / "a.pth"), tmp_path / "out", tokenizer=words, **HEADS
    )
    med = load_med(imported.folders["med"], imported.config)
    assert torch.equal(med.text_proj_m.weight, med.text_proj.weight + 1)
    assert torch.equal(med.image_queue, released["image_queue"])
    assert med.image_id_queue.unique().tolist() == [-1]


@pytest.mark.parametrize("gone", [("_m.",), ("queue",), ("_m.", "queue")])
def test_a_file_out_of_which_they_were_taken_is_a_med_too(
    released: dict[str, Tensor], words: str, tmp_path: Path, gone: tuple[str, ...]
) -> None:
    bare = {n: t for n, t in released.items() if not any(part in n for part in gone)}
    file = written(bare, tmp_path / "a.pth")
    imported = import_checkpoint(file, tmp_path / "out", tokenizer=words, **HEADS)
    assert not (imported.folders["med"] / "momentum.safetensors").exists()
    med = load_med(imported.folders["med"])
    assert torch.equal(med.text_proj_m.weight, med.text_proj.weight)


@torch.no_grad()
def test_transformers_captioner_is_ours(out: Path, stored: dict[str, Tensor]) -> None:
    theirs, info = BlipForConditionalGeneration.from_pretrained(
        out / "captioner", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    pixels, ids, mask = step(stored)
    ids[:, 0] = FACTS["bos_token_id"]
    labels = ids.masked_fill(ids == FACTS["pad_token_id"], -100)
    med = load_med(out / "med").eval()
    kv = med.text_encoder.cross_kv(med.vision_model(pixels))
    loss = theirs(pixel_values=pixels, input_ids=ids, attention_mask=mask, labels=labels).loss
    torch.testing.assert_close(loss, med.language_modelling(kv, ids), rtol=1e-5, atol=1e-5)
    # In train mode, without dropout, momentum or queues, this is also what the original computed.
    assert loss.item() == pytest.approx(FACTS["steps"][0]["loss_lm"], rel=1e-5)

    ours = Captioner(out / "captioner")
    prompt = torch.tensor([ours.tokenizer("a picture of ")["input_ids"]] * len(pixels))
    generated = theirs.generate(pixels, input_ids=prompt, max_length=12, do_sample=False)
    config = GenerationConfig(method="greedy", min_tokens=1, max_tokens=12)
    found = ours.generate(pixels, [b""] * len(pixels), config)[:, 0]
    texts = found != 0
    assert torch.equal(generated[:, : found.shape[1]][texts], found[texts])


@torch.no_grad()
def test_transformers_matcher_is_ours(out: Path, stored: dict[str, Tensor]) -> None:
    theirs, info = BlipForImageTextRetrieval.from_pretrained(
        out / "filter", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    med, (pixels, ids, mask) = load_med(out / "med").eval(), step(stored)
    ids[:, 0] = FACTS["enc_token_id"]
    logits = theirs(pixel_values=pixels, input_ids=ids, attention_mask=mask).itm_score
    kv = med.text_encoder.cross_kv(med.vision_model(pixels))
    states = med.text_encoder(ids, mask, image_kv=kv)
    torch.testing.assert_close(logits, med.itm_head(states[:, 0]), rtol=1e-5, atol=1e-5)
    [[(matching, _)]] = Matcher(out / "filter").match([PHOTO], [["a red dog"]])
    assert 0 < matching < 1


def test_processors_open_every_folder(out: Path) -> None:
    for folder in out.iterdir():
        for kind in (AutoProcessor, BlipProcessor):
            processor = kind.from_pretrained(folder)
            batch = processor(images=PHOTO, text="a red dog", return_tensors="pt")
            assert batch["pixel_values"].shape == (1, 3, 64, 64)
            assert processor.tokenizer.decode(batch["input_ids"][0]) == "[CLS] a red dog [SEP]"


def test_a_captioning_checkpoint_is_a_captioner_alone(
    released: dict[str, Tensor], words: str, out: Path, tmp_path: Path
) -> None:
    model = {n: t for n, t in released.items() if n.startswith(("visual_encoder.", "text_decoder"))}
    file = written(model, tmp_path / "caption.pth")
    imported = import_checkpoint(file, tmp_path / "out", tokenizer=words, **HEADS)
    assert list(imported.folders) == ["captioner"]
    assert imported.notes[0].startswith("no filter: the file has no text_encoder.")
    assert imported.notes[1].startswith("no med: ")
    same_weights(tmp_path / "out" / "captioner", out / "captioner")


def test_a_retrieval_checkpoint_is_a_filter_alone(
    released: dict[str, Tensor], words: str, out: Path, tmp_path: Path
) -> None:
    model = {n: t for n, t in released.items() if not n.startswith("text_decoder.")}
    model["ptr_queue"] = model.pop("queue_ptr")
    model["idx_queue"] = torch.full((1, 16), -100)
    file = written(model, tmp_path / "retrieval.pth")
    imported = import_checkpoint(file, tmp_path / "out", tokenizer=words, **HEADS)
    assert list(imported.folders) == ["filter"]
    same_weights(tmp_path / "out" / "filter", out / "filter")


def same_weights(one: Path, other: Path) -> None:
    a, b = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_bias_that_the_original_adds_is_taken(
    released: dict[str, Tensor], words: str, tmp_path: Path
) -> None:
    """Growing the vocabulary left the other, unused one at BERT's size."""
    head = "text_decoder.cls.predictions"
    model = released | {
        f"{head}.bias": torch.zeros(46),
        f"{head}.decoder.bias": torch.arange(48.0),
    }
    file = written(model, tmp_path / "a.pth")
    import_checkpoint(file, tmp_path / "out", tokenizer=words, **HEADS)
    tensors = load_file(tmp_path / "out" / "captioner" / "model.safetensors")
    assert tensors[f"{head}.bias"].tolist() == list(range(48))


def test_what_is_not_shared_is_no_med(
    released: dict[str, Tensor], words: str, tmp_path: Path
) -> None:
    name = "text_decoder.bert.encoder.layer.1.crossattention.self.key.weight"
    head = "text_decoder.cls.predictions.decoder.weight"
    model = released | {name: released[name] + 1, head: released[head] + 1}
    file = written(model, tmp_path / "a.pth")
    imported = import_checkpoint(file, tmp_path / "out", tokenizer=words, **HEADS)
    assert sorted(imported.folders) == ["captioner", "filter"]
    assert not (tmp_path / "out" / "med").exists()
    assert [note.partition(":")[0] for note in imported.notes] == ["captioner", "no med"]


def test_another_image_size(released: dict[str, Tensor], words: str, tmp_path: Path) -> None:
    file = written(released, tmp_path / "a.pth")
    imported = import_checkpoint(file, tmp_path / "out", tokenizer=words, image_size=96, **HEADS)
    name = "vision_model.embeddings.position_embedding"
    expected = resized_positions(released["visual_encoder.pos_embed"], 37)
    for folder in imported.folders.values():
        assert torch.equal(load_file(folder / "model.safetensors")[name], expected)
        batch = AutoProcessor.from_pretrained(folder)(images=PHOTO, return_tensors="pt")
        assert batch["pixel_values"].shape[-1] == 96
    theirs = BlipForImageTextRetrieval.from_pretrained(imported.folders["filter"])
    assert theirs.vision_model(torch.zeros(1, 3, 96, 96)).last_hidden_state.shape[1] == 37
    assert load_med(imported.folders["med"]).vision_model_m.config.image_size == 96


@pytest.mark.parametrize("width", [384, 768, 1024])
def test_heads_of_the_released_sizes_are_known(width: int, words: str, tmp_path: Path) -> None:
    """One layer of ViT-S, ViT-B and ViT-L width; BERT's text stack is as narrow as can be."""
    from stages.models.config import TextConfig, VisionConfig

    vision = VisionConfig(image_size=32, width=width, layers=1, heads=1, mlp_width=8)
    text = TextConfig(
        vocab_size=48,
        width=64,
        layers=1,
        heads=1,
        mlp_width=8,
        max_positions=30,
        vision_width=width,
    )
    med = Med(MedConfig(vision=vision, text=text, projection_dim=4, queue_size=4))
    model = {renamed(name): t for name, t in med.state_dict().items() if name != "image_id_queue"}
    file = written(model, tmp_path / "a.pth")
    imported = import_checkpoint(file, tmp_path / "out", tokenizer=words)
    assert imported.config.vision.heads == {384: 6, 768: 12, 1024: 16}[width]
    assert imported.config.vision.image_size == 32 and imported.config.text.heads == 1
    theirs = BlipForConditionalGeneration.from_pretrained(tmp_path / "out" / "captioner")
    assert theirs.config.vision_config.num_attention_heads == imported.config.vision.heads
    assert theirs.config.text_config.encoder_hidden_size == width
    AutoProcessor.from_pretrained(tmp_path / "out" / "med")


class Gadget:
    """What a hostile pickle would call."""

    def __init__(self, touched: Path) -> None:
        self.touched = touched

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.touched,)


def refused(file: Path, out: Path, words: str, **options: Any) -> str:
    """The one line with which a file is refused; nothing is left behind."""
    with pytest.raises(CheckpointError) as caught:
        import_checkpoint(file, out, tokenizer=words, **{**HEADS, **options})
    before = {file.name, "touched"} if file.parent == out.parent else set()
    assert {path.name for path in out.parent.iterdir()} <= before
    said = str(caught.value)
    assert "\n" not in said and len(said) < 600
    return said


def test_pickled_code_is_never_run(released: dict[str, Tensor], words: str, tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    for content in ({"model": released, "config": Gadget(touched)}, Gadget(touched)):
        torch.save(content, tmp_path / "a.pth")
        assert "never loaded" in refused(tmp_path / "a.pth", tmp_path / "out", words)
    (tmp_path / "a.pth").write_bytes(pickle.dumps({"model": Gadget(touched)}))
    assert "a.pth: " in refused(tmp_path / "a.pth", tmp_path / "out", words)
    assert not touched.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 100,
        b"PK\x03\x04 no zip",
        b"text\n" * 9,
        b"\x80\x02}q\x00.",
        b"\x80\x02K\x01.",
    ],
)
def test_files_that_are_no_checkpoint(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_bytes(content)
    said = refused(tmp_path / "a.pth", tmp_path / "out", words)
    assert said.startswith(f"{tmp_path / 'a.pth'}: ") and "need a .pth" in said


def test_a_file_cut_short(released: dict[str, Tensor], words: str, tmp_path: Path) -> None:
    whole = written(released, tmp_path / "a.pth").read_bytes()
    for length in (100, len(whole) // 2, len(whole) - 10):
        (tmp_path / "a.pth").write_bytes(whole[:length])
        assert "need a .pth" in refused(tmp_path / "a.pth", tmp_path / "out", words)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ({}, "no 'model' in it"),
        ([1], "no 'model' in it"),
        ({"state_dict": {}}, "no 'model' in it"),
        ({"model": 3}, "'model' is no dict"),
        ({"model": {"a": 3}}, "'model' is no dict"),
        ({"model": {3: torch.zeros(1)}}, "'model' is no dict"),
        ({"model": {}}, "neither captioner nor filter"),
    ],
)
def test_dicts_that_are_no_checkpoint(
    content: object, part: str, words: str, tmp_path: Path
) -> None:
    torch.save(content, tmp_path / "a.pth")
    assert part in refused(tmp_path / "a.pth", tmp_path / "out", words)


@pytest.mark.parametrize(
    ("name", "tensor", "part"),
    [
        ("visual_encoder.pos_embed", None, "no tensor visual_encoder.pos_embed"),
        ("visual_encoder.pos_embed", torch.zeros(1, 4, 48), "3 patches, no square"),
        ("visual_encoder.pos_embed", torch.zeros(17), "needs 3 dimensions"),
        ("visual_encoder.pos_embed", torch.zeros(1, 17, 47), "misshapen tensor"),
        ("visual_encoder.blocks.1.attn.qkv.bias", None, "no tensor visual_encoder.blocks.1"),
        ("visual_encoder.blocks.7.attn.qkv.bias", torch.zeros(1), "no tensor"),
        ("itm_head.weight", None, "no tensor itm_head.weight"),
        ("itm_head.weight", torch.zeros(3, 32), "misshapen tensor itm_head.weight (3, 32)"),
        ("vision_proj_m.bias", None, "no tensor vision_proj_m.bias"),
        ("text_queue", torch.zeros(16, 8), "misshapen tensor text_queue"),
        ("text_decoder.cls.predictions.transform.dense.bias", None, "transform.dense.bias"),
        ("text_decoder.bert.pooler.bias", torch.zeros(1), "unexpected tensor"),
        (
            "text_encoder.embeddings.word_embeddings.weight",
            torch.zeros(47, 32),
            "has 47 tokens, tokenizer",
        ),
    ],
)
def test_tensors_that_do_not_fit(
    released: dict[str, Tensor],
    words: str,
    tmp_path: Path,
    name: str,
    tensor: Tensor | None,
    part: str,
) -> None:
    model = {n: t for n, t in released.items() if n != name}
    if tensor is not None:
        model[name] = tensor
    file = written(model, tmp_path / "a.pth")
    assert part in refused(file, tmp_path / "out", words)


def test_models_for_other_tasks_are_refused(
    released: dict[str, Tensor], words: str, tmp_path: Path
) -> None:
    """Question answering: its decoder reads the question's states, not the image's."""
    parts = ("visual_encoder.", "text_encoder.", "text_decoder.")
    vqa = {name: tensor for name, tensor in released.items() if name.startswith(parts)}
    said = refused(written(vqa, tmp_path / "a.pth"), tmp_path / "out", words)
    assert "neither captioner nor filter" in said and "vision_proj." in said


def test_options_that_do_not_fit(released: dict[str, Tensor], words: str, tmp_path: Path) -> None:
    file, out = written(released, tmp_path / "a.pth"), tmp_path / "out"
    assert "multiple of the patch size 16" in refused(file, out, words, image_size=90)
    assert "multiple of the patch size 16" in refused(file, out, words, image_size=0)
    assert "--vision-heads" in refused(file, out, words, vision_heads=None)
    assert "not a multiple of heads 5" in refused(file, out, words, text_heads=5)
    assert "heads" in refused(file, out, words, vision_heads=0)
    assert "no such folder" in refused(file, out, str(tmp_path / "nowhere"))


def test_the_command(
    released: dict[str, Tensor], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(released, tmp_path / "a.pth")
    options = ["--tokenizer", words, "--image-size", "32", "--text-heads", "4"]
    command = ["import-checkpoint", str(file), str(tmp_path / "out"), *options]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"capfilt: {file}: the vision tower") and said.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert main([*command, "--vision-heads", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [str(tmp_path / "out" / name) for name in ("captioner", "filter", "med")]
    # What is there is never written over.
    assert main([*command, "--vision-heads", "4"]) == 2
    assert "exists and is not empty" in capsys.readouterr().err
