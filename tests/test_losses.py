"""losses.py: L1 and cosine loss, one term a head."""

import math

import pytest
import torch
from conftest import noise

from losses import distillation_loss, head_loss


def test_a_heads_loss_is_l1_plus_weighted_log_sigmoid_of_cosine():
    prediction, target = noise(2, 5, 8, seed=1), noise(2, 5, 8, seed=2)
    l1 = sum(abs(p - t) for p, t in zip(prediction.flatten().tolist(), target.flatten().tolist())) / 80
    cosines = []
    for p, t in zip(prediction.reshape(-1, 8).double(), target.reshape(-1, 8).double()):
        similarity = float(p @ t / (p.norm() * t.norm()))
        cosines.append(math.log(1 + math.exp(-similarity)))
    loss, l1s, cosine = distillation_loss([prediction], [target], cosine_weight=0.7)
    assert float(l1s) == pytest.approx(l1, rel=1e-5)
    assert float(cosine) == pytest.approx(sum(cosines) / 10, rel=1e-5)
    assert loss.item() == pytest.approx(l1 + 0.7 * sum(cosines) / 10, rel=1e-5)


def test_the_total_is_the_mean_over_heads_of_different_widths():
    predictions, targets = [noise(2, 5, 8), noise(2, 5, 24)], [noise(2, 5, 8, seed=3), noise(2, 5, 24, seed=4)]
    each = [float(distillation_loss([p], [t])[0]) for p, t in zip(predictions, targets)]
    assert float(distillation_loss(predictions, targets)[0]) == pytest.approx(sum(each) / 2, rel=1e-6)


def test_padded_frames_never_count():
    prediction, target = noise(2, 6, 8, seed=1), noise(2, 6, 8, seed=2)
    prediction[1, 4:] = float("nan")
    prediction.requires_grad_()
    valid = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    loss = distillation_loss([prediction], [target], valid)[0]
    loss.backward()
    frames = [prediction[0], prediction[1, :4]], [target[0], target[1, :4]]
    expected = distillation_loss([torch.cat(frames[0])[None]], [torch.cat(frames[1])[None]])[0]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert (prediction.grad[1, 4:] == 0).all() and prediction.grad[1, :4].abs().min() > 0


def test_no_valid_frame_gives_zero_and_still_differentiates():
    prediction = noise(1, 3, 4).requires_grad_()
    loss = distillation_loss([prediction], [noise(1, 3, 4)], torch.zeros(1, 3, dtype=torch.bool))[0]
    loss.backward()
    assert loss.item() == 0 and (prediction.grad == 0).all()


def test_half_precision_is_lifted_before_anything_is_computed():
    prediction, target = noise(2, 5, 8, seed=1).bfloat16(), noise(2, 5, 8, seed=2).bfloat16()
    for half, full in zip(head_loss(prediction, target), head_loss(prediction.float(), target.float())):
        assert half.dtype == torch.float32 and torch.equal(half, full)
