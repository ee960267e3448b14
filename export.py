"""Write a student as a folder for transformers and s3prl.

    python export.py runs/avg/student.pt --to my-student

The folder is a HuBERT with a model card. save_official writes fairseq's form and others.
"""

import json
import os
import warnings

import torch

import checkpoint
import program
from encoder import NORMALIZE_EPS
from student import load_student
from teachers import official_name, qkv_parts

POSITION = "positional_embedding.conv"
SETTINGS = [  # field of EncoderConfig, name in fairseq, name in transformers
    ("conv_bias", "conv_bias", "conv_bias"),
    ("dim", "encoder_embed_dim", "hidden_size"),
    ("ffn_dim", "encoder_ffn_embed_dim", "intermediate_size"),
    ("attention_heads", "encoder_attention_heads", "num_attention_heads"),
    ("layers", "encoder_layers", "num_hidden_layers"),
    ("pre_norm", "layer_norm_first", "do_stable_layer_norm"),
    ("pos_kernel", "conv_pos", "num_conv_pos_embeddings"),
    ("pos_groups", "conv_pos_groups", "num_conv_pos_embedding_groups"),
]
CARD_SETTINGS = "agg weights steps splits init dropout batch_size lr weight_decay warmup clip "
CARD_SETTINGS += "cosine_weight max_seconds precision seed"
CARD = """\
---
{header}
---

# {name}

A small speech encoder, trained to predict the hidden states of an ensemble of self-supervised
teachers ([arXiv:2302.12757](https://arxiv.org/abs/2302.12757)).

| | |
|---|---|
{rows}

```python
from transformers import HubertModel

model = HubertModel.from_pretrained("{name}").eval()
# waveforms: (batch, samples) at 16 kHz{waveforms}
states = model(waveforms, output_hidden_states=True).hidden_states
```

{padding}
{quiet}"""
PADDING = {  # by conv_norm
    "group": """\
**Padding changes the hidden states.** In the HuBERT of transformers and s3prl, a batch of
utterances of 8.1 and 2.6 s gives the shorter one a relative error of 29 to 59%.
Process one utterance at a time, or batches of utterances of one length.""",
    "layer": "**Padding changes the hidden states** unless the model gets an `attention_mask`.",
}
QUIET = """
**Quiet speech changes the hidden states.** The student was trained with 1e-5 added to the variance
of a waveform, transformers' feature extractor adds 1e-7: with an rms of 0.01, 0.003 and 0.001 it
makes a waveform 1.05, 1.44 and 3.16 times as loud as in training. Waveforms normalised with
`torch.nn.functional.layer_norm(waveform, waveform.shape)` give equal states.
"""


def official_state_dict(encoder, form):
    """The encoder's weights in float32, named as in "fairseq" or "transformers".

    s3prl and Microsoft's WavLM use fairseq's names. In all of them the positional convolution is
    weight-normalised (`weight_g`, `weight_v`).
    """
    weights = {}
    for name, tensor in encoder.state_dict().items():
        if name.startswith(f"{POSITION}.") and "weight" in name:
            continue  # added below, weight-normalised
        parts = qkv_parts(name)
        for part, weight in zip(parts, tensor.detach().float().cpu().chunk(len(parts))):
            weights[official_name(part, form, encoder.config)] = weight.clone()
    if not encoder.config.pos_depth:
        name = official_name(POSITION, form, encoder.config)
        weight = encoder.positional_embedding.conv.weight.detach().float().cpu().clone()
        weights[f"{name}.weight_g"] = weight.norm(dim=(0, 1), keepdim=True)
        weights[f"{name}.weight_v"] = weight
    return weights


def save_official(encoder, path, form, dtype=torch.float32):
    """Writes a checkpoint in the format of "fairseq", "s3prl" or "microsoft" (WavLM).

    Their code normalises waveforms with NORMALIZE_EPS["fairseq"], whatever the encoder has.
    dtype: of the weights in the file.
    """
    c = encoder.config
    model = {fairseq: getattr(c, field) for field, fairseq, _ in SETTINGS}
    model |= {"conv_feature_layers": str(list(c.conv_layers)), "activation_fn": "gelu"}
    model["extractor_mode"] = "layer_norm" if c.conv_norm == "layer" else "default"
    task = {"normalize": c.normalize, "sample_rate": 16000}
    wavlm = {"relative_position_embedding": c.relative_buckets > 0, "gru_rel_pos": c.relative_gate}
    wavlm |= {"num_buckets": c.relative_buckets, "max_distance": c.relative_distance}
    weights = official_state_dict(encoder, "fairseq")
    weights = {name: weight.to(dtype) for name, weight in weights.items()}
    contents = {
        "fairseq": {"cfg": {"model": model, "task": task}, "model": weights},
        "s3prl": {"model_cfg": model, "task_cfg": task, "model_weight": weights},
        "microsoft": {"cfg": model | task | wavlm, "model": weights},
    }
    checkpoint.save(path, contents[form])


