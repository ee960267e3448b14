"""Frozen teachers: the network that HuBERT, WavLM and the student share, and a loader for every official checkpoint form.

Works alone, with nothing but torch:

    teacher = load_teacher("hubert")                     # or a path
    states = teacher(waveforms, layers=[4, 8, 12])       # three tensors (batch, frames, dim)

Papers: HuBERT arXiv:2106.07447, WavLM arXiv:2110.13900; RobustHuBERT is the one that arXiv:2302.12757 distils.
"""

import contextlib
import ctypes
import dataclasses
import http.client
import json
import math
import os
import pickletools
import re
import sys
import time
import urllib.request
import warnings
import zipfile

import torch
import torch.nn.functional as F
from torch import nn

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


# ---------------------------------------------------------------- the network


@dataclasses.dataclass
class EncoderConfig:
    """Sizes of a SpeechEncoder. The defaults are HuBERT Base.

    conv_layers: (channels, kernel, stride) of each convolution, in samples of the layer below.
    conv_norm: "group" normalises each channel over time after the first convolution (Base),
        "layer" normalises over channels after every convolution (Large).
    pre_norm: LayerNorm before (Large) or after (Base) attention and feed-forward.
    relative_buckets: 0, or the number of WavLM's relative position buckets (320).
    normalize: the network was trained on waveforms of zero mean and unit variance.
    weight_norm: keep the positional convolution's weight normalisation (a student in training).
    dropout: of hidden states, attention and feed-forward, while training.
    conv_gradient_scale: factor on the gradient that reaches the convolutions (DistilHuBERT: 0.1).
    """

    conv_layers: tuple = ((512, 10, 5),) + ((512, 3, 2),) * 4 + ((512, 2, 2),) * 2
    conv_norm: str = "group"
    conv_bias: bool = False
    projection: bool = True
    dim: int = 768
    ffn_dim: int = 3072
    heads: int = 12
    layers: int = 12
    pre_norm: bool = False
    pos_kernel: int = 128
    pos_groups: int = 16
    relative_buckets: int = 0
    relative_distance: int = 800
    relative_gate: bool = True
    normalize: bool = False
    weight_norm: bool = False
    dropout: float = 0.0
    conv_gradient_scale: float = 1.0

    def __post_init__(self):
        self.conv_layers = tuple(tuple(layer) for layer in self.conv_layers)


