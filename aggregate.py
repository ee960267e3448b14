"""The ensemble: how the hidden states of several teachers become the student's targets.

Source: Huang et al. 2023, Ensemble knowledge distillation of self-supervised speech models,
arXiv:2302.12757. Needs torch alone.

    ensemble = Ensemble({"hubert": hubert, "wavlm": wavlm}, layers=[4, 8, 12], agg="avg")
    targets = ensemble(waveforms)    # one (batch, frames, dim) per prediction head
"""

import torch


def average(states, weights=None):
    """Layerwise average: per layer, the mean over teachers, whose states are not normalised.

    states[teacher][layer]: (batch, frames, dim), the same dim for all teachers.
    weights: one number per teacher, or None for equal weights.
    Returns one (batch, frames, dim) target per layer, in float32.
    """
    per_layer = [torch.stack(of_teachers).float() for of_teachers in zip(*states, strict=True)]
    if weights is None:
        return [of_teachers.mean(0) for of_teachers in per_layer]
    shares = torch.tensor(weights, device=per_layer[0].device) / sum(weights)
    return [torch.tensordot(shares, of_teachers, dims=1) for of_teachers in per_layer]


def concatenate(states):
    """Layerwise concatenation: per layer, the states of all teachers along the last dimension.

    states[teacher][layer]: (batch, frames, dim of that teacher).
    Returns one (batch, frames, sum of dims) target per layer.
    """
    return [torch.cat(of_teachers, dim=-1) for of_teachers in zip(*states, strict=True)]


def separate(states):
    """No aggregation: one target per teacher and layer, all layers of the first teacher first.

    states[teacher][layer] and each target: (batch, frames, dim of that teacher).
    """
    return [state for of_teacher in states for state in of_teacher]


AGGREGATIONS = {"avg": average, "concat": concatenate, "none": separate}


class Ensemble:
    """Frozen teachers in eval mode, as one network from waveforms to targets.

    teachers: {name: network}. A network needs `config.layers`, `config.dim` and
        `config.conv_layers` [(channels, kernel, stride), ...], as an EncoderConfig has, and
        `network(waveforms, layers=[4, 8])` gives one (batch, frames, dim) per requested layer,
        in the requested order.
    layers: numbers of hidden states, one list for all teachers, or one equally long per teacher.
    agg: a key of AGGREGATIONS. weights: of the teachers in an average, or None.
    heads: [(name, target dim), ...], a prediction head of the student per target.
    example: targets of small dummy states, which show the dims, and a change of the aggregation.
    Raises ValueError for a layer that a teacher lacks, for frames that differ between teachers,
    and for dims that cannot be aggregated.
    """

    def __init__(self, teachers, layers, agg, weights=None):
        self.names, self.teachers = list(teachers), list(teachers.values())
        self.layers = layers if isinstance(layers[0], list) else [layers] * len(teachers)
        self.aggregation = AGGREGATIONS[agg]
        self.options = {} if weights is None else {"weights": weights}
        if len(self.layers) != len(teachers) or len(set(map(len, self.layers))) > 1:
            given = f"{len(self.layers)} lists of layers for {len(teachers)} teachers"
            raise ValueError(f"{given}; give one list for all, or equally long ones per teacher")
        if weights and (len(weights) != len(teachers) or min(weights) <= 0):
            given = f"weights {weights} for {len(teachers)} teachers"
            raise ValueError(f"{given}; give one above 0 per teacher")
        first_frames = [conv[1:] for conv in self.teachers[0].config.conv_layers]
        for name, teacher, numbers in zip(self.names, self.teachers, self.layers):
            highest = teacher.config.layers
            if max(numbers) > highest:
                given = f"{name} has {highest} layers, no layer {max(numbers)}"
                raise ValueError(f"{given}; choose the layers of the heads from 1 to {highest}")
            if [conv[1:] for conv in teacher.config.conv_layers] != first_frames:
                raise ValueError(f"{name}: its frames differ from those of {self.names[0]}")
        self.example = self.aggregate_example()
        self.heads = [(name, x.shape[2]) for name, x in zip(self.head_names(), self.example)]

    @torch.no_grad()
    def __call__(self, waveforms):
        """(batch, samples) to one (batch, frames, dim) target per head, in float32."""
        states = [
            teacher(waveforms, layers=layers) for teacher, layers in zip(self.teachers, self.layers)
        ]
        return [target.float() for target in self.aggregation(states, **self.options)]

    def split(self, targets):
        """One target per head, from all of them along the last dimension, as they are cached."""
        return targets.split([dim for _, dim in self.heads], dim=-1)

    def aggregate_example(self):
        """The example: it shows the dims of the targets, and whether the aggregation has changed.

        Raises ValueError if the aggregation fails or changes batch or frames.
        """
        dims = [teacher.config.dim for teacher in self.teachers]
        states = []
        for number, dim in enumerate(dims, start=2):
            numbers = number * torch.arange(2.0 * dim).view(1, 2, dim)
            states.append([numbers % (7 + layer) for layer in range(len(self.layers[0]))])
        function = f"aggregate.py: {self.aggregation.__name__}"
        try:
            targets = list(self.aggregation(states, **self.options))
            shapes = [tuple(target.shape) for target in targets]
        except Exception as error:
            teachers = ", ".join(f"{name} {dim}" for name, dim in zip(self.names, dims))
            reason = f"{type(error).__name__}: {error}"[:100]
            problem = f"{function} fails for teachers of dims {teachers}"
            raise ValueError(f"{problem}: {reason}") from error
        for shape in shapes:
            if len(shape) != 3 or shape[:2] != (1, 2):
                problem = f"{function} gives a target of shape {shape}"
                raise ValueError(f"{problem}, not (1, 2, dim), for states of 1 batch, 2 frames")
        return targets

    def head_names(self):
        """A name per target.

        With a target per layer "layer4", or "layer4-8" if the layers differ between teachers; with
        a target per teacher and layer "wavlm.layer4"; with others "target1".
        """
        count = len(self.example)
        if count == len(self.layers[0]):
            names = []
            for numbers in zip(*self.layers):  # of all teachers
                numbers = numbers[:1] if len(set(numbers)) == 1 else numbers
                names.append("layer" + "-".join(map(str, numbers)))
            return names
        if count == sum(map(len, self.layers)):
            pairs = zip(self.names, self.layers)
            return [f"{name}.layer{number}" for name, numbers in pairs for number in numbers]
        return [f"target{number}" for number in range(1, count + 1)]
