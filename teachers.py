"""A frozen teacher (HuBERT, WavLM, wav2vec 2.0, data2vec, DistilHuBERT) from any official form: names, download, reading without running code, renaming, sizes.

    teacher = load_teacher("hubert")                     # or a path
    states = teacher(waveforms, layers=[4, 8, 12])       # three tensors (batch, frames, dim)

Papers: HuBERT arXiv:2106.07447, WavLM arXiv:2110.13900; RobustHuBERT is the one that arXiv:2302.12757 distils.
Works with encoder.py and safe_files.py beside it, and torch.
"""

import dataclasses
import hashlib
import http.client
import json
import os
import pickletools
import re
import sys
import time
import urllib.request
import zipfile

import torch

from encoder import EncoderConfig, SpeechEncoder
from safe_files import load_safely, locked, write_whole

# Where the official checkpoints lie; WavLM as s3prl converted it.
TEACHERS = {
    "hubert": "https://dl.fbaipublicfiles.com/hubert/hubert_base_ls960.pt",
    "hubert_large": "https://dl.fbaipublicfiles.com/hubert/hubert_large_ll60k.pt",
    "robust_hubert": "https://huggingface.co/kphuang68/HuBERT_base_robust_mgr/resolve/main/"
    "HuBERT_base_robust_mgr_best_loss_2.7821.pt",
    "wavlm": "https://huggingface.co/s3prl/converted_ckpts/resolve/main/wavlm_base.pt",
    "wavlm_plus": "https://huggingface.co/s3prl/converted_ckpts/resolve/main/wavlm_base_plus.pt",
    "wavlm_large": "https://huggingface.co/s3prl/converted_ckpts/resolve/main/wavlm_large.pt",
}


# ---------------------------------------------------------------- the official names

# Weights. Each row: our name, the name in fairseq (s3prl and Microsoft's WavLM too), the name in transformers.
# torchaudio's names are transformers' with other prefixes. {i} is a layer counted from 0.
NAMES = [
    ("feature_extractor.convs.{i}", "feature_extractor.conv_layers.{i}.0", "feature_extractor.conv_layers.{i}.conv"),
    ("feature_extractor.norms.{i}", "feature_extractor.conv_layers.{i}.2.1", "feature_extractor.conv_layers.{i}.layer_norm"),
    ("feature_extractor.norms.{i}", "feature_extractor.conv_layers.{i}.2", "feature_extractor.conv_layers.{i}.layer_norm"),
    ("feature_projection.norm", "layer_norm", "feature_projection.layer_norm"),
    ("feature_projection.projection", "post_extract_proj", "feature_projection.projection"),
    ("positional_embedding.convs.{i}", "encoder.pos_conv.{i}.0", "encoder.pos_conv_embed.layers.{i}.conv"),
    ("positional_embedding.conv", "encoder.pos_conv.0", "encoder.pos_conv_embed.conv"),
    ("norm", "encoder.layer_norm", "encoder.layer_norm"),
    ("relative_position", "encoder.layers.0.self_attn.relative_attention_bias", "encoder.layers.0.attention.rel_attn_embed"),
    ("layers.{i}.attention.q", "encoder.layers.{i}.self_attn.q_proj", "encoder.layers.{i}.attention.q_proj"),
    ("layers.{i}.attention.k", "encoder.layers.{i}.self_attn.k_proj", "encoder.layers.{i}.attention.k_proj"),
    ("layers.{i}.attention.v", "encoder.layers.{i}.self_attn.v_proj", "encoder.layers.{i}.attention.v_proj"),
    ("layers.{i}.attention.out", "encoder.layers.{i}.self_attn.out_proj", "encoder.layers.{i}.attention.out_proj"),
    ("layers.{i}.attention.gate", "encoder.layers.{i}.self_attn.grep_linear", "encoder.layers.{i}.attention.gru_rel_pos_linear"),
    ("layers.{i}.attention.gate_scale", "encoder.layers.{i}.self_attn.grep_a", "encoder.layers.{i}.attention.gru_rel_pos_const"),
    ("layers.{i}.attention_norm", "encoder.layers.{i}.self_attn_layer_norm", "encoder.layers.{i}.layer_norm"),
    ("layers.{i}.ffn_in", "encoder.layers.{i}.fc1", "encoder.layers.{i}.feed_forward.intermediate_dense"),
    ("layers.{i}.ffn_out", "encoder.layers.{i}.fc2", "encoder.layers.{i}.feed_forward.output_dense"),
    ("layers.{i}.ffn_norm", "encoder.layers.{i}.final_layer_norm", "encoder.layers.{i}.final_layer_norm"),
]  # fmt: skip