class SpeechEncoder(nn.Module):
    """Waveforms to hidden states: convolutions, a projection, a positional convolution, Transformer layers.

    HuBERT, WavLM (with `relative_buckets`) and the student are this network at their own sizes.
    Names follow bshall/hubert; the computation follows fairseq's HuBERT and Microsoft's WavLM,
    except that padding never leaks (see `forward`).
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.feature_extractor = FeatureExtractor(config)
        self.feature_projection = FeatureProjection(config)
        self.positional_embedding = PositionalEmbedding(config)
        self.norm = nn.LayerNorm(config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(TransformerLayer(config) for _ in range(config.layers))
        if config.relative_buckets:
            self.relative_position = nn.Embedding(config.relative_buckets, config.heads)

    def frames(self, samples):
        """Number of frames that `samples` (int or integer tensor, at 16 kHz) give; 0 below 400 samples at Base's sizes.

        An utterance's frames are those whose receptive field lies wholly inside it.
        """
        for _, kernel, stride in self.config.conv_layers:
            samples = (samples - kernel) // stride + 1
        return samples.clamp(min=0) if torch.is_tensor(samples) else max(samples, 0)

    def forward(self, waveforms, lengths=None, layers=None):
        """Hidden states of the layers asked for; computing stops at the highest of them.

        waveforms: (batch, samples) at 16 kHz, in -1..1.
        lengths: samples of each utterance, (batch,) tensor or list, for a padded batch; None: nothing is padded
            and no mask is built. With lengths an utterance's states are those it has alone (official code
            leaks: its first GroupNorm and its positional convolution see the padding); beyond its end they are 0.
        layers: which hidden states, in this order. 0 is the input of layer 1, None means 0..N. With pre_norm
            (Large) state N is taken after the final LayerNorm, as fairseq and transformers give it.
        Returns a list of (batch, frames, dim).
        Raises ValueError for a layer that does not exist, for lengths that do not fit the batch, and for an
        utterance too short to give one frame.
        """
        config = self.config
        layers = list(range(config.layers + 1)) if layers is None else list(layers)
        if any(not 0 <= layer <= config.layers for layer in layers):
            raise ValueError(f"layers {layers}: this encoder has hidden states 0 to {config.layers}")
        if waveforms.dim() != 2 or self.frames(waveforms.shape[1]) < 1:
            shape = tuple(waveforms.shape)
            raise ValueError(f"waveforms of shape {shape}: not (batch, samples) with at least one frame's samples")
        if lengths is not None:
            lengths = torch.as_tensor(lengths, device=waveforms.device)
            if lengths.shape != waveforms.shape[:1] or (lengths > waveforms.shape[1]).any():
                raise ValueError(f"lengths {lengths.tolist()} do not fit waveforms of shape {tuple(waveforms.shape)}")
            if (self.frames(lengths) < 1).any():
                raise ValueError(f"lengths {lengths.tolist()}: an utterance is too short for one frame")
            waveforms = waveforms.masked_fill(~_valid(lengths, waveforms.shape[1]), 0)

        if config.normalize:
            waveforms = _normalize(waveforms, lengths)
        x = self.feature_extractor(waveforms, lengths)
        if config.conv_gradient_scale != 1 and x.requires_grad:
            x = ScaleGradient.apply(x, config.conv_gradient_scale)
        x = self.feature_projection(x)

        valid = attention_mask = bias = None
        if lengths is not None:
            valid = _valid(self.frames(lengths), x.shape[1])[:, :, None]
            # The positional convolution must see past an utterance's end what it sees past the batch's: zeros.
            x = x.masked_fill(~valid, 0)
            attention_mask = valid[:, None, None, :, 0]
        x = x + self.positional_embedding(x)
        if not config.pre_norm:
            x = self.norm(x)
        x = self.dropout(x)

        if config.relative_buckets:
            bias = self.position_bias(x.shape[1])
        states = {0: x}
        for number, layer in enumerate(self.layers[: max(layers, default=0)], start=1):
            x = layer(x, attention_mask, bias)
            if number in layers:
                states[number] = x
        if config.pre_norm and config.layers in layers:
            states[config.layers] = self.norm(x)
        if valid is not None:
            states = {number: state.masked_fill(~valid, 0) for number, state in states.items()}
        return [states[layer] for layer in layers]

    def position_bias(self, frames):
        """WavLM's relative position bias, (heads, query frames, key frames), the same for every layer before its gate.

        Distances fall into buckets: exact when small, wider as a logarithm grows.
        Source: arXiv:2110.13900; compute_bias in Microsoft's wavlm/modules.py.
        """
        device = self.relative_position.weight.device
        buckets, distance = self.config.relative_buckets // 2, torch.arange(1 - frames, frames, device=device)
        exact, far = buckets // 2, distance.abs().clamp(min=1).float()
        far = torch.log(far / exact) / math.log(self.config.relative_distance / exact) * (buckets - exact)
        far = (far.long() + exact).clamp(max=buckets - 1)
        bucket = torch.where(distance.abs() < exact, distance.abs(), far) + (distance > 0) * buckets
        by_distance = self.relative_position(bucket).t()  # one value for each key - query, -(frames-1)..frames-1
        position = torch.arange(frames, device=device)
        return by_distance[:, position[None, :] - position[:, None] + frames - 1]


class FeatureExtractor(nn.Module):
    """The convolutions: (batch, samples) to (batch, frames, channels), one frame every 320 samples at Base's sizes."""

    def __init__(self, config):
        super().__init__()
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        below = 1
        for i, (channels, kernel, stride) in enumerate(config.conv_layers):
            self.convs.append(nn.Conv1d(below, channels, kernel, stride, bias=config.conv_bias))
            nn.init.kaiming_normal_(self.convs[-1].weight)
            if config.conv_norm == "layer":
                self.norms.append(nn.LayerNorm(channels))
            elif i == 0:
                self.norms.append(nn.GroupNorm(channels, channels))
            else:
                self.norms.append(nn.Identity())
            below = channels

    def forward(self, waveforms, lengths=None):
        x = waveforms.unsqueeze(1)
        for conv, norm in zip(self.convs, self.norms):
            x = conv(x)
            if lengths is not None:
                lengths = (lengths - conv.kernel_size[0]) // conv.stride[0] + 1
            if isinstance(norm, nn.LayerNorm):
                x = norm(x.transpose(1, 2)).transpose(1, 2)
            elif isinstance(norm, nn.GroupNorm) and lengths is not None:
                # The one statistic over time: taken over an utterance's own frames only.
                x = _normalize(x, lengths, norm.eps) * norm.weight[:, None] + norm.bias[:, None]
            else:
                x = norm(x)
            x = F.gelu(x)
        return x.transpose(1, 2)


