import math

import pytest
import torch
from conftest import noise

import aggregate
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


def test_aggregations_give_one_target_a_head_in_order():
    states = [[noise(2, 5, 4, seed=10 * teacher + layer) for layer in range(3)] for teacher in range(2)]
    average, concat, separate = (f(states) for f in aggregate.AGGREGATIONS.values())
    for layer in range(3):
        assert torch.allclose(average[layer], (states[0][layer] + states[1][layer]) / 2)
        assert torch.equal(concat[layer], torch.cat([states[0][layer], states[1][layer]], dim=-1))
    assert all(torch.equal(a, b) for a, b in zip(separate, states[0] + states[1], strict=True))
    for how in aggregate.AGGREGATIONS:
        heads = aggregate.heads(how, [2, 4, 6], [("hubert", 4), ("wavlm", 4)])
        assert [dim for _, dim in heads] == [target.shape[-1] for target in aggregate.AGGREGATIONS[how](states)]
        assert len({name for name, _ in heads}) == len(heads)


def test_averages_are_taken_in_float32():
    states = [[torch.full((1, 1, 1), value, dtype=torch.bfloat16)] for value in (1.0, 1.0078125, 1.0)]
    assert float(aggregate.average(states)[0]) == pytest.approx(1.0026041, abs=1e-6)


def test_teachers_of_different_widths_cannot_be_averaged_but_stand_side_by_side():
    teachers = [("hubert", 768), ("wavlm_large", 1024)]
    with pytest.raises(ValueError, match="wavlm_large 1024"):
        aggregate.heads("avg", [4], teachers)
    assert aggregate.heads("concat", [4, 8], teachers) == [("layer4", 1792), ("layer8", 1792)]
    assert aggregate.heads("none", [4], teachers) == [("hubert.layer4", 768), ("wavlm_large.layer4", 1024)]
