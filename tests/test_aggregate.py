"""aggregate.py: average, concatenation, or no aggregation."""

import pytest
import torch
from conftest import noise

import aggregate


def test_each_aggregation_gives_one_target_per_head():
    states = [[noise(2, 5, 4, seed=10 * t + layer) for layer in range(3)] for t in range(2)]
    average, concat, separate = (f(states) for f in aggregate.AGGREGATIONS.values())
    for layer in range(3):
        first, second = states[0][layer], states[1][layer]
        assert torch.allclose(average[layer], (first + second) / 2)
        assert torch.equal(concat[layer], torch.cat([first, second], dim=-1))
    assert all(torch.equal(a, b) for a, b in zip(separate, states[0] + states[1], strict=True))
    for agg, function in aggregate.AGGREGATIONS.items():
        heads = aggregate.heads(agg, [[2, 4, 6]] * 2, [("hubert", 4), ("wavlm", 4)])
        assert [dim for _, dim in heads] == [target.shape[-1] for target in function(states)]


def test_averages_are_taken_in_float32():
    states = [[torch.full((1, 1, 1), x, dtype=torch.bfloat16)] for x in (1.0, 1.0078125, 1.0)]
    assert float(aggregate.average(states)[0]) == pytest.approx(1.0026041, abs=1e-6)


BOTH = [[4, 8], [4, 8]]
DEEPER = [[4, 8], [8, 16]]


@pytest.mark.parametrize(
    "agg, layers, dims, expected",
    [
        ("avg", BOTH, [4, 4], "layer4 4, layer8 4"),
        ("avg", DEEPER, [4, 4], "layer4-8 4, layer8-16 4"),
        ("concat", DEEPER, [4, 6], "layer4-8 10, layer8-16 10"),
        ("none", DEEPER, [4, 6], "a.layer4 4, a.layer8 4, b.layer8 6, b.layer16 6"),
    ],
)
def test_heads_are_named_after_layers(agg, layers, dims, expected):
    heads = aggregate.heads(agg, layers, list(zip("ab", dims)))
    assert ", ".join(f"{name} {dim}" for name, dim in heads) == expected


def test_teachers_of_different_dims_cannot_be_averaged():
    with pytest.raises(ValueError, match="hubert 768, wavlm_large 1024"):
        aggregate.heads("avg", BOTH, [("hubert", 768), ("wavlm_large", 1024)])
