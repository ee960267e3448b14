"""Aggregation: how the teachers' hidden states become the student's targets.

Source: Huang et al. 2023, Ensemble knowledge distillation of self-supervised speech models,
arXiv:2302.12757. Needs torch alone.
"""

import torch


def average(states):
    """Layerwise average: per layer, the mean over teachers (in the paper, better than concat).

    states[teacher][layer]: (batch, frames, dim), the same dim for all teachers.
    Returns one (batch, frames, dim) target per layer, in float32.
    """
    return [
        torch.stack([state.float() for state in layer]).mean(0)
        for layer in zip(*states, strict=True)
    ]


def concatenate(states):
    """Layerwise concatenation: per layer, the states of all teachers along the last dimension.

    states[teacher][layer]: (batch, frames, dim of that teacher).
    Returns one (batch, frames, sum of dims) target per layer.
    """
    return [torch.cat(layer, dim=-1) for layer in zip(*states, strict=True)]


def separate(states):
    """No aggregation: one target per teacher and layer, all layers of the first teacher first.

    states[teacher][layer] and each target: (batch, frames, dim of that teacher).
    """
    return [state for layers in states for state in layers]


AGGREGATIONS = {"avg": average, "concat": concatenate, "none": separate}


def heads(agg, layers, teachers):
    """The student's prediction heads [(name, target dim), ...], in the order of the targets.

    agg: a key of AGGREGATIONS. teachers: [(name, dim), ...]. layers: one list per teacher.
    Names: "layer4", "layer4-8" if the layers differ between teachers, "wavlm.layer4" for "none".
    Raises ValueError if teachers to be averaged differ in dim.
    """
    found = []
    if agg == "none":
        for (name, dim), numbers in zip(teachers, layers):
            found += [(f"{name}.layer{number}", dim) for number in numbers]
        return found
    dims = [dim for _, dim in teachers]
    if agg == "avg" and len(set(dims)) > 1:
        widths = ", ".join(f"{name} {dim}" for name, dim in teachers)
        raise ValueError(f"an average needs teachers of one dim, not {widths}; concat takes any")
    for numbers in zip(*layers, strict=True):
        same = len(set(numbers)) == 1
        name = "layer" + "-".join(map(str, numbers[:1] if same else numbers))
        found.append((name, dims[0] if agg == "avg" else sum(dims)))
    return found