# Settings. Each row: our field of EncoderConfig, the name in fairseq (s3prl and Microsoft's WavLM too), in transformers.
SETTINGS = [
    ("conv_norm", "extractor_mode", "feat_extract_norm"),  # default or layer_norm; group or layer
    ("conv_bias", "conv_bias", "conv_bias"),
    ("projection_norm", "feat_proj_layer_norm", "feat_proj_layer_norm"),
    ("dim", "encoder_embed_dim", "hidden_size"),
    ("ffn_dim", "encoder_ffn_embed_dim", "intermediate_size"),
    ("heads", "encoder_attention_heads", "num_attention_heads"),
    ("layers", "encoder_layers", "num_hidden_layers"),
    ("pre_norm", "layer_norm_first", "do_stable_layer_norm"),
    ("pos_kernel", "conv_pos", "num_conv_pos_embeddings"),
    ("pos_groups", "conv_pos_groups", "num_conv_pos_embedding_groups"),
    ("relative_buckets", "num_buckets", "num_buckets"),
    ("relative_distance", "max_distance", "max_bucket_distance"),
    ("relative_gate", "gru_rel_pos", "gru_rel_pos"),
    ("normalize", "normalize", "do_normalize"),
]

# Weights of pre-training or of a task that are no part of the encoder.
NOT_ENCODER = re.compile(
    r"mask_emb|masked_spec_embed|mask_generator\.|logit_generator\.|label_embs|final_proj\.|"
    r"domain|discriminator|(^|w2v_encoder\.)proj\.|lm_head\.|aux\.|output_layer\.|^(quantizer|project_q|project_hid)\."
)

# What a fairseq checkpoint may mention beside tensors: each becomes an inert placeholder, never the class itself.
INERT = re.compile(
    r"(fairseq|fairseq_cli|omegaconf|examples|typing|pathlib)\.|argparse\.Namespace$|_codecs\.encode$|"
    r"numpy\.(_?core\.multiarray\.(scalar|_reconstruct)|dtype|ndarray|dtypes\.\w+)$"
)


# ---------------------------------------------------------------- loading


def load_teacher(name_or_path, device="cpu"):
    """A frozen teacher, in eval mode, from an official name or a checkpoint in any official form.

    name_or_path: a name in TEACHERS (downloaded once into torch.hub's cache) or a path. The form is recognised by
        what the file holds: fairseq (`model` with `cfg` or the older `args`), s3prl's converted form, Microsoft's
        WavLM, torchaudio's state dict, transformers' weights (bare, or a folder with config.json).
    Returns a SpeechEncoder on `device`, in float32, its positional convolution's weight normalisation folded.
    Raises FileNotFoundError where there is no such file, OSError where it cannot be downloaded, and ValueError, in
        one line that names the file, for anything that is not a whole HuBERT or WavLM. No code in a file is run.
    """
    path = os.fspath(name_or_path)
    if path in TEACHERS:
        path = download(TEACHERS[path])
    weights, settings, task = _read_checkpoint(path)
    form, weights = _rename(path, weights)
    with torch.device("meta"):  # no memory and no random numbers for weights that the checkpoint brings
        encoder = SpeechEncoder(_config(path, weights, settings, task))
    _fill(path, form, encoder, weights)
    return encoder.to(device).eval().requires_grad_(False)


