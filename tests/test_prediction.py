"""Ensemble prediction against float64 arithmetic written out; shapes: K members, N rows, C classes."""

import math

import pytest
import torch

import latephase_kernels as lp

K, N, C = 5, 7, 4


def logits(dtype=torch.float32):
    return (4 * torch.randn(K, N, C, generator=torch.Generator().manual_seed(0))).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_probabilities_and_entropy(dtype):
    z = logits(dtype)
    p = z.double().exp()
    p = (p / p.sum(-1, keepdim=True)).mean(0)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6  # reduced types are computed in float32
    torch.testing.assert_close(lp.ensemble_probabilities(z).double(), p, rtol=tolerance, atol=tolerance)
    entropy = lp.predictive_entropy(z)
    torch.testing.assert_close(entropy.double(), -(p * p.log()).sum(-1), rtol=tolerance, atol=tolerance)
    assert entropy.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_classes_in_another_dimension():
    z = logits().reshape(K, N, 2, 2).movedim(-1, 2).repeat(1, 1, 1, 3)  # [K, N, C=2, 6] as in segmentation
    expected = lp.predictive_entropy(z.movedim(2, -1))
    assert expected.shape == (N, 6)
    torch.testing.assert_close(lp.predictive_entropy(z, dim=2), expected)
    torch.testing.assert_close(lp.predictive_entropy(z, dim=-2), expected)
    probabilities = lp.ensemble_probabilities(z.movedim(2, -1)).movedim(-1, 1)
    torch.testing.assert_close(lp.ensemble_probabilities(z, dim=2), probabilities)
    assert torch.equal(lp.member_disagreement(z, dim=2), lp.member_disagreement(z.movedim(2, -1)))


def test_certain_and_uncertain_members():
    certain = torch.tensor([[0.0, -math.inf], [0.0, -1e30]])  # two rows, all on class 0
    entropy = lp.predictive_entropy(certain.expand(3, 2, 2))
    assert entropy.tolist() == [0.0, 0.0] and not entropy.signbit().any()
    opposed = torch.stack([certain, certain.flip(-1)])
    torch.testing.assert_close(lp.predictive_entropy(opposed), torch.full((2,), math.log(2)))
    assert lp.member_disagreement(opposed).tolist() == [1.0, 1.0]
    assert torch.isnan(lp.predictive_entropy(torch.full((2, 1, 3), math.nan))).all()


def test_disagreement_counts_pairs():
    z = logits()
    predicted = z.argmax(-1)
    pairs = [(i, j) for i in range(K) for j in range(i)]
    expected = torch.stack([(predicted[i] != predicted[j]).double() for i, j in pairs]).mean(0)
    torch.testing.assert_close(lp.member_disagreement(z).double(), expected)
    assert lp.member_disagreement(z[:1]).tolist() == [0.0] * N


@pytest.mark.parametrize("function", [lp.ensemble_probabilities, lp.predictive_entropy, lp.member_disagreement])
def test_wrong_arguments(function):
    for wrong, error, message in (
        ([1.0], TypeError, "logits must be a floating-point tensor, got list"),
        (torch.ones(2, 3, 4, dtype=torch.long), TypeError, "got torch.int64"),
        (torch.ones(3), ValueError, r"logits must be \[K, N, …\].*got shape \[3\]"),
        (torch.ones(0, 3, 4), ValueError, "K >= 1"),
    ):
        with pytest.raises(error, match=f"{function.__name__}: .*{message}"):
            function(wrong)
    for dim in (0, 3, -3):
        with pytest.raises(ValueError, match="dim must be a dimension of logits other than 0"):
            function(logits(), dim=dim)
