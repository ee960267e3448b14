"""The student: a teacher's convolutions and a few Transformer layers, with prediction heads on the last.

Source: DistilHuBERT, arXiv:2110.01900; multiple heads for multiple teachers: arXiv:2302.12757.

    student = load_student("runs/avg/student.pt")
    states = student.hidden_states(waveforms, lengths)        # 0..N, each (batch, frames, dim)
"""

import dataclasses
import os

import torch
from torch import nn

from encoder import EncoderConfig, SpeechEncoder
from safe_files import load_safely

FORMAT = "ekd-student-1"


class Student(nn.Module):
    """A small SpeechEncoder and one prediction head a target.

    config: the encoder's sizes. heads: [(name, target dim), ...].
    """

    def __init__(self, config, heads):
        super().__init__()
        self.encoder = SpeechEncoder(config)
        self.head_names = [name for name, _ in heads]
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(config.dim, config.dim), nn.GELU(), nn.Linear(config.dim, dim)) for _, dim in heads
        )

    def forward(self, waveforms, lengths=None):
        """waveforms (batch, samples) at 16 kHz, lengths in samples or None. Returns [(batch, frames, target dim)], one a head."""
        last = self.encoder(waveforms, lengths, layers=[self.encoder.config.layers])[0]
        return [head(last) for head in self.heads]

    def hidden_states(self, waveforms, lengths=None):
        """Hidden states 0..N for downstream use, each (batch, frames, dim); 0 is the input of layer 1."""
        return self.encoder(waveforms, lengths)


def student_config(teacher, layers=2, dropout=0.1):
    """The student's EncoderConfig: the teacher's sizes with fewer layers, and no relative positions if it is a WavLM.

    The gradient into the convolutions is scaled by 0.1, as in DistilHuBERT.
    """
    return dataclasses.replace(
        teacher, layers=layers, relative_buckets=0, weight_norm=True, dropout=dropout, conv_gradient_scale=0.1
    )


def initialise(student, teacher):
    """Copies the teacher's convolutions, projection, positional convolution and first layers into the student.

    teacher: a SpeechEncoder of the student's sizes. WavLM's relative-position parts are left out.
    Raises ValueError where the teacher has fewer layers than the student.
    """
    encoder = student.encoder
    if encoder.config.layers > teacher.config.layers:
        depths = f"{encoder.config.layers} layers, the first teacher {teacher.config.layers}"
        raise ValueError(f"the student has {depths}; it can only start from random weights")
    weights = teacher.state_dict()
    if not encoder.config.pos_depth:
        # The weight normalisation splits it again, and keeps the storage that it is given: a copy, or training the
        # student would change the teacher.
        conv = encoder.positional_embedding.conv
        with torch.no_grad():
            conv.weight = weights.pop("positional_embedding.conv.weight").to(conv.bias.device, copy=True)
    own = encoder.state_dict()
    encoder.load_state_dict({name: weights.get(name, own[name]) for name in own})


def save_student(student, file, **about):
    """Writes a student to a path or an open file: sizes, heads and weights in plain types (`weights_only=True` reads it).

    about: how it was made, such as its teachers, aggregation, layers and step, for its model card (see export.py).
    """
    heads = [(name, head[-1].out_features) for name, head in zip(student.head_names, student.heads)]
    config = dataclasses.asdict(student.encoder.config)
    weights = {name: tensor.detach().cpu() for name, tensor in student.state_dict().items()}
    torch.save({"format": FORMAT, "config": config, "heads": heads, "weights": weights, **about}, file)


def load_student(path, device="cpu"):
    """The Student in a student.pt that train.py wrote, or in the folder of a run, on `device`, in eval mode.

    Raises FileNotFoundError where there is none, ValueError where the file is something else.
    """
    if os.path.isdir(path):
        path = os.path.join(path, "student.pt")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such student; train.py writes OUT/student.pt")
    try:
        saved = load_safely(path)
        if saved["format"] != FORMAT:
            raise ValueError(saved["format"])
        student = Student(EncoderConfig(**saved["config"]), saved["heads"])
        student.load_state_dict(saved["weights"])
    except Exception:  # a damaged file can raise nearly anything
        raise ValueError(f"{path}: damaged, or not a student; give a student.pt that train.py wrote") from None
    return student.to(device).eval()
