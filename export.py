"""An encoder written in the official forms: a folder for transformers, or a checkpoint of fairseq, s3prl or Microsoft.

    python export.py runs/avg/student.pt --to my-student          # transformers, with a model card

The names of weights and settings are those that teachers.py reads by: its tables NAMES and SETTINGS.
"""

import processes

import json
import os

import torch

from safe_files import load_safely, write_text, write_whole
from student import load_student
from teachers import SETTINGS, official_name, parts_of

CONV = "positional_embedding.conv"


def official_state_dict(encoder, form):
    """The encoder's weights under the names of "fairseq" (s3prl and Microsoft's WavLM too) or "transformers", in float32.

    The positional convolution comes weight-normalised (`weight_g`, `weight_v`), as both expect it.
    """
    weights = {}
    for name, tensor in encoder.state_dict().items():
        if name.startswith(CONV + ".") and "weight" in name:
            continue
        parts = parts_of(name)
        for part, piece in zip(parts, tensor.detach().float().cpu().chunk(len(parts))):
            weights[official_name(part, form, encoder.config)] = piece.clone()
    if encoder.config.pos_depth:
        return weights
    conv = official_name(CONV, form, encoder.config)
    v = encoder.positional_embedding.conv.weight.detach().float().cpu().clone()
    weights[conv + ".weight_g"], weights[conv + ".weight_v"] = v.norm(dim=(0, 1), keepdim=True), v
    return weights


def official_settings(config, form):
    """The EncoderConfig under the names of "fairseq" (s3prl too), "microsoft" or "transformers"."""
    # WavLM's alone has relative positions; the others say in another place whether waveforms are normalised.
    rows = [row for row in SETTINGS if form == "microsoft" or not row[0].startswith(("relative_", "normalize"))]
    if form != "transformers":
        rows = [row for row in rows if row[0] != "projection_norm"]  # transformers' alone
    settings = {row[2 if form == "transformers" else 1]: getattr(config, row[0]) for row in rows}
    if form == "transformers":
        channels, kernels, strides = (list(column) for column in zip(*config.conv_layers))
        settings |= {"conv_dim": channels, "conv_kernel": kernels, "conv_stride": strides}
        return settings | {"hidden_act": "gelu", "feat_extract_activation": "gelu"}
    settings["extractor_mode"] = "layer_norm" if config.conv_norm == "layer" else "default"
    if form == "microsoft":
        settings["relative_position_embedding"] = config.relative_buckets > 0
    return settings | {"conv_feature_layers": str(list(config.conv_layers)), "activation_fn": "gelu"}


def save_official(encoder, path, form, dtype=torch.float32):
    """Writes an encoder as a checkpoint in the form of "fairseq", "s3prl" or "microsoft" (WavLM), as `load_teacher` reads it.

    dtype: of the weights in the file; all of these forms may be in half precision.
    """
    settings, weights = official_settings(encoder.config, form), official_state_dict(encoder, "fairseq")
    weights = {name: weight.to(dtype) for name, weight in weights.items()}
    task = {"normalize": encoder.config.normalize, "sample_rate": 16000}
    if form == "fairseq":
        content = {"args": None, "cfg": {"model": settings, "task": task}, "model": weights}
    elif form == "s3prl":
        content = {"task_cfg": task, "model_cfg": settings, "model_weight": weights, "dictionaries_symbols": []}
    else:
        content = {"cfg": settings, "model": weights}
    write_whole(path, lambda file: torch.save(content, file))


# ---------------------------------------------------------------- transformers


