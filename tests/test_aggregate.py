"""aggregate.py: average, concatenation, or no aggregation."""

import pytest
import torch
from conftest import noise

import aggregate


def test_aggregations_give_one_target_a_head_in_order():
    states = [[noise(2, 5, 4, seed=10 * teacher + layer) for layer in range(3)] for teacher in range(2)]
    average, concat, separate = (f(states) for f in aggregate.AGGREGATIONS.values())
    for layer in range(3):
        assert torch.allclose(average[layer], (states[0][layer] + states[1][layer]) / 2)
        assert torch.equal(concat[layer], torch.cat([states[0][layer], states[1][layer]], dim=-1))
    assert all(torch.equal(a, b) for a, b in zip(separate, states[0] + states[1], strict=True))
    for how in aggregate.AGGREGATIONS:
        heads = aggregate.heads(how, [[2, 4, 6]] * 2, [("hubert", 4), ("wavlm", 4)])
        assert [dim for _, dim in heads] == [target.shape[-1] for target in aggregate.AGGREGATIONS[how](states)]
        assert len({name for name, _ in heads}) == len(heads)


def test_averages_are_taken_in_float32():
    states = [[torch.full((1, 1, 1), value, dtype=torch.bfloat16)] for value in (1.0, 1.0078125, 1.0)]
    assert float(aggregate.average(states)[0]) == pytest.approx(1.0026041, abs=1e-6)


def test_teachers_of_different_widths_cannot_be_averaged_but_stand_side_by_side():
    teachers = [("hubert", 768), ("wavlm_large", 1024)]
    with pytest.raises(ValueError, match="wavlm_large 1024"):
        aggregate.heads("avg", [[4], [4]], teachers)
    assert aggregate.heads("concat", [[4, 8]] * 2, teachers) == [("layer4", 1792), ("layer8", 1792)]
    assert aggregate.heads("none", [[4], [4]], teachers) == [("hubert.layer4", 768), ("wavlm_large.layer4", 1024)]


def test_teachers_layers_are_paired_in_order_and_named():
    teachers, layers = [("hubert", 4), ("large", 4)], [[4, 8], [8, 16]]
    assert aggregate.heads("avg", layers, teachers) == [("layer4-8", 4), ("layer8-16", 4)]
    assert aggregate.heads("concat", layers, teachers) == [("layer4-8", 8), ("layer8-16", 8)]
    names = [name for name, _ in aggregate.heads("none", layers, teachers)]
    assert names == ["hubert.layer4", "hubert.layer8", "large.layer8", "large.layer16"]
    same = [("layer4", 4), ("layer8", 4)]  # one list for all, or the same for each
    assert aggregate.heads("avg", [4, 8], teachers) == aggregate.heads("avg", [[4, 8], [4, 8]], teachers) == same
