import hashlib

import numpy as np
import pytest
import torch
from transformers.generation import logits_process as theirs

from stages.models.sampling import (
    NOT_FINITE,
    Rules,
    Samples,
    draw,
    forbid,
    nucleus,
    penalise_repeats,
    uniforms,
)

KEYS = [hashlib.sha256(bytes([i])).digest() for i in range(50)]


def scattered(probabilities: torch.Tensor, tokens: torch.Tensor, size: int) -> torch.Tensor:
    return torch.zeros(len(tokens), size).scatter(1, tokens, probabilities)


def test_noise_depends_on_seed_image_caption_and_step_alone() -> None:
    noise = uniforms(7, KEYS, 3, 16)
    assert noise.shape == (50, 3, 16) and noise.min() >= 0 and noise.max() < 1
    assert np.array_equal(uniforms(7, KEYS[::-1], 3, 16), noise[::-1])
    assert np.array_equal(uniforms(7, KEYS[20:21], 3, 16), noise[20:21])
    assert np.array_equal(uniforms(7, KEYS, 2, 9), noise[:, :2, :9])
    assert len(np.unique(noise)) == noise.size
    assert not np.isin(uniforms(8, KEYS, 3, 16), noise).any()


def test_noise_is_the_same_in_every_release() -> None:
    expected = [0.21404773, 0.34262159, 0.68682120]
    assert uniforms(0, [bytes(32)], 1, 3)[0, 0] == pytest.approx(expected, abs=1e-8)


def test_noise_is_uniform_and_uncorrelated() -> None:
    noise = uniforms(0, KEYS, 4, 100)
    counts, _ = np.histogram(noise, bins=20, range=(0, 1))
    chi_square = ((counts - noise.size / 20) ** 2 / (noise.size / 20)).sum()
    assert chi_square < 43.8  # 19 degrees of freedom, p = 0.001
    assert abs(np.corrcoef(noise[:, 0].ravel(), noise[:, 1].ravel())[0, 1]) < 0.05
    assert abs(np.corrcoef(noise[:-1].ravel(), noise[1:].ravel())[0, 1]) < 0.05


@pytest.mark.parametrize("scale", [0.3, 2.0, 8.0])
@pytest.mark.parametrize(("top_k", "top_p"), [(50, 0.9), (0, 0.9), (5, 0.5), (50, 1.0), (1, 0.9)])
def test_step_distribution_equals_transformers(scale: float, top_k: int, top_p: float) -> None:
    torch.manual_seed(0)
    scores = torch.randn(64, 997) * scale
    ids = torch.randint(0, 997, (64, 12))
    expected = theirs.RepetitionPenaltyLogitsProcessor(1.1)(ids, scores)
    expected = theirs.MinLengthLogitsProcessor(20, 3, device="cpu")(ids, expected)
    if top_k:
        expected = theirs.TopKLogitsWarper(top_k)(ids, expected)
    if top_p < 1:
        expected = theirs.TopPLogitsWarper(top_p)(ids, expected)
    ours = nucleus(forbid(penalise_repeats(scores, ids, 1.1), 3), top_k, top_p)
    assert (scattered(*ours, 997) - expected.softmax(-1)).abs().max() < 1e-5
    assert (scattered(*ours, 997)[:, 3] == 0).all()


def test_no_penalty_changes_nothing() -> None:
    scores = torch.randn(2, 10)
    assert penalise_repeats(scores, torch.zeros(2, 1, dtype=torch.long), 1.0) is scores


def test_frequencies_agree_with_torch_multinomial() -> None:
    torch.manual_seed(1)
    draws, kept = 40_000, 20
    probabilities, tokens = nucleus(torch.randn(1, 200) * 1.5, kept, 0.95)
    noise = uniforms(0, [i.to_bytes(32, "big") for i in range(draws // 20)], 4, 5).ravel()
    ours = draw(
        probabilities.expand(draws, -1), tokens.expand(draws, -1), torch.from_numpy(noise)
    )  # fmt: skip
    reference = tokens[0, torch.multinomial(probabilities[0], draws, replacement=True)]
    support = tokens[0, probabilities[0] > 0]
    assert set(ours.tolist()) <= set(support.tolist())
    mine = np.array([(ours == t).sum() for t in support], dtype=float)
    other = np.array([(reference == t).sum() for t in support], dtype=float)
    two_sample = ((mine - other) ** 2 / (mine + other)).sum()
    expected = probabilities[0, : len(support)].numpy() * draws
    one_sample = ((mine - expected) ** 2 / expected).sum()
    assert 5 < len(support) <= 20
    assert two_sample < 45.3 and one_sample < 45.3  # 20 degrees of freedom, p = 0.001


def test_draw_at_the_borders() -> None:
    probabilities = torch.tensor([[0.5, 0.25, 0.25, 0.0]]).expand(5, -1)
    tokens = torch.tensor([[9, 4, 7, 1]]).expand(5, -1)
    noise = torch.tensor([0.0, 0.4999, 0.5, 0.75, 1 - 2**-53], dtype=torch.float64)
    assert draw(probabilities, tokens, noise).tolist() == [9, 9, 4, 7, 7]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("settings", [(50, 0.9), None])
def test_a_row_that_is_not_finite_is_lost_alone(
    bad: float, settings: tuple[int, float] | None
) -> None:
    torch.manual_seed(3)
    rules = Rules(min_tokens=1, max_tokens=6, penalty=1.1, eos=3, pad=0)
    noise = torch.from_numpy(uniforms(0, KEYS[:3], 2, 6))

    def sampled(spoil: bool) -> torch.Tensor:
        torch.manual_seed(4)
        search = Samples(torch.tensor([7]), noise, rules, nucleus=settings)
        for step in range(5):
            logits = torch.randn(6, 100)
            if spoil and step == 2:
                logits[3, 50] = bad
            search.step(logits)
            assert ((search.last >= 0) & (search.last < 100)).all()
        return search.results()

    expected, found = sampled(spoil=False), sampled(spoil=True)
    assert (found[1, 1] == NOT_FINITE).all() and (expected != NOT_FINITE).all()
    found[1, 1] = expected[1, 1]
    assert torch.equal(found, expected)


def test_draw_does_not_depend_on_the_batch() -> None:
    torch.manual_seed(2)
    probabilities, tokens = nucleus(torch.randn(30, 100), 50, 0.9)
    noise = torch.rand(30, dtype=torch.float64)
    whole = draw(probabilities, tokens, noise)
    single = [int(draw(probabilities[i, None], tokens[i, None], noise[i, None])) for i in range(30)]
    assert whole.tolist() == single
