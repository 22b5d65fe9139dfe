import pytest
import torch
import torch.nn.functional as F

from stages.models.losses import (
    IGNORED,
    MedLosses,
    Negatives,
    contrastive_targets,
    draw_negatives,
    matching_labels,
    negative_floor,
    same_pair,
)

CPU = torch.device("cpu")


def test_total_is_the_plain_sum() -> None:
    assert MedLosses(torch.tensor(1.0), torch.tensor(2.0), torch.tensor(4.0)).total.item() == 7


def test_without_ids_only_the_pair_itself_is_positive() -> None:
    assert torch.equal(same_pair(3, None, CPU), torch.eye(3, dtype=torch.bool))


def test_pairs_of_one_image_share_its_target() -> None:
    positives = same_pair(3, torch.tensor([7, 5, 7]), CPU)
    targets = contrastive_targets(positives, torch.randn(3, 3), alpha=0.0)
    expected = [[0.5, 0.0, 0.5], [0.0, 1.0, 0.0], [0.5, 0.0, 0.5]]
    assert torch.equal(targets, torch.tensor(expected))


def test_alpha_mixes_in_the_momentum_distribution() -> None:
    scores = torch.randn(2, 5)
    positives = F.pad(torch.eye(2, dtype=torch.bool), (0, 3))
    expected = 0.4 * F.softmax(scores, dim=1) + 0.6 * positives
    torch.testing.assert_close(contrastive_targets(positives, scores, 0.4), expected)


def test_negatives_are_never_excluded_and_favour_the_similar() -> None:
    batch = 6
    excluded = same_pair(batch, torch.tensor([0, 0, 1, 2, 3, 4]), CPU)
    scores = torch.zeros(batch, batch)
    scores[2, 5] = 4.0
    generator = torch.Generator().manual_seed(0)
    picks = torch.zeros(batch)
    for _ in range(200):
        drawn = draw_negatives(scores, scores, excluded, generator)
        assert not excluded[torch.arange(batch), drawn.text_index].any()
        assert not excluded[torch.arange(batch), drawn.image_index].any()
        picks[drawn.text_index[2]] += 1
    # softmax gives the similar one e^4 / (e^4 + 4), 93% of the draws
    assert picks[5] > 150
    assert picks[2] == 0


def test_draws_repeat_with_the_generator() -> None:
    scores, excluded = torch.randn(32, 32), same_pair(32, None, CPU)
    first, again, other = (
        draw_negatives(scores, scores.T, excluded, torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    assert torch.equal(first.image_index, again.image_index)
    assert torch.equal(first.text_index, again.text_index)
    assert not torch.equal(first.image_index, other.image_index)


def test_rows_without_a_candidate_are_left_out_of_the_loss() -> None:
    excluded = same_pair(3, torch.tensor([4, 4, 4]), CPU)
    drawn = draw_negatives(torch.zeros(3, 3), torch.zeros(3, 3), excluded, None)
    assert matching_labels(3, drawn, CPU).tolist() == [1] * 3 + [IGNORED] * 6


def test_labels_are_positives_then_both_kinds_of_negatives() -> None:
    given = Negatives(torch.tensor([1, 0]), torch.tensor([1, 0]))
    assert matching_labels(2, given, CPU).tolist() == [1, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("floor", [0.0, 1e-4])
def test_the_floor_is_how_often_the_least_similar_are_drawn(
    floor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The original's weights: in pretraining softmax + 1e-4, in fine-tuning softmax alone, both
    without the pairs of the same image."""
    excluded = same_pair(5, torch.tensor([0, 0, 1, 2, 3]), CPU)
    scores, drawn_from = torch.randn(5, 5) * 3, []
    draw = torch.multinomial

    def watched(weights: torch.Tensor, *rest: object, **named: object) -> torch.Tensor:
        drawn_from.append(weights / weights.sum(1, keepdim=True))
        return draw(weights, *rest, **named)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(torch, "multinomial", watched)
    draw_negatives(scores, scores.T, excluded, None, floor)
    for found, given in zip(drawn_from, (scores.T, scores), strict=True):
        weights = (F.softmax(given, dim=1) + floor).masked_fill(excluded, 0)
        torch.testing.assert_close(found, weights / weights.sum(1, keepdim=True))


def test_without_a_floor_a_right_pair_far_ahead_leaves_the_others_their_odds() -> None:
    scores = torch.zeros(4, 4) + 2000 * torch.eye(4)  # of 1 against -1 at the least temperature
    scores[:, 3] -= 50
    picks = torch.zeros(4)
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        drawn = draw_negatives(scores, scores.T, same_pair(4, None, CPU), generator)
        picks[drawn.text_index[0]] += 1
    assert picks[0] == picks[3] == 0
    assert picks[1] > 8 and picks[2] > 8


def test_the_floors_of_all_candidates_together_are_those_of_the_originals_worker() -> None:
    assert negative_floor(4) == negative_floor(75) == 1e-4
    assert 2400 * negative_floor(2400) == pytest.approx(75 * 1e-4)


@pytest.mark.parametrize("floor", [0.0, 1e-4])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_scores_that_are_not_finite_can_be_drawn_from(value: float, floor: float) -> None:
    scores = torch.full((4, 4), value)
    excluded = same_pair(4, torch.tensor([0, 0, 1, 1]), CPU)
    seen = set()
    for seed in range(20):
        drawn = draw_negatives(scores, scores, excluded, torch.Generator().manual_seed(seed), floor)
        assert not excluded[torch.arange(4), drawn.text_index].any()
        assert drawn.none_for_text is not None and not drawn.none_for_text.any()
        seen.add(drawn.text_index[0].item())
    assert seen == {2, 3}
