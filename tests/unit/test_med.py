"""MED's own promises; that its numbers are the original's is test_reference.py's business."""

import copy

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from stages.models.config import TEMPERATURE_RANGE, MedConfig, TextConfig, VisionConfig
from stages.models.losses import MedLosses, Negatives, draw_negatives
from stages.models.med import NO_IMAGE_ID, Med

VOCABULARY = 40
CONFIG = MedConfig(
    vision=VisionConfig(image_size=16, patch_size=8, width=24, layers=2, heads=2, mlp_width=48),
    text=TextConfig(
        vocab_size=VOCABULARY,
        width=16,
        layers=2,
        heads=2,
        mlp_width=32,
        max_positions=32,
        vision_width=24,
        dropout=0.0,
        cls_token_id=2,
        sep_token_id=3,
        dec_token_id=VOCABULARY - 2,
        enc_token_id=VOCABULARY - 1,
    ),
    projection_dim=8,
    queue_size=10,
)


def med(seed: int = 0, **changes: object) -> Med:
    torch.manual_seed(seed)
    return Med(CONFIG.model_copy(update=changes)).train()


def batch(size: int = 4, length: int = 9, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels, ids and mask; texts of 4 to ``length`` tokens, the second one the longest."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(size, 3, 16, 16, generator=generator)
    ids = torch.randint(5, VOCABULARY - 2, (size, length), generator=generator)
    lengths = torch.randint(4, length + 1, (size,), generator=generator)
    lengths[1 % size] = length
    mask = (torch.arange(length) < lengths[:, None]).long()
    ids[:, 0] = CONFIG.text.cls_token_id
    ids[torch.arange(size), lengths - 1] = CONFIG.text.sep_token_id
    return pixels, ids * mask, mask


def storages(model: Med) -> set[tuple[int, int]]:
    """Each pair of names that BLIP.md calls shared, as addresses of their memory."""
    state = model.state_dict(keep_vars=True)
    pairs = {
        (value.data_ptr(), state[name.replace("text_decoder.bert", "text_encoder")].data_ptr())
        for name, value in state.items()
        if name.startswith("text_decoder.bert.") and ".attention." not in name
    }
    head = "text_decoder.cls.predictions."
    words = state["text_encoder.embeddings.word_embeddings.weight"]
    pairs.add((state[f"{head}decoder.weight"].data_ptr(), words.data_ptr()))
    pairs.add((state[f"{head}decoder.bias"].data_ptr(), state[f"{head}bias"].data_ptr()))
    return pairs


def assert_tied(model: Med) -> None:
    assert len(storages(model)) > 20
    assert all(ours == theirs for ours, theirs in storages(model))
    state = model.state_dict(keep_vars=True)
    for name, value in state.items():
        if name.startswith("text_decoder.bert.") and ".attention." in name:
            twin = state[name.replace("text_decoder.bert", "text_encoder")]
            assert value.data_ptr() != twin.data_ptr(), name


def step(model: Med) -> MedLosses:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    model.begin_step()
    losses: MedLosses = model(*batch(), 0.4)
    losses.total.backward()
    optimizer.step()
    return losses


def test_size_at_vit_b_is_the_papers() -> None:
    with torch.device("meta"):
        model = Med(MedConfig())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert abs(trained - 252e6) < 1e6


def test_tied_tensors_stay_one_storage() -> None:
    model = med()
    assert_tied(model)
    step(model)
    assert_tied(model)
    model.load_state_dict(copy.deepcopy(med(seed=3).state_dict()))
    assert_tied(model)
    assert_tied(copy.deepcopy(model).double())


def test_padding_changes_nothing() -> None:
    pixels, ids, mask = batch()
    wide, wide_mask = torch.zeros(4, 20, dtype=torch.int64), torch.zeros(4, 20, dtype=torch.int64)
    wide[:, :9], wide_mask[:, :9] = ids, mask
    negatives = torch.tensor([1, 2, 3, 0]), torch.tensor([3, 2, 1, 0])
    tight = med()(pixels, ids, mask, 0.4, negatives=negatives)
    padded = med()(pixels, wide, wide_mask, 0.4, negatives=negatives)
    assert tight == padded


def test_image_keys_are_computed_once_for_each_layer() -> None:
    model = med()
    calls = []
    for layer in model.text_encoder.encoder.layer:
        layer.crossattention.self.key.register_forward_hook(lambda *_: calls.append(1))
    model(*batch())
    assert len(calls) == CONFIG.text.layers


def test_momentum_copies_follow_before_they_are_used() -> None:
    model = med()
    with torch.no_grad():
        model.text_proj.weight += 1.0
    before = model.text_proj_m.weight.clone()
    model.begin_step()
    torch.testing.assert_close(model.text_proj_m.weight, before + 0.005)
    assert not any(p.requires_grad for p in model.vision_model_m.parameters())


def test_temperature_is_clamped() -> None:
    model = med()
    for outside, clamped in zip((-1.0, 9.0), TEMPERATURE_RANGE, strict=True):
        with torch.no_grad():
            model.temp.fill_(outside)
        model.begin_step()
        assert model.temp.item() == pytest.approx(clamped)


def test_queue_wraps_around() -> None:
    model = med()
    for ids in ([1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]):
        model(*batch(), image_ids=torch.tensor(ids))
    assert model.image_id_queue.tolist() == [11, 12, 3, 4, 5, 6, 7, 8, 9, 10]
    assert model.queue_ptr.item() == 2
    for queue in (model.image_queue, model.text_queue):
        torch.testing.assert_close(queue.norm(dim=0), torch.ones(10))
    # Same pictures, nearly the same model: the newest features are the oldest ones again.
    torch.testing.assert_close(model.image_queue[:, 4], model.image_queue[:, 8], atol=0.1, rtol=0)


def test_evaluation_leaves_the_model_as_it_is() -> None:
    model = med().eval()
    with torch.no_grad():
        model.text_proj.weight += 1.0
    before = copy.deepcopy(model.state_dict())
    model(*batch())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_pairs_of_one_image_are_no_negatives() -> None:
    """One image with three texts, another with one: each of the three can only draw the one."""
    ids, seen = torch.tensor([5, 5, 9, 5]), set()
    for seed in range(8):
        model, rows = med(), []
        model.text_encoder.register_forward_pre_hook(
            lambda _module, _args, named, rows=rows: rows.append(named.get("rows")),
            with_kwargs=True,
        )
        model(*batch(), image_ids=ids, generator=torch.Generator().manual_seed(seed))
        drawn_texts = rows[-1][1:8:2]  # beside each image's own text
        assert drawn_texts[[0, 1, 3]].tolist() == [2, 2, 2]
        seen.add(drawn_texts[2].item())
    assert seen <= {0, 1, 3}
    assert len(seen) > 1


def test_pairs_of_one_image_share_targets_also_with_the_queue() -> None:
    ids = torch.tensor([5, 5, 9, 5])
    assert stirred()(*batch(), image_ids=ids).itc != stirred()(*batch()).itc
    same, other = stirred(), stirred()
    for model, queued in ((same, ids), (other, ids + 10)):
        model(*batch(seed=2), image_ids=queued)
    # The queues hold the same features; whether they count as positives is the difference.
    assert torch.equal(same.image_queue, other.image_queue)
    assert same(*batch(), image_ids=ids).itc != other(*batch(), image_ids=ids).itc


def stirred() -> Med:
    """A model whose features lie far apart, as they do not at the start of training."""
    model = med()
    with torch.no_grad():
        for parameter in (*model.vision_model.parameters(), *model.text_encoder.parameters()):
            parameter.normal_(std=0.3)
    model.reset_momentum()
    return model


def test_the_floor_of_hard_negatives_is_pretrainings_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    floors = []

    def drawn(
        i2t: Tensor, t2i: Tensor, excluded: Tensor, source: object, floor: float
    ) -> Negatives:
        floors.append(floor)
        return draw_negatives(i2t, t2i, excluded, None, floor)

    monkeypatch.setattr("stages.models.med.draw_negatives", drawn)
    model, (pixels, ids, mask) = med(), batch()
    model(pixels, ids, mask)
    tokens = model.vision_model(pixels)
    kv = model.text_encoder.cross_kv(tokens)
    model.contrastive_and_matching(pixels, tokens, kv, ids, mask)
    assert floors == [1e-4, 0.0]


def test_off_ignores_the_image_ids() -> None:
    off = med(mask_same_image=False)
    losses = off(*batch(), image_ids=torch.zeros(4, dtype=torch.int64), generator=seeded())
    without = med()(*batch(), generator=seeded())
    assert losses == without
    assert off.image_id_queue.unique().tolist() == [NO_IMAGE_ID]


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def test_one_pair_alone_still_trains() -> None:
    losses = med()(*batch(1))
    losses.total.backward()
    assert all(torch.isfinite(loss) for loss in losses)


def test_parts_are_what_the_whole_is_made_of() -> None:
    whole = med()(*batch(), 0.4, generator=seeded())
    match = med()(*batch(), 0.4, generator=seeded(), language=False)
    speak = med()(*batch(), matching=False)
    assert (match.itc, match.itm, match.lm) == (whole.itc, whole.itm, 0)
    assert (speak.itc, speak.itm, speak.lm) == (0, 0, whole.lm)


def test_prompt_tokens_carry_no_loss() -> None:
    pixels, ids, mask = batch()
    ids[:, 1:3] = 7
    model = med()
    kv = model.text_encoder.cross_kv(model.vision_model(pixels))
    with_prompt = model.language_modelling(kv, ids, prompt_length=3)
    logits = model.text_decoder.cls.predictions(
        model.text_decoder.bert(
            torch.cat([torch.full((4, 1), CONFIG.text.dec_token_id), ids[:, 1:]], dim=1),
            mask,
            causal=True,
            image_kv=kv,
        )
    )
    targets = ids.masked_fill(mask == 0, -100)
    targets[:, :3] = -100
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten(), label_smoothing=0.1
    )
    torch.testing.assert_close(with_prompt, expected)
    assert model.language_modelling(kv, ids, prompt_length=99) == 0


def test_learns_a_batch_by_heart() -> None:
    model = med()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-3)
    totals = []
    for _ in range(60):
        model.begin_step()
        losses = model(*batch(), generator=seeded())
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        totals.append(losses)
    assert totals[-1].lm < 0.6 * totals[0].lm
    assert totals[-1].itm < 0.3


def test_autocast_keeps_the_contrastive_loss_precise() -> None:
    exact = med()(*batch(), 0.4, generator=seeded())
    with torch.autocast("cpu", torch.bfloat16):
        mixed = med()(*batch(), 0.4, generator=seeded())
    assert mixed.itc.dtype == torch.float32
    torch.testing.assert_close(mixed.itc, exact.itc, rtol=0.05, atol=0.05)


def test_parts_of_different_width_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"vision_width 768 must equal vision\.width 24"):
        MedConfig(vision=CONFIG.vision)