def write_transformers(student, folder, about=None):
    """Writes a Student without its heads as a folder that transformers.HubertModel loads.

    about: facts for the model card, see model_card.
    Raises FileExistsError unless the folder is new or empty, ValueError if it cannot be a HuBERT.
    """
    c = student.encoder.config
    if os.path.isdir(folder) and os.listdir(folder):
        raise FileExistsError(f"{folder}: not empty; choose another folder")
    if c.pos_depth or c.relative_buckets:
        raise ValueError("data2vec's and WavLM's positions cannot be exported as HuBERT")
    config = {transformers: getattr(c, field) for field, _, transformers in SETTINGS}
    config |= {"architectures": ["HubertModel"], "model_type": "hubert"}
    channels, kernels, strides = zip(*c.conv_layers)
    config |= {"conv_dim": channels, "conv_kernel": kernels, "conv_stride": strides}
    config |= {"feat_extract_norm": c.conv_norm, "feat_proj_layer_norm": c.projection_norm}
    for name in ("hidden_dropout", "attention_dropout", "activation_dropout"):
        config[name] = c.dropout
    config |= {"feat_proj_dropout": 0.0, "layerdrop": 0.0}
    config |= {"apply_spec_augment": False, "mask_time_prob": 0.0}  # there is no mask embedding
    config["tie_last_hidden_states"] = True  # transformers 5: the last with the final LayerNorm
    preprocessor = {"feature_extractor_type": "Wav2Vec2FeatureExtractor"}
    preprocessor |= {"do_normalize": c.normalize, "sampling_rate": 16000}
    weights = official_state_dict(student.encoder, "transformers")
    if not c.projection:  # transformers always has one
        weights["feature_projection.projection.weight"] = torch.eye(c.dim)
        weights["feature_projection.projection.bias"] = torch.zeros(c.dim)
    name = os.path.basename(os.path.abspath(folder))
    os.makedirs(folder, exist_ok=True)
    checkpoint.save(f"{folder}/config.json", json.dumps(config, indent=2))
    checkpoint.save(f"{folder}/preprocessor_config.json", json.dumps(preprocessor, indent=2))
    checkpoint.save(f"{folder}/README.md", model_card(student, name, about or {}))
    checkpoint.save(f"{folder}/model.safetensors", safetensors(weights))


def safetensors(weights):
    """The bytes of a .safetensors file of float32 tensors, for teachers.read_safetensors.

    Source: github.com/huggingface/safetensors, "Format".
    """
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, weight in weights.items():
        start, end = end, end + 4 * weight.numel()
        header[name] = {"dtype": "F32", "shape": list(weight.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    content = [weight.contiguous().numpy().tobytes() for weight in weights.values()]
    return len(text).to_bytes(8, "little") + text + b"".join(content)


def model_card(student, name, about):
    """The README.md of an exported student; facts missing from `about` are "not recorded".

    about: {"teachers": [name], "agg": "avg", "layers": [4, 8, 12], "step": 200000, "data": name,
    "language": "en", "license": "mit", "settings": {of train.py}, "commit": hash}.
    """
    config = student.encoder.config
    millions = sum(weight.numel() for weight in student.encoder.parameters()) / 1e6
    normalised = ", each of mean 0 and variance 1" if config.normalize else ""
    settings = about.get("settings", {})
    names = CARD_SETTINGS.split() + ["snr", "noise_probability"] * bool(settings.get("noise"))
    if str(settings.get("data")).endswith(".tsv"):
        names.remove("splits")  # a manifest has none
    settings = [f"{key} {settings[key]}" for key in names if settings.get(key) is not None]
    facts = {
        "teachers": ", ".join(about.get("teachers", [])),
        "layers of the teachers": ", ".join(map(str, about.get("layers", []))),
        "aggregation": about.get("agg"),
        "prediction heads, not exported": ", ".join(student.head_names),
        "training data": about.get("data"),
        "language": about.get("language"),
        "licence": about.get("license"),
        "training steps": str(about.get("step", "")),
        "training settings": "; ".join(settings),
        "commit of the code": about.get("commit"),
        "encoder": f"{config.layers} layers of {config.dim}, {millions:.2f} million parameters",
        "waveforms": f"16 kHz{normalised}",
    }
    is_older = config.normalize and config.normalize_eps == NORMALIZE_EPS["fairseq"]
    rows = [f"| {fact} | {value or 'not recorded'} |" for fact, value in facts.items()]
    header = ["library_name: transformers", "tags: [speech, hubert, knowledge-distillation]"]
    for key in ("language", "license"):
        if about.get(key):
            header.append(f"{key}: {json.dumps(about[key])}")  # JSON is YAML
    parts = {"header": "\n".join(header), "rows": "\n".join(rows), "waveforms": normalised}
    return CARD.format(
        name=name, padding=PADDING[config.conv_norm], quiet=QUIET if is_older else "", **parts
    )


def main(arguments=None):
    program.init()
    with program.one_line_errors():
        parser = program.Parser(__doc__.split("\n")[0])
        parser.add_argument("student", help="student.pt of train.py, or its folder")
        parser.add_argument("--to", required=True, metavar="DIR", help="new folder")
        parser.add_argument("--language", help="of the training data, for the card, such as en")
        parser.add_argument("--license", help="of the student, for the card, such as mit")
        args = parser.parse_args(arguments)
        path = args.student
        if os.path.isdir(path):
            path = os.path.join(path, "student.pt")
        student = load_student(path)
        about = checkpoint.load(path) | {"language": args.language, "license": args.license}
        about |= checkpoint.read_json(os.path.join(os.path.dirname(path), "config.json"))
        write_transformers(student, args.to, about)
        step, steps = about.get("step"), about.get("settings", {}).get("steps")
        if step is not None and steps is not None and step < steps:
            warnings.warn(f"{path}: after step {step} of {steps}; train.py has not finished")
    print(f"{args.to}: a HuBERT for transformers; {args.to}/README.md is its model card")


if __name__ == "__main__":
    program.run(main)
