"""A frozen teacher from a checkpoint in any official form, without fairseq or code from the file.

    teacher = load_teacher("hubert")                  # or a path
    states = teacher(waveforms, layers=[4, 8, 12])    # three of (batch, frames, dim)

Needs torch, filelock, encoder.py and checkpoint.py.
Papers: see encoder.py; RobustHuBERT: arXiv:2302.12757.
"""

import contextlib
import dataclasses
import fnmatch
import hashlib
import json
import os
import pickletools
import re
import socket
import tempfile
import warnings
import zipfile

import torch
from filelock import FileLock

import checkpoint
from encoder import NORMALIZE_EPS, EncoderConfig, SpeechEncoder

S3PRL = "https://huggingface.co/s3prl/converted_ckpts/resolve/main"
TEACHERS = {
    "hubert": "https://dl.fbaipublicfiles.com/hubert/hubert_base_ls960.pt",
    "hubert_large": "https://dl.fbaipublicfiles.com/hubert/hubert_large_ll60k.pt",
    "robust_hubert": "https://huggingface.co/kphuang68/HuBERT_base_robust_mgr/resolve/main/"
    "HuBERT_base_robust_mgr_best_loss_2.7821.pt",
    "wavlm": f"{S3PRL}/wavlm_base.pt",
    "wavlm_plus": f"{S3PRL}/wavlm_base_plus.pt",
    "wavlm_large": f"{S3PRL}/wavlm_large.pt",
}


def load_teacher(name_or_path, device="cpu"):
    """A frozen SpeechEncoder in eval mode, in float32.

    name_or_path: a name in TEACHERS (downloaded once into torch.hub's folder), a checkpoint of
        fairseq, s3prl, Microsoft's WavLM or torchaudio, or transformers' folder or weights.
    Raises OSError or ValueError with one line for anything else. No code in a file is run.
    On a GPU, torch's convolutions are in TF32 unless torch.backends.cudnn.allow_tf32 is False.
    """
    path = os.fspath(name_or_path)
    if path in TEACHERS and os.path.exists(path):
        raise ValueError(f"{path}: a known name and a file here; write ./{path}, or rename it")
    if path in TEACHERS:
        path = download(TEACHERS[path])
    weights, settings = read_checkpoint(path)
    form, prefix = find_encoder(path, weights)
    weights = fold_weight_norm(rename(path, form, prefix, weights))
    config = encoder_config(path, form, weights, settings)
    with torch.device("meta"):  # no memory, no random numbers: the checkpoint has all weights
        encoder = SpeechEncoder(config)
    load_weights(encoder, path, form, weights)
    return encoder.to(device).eval().requires_grad_(False)


def digest(encoder):
    """16 hex digits of a hash over the sizes and weights of a SpeechEncoder."""
    defaults = dataclasses.asdict(EncoderConfig())
    sizes = dataclasses.asdict(encoder.config)
    # Without defaults, so that a field added to EncoderConfig changes no digest.
    sizes = {name: size for name, size in sizes.items() if size != defaults[name]}
    content = hashlib.sha256(str(sizes).encode())
    for weight in encoder.state_dict().values():
        content.update(weight.detach().cpu().contiguous().numpy().tobytes())
    return content.hexdigest()[:16]


def short_names(paths):
    """A name per teacher: that of the file without its ending; all numbered if two are equal."""
    names = [os.path.splitext(os.path.basename(os.path.normpath(path)))[0] for path in paths]
    if len(set(names)) < len(names):
        names = [f"{name}-{number}" for number, name in enumerate(names, start=1)]
    return names


# ------------------------------------------------------------------ weights

