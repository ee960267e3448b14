"""The student: a teacher's convolutions and a few Transformer layers, with prediction heads on the last.

Source: DistilHuBERT, arXiv:2110.01900; multiple heads for multiple teachers: arXiv:2302.12757.

    student = load_student("runs/avg/student.pt")
    states = student.hidden_states(waveforms, lengths)        # 0..N, each (batch, frames, dim)

    python student.py runs/avg/student.pt --to my-student     # a transformers HuBERT folder
"""

import argparse
import contextlib
import dataclasses
import json
import os
import struct
import sys

import torch
from torch import nn

from teachers import EncoderConfig, SpeechEncoder, load_safely, official_state_dict

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
        raise ValueError(f"--student-layers: the student has {depths}; take fewer, or --init none")
    weights = teacher.state_dict()
    conv = encoder.positional_embedding.conv
    with torch.no_grad():
        # The parametrisation splits it again, and keeps the storage that it is given: a copy, or training the student
        # would change the teacher.
        conv.weight = weights.pop("positional_embedding.conv.weight").to(conv.bias.device, copy=True)
    own = encoder.state_dict()
    encoder.load_state_dict({name: weights.get(name, own[name]) for name in own})


def save_student(student, file, **about):
    """Writes a student to a path or an open file: sizes, heads and weights in plain types (`weights_only=True` reads it)."""
    heads = [(name, head[-1].out_features) for name, head in zip(student.head_names, student.heads)]
    config = dataclasses.asdict(student.encoder.config)
    weights = {name: tensor.detach().cpu() for name, tensor in student.state_dict().items()}
    torch.save({"format": FORMAT, "config": config, "heads": heads, "weights": weights, **about}, file)


def earlier(path, age):
    """Where save_atomically keeps what was saved `age` saves before the last one: last.pt, last.1.pt, last.2.pt, ..."""
    stem, ending = os.path.splitext(path)
    return f"{stem}.{age}{ending}" if age else path


def save_atomically(path, write, keep=1):
    """Calls write(file) on a temporary file beside `path`, and gives it the name only when it is whole on disk.

    keep: how many files stay, this one and those saved before it, under the names that `earlier` gives.
    Raises OSError with one line, the files that were there being whole.
    """
    partial = path + ".partial"
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        for age in range(keep - 1, 0, -1):
            if os.path.exists(earlier(path, age - 1)):
                os.replace(earlier(path, age - 1), earlier(path, age))
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            os.remove(partial)
        while error.__context__:  # torch.save covers what went wrong first with a RuntimeError of its own
            error = error.__context__
        if not isinstance(error, OSError):  # as that a process of the loader died: torch raises it wherever we are
            raise error
        raise OSError(f"{path}: not written ({error}); what was saved before is whole") from error


def load_student(path, device="cpu"):
    """The Student in a student.pt that train.py wrote, on `device`, in eval mode.

    Raises FileNotFoundError where there is none, ValueError where the file is something else.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such student; train.py writes OUT/student.pt")
    try:
        saved = load_safely(path)
        known = saved["format"] == FORMAT
        student = Student(EncoderConfig(**saved["config"]), saved["heads"])
        student.load_state_dict(saved["weights"])
    except Exception:  # a damaged file can raise nearly anything
        known = False
    if not known:
        raise ValueError(f"{path}: damaged, or not a student; give a student.pt that train.py wrote")
    return student.to(device).eval()


def write_transformers(student, folder):
    """Writes the student, without its heads, as a transformers HuBERT folder.

    `transformers.HubertModel.from_pretrained(folder)` gives equal hidden states; s3prl takes the folder as
    `hf_hubert_custom`. Raises FileExistsError where the folder holds files already.
    """
    if os.path.isdir(folder) and os.listdir(folder):
        raise FileExistsError(f"{folder}: not empty; give --to a new folder")
    c = student.encoder.config
    channels, kernels, strides = (list(column) for column in zip(*c.conv_layers))
    config = {
        "architectures": ["HubertModel"],
        "model_type": "hubert",
        "hidden_size": c.dim,
        "intermediate_size": c.ffn_dim,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "conv_dim": channels,
        "conv_kernel": kernels,
        "conv_stride": strides,
        "conv_bias": c.conv_bias,
        "num_feat_extract_layers": len(channels),
        "feat_extract_norm": c.conv_norm,
        "do_stable_layer_norm": c.pre_norm,
        "num_conv_pos_embeddings": c.pos_kernel,
        "num_conv_pos_embedding_groups": c.pos_groups,
        "hidden_act": "gelu",
        "feat_extract_activation": "gelu",
        "layer_norm_eps": 1e-5,
        "hidden_dropout": c.dropout,
        "attention_dropout": c.dropout,
        "activation_dropout": c.dropout,
        "feat_proj_dropout": 0.0,
        "layerdrop": 0.0,
        # The student never saw a mask, so it has no mask embedding either.
        "apply_spec_augment": False,
        "mask_time_prob": 0.0,
        "mask_feature_prob": 0.0,
    }
    preprocessor = {
        "feature_extractor_type": "Wav2Vec2FeatureExtractor",
        "do_normalize": c.normalize,
        "feature_size": 1,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": True,
        "sampling_rate": 16000,
    }
    weights = official_state_dict(student.encoder, "transformers")
    if not c.projection:  # transformers always has one
        weights["feature_projection.projection.weight"] = torch.eye(c.dim)
        weights["feature_projection.projection.bias"] = torch.zeros(c.dim)
    os.makedirs(folder, exist_ok=True)
    for name, content in (("config.json", config), ("preprocessor_config.json", preprocessor)):
        with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
            json.dump(content, file, indent=2)
    _write_safetensors(weights, os.path.join(folder, "model.safetensors"))


def _write_safetensors(weights, path):
    """float32 tensors as a .safetensors file: 8 bytes of header length, a JSON header, the tensors' bytes."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in weights.items():
        start, end = end, end + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in weights.values():
            file.write(tensor.contiguous().numpy().astype("<f4").tobytes())


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Write a student as a transformers HuBERT folder.")
    parser.add_argument("student", help="student.pt that train.py wrote")
    parser.add_argument("--to", required=True, metavar="DIR", help="new folder for config.json and the weights")
    args = parser.parse_args(arguments)
    try:
        write_transformers(load_student(args.student), args.to)
    except (OSError, ValueError) as error:
        sys.exit(_refuse(error))
    print(f'{args.to}: transformers.HubertModel.from_pretrained("{args.to}") loads it')


def _refuse(error):
    print(f"student.py: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
