"""losses.py: L1 and cosine loss per head."""

import math

import pytest
import torch
from conftest import noise

from losses import distillation_loss, head_loss


def test_a_heads_loss_is_l1_plus_weighted_log_sigmoid_of_cosine():
    prediction, target = noise(2, 5, 8, seed=1), noise(2, 5, 8, seed=2)
    l1 = cosine = 0
    for p, t in zip(prediction.reshape(-1, 8).double(), target.reshape(-1, 8).double()):
        l1 += sum(abs(a - b) for a, b in zip(p.tolist(), t.tolist())) / 80
        cosine += math.log(1 + math.exp(-float(p @ t / (p.norm() * t.norm())))) / 10
    loss, l1s, cosines = distillation_loss([prediction], [target], cosine_weight=0.7)
    assert float(l1s) == pytest.approx(l1, rel=1e-5)
    assert float(cosines) == pytest.approx(cosine, rel=1e-5)
    assert float(loss) == pytest.approx(l1 + 0.7 * cosine, rel=1e-5)


def test_the_total_is_the_mean_over_heads_of_different_dims():
    predictions, targets = [noise(2, 5, 8), noise(2, 5, 24)], [noise(2, 5, 8, seed=3)]
    targets.append(noise(2, 5, 24, seed=4))
    each = [float(distillation_loss([p], [t])[0]) for p, t in zip(predictions, targets)]
    total = float(distillation_loss(predictions, targets)[0])
    assert total == pytest.approx(sum(each) / 2, rel=1e-6)


def test_half_precision_is_converted_before_anything_is_computed():
    prediction, target = noise(2, 5, 8, seed=1).bfloat16(), noise(2, 5, 8, seed=2).bfloat16()
    full = head_loss(prediction.float(), target.float())
    for a, b in zip(head_loss(prediction, target), full):
        assert a.dtype == torch.float32 and torch.equal(a, b)
