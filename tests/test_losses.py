"""Eq. 7 to 9, by hand, and the faults that a first implementation has."""

import pytest
import torch

from cin_fast.losses import contrastive_loss, pair_counts
from cin_fast.models.base import LossParts


def test_a_positive_and_a_negative_pair_by_hand():
    # Distances 0.3 (same class) and 0.1 (different classes): (0.09 + 0.4^2) / 2.
    embeddings = torch.tensor([[0.3, 0.0], [0.0, 0.0], [0.0, 1.0], [0.0, 1.1]])
    labels, partner = torch.tensor([7, 7, 1, 2]), torch.tensor([1, 0, 3, 2])
    loss = contrastive_loss(embeddings, labels, partner, margin=0.5)
    torch.testing.assert_close(loss, torch.tensor((0.09 + 0.16) / 2))


def test_a_negative_pair_beyond_the_margin_costs_nothing():
    embeddings = torch.tensor([[0.0], [0.6]], requires_grad=True)
    loss = contrastive_loss(embeddings, torch.tensor([0, 1]), torch.tensor([1, 0]))
    loss.backward()
    assert loss == 0
    assert (embeddings.grad == 0).all()


def test_the_hinge_is_squared_distance_not_distance_squared():
    # max(0, beta - d)^2 with d = 0.2: 0.09. (beta - d^2 would give 0.2116.)
    embeddings = torch.tensor([[0.0], [0.2]])
    loss = contrastive_loss(embeddings, torch.tensor([0, 1]), torch.tensor([1, 0]))
    torch.testing.assert_close(loss, torch.tensor(0.09))


def test_it_is_a_mean_over_pairs_not_a_sum():
    embeddings = torch.tensor([[0.0], [0.2]]).repeat(3, 1)
    labels, partner = torch.tensor([0, 1] * 3), torch.tensor([1, 0, 3, 2, 5, 4])
    torch.testing.assert_close(contrastive_loss(embeddings, labels, partner), torch.tensor(0.09))


def test_every_pair_is_judged_by_its_own_labels():
    embeddings = torch.tensor([[0.0], [0.2], [0.0], [0.2]])
    partner = torch.tensor([1, 0, 3, 2])
    mixed = contrastive_loss(embeddings, torch.tensor([0, 0, 0, 1]), partner)
    torch.testing.assert_close(mixed, torch.tensor((0.04 + 0.09) / 2))


@pytest.mark.parametrize("labels", [[0, 0], [0, 1]])
def test_no_gradient_is_nan_at_distance_zero(labels):
    embeddings = torch.zeros(2, 3, requires_grad=True)
    contrastive_loss(embeddings, torch.tensor(labels), torch.tensor([1, 0])).backward()
    assert embeddings.grad.isfinite().all()


@pytest.mark.parametrize("labels", [[0, 0, 1, 2], [0, 1, 2, 3], [5, 5, 5, 5]])
def test_gradient(labels):
    embeddings = 0.1 * torch.randn(4, 3, dtype=torch.float64, generator=torch.manual_seed(0))
    index = torch.tensor(labels), torch.tensor([1, 0, 3, 2])

    def loss(e):
        # Distances are float32 in the loss; the check needs them as they come.
        squared = (e - e[index[1]]).square().sum(1)
        hinge = (0.5 - squared.sqrt()).clamp(min=0).square()
        return torch.where(index[0] == index[0][index[1]], squared, hinge).mean()

    leaf = embeddings.requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    (actual,) = torch.autograd.grad(contrastive_loss(leaf, *index), leaf)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)


def test_an_image_without_partner_is_in_no_pair():
    embeddings = torch.tensor([[0.0], [0.2], [9.0]])
    labels, partner = torch.tensor([0, 1, 1]), torch.tensor([1, 0, 2])
    torch.testing.assert_close(contrastive_loss(embeddings, labels, partner), torch.tensor(0.09))
    alone = contrastive_loss(embeddings[:1], labels[:1], torch.tensor([0]))
    assert alone == 0


def test_what_is_no_number_stays_none():
    embeddings = torch.ones(2, 3)
    embeddings[0, 0] = float("nan")
    for labels in ([0, 0], [0, 1]):
        loss = contrastive_loss(embeddings, torch.tensor(labels), torch.tensor([1, 0]))
        assert loss.isnan()


def test_pair_counts():
    assert pair_counts(torch.tensor([0, 0, 1, 2, 4]), torch.tensor([1, 0, 3, 2, 4])) == (1, 1)


def test_total_is_classification_plus_alpha_times_pair():
    parts = LossParts(torch.tensor(1.0), torch.tensor(0.25))
    assert parts.total(2.0) == 1.5
    assert LossParts(torch.tensor(1.0)).total(2.0) == 1.0


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"labels: expected \(4,\)"):
        contrastive_loss(torch.zeros(4, 2), torch.zeros(3).long(), torch.zeros(4).long())
    with pytest.raises(ValueError, match="partner: expected"):
        contrastive_loss(torch.zeros(4, 2), torch.zeros(4).long(), torch.zeros(3).long())
    with pytest.raises(ValueError, match="margin: expected above 0, found -1"):
        contrastive_loss(torch.zeros(2, 2), torch.zeros(2).long(), torch.tensor([1, 0]), -1.0)