def digest(encoder):
    """16 characters that change with any weight or size of a SpeechEncoder."""
    sizes = dataclasses.asdict(encoder.config)
    for name in ("projection_norm", "pos_depth"):  # came later: without them, digests kept before hold
        if sizes[name] == getattr(EncoderConfig, name):
            del sizes[name]
    found = hashlib.sha256(str(sizes).encode())
    for weight in encoder.state_dict().values():
        found.update(weight.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def short_names(paths):
    """A short name for each teacher, for heads and metrics: the file's without its ending, numbered where it recurs."""
    stems = [os.path.splitext(os.path.basename(os.path.normpath(path)))[0] for path in paths]
    counts = [stems[:i].count(stem) + 1 for i, stem in enumerate(stems)]
    return [f"{stem}-{count}" if count > 1 else stem for stem, count in zip(stems, counts)]


def layers_of(heads, teachers, names):
    """The layers of each teacher that are predicted, a list for each. Raises ValueError where a teacher lacks one."""
    layers = heads if isinstance(heads[0], list) else [heads] * len(teachers)
    if len(layers) != len(teachers):
        raise ValueError(f"{len(layers)} lists for {len(teachers)} teachers; give one for all, or one for each")
    for name, teacher, mine in zip(names, teachers, layers):
        if max(mine) > teacher.config.layers:
            raise ValueError(f"{name} has {teacher.config.layers} layers, not {max(mine)}")
    return layers


def check_frames(teachers, names):
    """Raises ValueError where a teacher's frames are not those of the first."""
    for name, teacher in zip(names, teachers):
        if [layer[1:] for layer in teacher.config.conv_layers] != [
            layer[1:] for layer in teachers[0].config.conv_layers
        ]:
            raise ValueError(f"{name}: its frames are not those of {names[0]}; teachers must share one frame rate")


def download(url):
    """The file at `url`, in torch.hub's cache: fetched by one process a machine while the others wait.

    A broken download leaves no file. Returns the path. Raises OSError with one line.
    """
    folder = os.path.join(torch.hub.get_dir(), "checkpoints")
    path = os.path.join(folder, url.rsplit("/", 1)[-1])
    if os.path.exists(path):
        return path
    os.makedirs(folder, exist_ok=True)
    with locked(path + ".lock"):
        if not os.path.exists(path):  # or another process fetched it while this one waited
            try:
                write_whole(path, lambda file: _fetch(url, file))
            except (OSError, http.client.HTTPException) as error:
                reason = error.__cause__ or error
                what = f"not downloaded ({reason}); try again, or fetch it by hand and give its path"
                raise OSError(f"{url}: {what}") from error
    return path


def _fetch(url, file):
    """Downloads into an open file. torch.hub's own downloader checks no length and waits for a silent server for ever."""
    with urllib.request.urlopen(url, timeout=60) as response:
        total, done, shown = int(response.headers.get("Content-Length") or 0), 0, 0.0
        while block := response.read(1 << 20):
            file.write(block)
            done += len(block)
            if time.monotonic() - shown > 0.5 or done == total:
                shown = time.monotonic()
                part = f" |{'#' * (30 * done // total):30}| {100 * done // total:3}%" if total else ""
                print(f"\r{os.path.basename(url)}{part} {done / 1e6:,.0f} MB", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    if done < total:
        raise OSError(f"the connection broke after {done:,} of {total:,} bytes")
    file.flush()
    with open(file.name, "rb") as written:
        start = written.read(512)
    if not start.startswith((b"PK", b"\x80")) or (start.startswith(b"PK") and not zipfile.is_zipfile(file.name)):
        raise OSError("what came is no checkpoint")


# ---------------------------------------------------------------- reading


def _read_checkpoint(path):
    """(weights by name, settings of the model, settings of the task), as the file has them; {} where it has none."""
    if os.path.isdir(path):
        for name in ("model.safetensors", "pytorch_model.bin"):
            if os.path.exists(os.path.join(path, name)) and os.path.exists(os.path.join(path, "config.json")):
                return _read_checkpoint(os.path.join(path, name))
        if os.path.exists(os.path.join(path, "student.pt")):
            raise ValueError(
                f"{path}: the folder of a run; as a teacher give the folder that export.py writes of its student.pt"
            )
        raise ValueError(f"{path}: a folder needs config.json with model.safetensors or pytorch_model.bin")
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: no such teacher; give a checkpoint's path or one of {', '.join(TEACHERS)}")

    content = _read_file(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not a HuBERT or WavLM checkpoint")
    if str(content.get("format")).startswith("ekd-student"):
        raise ValueError(f"{path}: a student; as a teacher give the folder that export.py writes of it")
    if "model_weight" in content:  # s3prl
        return content["model_weight"], _plain(content.get("model_cfg")), _plain(content.get("task_cfg"))
    if isinstance(content.get("Distiller"), dict):  # s3prl's DistilHuBERT, which has no norm before the projection
        settings = _plain(_plain(content.get("Config")).get("distiller"))
        settings["conv_feature_layers"] = settings.get("extractor_conv_feature_layers")
        return content["Distiller"], settings | {"feat_proj_layer_norm": False}, {}
    if isinstance(content.get("model"), dict):  # fairseq; Microsoft's cfg and the older args are flat
        settings = _plain(content.get("cfg")) or _plain(content.get("args"))
        model = _plain(settings.get("model"))
        settings = _plain(model.get("w2v_args")) or settings  # a fine-tuned file holds its pre-training's settings here
        model = _plain(settings.get("model")) or settings
        return content["model"], model, _plain(settings.get("task")) or settings
    folder = os.path.dirname(path)  # bare weights: transformers keeps the settings beside them
    return content, _read_json(folder, "config.json"), _read_json(folder, "preprocessor_config.json")


def _read_json(folder, name):
    path = os.path.join(folder, name)
    try:
        with open(path, encoding="utf-8-sig") as file:
            return _plain(json.load(file))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None


def _read_file(path):
    """What a .pt, .pth, .bin or .safetensors file holds, without running any code in it."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        start = file.read(512)
    if start.lstrip()[:1] == b"<":
        raise ValueError(f"{path}: a web page, not a checkpoint; download it again")
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < size:
        return _read_safetensors(path)
    try:
        inert = [(_Inert, name) for name in _mentioned(path) if INERT.match(name)]
        with torch.serialization.safe_globals(inert):
            return load_safely(path, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged file can raise nearly anything
        foreign = re.search(r"GLOBAL ([\w.]+)", str(error))
        if foreign:
            raise ValueError(f"{path}: refused, it asks to run {foreign[1]}; get it from its official place") from None
        reason = str(error).split("WeightsUnpickler error:")[-1].strip().partition("\n")[0] or type(error).__name__
        raise ValueError(f"{path}: damaged, cut short or no checkpoint; get it again ({reason[:120]})") from None


def _mentioned(path):
    """Names of the classes that a torch.save file mentions."""
    if zipfile.is_zipfile(path):
        return torch.serialization.get_unsafe_globals_in_checkpoint(path)
    names = set()
    with open(path, "rb") as file:
        for _ in range(4):  # before torch 1.6: a magic number, a protocol, the system, the object, each a pickle
            names |= {arg.replace(" ", ".") for op, arg, _ in pickletools.genops(file) if op.name == "GLOBAL"}
    return names


class _Inert:
    """Stands in for a class that a checkpoint mentions: takes what it is given and does nothing."""

    def __init__(self, *arguments, **keywords):
        pass

    def __setstate__(self, state):
        if isinstance(state, dict):
            self.__dict__.update(state)


def _plain(settings):
    """A dict of settings from a dict, an argparse.Namespace or an omegaconf container that came out as a placeholder."""
    if isinstance(settings, _Inert):
        settings = settings.__dict__.get("_content", settings.__dict__)  # omegaconf keeps its items in _content
    if not isinstance(settings, dict):
        return {}
    return {k: v.__dict__["_val"] if isinstance(v, _Inert) and "_val" in v.__dict__ else v for k, v in settings.items()}


def _read_safetensors(path):
    """A .safetensors file as a state dict. Format: 8 bytes of header length, a JSON header, the tensors' bytes."""
    types = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    try:
        with open(path, "rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            data = bytearray(file.read())
        header.pop("__metadata__", None)
        weights = {}
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            if not 0 <= start <= end <= len(data):
                raise ValueError(f"{name} lies outside the file")
            if entry["dtype"] in types:  # all that an encoder has
                tensor = torch.frombuffer(data[start:end], dtype=types[entry["dtype"]])
                weights[name] = tensor.reshape(entry["shape"])
        return weights
    except (ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise ValueError(f"{path}: damaged or cut short; get it again ({error})") from None


# ---------------------------------------------------------------- renaming


def _rename(path, weights):
    """(form, weights under our names), the weight normalisation folded. A weight without a name of ours keeps its own."""
    if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights):
        raise ValueError(f"{path}: not a HuBERT or WavLM checkpoint")
    weights = {name: tensor for name, tensor in weights.items() if torch.is_tensor(tensor)}
    for prefix in ("hubert.", "wavlm.", "wav2vec2.", "data2vec_audio.", "w2v_encoder.w2v_model."):
        if any(name.startswith(prefix + "feature_extractor.") for name in weights):
            weights = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
    if "post_extract_proj.weight" in weights or "encoder.pos_conv.0.bias" in weights:
        form = "fairseq"
    elif any(name.startswith("encoder.transformer.") for name in weights):
        form, weights = "torchaudio", _torchaudio_as_transformers(weights)
    elif any(name.startswith("feature_projection.") for name in weights):
        form = "transformers"
    else:
        first = ", ".join(list(weights)[:3]) or "none"
        raise ValueError(f"{path}: not a HuBERT or WavLM checkpoint (its first weights: {first})")

    renamed = {}
    theirs = [(re.compile(_pattern(row[1 if form == "fairseq" else 2]) + r"(\..+)?"), row[0]) for row in NAMES]
    for name, tensor in weights.items():
        for pattern, ours in theirs:
            if match := pattern.fullmatch(name):
                *layer, suffix = match.groups()
                name = ours.format(i="".join(layer)) + (suffix or "")
                break
        renamed[name] = tensor

    conv = "positional_embedding.conv."
    for g, v in (("weight_g", "weight_v"), ("parametrizations.weight.original0", "parametrizations.weight.original1")):
        if conv + g in renamed and conv + v in renamed:
            magnitude, direction = renamed.pop(conv + g).float(), renamed.pop(conv + v).float()
            renamed[conv + "weight"] = magnitude * direction / direction.norm(dim=(0, 1), keepdim=True)
    return form, renamed


def _torchaudio_as_transformers(weights):
    renamed = {}
    for name, tensor in weights.items():
        name = name.replace("encoder.transformer.", "encoder.")
        name = name.replace("encoder.feature_projection.", "feature_projection.")
        name = name.replace(".attention.attention.", ".attention.")  # its WavLM wraps nn.MultiheadAttention, ...
        if ".in_proj_" in name:  # ... which packs queries, keys and values
            for part, third in zip("qkv", tensor.chunk(3)):
                renamed[name.replace(".in_proj_", f".{part}_proj.")] = third
        else:
            renamed[name] = tensor
    return renamed


# ---------------------------------------------------------------- sizes


def _config(path, weights, settings, task):
    """EncoderConfig of a checkpoint: what its settings say, else what its tensors' names and shapes show."""

    def number(name):
        found = [int(m[1]) for m in (re.match(name + r"\.(\d+)\.", key) for key in weights) if m]
        return max(found, default=-1) + 1

    def shape(name, *default):
        return tuple(weights[name].shape) if name in weights else default

    def said(kind, *names):
        """The first of `names` that the settings hold as a `kind`: a placeholder is not one."""
        values = (source[name] for source in (settings, task) for name in names if name in source)
        return next((value for value in values if isinstance(value, kind)), None)

    for name in ("activation_fn", "hidden_act", "feat_extract_activation"):
        if said(str, name) not in (None, "gelu"):
            raise ValueError(f"{path}: {name} is {said(str, name)}; only gelu is known here")

    sizes = {ours: said(EncoderConfig.__dataclass_fields__[ours].type, *theirs) for ours, *theirs in SETTINGS}
    sizes = {ours: value for ours, value in sizes.items() if value is not None}
    per_layer = "feature_extractor.norms.1.weight" in weights
    if "conv_norm" in sizes:
        per_layer = sizes["conv_norm"] in ("layer_norm", "layer")
    sizes["conv_norm"] = "layer" if per_layer else "group"
    sizes["conv_layers"] = _conv_layers(path, weights, settings, number("feature_extractor.convs"))
    dim = sizes.setdefault("dim", shape("norm.weight", 0)[0])
    sizes["projection"] = "feature_projection.projection.weight" in weights or sizes["conv_layers"][-1][0] != dim

    depth = number("positional_embedding.convs")  # data2vec's, whose settings say kernels otherwise in every form
    first = "positional_embedding.convs.0.weight" if depth else "positional_embedding.conv.weight"
    channels, channels_of_a_group, kernel = shape(first, dim, 1, 128)
    if depth:
        sizes |= {"pos_depth": depth, "pos_kernel": kernel}
    buckets, bias_heads = shape("relative_position.weight", 320, None)
    gated = any(".attention.gate" in name for name in weights)
    relative = said(bool, "relative_position_embedding")
    if relative is None:
        relative = gated or settings.get("model_type") == "wavlm"
    shown = {"conv_bias": "feature_extractor.convs.0.bias" in weights, "layers": number("layers")}
    shown |= {"ffn_dim": shape("layers.0.ffn_in.weight", 0)[0], "pos_kernel": kernel}
    shown |= {"pos_groups": channels // channels_of_a_group}
    shown |= {"relative_buckets": buckets, "relative_gate": gated or not relative}
    # Tensors do not show these two. The published models agree: Large is pre-norm and normalised, Base neither, and
    # data2vec, with a norm for each convolution, normalised but not pre-norm.
    shown |= {"pre_norm": per_layer and not depth, "normalize": per_layer}
    sizes = shown | sizes
    if not relative:
        sizes["relative_buckets"] = 0

    heads = sizes.setdefault("heads", bias_heads)
    if heads is None:
        published = {768: 12, 1024: 16, 1280: 16}  # Base, Large, X-Large
        heads = sizes["heads"] = published.get(dim, sizes["pos_groups"])
        if dim not in published:
            _note(f"{path}: no configuration; taking {heads} attention heads (if wrong, put its config.json beside it)")
    if not dim or not heads or dim % heads:
        raise ValueError(f"{path}: {dim} dims do not divide over {heads} attention heads; not a whole HuBERT or WavLM")
    return EncoderConfig(**sizes)


def _conv_layers(path, weights, settings, number):
    """((channels, kernel, stride), …) from the settings, else from the tensors with the strides every model has."""
    text, strides = settings.get("conv_feature_layers"), settings.get("conv_stride")
    if isinstance(text, str):  # fairseq's Python, "[(512,10,5)] + [(512,3,2)] * 4 + …", read without eval
        layers = []
        for group, times in re.findall(r"\[([^\]]*)\](?:\*(\d+))?", text.replace(" ", "")):
            layers += [tuple(map(int, t)) for t in re.findall(r"\((\d+),(\d+),(\d+)\)", group)] * int(times or 1)
        if layers:
            return tuple(layers)
    if isinstance(strides, list) and isinstance(settings.get("conv_dim"), list):
        return tuple(zip(settings["conv_dim"], settings["conv_kernel"], strides))
    shapes = [weights.get(f"feature_extractor.convs.{i}.weight") for i in range(number)]
    if number != 7 or any(tensor is None for tensor in shapes):
        raise ValueError(
            f"{path}: no configuration, and {number} convolutions, not the usual 7; put its config.json beside it"
        )
    return tuple((len(tensor), tensor.shape[2], stride) for tensor, stride in zip(shapes, (5, 2, 2, 2, 2, 2, 2)))


def _fill(path, form, encoder, weights):
    """Gives the encoder the renamed weights; ValueError where one is missing or of another shape."""
    filled, missing = {}, []
    for name, parameter in encoder.state_dict().items():
        parts = parts_of(name)
        theirs = [official_name(part, form, encoder.config) for part in parts]
        missing += [official for part, official in zip(parts, theirs) if part not in weights]
        if missing:
            continue
        tensor = torch.cat([weights.pop(part) for part in parts])
        if tensor.shape != parameter.shape:
            shapes = f"{tuple(tensor.shape)} where the other sizes ask for {tuple(parameter.shape)}"
            raise ValueError(f"{path}: {' + '.join(theirs)} has shape {shapes}")
        filled[name] = tensor.to(torch.float32, copy=True)  # a copy: the file may be mapped, and may change
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(f"{path}: not a whole HuBERT or WavLM, missing {', '.join(missing[:3])}{more}")
    encoder.load_state_dict(filled, assign=True)
    unknown = [name for name in weights if not NOT_ENCODER.search(name)]
    inside = [name for name in unknown if re.match(r"(encoder|layers|feature_\w+|positional_embedding)\.", name)]
    if inside:
        raise ValueError(f"{path}: not a network known here, its encoder has {', '.join(inside[:3])} too")
    if unknown:
        more = ", ..." if len(unknown) > 5 else ""
        _note(f"{path}: passed over {len(unknown)} weights unknown to the encoder: {', '.join(unknown[:5])}{more}")


def parts_of(name):
    """The official parameters that one of ours is made of: queries, keys and values are one Linear here, three there."""
    return [name.replace(".qkv.", f".{part}.") for part in "qkv"] if ".qkv." in name else [name]


def official_name(name, form, config):
    """Our parameter's name as `form` has it."""
    stem, dot, kind = name.rpartition(".")
    if kind not in ("weight", "bias"):
        stem, dot, kind = name, "", ""
    for ours, fairseq, transformers in NAMES:
        match = re.fullmatch(_pattern(ours), stem)
        if match and not (config.conv_norm == "group" and fairseq.endswith(".2.1")):  # Large's name for a norm
            theirs = (fairseq if form == "fairseq" else transformers).format(i="".join(match.groups()))
            if form == "torchaudio":
                theirs = re.sub("^encoder", "encoder.transformer", theirs)
                theirs = re.sub("^feature_projection", "encoder.feature_projection", theirs)
            return theirs + dot + kind
    return name


def _pattern(template):
    return re.escape(template).replace(r"\{i\}", r"(\d+)")


def _note(line):
    if os.environ.get("RANK", "0") == "0":  # once under torchrun
        print(line, file=sys.stderr)