class FeatureProjection(nn.Module):
    """LayerNorm, then Linear from the convolutions' channels to the Transformer's width."""

    def __init__(self, config):
        super().__init__()
        channels = config.conv_layers[-1][0]
        self.norm = nn.LayerNorm(channels)
        # fairseq leaves the projection out where the widths agree.
        self.projection = nn.Linear(channels, config.dim) if config.projection else nn.Identity()
        self.apply(_init_linear)

    def forward(self, x):
        return self.projection(self.norm(x))


class PositionalEmbedding(nn.Module):
    """A grouped convolution over time whose output is added to its input: (batch, frames, dim) to the same."""

    def __init__(self, config):
        super().__init__()
        kernel = config.pos_kernel
        self.conv = nn.Conv1d(config.dim, config.dim, kernel, padding=kernel // 2, groups=config.pos_groups)
        nn.init.normal_(self.conv.weight, std=math.sqrt(4 / (kernel * config.dim)))
        nn.init.zeros_(self.conv.bias)
        if config.weight_norm:
            nn.utils.parametrizations.weight_norm(self.conv, dim=2)

    def forward(self, x):
        frames = x.shape[1]
        x = self.conv(x.transpose(1, 2))[..., :frames]  # an even kernel gives one frame too many
        return F.gelu(x).transpose(1, 2)


class TransformerLayer(nn.Module):
    """Self-attention and feed-forward: (batch, frames, dim) to the same."""

    def __init__(self, config):
        super().__init__()
        self.pre_norm = config.pre_norm
        self.attention = SelfAttention(config)
        self.attention_norm = nn.LayerNorm(config.dim)
        self.ffn_in = nn.Linear(config.dim, config.ffn_dim)
        self.ffn_out = nn.Linear(config.ffn_dim, config.dim)
        self.ffn_norm = nn.LayerNorm(config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.apply(_init_linear)

    def forward(self, x, mask=None, bias=None):
        if self.pre_norm:
            x = x + self.dropout(self.attention(self.attention_norm(x), mask, bias))
            return x + self.feed_forward(self.ffn_norm(x))
        x = self.attention_norm(x + self.dropout(self.attention(x, mask, bias)))
        return self.ffn_norm(x + self.feed_forward(x))

    def feed_forward(self, x):
        return self.dropout(self.ffn_out(self.dropout(F.gelu(self.ffn_in(x)))))


class SelfAttention(nn.Module):
    """Multi-head attention; with a relative position bias, gated by each frame itself as in WavLM (arXiv:2110.13900)."""

    def __init__(self, config):
        super().__init__()
        self.heads, self.dropout = config.heads, config.dropout
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.out = nn.Linear(config.dim, config.dim)
        self.gated = bool(config.relative_buckets and config.relative_gate)
        if self.gated:
            self.gate = nn.Linear(config.dim // config.heads, 8)
            self.gate_scale = nn.Parameter(torch.ones(1, config.heads, 1, 1))

    def forward(self, x, mask=None, bias=None):
        """x: (batch, frames, dim); mask: (batch, 1, 1, frames), True where a key counts; bias: (heads, frames, frames)."""
        batch, frames, dim = x.shape
        q, k, v = self.qkv(x).view(batch, frames, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if bias is not None:
            if self.gated:
                bias = self.gates(x) * bias
            bias = bias.to(q.dtype)
            mask = bias if mask is None else bias.masked_fill(~mask, -math.inf)
        dropout = self.dropout if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        return self.out(x.transpose(1, 2).reshape(batch, frames, dim))

    def gates(self, x):
        """How much each frame heeds the position bias: (batch, heads, frames, 1)."""
        x = x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)
        update, reset = self.gate(x).view(*x.shape[:3], 2, 4).sum(-1).sigmoid().chunk(2, dim=-1)
        return update * (reset * self.gate_scale - 1) + 2


class ScaleGradient(torch.autograd.Function):
    """Identity forward, gradient times `scale` backward."""

    @staticmethod
    def forward(context, x, scale):
        context.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(context, gradient):
        return gradient * context.scale, None


def _init_linear(module):
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def _valid(lengths, longest):
    """(batch, longest), True within each utterance."""
    return torch.arange(longest, device=lengths.device) < lengths[:, None]


def _normalize(x, lengths=None, eps=1e-5):
    """Zero mean and unit variance over the last dimension, in float32, over the first `lengths` of it where given."""
    x = x.float()
    if lengths is None:
        return F.layer_norm(x, x.shape[-1:], eps=eps)
    shape = (-1,) + (1,) * (x.dim() - 1)
    outside = (~_valid(lengths, x.shape[-1])).view(x.shape[0], *shape[2:], x.shape[-1])
    count = lengths.view(shape)
    x = x.masked_fill(outside, 0)
    x = (x - x.sum(-1, keepdim=True) / count).masked_fill(outside, 0)
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) / count + eps)


def native_bf16(device):
    """Whether the device computes in bf16 rather than emulating it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = torch.cpu.get_capabilities()
    return any(able.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))


def reuse_memory():
    """For a program that computes on a CPU: memory given back is kept for the next tensor.

    glibc otherwise asks the system for every tensor over 32 MB anew, and clearing its pages took a fifth of a training
    step of Base teachers. Does nothing where the C library is another one.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: large tensors from the heap too
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never give the heap's end back


# ---------------------------------------------------------------- checkpoints

# Each row: our name, the name in fairseq (s3prl and Microsoft's WavLM too), the name in transformers.
# torchaudio's names are transformers' with other prefixes. {i} is a layer counted from 0.
NAMES = [
    ("feature_extractor.convs.{i}", "feature_extractor.conv_layers.{i}.0", "feature_extractor.conv_layers.{i}.conv"),
    ("feature_extractor.norms.{i}", "feature_extractor.conv_layers.{i}.2.1", "feature_extractor.conv_layers.{i}.layer_norm"),
    ("feature_extractor.norms.{i}", "feature_extractor.conv_layers.{i}.2", "feature_extractor.conv_layers.{i}.layer_norm"),
    ("feature_projection.norm", "layer_norm", "feature_projection.layer_norm"),
    ("feature_projection.projection", "post_extract_proj", "feature_projection.projection"),
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

# Weights of pre-training or of a task that are no part of the encoder.
NOT_ENCODER = re.compile(
    r"mask_emb|masked_spec_embed|mask_generator\.|logit_generator\.|label_embs|final_proj\.|"
    r"domain|discriminator|(^|w2v_encoder\.)proj\.|lm_head\.|aux\."
)

# What a fairseq checkpoint may mention beside tensors: each becomes an inert placeholder, never the class itself.
INERT = re.compile(
    r"(fairseq|fairseq_cli|omegaconf|examples|typing|pathlib)\.|argparse\.Namespace$|_codecs\.encode$|"
    r"numpy\.(_?core\.multiarray\.(scalar|_reconstruct)|dtype|ndarray|dtypes\.\w+)$"
)


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


def download(url):
    """The file at `url`, in torch.hub's cache: fetched by one process a machine while the others wait.

    A broken download leaves no file. Returns the path. Raises OSError with one line.
    """
    folder = os.path.join(torch.hub.get_dir(), "checkpoints")
    path = os.path.join(folder, url.rsplit("/", 1)[-1])
    if os.path.exists(path):
        return path
    os.makedirs(folder, exist_ok=True)
    with _locked(path + ".lock"):
        if os.path.exists(path):  # another process fetched it while this one waited
            return path
        partial = path + ".partial"
        try:
            with urllib.request.urlopen(url, timeout=60) as response, open(partial, "wb") as file:
                total, done, shown = int(response.headers.get("Content-Length") or 0), 0, 0.0
                while block := response.read(1 << 20):
                    file.write(block)
                    done += len(block)
                    if time.monotonic() - shown > 0.5 or done == total:
                        shown = time.monotonic()
                        _progress(os.path.basename(path), done, total)
            print(file=sys.stderr)
            if done < total:
                raise OSError(f"the connection broke after {done:,} of {total:,} bytes")
            with open(partial, "rb") as file:
                start = file.read(512)
            if not start.startswith((b"PK", b"\x80")) or (start.startswith(b"PK") and not zipfile.is_zipfile(partial)):
                raise OSError("what came is no checkpoint")
            os.replace(partial, path)
        except (OSError, http.client.HTTPException) as error:
            what = f"not downloaded ({error}); try again, or fetch it by hand and give its path"
            raise OSError(f"{url}: {what}") from error
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.remove(partial)
    return path


def _progress(name, done, total):
    bar = f" |{'#' * (30 * done // total):30}| {100 * done // total:3}%" if total else ""
    print(f"\r{name}{bar} {done / 1e6:,.0f} MB", end="", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _locked(path):
    """One process at a time; the lock goes with its holder, however that ends."""
    import fcntl  # not on Windows, where the rest of this file works

    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _read_checkpoint(path):
    """(weights by name, settings of the model, settings of the task), as the file has them; {} where it has none."""
    if os.path.isdir(path):
        for name in ("model.safetensors", "pytorch_model.bin"):
            if os.path.exists(os.path.join(path, name)) and os.path.exists(os.path.join(path, "config.json")):
                return _read_checkpoint(os.path.join(path, name))
        raise ValueError(f"{path}: a folder needs config.json with model.safetensors or pytorch_model.bin")
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: no such teacher; give a checkpoint's path or one of {', '.join(TEACHERS)}")

    content = _read_file(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not a HuBERT or WavLM checkpoint")
    if "model_weight" in content:  # s3prl
        return content["model_weight"], _plain(content.get("model_cfg")), _plain(content.get("task_cfg"))
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
        with open(path, encoding="utf-8") as file:
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


def load_safely(path, mmap=False):
    """What a file of torch.save holds, tensors and plain types alone: no code in it is run.

    Raises nearly anything where it is damaged or holds something else, a changed byte of a zip (torch 1.6 and later)
    included, which torch.load does not look for.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()
        if damaged:
            raise ValueError(f"{damaged} does not match its checksum")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's remarks on the formats of old files
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


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


def _rename(path, weights):
    """(form, weights under our names), the weight normalisation folded. A weight without a name of ours keeps its own."""
    if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights):
        raise ValueError(f"{path}: not a HuBERT or WavLM checkpoint")
    weights = {name: tensor for name, tensor in weights.items() if torch.is_tensor(tensor)}
    for prefix in ("hubert.", "wavlm.", "wav2vec2.", "w2v_encoder.w2v_model."):
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

    def either(value, seen):
        return seen if value is None else value

    for name in ("activation_fn", "hidden_act", "feat_extract_activation"):
        if said(str, name) not in (None, "gelu"):
            raise ValueError(f"{path}: {name} is {said(str, name)}; only gelu is known here")

    conv_layers = _conv_layers(path, weights, settings, number("feature_extractor.convs"))
    norm = said(str, "extractor_mode", "feat_extract_norm")
    per_layer = norm in ("layer_norm", "layer") if norm else "feature_extractor.norms.1.weight" in weights
    dim = either(said(int, "encoder_embed_dim", "hidden_size"), shape("norm.weight", 0)[0])
    pos_shape = shape("positional_embedding.conv.weight", dim, 1, 128)
    pos_groups = either(said(int, "conv_pos_groups", "num_conv_pos_embedding_groups"), pos_shape[0] // pos_shape[1])
    gated = any(".attention.gate" in name for name in weights)
    relative = either(said(bool, "relative_position_embedding"), gated or settings.get("model_type") == "wavlm")
    buckets, bias_heads = shape("relative_position.weight", 320, None)
    buckets = either(said(int, "num_buckets"), buckets) if relative else 0
    heads = either(said(int, "encoder_attention_heads", "num_attention_heads"), bias_heads)
    if heads is None:
        heads = dim // 64 if dim in (768, 1024, 1280) else pos_groups  # the published sizes have 64 dims a head
        if dim not in (768, 1024, 1280):
            _note(f"{path}: no configuration; taking {heads} attention heads (if wrong, put its config.json beside it)")
    if not dim or not heads or dim % heads:
        raise ValueError(f"{path}: {dim} dims do not divide over {heads} attention heads; not a whole HuBERT or WavLM")
    # Tensors do not show these two. The published models agree: Large is pre-norm and normalised, Base neither.
    pre_norm = either(said(bool, "layer_norm_first", "do_stable_layer_norm"), per_layer)
    normalize = either(said(bool, "normalize", "do_normalize"), per_layer)
    return EncoderConfig(
        conv_layers=conv_layers,
        conv_norm="layer" if per_layer else "group",
        conv_bias=either(said(bool, "conv_bias"), "feature_extractor.convs.0.bias" in weights),
        projection="feature_projection.projection.weight" in weights or conv_layers[-1][0] != dim,
        dim=dim,
        ffn_dim=either(said(int, "encoder_ffn_embed_dim", "intermediate_size"), shape("layers.0.ffn_in.weight", 0)[0]),
        heads=heads,
        layers=either(said(int, "encoder_layers", "num_hidden_layers"), number("layers")),
        pre_norm=pre_norm,
        pos_kernel=either(said(int, "conv_pos", "num_conv_pos_embeddings"), pos_shape[2]),
        pos_groups=pos_groups,
        relative_buckets=buckets,
        relative_distance=either(said(int, "max_distance", "max_bucket_distance"), 800),
        relative_gate=either(said(bool, "gru_rel_pos"), gated or not relative),
        normalize=normalize,
    )


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
        parts = _parts(name)
        theirs = [_official_name(part, form, encoder.config) for part in parts]
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
    if unknown:
        more = ", ..." if len(unknown) > 5 else ""
        _note(f"{path}: passed over {len(unknown)} weights unknown to the encoder: {', '.join(unknown[:5])}{more}")


def _parts(name):
    """The official parameters that one of ours is made of: queries, keys and values are one Linear here, three there."""
    return [name.replace(".qkv.", f".{part}.") for part in "qkv"] if ".qkv." in name else [name]


def _official_name(name, form, config):
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


def official_state_dict(encoder, form):
    """The encoder's weights under the names of "fairseq" (Microsoft's WavLM too) or "transformers".

    The positional convolution comes weight-normalised (`weight_g`, `weight_v`), as both expect it.
    """
    weights = {}
    for name, tensor in encoder.state_dict().items():
        if name.startswith("positional_embedding.conv.") and "weight" in name:
            continue
        parts = _parts(name)
        for part, piece in zip(parts, tensor.detach().float().cpu().chunk(len(parts))):
            weights[_official_name(part, form, encoder.config)] = piece.clone()
    conv = _official_name("positional_embedding.conv", form, encoder.config)
    v = encoder.positional_embedding.conv.weight.detach().float().cpu().clone()
    weights[conv + ".weight_g"], weights[conv + ".weight_v"] = v.norm(dim=(0, 1), keepdim=True), v
    return weights


def save_official(encoder, path, form):
    """Writes an encoder as a checkpoint in the form of "fairseq", "s3prl" or "microsoft" (WavLM), as `load_teacher` reads it."""
    c = encoder.config
    settings = {
        "extractor_mode": "layer_norm" if c.conv_norm == "layer" else "default",
        "conv_feature_layers": str(list(c.conv_layers)),
        "conv_bias": c.conv_bias,
        "encoder_embed_dim": c.dim,
        "encoder_ffn_embed_dim": c.ffn_dim,
        "encoder_attention_heads": c.heads,
        "encoder_layers": c.layers,
        "layer_norm_first": c.pre_norm,
        "conv_pos": c.pos_kernel,
        "conv_pos_groups": c.pos_groups,
        "activation_fn": "gelu",
    }
    task, weights = {"normalize": c.normalize, "sample_rate": 16000}, official_state_dict(encoder, "fairseq")
    if form == "fairseq":
        content = {"args": None, "cfg": {"model": settings, "task": task}, "model": weights}
    elif form == "s3prl":
        content = {"task_cfg": task, "model_cfg": settings, "model_weight": weights, "dictionaries_symbols": []}
    else:
        relative = {
            "relative_position_embedding": c.relative_buckets > 0,
            "num_buckets": c.relative_buckets,
            "max_distance": c.relative_distance,
            "gru_rel_pos": c.relative_gate,
        }
        content = {"cfg": {**settings, **relative, "normalize": c.normalize}, "model": weights}
    torch.save(content, path)


def _note(line):
    if os.environ.get("RANK", "0") == "0":  # once under torchrun
        print(line, file=sys.stderr)