# A weight's name in this code, in fairseq (also s3prl and Microsoft), and in transformers.
CONV, POSITION, LAYER = "feature_extractor.conv_layers", "encoder.pos_conv", "encoder.layers.{i}."
NAMES = [
    ("feature_extractor.convs.{i}", CONV + ".{i}.0", CONV + ".{i}.conv"),
    ("feature_extractor.norms.{i}", CONV + ".{i}.2", CONV + ".{i}.layer_norm"),
    ("feature_projection.norm", "layer_norm", "feature_projection.layer_norm"),
    ("feature_projection.projection", "post_extract_proj", "feature_projection.projection"),
    ("positional_embedding.convs.{i}", POSITION + ".{i}.0", POSITION + "_embed.layers.{i}.conv"),
    ("positional_embedding.conv", POSITION + ".0", POSITION + "_embed.conv"),
    ("norm", "encoder.layer_norm", "encoder.layer_norm"),
    (
        "relative_position",
        LAYER + "self_attn.relative_attention_bias",
        LAYER + "attention.rel_attn_embed",
    ),
]
NAMES_IN_A_LAYER = [
    ("attention.gate", "self_attn.grep_linear", "attention.gru_rel_pos_linear"),
    ("attention.gate_scale", "self_attn.grep_a", "attention.gru_rel_pos_const"),
    ("attention.qkv", "self_attn.in_proj", "attention.in_proj"),
    ("attention.{x}", "self_attn.{x}_proj", "attention.{x}_proj"),  # q, k, ...
    ("attention_norm", "self_attn_layer_norm", "layer_norm"),
    ("ffn_in", "fc1", "feed_forward.intermediate_dense"),
    ("ffn_out", "fc2", "feed_forward.output_dense"),
    ("ffn_norm", "final_layer_norm", "final_layer_norm"),
]
NAMES += [("layers.{i}." + a, LAYER + b, LAYER + c) for a, b, c in NAMES_IN_A_LAYER]
FORMS = {"fairseq": 1, "transformers": 2, "torchaudio": 2}  # columns of NAMES
DTYPES = {"F64": torch.double, "F32": torch.float, "F16": torch.half, "BF16": torch.bfloat16}


def translate(name, source, target):
    """Translates the name of a weight or layer from column `source` of NAMES to `target`."""
    for row in NAMES:
        pattern = re.escape(row[source]).replace(r"\{i\}", r"(?P<i>\d+)")
        pattern = pattern.replace(r"\{x\}", "(?P<x>[a-z]+)") + r"(?P<kind>(\..+)?)"
        match = re.fullmatch(pattern, name)
        if match:
            fields = {"i": 0} | match.groupdict()  # the position bias is stored in layer 0
            return row[target].format(**fields) + fields["kind"]
    return name


def official_name(name, form, config):
    """The name in a form of FORMS of a weight or layer of a SpeechEncoder."""
    official = translate(name, 0, FORMS[form])
    if form == "fairseq" and config.conv_norm == "layer":  # norms in a Sequential
        official = re.sub(r"(conv_layers\.\d+\.2)\b", r"\1.1", official)
    return official


def qkv_parts(name):
    """[q, k, v names] for a qkv weight, which is one tensor in this code; otherwise [name]."""
    return [name.replace(".qkv.", f".{part}.") for part in "qkv"] if ".qkv." in name else [name]


def find_encoder(path, names):
    """(form in FORMS, prefix such as "wavlm.") of the encoder among the names of all weights."""
    names = "\n".join(names)
    adapter = re.search(r"\b(base_layer|lora_\w+)", names)
    if adapter:
        remedy = "merge the adapter into the weights (in peft: merge_and_unload)"
        raise ValueError(f"{path}: it has {adapter[0]}; {remedy}")
    first_conv = r"^(.*\.)?feature_extractor\.conv_layers\.0\."
    prefixes = sorted(set(re.findall(first_conv, names, re.MULTILINE)))
    if not prefixes:
        raise ValueError(f"{path}: not a HuBERT or WavLM checkpoint")
    if len(prefixes) > 1:
        encoders = ", ".join(f"{prefix}feature_extractor" for prefix in prefixes)
        raise ValueError(f"{path}: {len(prefixes)} encoders ({encoders}); save one of them alone")
    if f"{prefixes[0]}encoder.transformer." in names:
        return "torchaudio", prefixes[0]
    transformers = "feature_projection.projection.weight" in names
    return "transformers" if transformers else "fairseq", prefixes[0]


def rename(path, form, prefix, official):
    """The weights with the encoder's prefix by their names in this code."""
    weights = {}
    for name, weight in official.items():
        if name.startswith(prefix):
            name = name.removeprefix(prefix)
            name = re.sub(r"(conv_layers\.\d+\.2)\.1\.", r"\1.", name)  # fairseq's Large
            # torchaudio has transformers' names with more prefixes, and one weight for q, k and v.
            name = re.sub(r"^encoder\.transformer\.", "encoder.", name)
            name = re.sub(r"^encoder\.feature_", "feature_", name)
            name = name.replace(".attention.attention.", ".attention.")
            name = name.replace(".in_proj_", ".in_proj.")
            name = name.replace("parametrizations.weight.original0", "weight_g")
            name = name.replace("parametrizations.weight.original1", "weight_v")
            weights[translate(name, FORMS[form], 0)] = weight
    return weights


