"""The student: a teacher's convolutions, a few Transformer layers, prediction heads on top.

    student = load_student("runs/avg/student.pt")
    states = student.hidden_states(waveforms, lengths)    # 0..N, each (batch, frames, dim)

Source: DistilHuBERT, arXiv:2110.01900; targets of several teachers: arXiv:2302.12757.
"""

import dataclasses
import math
import os

import torch
from torch import nn

import checkpoint
from encoder import NORMALIZE_EPS, EncoderConfig, SpeechEncoder

FORMAT = "ekd-student-1"


class Student(nn.Module):
    """A small SpeechEncoder with one prediction head per (name, target dim) in `heads`."""

    def __init__(self, config, heads):
        super().__init__()
        self.encoder = SpeechEncoder(config)
        self.head_names = [name for name, _ in heads]
        self.heads = nn.ModuleList()
        for _, dim in heads:
            hidden = nn.Linear(config.dim, config.dim)
            self.heads.append(nn.Sequential(hidden, nn.GELU(), nn.Linear(config.dim, dim)))

    def forward(self, waveforms, lengths=None):
        """One (batch, frames, target dim) per head, for waveforms and lengths of the encoder."""
        last = self.encoder(waveforms, lengths, layers=[self.encoder.config.layers])[0]
        return [head(last) for head in self.heads]

    def hidden_states(self, waveforms, lengths=None):
        """Hidden states 0..N for downstream tasks, each (batch, frames, dim)."""
        return self.encoder(waveforms, lengths)


def student_config(teacher, layers=2, dropout=0.1, dim=None):
    """The EncoderConfig of a teacher with fewer layers and without relative positions.

    dim: the width, by default the teacher's. With another width the feed-forward dim is 4 * dim,
        and the fewest attention heads with at most 64 dims each.
    The gradient into the convolutions is scaled by 0.1, as in DistilHuBERT. If the teacher
    normalises waveforms, so does the student, with the 1e-7 of transformers: an exported student
    has equal states there.
    """
    sizes = {"layers": layers, "dropout": dropout, "relative_buckets": 0}
    sizes |= {"weight_norm": True, "conv_gradient_scale": 0.1}
    sizes["normalize_eps"] = NORMALIZE_EPS["transformers"]
    if dim not in (None, teacher.dim):
        sizes |= {"dim": dim, "ffn_dim": 4 * dim, "projection": True}
        sizes["attention_heads"] = next(
            n for n in range(1, dim + 1) if dim % n == 0 and dim / n <= 64
        )
        sizes["pos_groups"] = math.gcd(dim, teacher.pos_groups)
    return dataclasses.replace(teacher, **sizes)


def initialise(student, teacher):
    """Copies a teacher's convolutions, projection, position embedding and first layers.

    If the widths differ, the convolutions alone. Raises ValueError if the teacher has fewer layers.
    A Large teacher's final LayerNorm becomes the norm after the student's last layer.
    """
    encoder = student.encoder
    if encoder.config.dim != teacher.config.dim:
        encoder.feature_extractor.load_state_dict(teacher.feature_extractor.state_dict())
        return
    layers, available = encoder.config.layers, teacher.config.layers
    if layers > available:
        cause = f"a student of {layers} layers, a teacher of {available}"
        raise ValueError(f"{cause}; it needs random initial weights")
    weights = teacher.state_dict()
    if not encoder.config.pos_depth:
        conv = encoder.positional_embedding.conv
        with torch.no_grad():  # a clone: weight_norm shares the storage of what it is given
            conv.weight = weights["positional_embedding.conv.weight"].clone().to(conv.bias)
    # Not strict, as the teacher has further layers.
    missing = encoder.load_state_dict(weights, strict=False).missing_keys
    weight_norm = "positional_embedding.conv.parametrizations."  # copied above
    assert all(name.startswith(weight_norm) for name in missing), missing


def save_student(student, path, **about):
    """Writes sizes, heads, weights, and `about`: teachers, aggregation, layers, step, ..."""
    heads = [(name, head[-1].out_features) for name, head in zip(student.head_names, student.heads)]
    weights = {name: weight.detach().cpu() for name, weight in student.state_dict().items()}
    config = dataclasses.asdict(student.encoder.config)
    content = {"format": FORMAT, "config": config, "heads": heads, "weights": weights}
    checkpoint.save(path, content | about)


def load_student(path, device="cpu"):
    """The Student of a student.pt or of the folder of a run, frozen and in eval mode.

    Raises FileNotFoundError or ValueError, in one line.
    """
    if os.path.isdir(path):
        path = os.path.join(path, "student.pt")
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: no such student; train.py writes OUT/student.pt")
    saved = checkpoint.load(path)
    if not isinstance(saved, dict) or saved.get("format") != FORMAT:
        raise ValueError(f"{path}: not a student that train.py wrote")
    sizes = saved["config"]
    if "heads" in sizes:  # the older name
        sizes["attention_heads"] = sizes.pop("heads")
    student = Student(EncoderConfig(**sizes), saved["heads"])
    student.load_state_dict(saved["weights"])
    return student.to(device).eval().requires_grad_(False)
