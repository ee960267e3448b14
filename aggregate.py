"""Aggregation: what the ensemble's hidden states become before the student predicts them.

Source: Huang et al. 2023, Ensemble knowledge distillation of self-supervised speech models, arXiv:2302.12757.
Works alone, with nothing but torch.
"""

import torch


def average(states):
    """Layerwise average: each layer's target is the mean over teachers, the aggregation the paper found better.

    states[teacher][layer]: (batch, frames, dim), the same dim for every teacher.
    Returns one (batch, frames, dim) target a layer, in float32.
    """
    return [torch.stack([state.float() for state in layer]).mean(0) for layer in zip(*states)]


def concatenate(states):
    """Layerwise concatenation: each layer's target is all teachers' states side by side.

    states[teacher][layer]: (batch, frames, dim of that teacher).
    Returns one (batch, frames, sum of dims) target a layer, teachers in the order given.
    """
    return [torch.cat(layer, dim=-1) for layer in zip(*states)]


def separate(states):
    """No aggregation: every teacher's every layer is a target of its own (the paper's multiple prediction heads).

    states[teacher][layer]: (batch, frames, dim of that teacher).
    Returns one (batch, frames, dim) target for each teacher and layer: all layers of the first teacher, then of the next.
    """
    return [state for teacher in states for state in teacher]


AGGREGATIONS = {"avg": average, "concat": concatenate, "none": separate}


def heads(agg, layers, teachers):
    """The prediction heads that an aggregation asks for, in the order of its targets.

    agg: "avg", "concat" or "none"; layers: those distilled, one list for all teachers or a list for each, as many each;
    teachers: [(name, dim), ...].
    Returns [(name of the head, target dim), ...], such as [("layer4", 768), ...] or [("wavlm_plus.layer4", 768), ...];
    where teachers' layers of other numbers are paired, [("layer4-8", 768), ...].
    Raises ValueError where teachers to be averaged differ in width.
    """
    dims = [dim for _, dim in teachers]
    if not isinstance(layers[0], list):
        layers = [layers] * len(teachers)
    if agg == "none":
        return [(f"{name}.layer{layer}", dim) for (name, dim), mine in zip(teachers, layers) for layer in mine]
    if agg == "avg" and len(set(dims)) > 1:
        widths = ", ".join(f"{name} {dim}" for name, dim in teachers)
        raise ValueError(f"an average needs teachers of one width, these have {widths}; concat and none take any")
    pairs = [pair if len(set(pair)) > 1 else pair[:1] for pair in zip(*layers)]
    return [("layer" + "-".join(map(str, pair)), dims[0] if agg == "avg" else sum(dims)) for pair in pairs]
