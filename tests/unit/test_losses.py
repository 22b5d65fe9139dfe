import torch
import torch.nn.functional as F

from stages.models.losses import (
    IGNORED,
    MedLosses,
    Negatives,
    contrastive_targets,
    draw_negatives,
    matching_labels,
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