def fold_weight_norm(weights):
    """The same with the positional convolution's weight in place of its weight_g and weight_v."""
    g, v = "positional_embedding.conv.weight_g", "positional_embedding.conv.weight_v"
    if g in weights and v in weights and weights[v].dim() == 3:
        magnitude, direction = weights.pop(g).float(), weights.pop(v).float()
        norm = direction.norm(dim=(0, 1), keepdim=True)
        weights["positional_embedding.conv.weight"] = magnitude * direction / norm
    return weights


def encoder_config(path, form, weights, settings):
    """Sizes from the tensors or the settings; a default, if in neither, is printed."""
    assumed = {}

    def setting(kind, fairseq, transformers, default):
        for name in (fairseq, transformers):
            if isinstance(settings.get(name), kind):
                return settings[name]
        assumed[transformers] = default
        return default

    def shape(name, rank):
        size = tuple(weights[name].shape) if name in weights else ()
        if len(size) != rank:
            official = official_name(name, form, EncoderConfig())
            problem = f"has shape {size}, not {rank} dimensions" if size else "is missing"
            raise ValueError(f"{path}: {official} {problem}")
        return size

    def count(names):
        return len(fnmatch.filter(weights, names))

    for name in ("activation_fn", "hidden_act", "feat_extract_activation"):
        if isinstance(settings.get(name), str) and settings[name] != "gelu":
            raise ValueError(f"{path}: {name} is {settings[name]}; only gelu is supported")
    if settings.get("layer_norm_eps", 1e-5) != 1e-5:
        raise ValueError(f"{path}: layer_norm_eps is {settings['layer_norm_eps']}, not 1e-5")
    (dim,) = shape("norm.weight", 1)
    ffn_dim, _ = shape("layers.0.ffn_in.weight", 2)
    number = count("feature_extractor.convs.*.weight")
    convs = [shape(f"feature_extractor.convs.{i}.weight", 3) for i in range(number)]
    strides = setting(list, "conv_stride", "conv_stride", [5, 2, 2, 2, 2, 2, 2])
    if len(strides) != number:
        raise ValueError(f"{path}: {number} convolutions, but {len(strides)} strides")
    norm_per_conv = "feature_extractor.norms.1.weight" in weights  # as in Large
    depth = count("positional_embedding.convs.*.weight")
    pre_norm = norm_per_conv and not depth
    position = "positional_embedding.convs.0" if depth else "positional_embedding.conv"
    _, group_channels, pos_kernel = shape(f"{position}.weight", 3)
    gated = count("layers.*.attention.gate*") > 0
    buckets, distance = 0, EncoderConfig.relative_distance
    if gated or "relative_position.weight" in weights:  # WavLM
        buckets, attention_heads = shape("relative_position.weight", 2)
        distance = setting(int, "max_distance", "max_bucket_distance", distance)
    else:
        default = None if dim % 64 else dim // 64
        default = {1280: 16, 1920: 16}.get(dim, default)  # HuBERT X-Large, XLS-R
        attention_heads = setting(int, "encoder_attention_heads", "num_attention_heads", default)
    if attention_heads is None:
        remedy = "write num_attention_heads into a config.json beside it"
        raise ValueError(f"{path}: its {dim} dims do not show the attention heads; {remedy}")
    if attention_heads < 1 or dim % attention_heads:
        problem = f"num_attention_heads {attention_heads} does not divide the {dim} dims"
        raise ValueError(f"{path}: {problem}")
    config = EncoderConfig(
        conv_layers=tuple((out, kernel, s) for (out, _, kernel), s in zip(convs, strides)),
        conv_norm="layer" if norm_per_conv else "group",
        conv_bias="feature_extractor.convs.0.bias" in weights,
        projection=count("feature_projection.projection.*") > 0 or convs[-1][0] != dim,
        projection_norm=count("feature_projection.norm.*") > 0,
        dim=dim,
        ffn_dim=ffn_dim,
        attention_heads=attention_heads,
        layers=setting(int, "encoder_layers", "num_hidden_layers", count("layers.*.ffn_in.weight")),
        pre_norm=setting(bool, "layer_norm_first", "do_stable_layer_norm", pre_norm),
        pos_kernel=pos_kernel,
        pos_groups=dim // group_channels,
        pos_depth=depth,
        relative_buckets=buckets,
        relative_distance=distance,
        relative_gate=gated or not buckets,
        normalize=setting(bool, "normalize", "do_normalize", norm_per_conv),
        normalize_eps=NORMALIZE_EPS[form],
    )
    assumed.pop("num_hidden_layers", None)  # counted from the weights
    if assumed:
        text = ", ".join(f"{name} {value}" for name, value in assumed.items())
        warnings.warn(f"{path}: not in its configuration, so assumed: {text}")
    return config