def write_transformers(student, folder, about=None):
    """Writes the student, without its heads, as a transformers HuBERT folder with a model card.

    about: what the card says of its making, as student.pt holds it (see `model_card`).
    `transformers.HubertModel.from_pretrained(folder)` gives equal hidden states; s3prl takes the folder as
    `hf_hubert_custom`. Raises FileExistsError where the folder holds files already.
    """
    if os.path.isdir(folder) and os.listdir(folder):
        raise FileExistsError(f"{folder}: not empty; give a new folder")
    c = student.encoder.config
    if c.pos_depth:
        raise ValueError("a student with data2vec's positional convolutions is no HuBERT; nothing is written")
    config = {"architectures": ["HubertModel"], "model_type": "hubert"} | official_settings(c, "transformers")
    config |= {"num_feat_extract_layers": len(c.conv_layers), "layer_norm_eps": 1e-5}
    config |= {"hidden_dropout": c.dropout, "attention_dropout": c.dropout, "activation_dropout": c.dropout}
    config |= {"feat_proj_dropout": 0.0, "layerdrop": 0.0}
    # The student never saw a mask, so it has no mask embedding either.
    config |= {"apply_spec_augment": False, "mask_time_prob": 0.0, "mask_feature_prob": 0.0}
    preprocessor = {"feature_extractor_type": "Wav2Vec2FeatureExtractor", "do_normalize": c.normalize}
    preprocessor |= {"feature_size": 1, "padding_side": "right", "padding_value": 0.0}
    preprocessor |= {"return_attention_mask": True, "sampling_rate": 16000}
    weights = official_state_dict(student.encoder, "transformers")
    if not c.projection:  # transformers always has one
        weights["feature_projection.projection.weight"] = torch.eye(c.dim)
        weights["feature_projection.projection.bias"] = torch.zeros(c.dim)
    os.makedirs(folder, exist_ok=True)
    write_text(os.path.join(folder, "config.json"), json.dumps(config, indent=2))
    write_text(os.path.join(folder, "preprocessor_config.json"), json.dumps(preprocessor, indent=2))
    write_text(
        os.path.join(folder, "README.md"), model_card(student, os.path.basename(os.path.normpath(folder)), about)
    )
    write_whole(os.path.join(folder, "model.safetensors"), lambda file: _write_safetensors(weights, file))


def _write_safetensors(weights, file):
    """float32 tensors in the .safetensors form: 8 bytes of header length, a JSON header, the tensors' bytes."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in weights.items():
        start, end = end, end + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in weights.values():
        file.write(tensor.contiguous().numpy().astype("<f4").tobytes())


def model_card(student, name, about=None):
    """The README.md of a folder for the hub: front matter, then what the student is and how it was made.

    about: {"teachers": [name], "agg": "avg", "layers": [4, 8, 12], "step": 200000}; what it lacks is "not recorded".
    """
    about, config = about or {}, student.encoder.config
    millions = sum(weight.numel() for weight in student.encoder.parameters()) / 1e6
    aggregations = {
        "avg": "layerwise average",
        "concat": "layerwise concatenation",
        "none": "none, a head for each teacher",
    }
    rows = {
        "teachers": ", ".join(about.get("teachers", [])),
        "aggregation": aggregations.get(about.get("agg"), ""),
        "layers of the teachers predicted": ", ".join(map(str, about.get("layers", []))),
        "prediction heads (not in this folder)": ", ".join(student.head_names),
        "steps": f"{about['step']:,}" if "step" in about else "",
        "Transformer layers": config.layers,
        "width": config.dim,
        "weights": f"{millions:.2f} million",
        "waveforms": "16 kHz" + (", normalised to zero mean and unit variance" if config.normalize else ""),
    }
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "tags:",
            *(f"- {tag}" for tag in ("speech", "hubert", "knowledge-distillation", "feature-extraction")),
            "---",
            "",
            f"# {name}",
            "",
            "A small speech encoder that learned to predict the hidden states of an ensemble of self-supervised teachers",
            "([arXiv:2302.12757](https://arxiv.org/abs/2302.12757)).",
            "",
            "| | |",
            "|---|---|",
            *(f"| {what} | {value or 'not recorded'} |" for what, value in rows.items()),
            "",
            "```python",
            "from transformers import HubertModel",
            "",
            f'states = HubertModel.from_pretrained("{name}")(waveforms, output_hidden_states=True).hidden_states',
            "```",
            "",
        ]
    )


def main(arguments=None):
    parser = processes.parser("Write a student as a transformers HuBERT folder.")
    parser.add_argument("student", help="student.pt that train.py wrote, or its folder")
    parser.add_argument("--to", required=True, metavar="DIR", help="new folder for config.json, weights and model card")
    args = parser.parse_args(arguments)
    with processes.together():
        if os.path.isdir(args.student):
            args.student = os.path.join(args.student, "student.pt")
        write_transformers(load_student(args.student), args.to, load_safely(args.student))
    print(f'{args.to}: transformers.HubertModel.from_pretrained("{args.to}") loads it; README.md is its model card')


if __name__ == "__main__":
    processes.run(main)
