"""aggregate.py: average, concatenation, or no aggregation, and the ensemble."""

import dataclasses

import pytest
import torch
from conftest import ROOT, noise, random_encoder

import aggregate
from aggregate import Ensemble


def test_each_aggregation_gives_one_target_per_layer_or_per_teacher_and_layer():
    states = [[noise(2, 5, 4, seed=10 * t + layer) for layer in range(3)] for t in range(2)]
    average, concat, separate = (f(states) for f in aggregate.AGGREGATIONS.values())
    weighted = aggregate.average(states, weights=[1, 3])
    for layer in range(3):
        first, second = states[0][layer], states[1][layer]
        assert torch.allclose(average[layer], (first + second) / 2)
        assert torch.allclose(weighted[layer], first / 4 + 3 * second / 4)
        assert torch.equal(concat[layer], torch.cat([first, second], dim=-1))
    assert all(torch.equal(a, b) for a, b in zip(separate, states[0] + states[1], strict=True))


def test_averages_are_taken_in_float32():
    states = [[torch.full((1, 1, 1), x, dtype=torch.bfloat16)] for x in (1.0, 1.0078125, 1.0)]
    assert float(aggregate.average(states)[0]) == pytest.approx(1.0026041, abs=1e-6)
    weighted = aggregate.average(states, weights=[1, 1, 1])[0]
    assert float(weighted) == pytest.approx(1.0026041, abs=1e-6)


class Ramp(torch.nn.Module):
    """A teacher that is no SpeechEncoder: state l of frame t is l * t, in each dim."""

    @dataclasses.dataclass
    class Config:
        layers: int = 16
        dim: int = 4
        conv_layers: tuple = ((8, 10, 5),) + ((8, 3, 2),) * 4 + ((8, 2, 2),) * 2

    def __init__(self, **sizes):
        super().__init__()
        self.config = self.Config(**sizes)

    def forward(self, waveforms, layers):
        frames = torch.arange((waveforms.shape[1] - 400) // 320 + 1.0)
        state = frames[None, :, None].expand(len(waveforms), -1, self.config.dim)
        return [layer * state for layer in layers]


def test_any_network_with_layers_dim_and_frames_is_a_teacher():
    encoder, ramp = random_encoder(), Ramp(dim=48)
    targets = Ensemble({"hubert": encoder, "ramp": ramp}, [2, 4], "avg")(noise(2, 4000))
    with torch.no_grad():
        states = encoder(noise(2, 4000), layers=[2, 4])
    for layer, state, target in zip([2, 4], states, targets, strict=True):
        expected = (state + layer * torch.arange(12.0)[:, None]) / 2
        assert torch.allclose(target, expected, atol=1e-5) and not target.requires_grad


BOTH = [4, 8]
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
def test_heads_follow_from_the_aggregation_and_are_named_after_layers(agg, layers, dims, expected):
    teachers = {name: Ramp(dim=dim) for name, dim in zip("ab", dims)}
    ensemble = Ensemble(teachers, layers, agg)
    assert ", ".join(f"{name} {dim}" for name, dim in ensemble.heads) == expected
    targets = ensemble(noise(2, 4000))
    assert [target.shape[-1] for target in targets] == [dim for _, dim in ensemble.heads]
    again = ensemble.split(torch.cat(targets, dim=-1))
    assert all(torch.equal(a, b) for a, b in zip(again, targets, strict=True))


def test_an_aggregation_of_a_readers_own_is_one_function(monkeypatch):
    def deepest(states):
        yield torch.stack([layers[-1] for layers in states]).mean(0)

    monkeypatch.setitem(aggregate.AGGREGATIONS, "deepest", deepest)
    ensemble = Ensemble({"a": Ramp(), "b": Ramp()}, BOTH, "deepest")
    assert ensemble.heads == [("target1", 4)]
    assert torch.equal(ensemble(noise(1, 720))[0][0, :, 0], torch.tensor([0.0, 8.0]))


def test_the_readmes_aggregation_works_as_it_is_written(monkeypatch):
    blocks = (ROOT / "README.md").read_text().split("```python\n")
    (block,) = [block.split("```")[0] for block in blocks if "AGGREGATIONS[" in block]
    monkeypatch.setattr(aggregate, "AGGREGATIONS", dict(aggregate.AGGREGATIONS))
    exec(block, vars(aggregate))
    quiet, loud = torch.randn(1, 2, 4), 1 + 100 * torch.randn(1, 2, 4)
    (target,) = aggregate.AGGREGATIONS["norm"]([[quiet], [loud]])
    shares = [torch.nn.functional.layer_norm(x, (4,)) / 2 for x in (quiet, loud)]
    torch.testing.assert_close(target, sum(shares))


def no_batch(states):
    return [state[0] for state in states[0]]


def broken(states):
    return states[0][0] @ states[1][0]


@pytest.mark.parametrize(
    "sizes, layers, agg, words",
    [
        ({"dim": 6}, BOTH, "avg", "aggregate.py: average fails for teachers of dims a 4, b 6"),
        ({"layers": 6}, BOTH, "avg", "b has 6 layers, no layer 8"),
        ({}, [[4]], "avg", "1 lists of layers for 2 teachers"),
        ({}, [[4, 8], [4]], "none", "equally long"),
        ({"conv_layers": ((8, 10, 5),)}, BOTH, "avg", "b: its frames differ from those of a"),
        ({}, BOTH, no_batch, r"aggregate.py: no_batch gives a target of shape \(2, 4\)"),
        ({}, BOTH, broken, "aggregate.py: broken fails .*RuntimeError"),
    ],
)
def test_teachers_that_do_not_fit_together_are_refused(monkeypatch, sizes, layers, agg, words):
    if callable(agg):
        monkeypatch.setitem(aggregate.AGGREGATIONS, agg.__name__, agg)
        agg = agg.__name__
    with pytest.raises(ValueError, match=words):
        Ensemble({"a": Ramp(), "b": Ramp(**sizes)}, layers, agg)


@pytest.mark.parametrize("weights", [[1], [1, 0]])
def test_weights_are_one_per_teacher_above_0(weights):
    with pytest.raises(ValueError, match="weights"):
        Ensemble({"a": Ramp(), "b": Ramp()}, BOTH, "avg", weights)