def load_weights(encoder, path, form, weights):
    """Raises ValueError for a missing, misshapen, not finite or unknown weight of the encoder."""
    state = {}
    for name, parameter in encoder.state_dict().items():
        parts = [name] if name in weights else qkv_parts(name)
        expected = (parameter.shape[0] // len(parts), *parameter.shape[1:])
        for part in parts:
            size = tuple(weights[part].shape) if part in weights else ()
            problem = ""
            if size != expected:
                problem = f"has shape {size}, not {expected}" if size else "is missing"
            elif not weights[part].float().isfinite().all():
                problem = "has values that are NaN or infinite"
            if problem:
                official = official_name(part, form, encoder.config)
                raise ValueError(f"{path}: {official} {problem}")
        state[name] = torch.cat([weights.pop(part).float() for part in parts])
    encoder.load_state_dict(state, assign=True)
    # layer_norm_for_extract is of a loss of UniSpeech-SAT.
    names = r"encoder\.(?!layer_norm_for_extract)|(feature_\w+|layers|positional_embedding)\."
    of_encoder = re.compile(names)
    unknown = [name for name in weights if of_encoder.match(name)]
    if unknown:
        raise ValueError(f"{path}: unsupported architecture, it has {', '.join(unknown[:3])}")


# ------------------------------------------------------------------ files

# Classes in a fairseq checkpoint that become Placeholders; nothing of them is run.
PLACEHOLDERS = re.compile(
    r"(fairseq|fairseq_cli|omegaconf|examples|typing|pathlib)\.|argparse\.Namespace$|"
    r"collections\.defaultdict$|builtins\.(dict|list|tuple|str|int|float|bool|bytes|type)$|"
    r"_codecs\.encode$|numpy\.(_?core\.multiarray\.(scalar|_reconstruct)|dtype|ndarray)"
)


class Placeholder:
    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        if isinstance(state, dict):
            self.__dict__.update(state)


def plain(settings):
    """A dict from a dict, or from the Placeholder of a Namespace or an omegaconf container."""
    if isinstance(settings, Placeholder):
        settings = vars(settings).get("_content", vars(settings))
    if not isinstance(settings, dict):
        return {}
    # omegaconf wraps every value in a node.
    return {name: getattr(value, "_val", value) for name, value in settings.items()}


def read_checkpoint(path):
    """({name: tensor}, settings) of a checkpoint, by the names of its form."""
    if os.path.isdir(path):  # transformers
        names = ["model.safetensors", "pytorch_model.bin"]
        names += ["adapter_model.safetensors", "adapter_model.bin"]  # refused: not merged
        names += ["model.safetensors.index.json", "pytorch_model.bin.index.json"]
        files = [os.path.join(path, name) for name in names]
        path = next(filter(os.path.exists, files), files[0])
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: no such file; known names: {', '.join(TEACHERS)}")
    if path.endswith(".index.json"):  # of a large model, in several files
        content, names = {}, checkpoint.read_json(path).get("weight_map", {}).values()
        for name in sorted(set(names)):
            content |= read_file(os.path.join(os.path.dirname(path), name))
    else:
        content = read_file(path)
    content = content if isinstance(content, dict) else {}
    if str(content.get("format")).startswith("ekd-student"):
        raise ValueError(f"{path}: a student; give the folder that export.py writes of it")
    if "model_weight" in content:  # s3prl
        weights = content["model_weight"]
        settings = plain(content.get("model_cfg")) | plain(content.get("task_cfg"))
    elif "Distiller" in content:  # s3prl's DistilHuBERT
        weights = content["Distiller"]
        settings = {"layer_norm_first": False, "normalize": False}
        settings |= plain(plain(content.get("Config")).get("distiller"))
    elif isinstance(content.get("model"), dict):  # fairseq; args and Microsoft's cfg are flat
        weights = content["model"]
        settings = plain(content.get("cfg")) or plain(content.get("args"))
        model = plain(settings.get("model")) or settings
        settings = plain(model.get("w2v_args")) or settings  # pre-training, if fine-tuned
        model = plain(settings.get("model")) or settings
        settings = model | plain(settings.get("task"))
    else:
        weights, settings = content, {}
    weights = {str(name): x for name, x in plain(weights).items() if torch.is_tensor(x)}
    if not settings:  # transformers has files of them, torchaudio none
        for name in ("processor_config.json", "preprocessor_config.json", "config.json"):
            read = checkpoint.read_json(os.path.join(os.path.dirname(path), name))
            for part in ("feature_extractor", "encoder"):  # transformers 5, SpeechEncoderDecoder
                read = plain(read.get(part)) or read
            settings |= read
        if settings.get("model_type") == "data2vec-audio":
            settings["do_stable_layer_norm"] = False
    text = settings.get("conv_feature_layers") or settings.get("extractor_conv_feature_layers")
    if isinstance(text, str):  # such as "[(512,10,5)] + [(512,3,2)] * 4"
        strides = settings["conv_stride"] = []
        for group, times in re.findall(r"\[(.*?)\](?:\s*\*\s*(\d+))?", text):
            strides += [int(x) for x in re.findall(r"(\d+)\s*\)", group)] * int(times or 1)
    for name, weight in weights.items():
        if "weight" in name and weight.dtype not in DTYPES.values():
            dtype = str(weight.dtype).removeprefix("torch.")
            raise ValueError(f"{path}: {name}: the dtype {dtype} is not read")
    return weights, settings


def read_file(path):
    """The content of a file of torch.save or safetensors; raises ValueError if it is damaged."""
    with open(path, "rb") as file:
        start = file.read(9)
    if start[8:] == b"{":  # safetensors: 8 bytes of length, then a JSON header
        return read_safetensors(path)
    classes = []
    with contextlib.suppress(Exception), open(path, "rb") as file:  # checkpoint.load reports damage
        if zipfile.is_zipfile(path):
            classes = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        else:  # before torch 1.6: pickles of magic number, protocol, system and content
            steps = (step for _ in range(4) for step in pickletools.genops(file))
            classes = [name.replace(" ", ".") for op, name, _ in steps if op.name == "GLOBAL"]
            classes = [name.replace("__builtin__", "builtins") for name in classes]
    classes = [(Placeholder, name) for name in classes if PLACEHOLDERS.match(name)]
    try:
        with torch.serialization.safe_globals(classes):
            return checkpoint.load(path, mmap=zipfile.is_zipfile(path))
    except ValueError as error:
        code = re.search(r"GLOBAL ([\w.]+)", str(error.__cause__))
        if code:
            raise ValueError(f"{path}: refused, it would run {code[1]}") from None
        raise


def read_safetensors(path):
    """Format: 8 bytes of header length, a JSON header, the bytes of the tensors."""
    weights, unread = {}, []
    try:
        with open(path, "rb") as file:
            size, file_size = int.from_bytes(file.read(8), "little"), os.path.getsize(path)
            header = json.loads(file.read(min(size, file_size)))
            content = bytearray(file_size - file.tell())
            body = memoryview(content)[: file.readinto(content)]  # its slices are no copies
        for name, entry in header.items():
            if entry.get("dtype") in DTYPES:
                data = body[slice(*entry["data_offsets"])]
                weight = torch.frombuffer(data, dtype=DTYPES[entry["dtype"]])
                weights[name] = weight.reshape(entry["shape"])
            elif "weight" in name:
                unread.append(f"{name}: the dtype {entry['dtype']} is not read")
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path}: damaged or truncated; download it again ({error})") from None
    if unread:
        raise ValueError(f"{path}: {unread[0]}")
    return weights


def download(url):
    """Path of the file in torch.hub's folder, downloaded by one process. Raises OSError."""
    folder = os.path.join(torch.hub.get_dir(), "checkpoints")
    path = os.path.join(folder, os.path.basename(url))
    if os.path.exists(path):
        return path
    socket.setdefaulttimeout(60)
    try:
        os.makedirs(folder, exist_ok=True)
        with FileLock(f"{path}.lock"), tempfile.TemporaryDirectory(dir=folder) as partial:
            if not os.path.exists(path):  # not downloaded by another process meanwhile
                torch.hub.download_url_to_file(url, f"{partial}/file")
                read_file(f"{partial}/file")  # torch.hub does not detect a truncated download
                os.replace(f"{partial}/file", path)
    except (OSError, ValueError) as error:
        remedy = "try again, or set TORCH_HOME to another folder"
        raise OSError(f"{url}: not downloaded to {folder} ({error}); {remedy}") from None
    finally:
        socket.setdefaulttimeout(None)
    return path
