"""The encoder shared by HuBERT, WavLM, wav2vec 2.0, data2vec, DistilHuBERT and the student.

    encoder = SpeechEncoder(EncoderConfig())                   # HuBERT Base, random weights
    states = encoder(waveforms, lengths, layers=[4, 8, 12])    # three of (batch, frames, dim)

Papers: HuBERT arXiv:2106.07447, WavLM arXiv:2110.13900, wav2vec 2.0 arXiv:2006.11477,
data2vec arXiv:2202.03555, DistilHuBERT arXiv:2110.01900. Module names follow bshall/hubert.
Equal to the official code, except that padding never changes an utterance. Needs torch alone.
"""

import dataclasses
import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

# Added to a waveform's variance: by F.layer_norm in fairseq, s3prl, WavLM and torchaudio, and by
# Wav2Vec2FeatureExtractor.zero_mean_unit_var_norm in transformers.
NORMALIZE_EPS = {"fairseq": 1e-5, "torchaudio": 1e-5, "transformers": 1e-7}


@dataclasses.dataclass
class EncoderConfig:
    """Sizes of a SpeechEncoder. The defaults are HuBERT Base."""

    # (channels, kernel, stride) per convolution
    conv_layers: tuple = ((512, 10, 5),) + ((512, 3, 2),) * 4 + ((512, 2, 2),) * 2
    conv_norm: str = "group"  # GroupNorm after the first convolution; "layer": LayerNorm after each
    conv_bias: bool = False
    projection: bool = True  # from the channels of the last convolution to dim
    projection_norm: bool = True  # LayerNorm before the projection (False in DistilHuBERT)
    dim: int = 768
    ffn_dim: int = 3072
    attention_heads: int = 12
    layers: int = 12
    pre_norm: bool = False  # LayerNorm before attention and feed-forward (Large), else after
    pos_kernel: int = 128
    pos_groups: int = 16
    pos_depth: int = 0  # number of positional convolutions in data2vec's form, 0 for HuBERT's
    relative_buckets: int = 0  # for WavLM's relative positions (320), 0 without
    relative_distance: int = 800  # keys this far or farther share the last bucket
    relative_gate: bool = True
    normalize: bool = False  # waveforms to zero mean and unit variance
    normalize_eps: float = NORMALIZE_EPS["fairseq"]
    weight_norm: bool = False  # of the positional convolution, for training
    dropout: float = 0.0  # of hidden states, attention and feed-forward, in training mode
    conv_gradient_scale: float = 1.0  # of the gradient into the convolutions


class SpeechEncoder(nn.Module):
    """Waveforms to hidden states: convolutions, projection, positions, Transformer layers."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.feature_extractor = FeatureExtractor(config)
        channels = config.conv_layers[-1][0]
        norm = nn.LayerNorm(channels) if config.projection_norm else nn.Identity()
        projection = nn.Linear(channels, config.dim) if config.projection else nn.Identity()
        self.feature_projection = nn.Sequential(OrderedDict(norm=norm, projection=projection))
        self.feature_projection.apply(init_linear)
        self.positional_embedding = PositionalEmbedding(config)
        self.norm = nn.LayerNorm(config.dim)  # before layer 1; with pre_norm, after the last layer
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(TransformerLayer(config) for _ in range(config.layers))
        if config.relative_buckets:
            self.relative_position = nn.Embedding(config.relative_buckets, config.attention_heads)

    def frames(self, samples):
        """Number of frames of `samples`, an int or integer tensor; 0 if too short (Base: 400).

        A frame's receptive field lies within the utterance: convolutions have no padding.
        """
        for _, kernel, stride in self.config.conv_layers:
            samples = (samples - kernel) // stride + 1
        return samples.clamp(min=0) if torch.is_tensor(samples) else max(samples, 0)

    def forward(self, waveforms, lengths=None, layers=None):
        """The requested hidden states; layers above the highest of them are not computed.

        waveforms: (batch, samples) at 16 kHz, in -1..1.
        lengths: (batch,) samples per utterance, a tensor or a list, or None without padding.
            Hidden states equal those of the utterance alone, and are 0 in the padding.
        layers: numbers of hidden states, in any order, or None for all. State 0 is the input of
            layer 1. With pre_norm the last state includes the final LayerNorm.
        Returns a list of (batch, frames, dim).
        Raises ValueError for an unknown layer, wrong shapes, or an utterance below one frame.
        """
        config = self.config
        requested = list(range(config.layers + 1)) if layers is None else layers
        if not all(0 <= number <= config.layers for number in requested):
            raise ValueError(f"layers {requested}: this encoder has states 0 to {config.layers}")
        lengths = self.lengths_of_padded(waveforms, lengths)
        if lengths is not None:
            waveforms = waveforms.masked_fill(padding_mask(lengths, waveforms.shape[1]), 0)
        if config.normalize:
            waveforms = normalize(waveforms[:, None], lengths, config.normalize_eps)[:, 0]

        x = self.feature_extractor(waveforms.to(self.norm.weight.dtype), lengths)
        if config.conv_gradient_scale != 1 and x.requires_grad:
            # The value stays x; the gradient is multiplied by the scale.
            x = torch.lerp(x.detach(), x, config.conv_gradient_scale)
        x = self.feature_projection(x)

        frames = x.shape[1]
        keys = (frames + 7) // 8 * 8  # GPU kernels need masks of 8n keys; SelfAttention slices them
        padding = mask = bias = None
        if lengths is not None:
            frame_lengths = self.frames(lengths)
            padding = padding_mask(frame_lengths, frames)[:, :, None]
            mask = ~padding_mask(frame_lengths, keys)[:, None, None]  # True: attended to
        if config.relative_buckets:
            bias = self.position_bias(frames, keys)

        x = x + self.positional_embedding(x, padding)
        if not config.pre_norm:
            x = self.norm(x)
        x = self.dropout(x)
        states = {0: x}
        for number, layer in enumerate(self.layers[: max(requested, default=0)], start=1):
            x = layer(x, mask, bias)
            if number in requested:
                states[number] = x
        if config.pre_norm and config.layers in requested:
            states[config.layers] = self.norm(x)
        if padding is not None:
            states = {number: state.masked_fill(padding, 0) for number, state in states.items()}
        return [states[number] for number in requested]

    def lengths_of_padded(self, waveforms, lengths):
        """The lengths on the waveforms' device, or None if nothing is padded.

        Lengths on a GPU are not checked: a check would force a sync.
        """
        if waveforms.dim() != 2:
            raise ValueError(f"waveforms of shape {tuple(waveforms.shape)}, not (batch, samples)")
        batch, samples = waveforms.shape
        if self.frames(samples) < 1:
            raise ValueError(f"waveforms of {samples} samples are too short for one frame")
        if lengths is None or (torch.is_tensor(lengths) and lengths.device.type != "cpu"):
            return lengths
        lengths = torch.as_tensor(lengths)
        if len(lengths) != batch or lengths.max() > samples or self.frames(lengths).min() < 1:
            expected = f"{batch} lengths of one frame to {samples} samples"
            raise ValueError(f"lengths {lengths.tolist()}: expected {expected}")
        return lengths.to(waveforms.device) if lengths.min() < samples else None

    def position_bias(self, frames, keys):
        """WavLM's relative position bias before its gate, (heads, frames, keys).

        One value per head and bucket; half of the buckets are for keys after the query. Each
        distance below `exact` has a bucket; larger ones share buckets of logarithmic width.
        Source: arXiv:2110.13900; compute_bias in Microsoft's wavlm/modules.py.
        """
        device = self.relative_position.weight.device
        buckets = self.config.relative_buckets // 2
        exact = buckets // 2  # number of distances with a bucket each
        offset = torch.arange(1 - frames, frames, device=device)  # key - query
        distance = offset.abs()
        growth = torch.log(distance.clamp(min=1).float() / exact)
        growth = growth / math.log(self.config.relative_distance / exact)
        log_bucket = (exact + (growth * (buckets - exact)).long()).clamp(max=buckets - 1)
        bucket = torch.where(distance < exact, distance, log_bucket)
        bias = self.relative_position(bucket + (offset > 0) * buckets).t()  # (heads, offsets)
        query = torch.arange(frames, device=device)[:, None]
        key = torch.arange(keys, device=device).clamp(max=frames - 1)
        return bias[:, key - query + frames - 1]  # column 0 is the offset 1 - frames


class FeatureExtractor(nn.Module):
    """Convolutions: (batch, samples) to (batch, frames, channels); Base: 320 samples per frame."""

    def __init__(self, config):
        super().__init__()
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        inputs = 1
        for i, (channels, kernel, stride) in enumerate(config.conv_layers):
            self.convs.append(nn.Conv1d(inputs, channels, kernel, stride, bias=config.conv_bias))
            nn.init.kaiming_normal_(self.convs[i].weight)
            if config.conv_norm == "layer":
                self.norms.append(nn.LayerNorm(channels))
            else:
                self.norms.append(nn.Identity() if i else nn.GroupNorm(channels, channels))
            inputs = channels

    def forward(self, waveforms, lengths=None):
        x = waveforms[:, None]
        for conv, norm in zip(self.convs, self.norms):
            x = conv(x)
            if lengths is not None:
                lengths = (lengths - conv.kernel_size[0]) // conv.stride[0] + 1
            if isinstance(norm, nn.LayerNorm):
                x = norm(x.transpose(1, 2)).transpose(1, 2)
            elif isinstance(norm, nn.GroupNorm) and lengths is None:
                with torch.autocast(x.device.type, enabled=False):  # would copy x to float32
                    weight, bias = norm.weight.to(x.dtype), norm.bias.to(x.dtype)
                    x = F.group_norm(x, norm.num_groups, weight, bias, norm.eps)
            elif isinstance(norm, nn.GroupNorm):  # over each utterance without its padding
                scaled = normalize(x, lengths, norm.eps) * norm.weight[:, None]
                x = (scaled + norm.bias[:, None]).to(x.dtype)
            x = F.gelu(x)
        return x.transpose(1, 2)


class PositionalEmbedding(nn.Module):
    """Grouped convolutions over time, (batch, frames, dim) to the same; added to their input.

    HuBERT has one, data2vec several, with a LayerNorm without weights after each.
    """

    def __init__(self, config):
        super().__init__()
        self.layer_norm = config.pos_depth > 0
        kernel = config.pos_kernel
        sizes = {"kernel_size": kernel, "padding": kernel // 2, "groups": config.pos_groups}
        convs = [nn.Conv1d(config.dim, config.dim, **sizes) for _ in range(config.pos_depth or 1)]
        for conv in convs:
            nn.init.normal_(conv.weight, std=math.sqrt(4 / (kernel * config.dim)))
            nn.init.zeros_(conv.bias)
        if self.layer_norm:
            self.convs = nn.ModuleList(convs)
        else:
            self.conv = convs[0]
        if config.weight_norm and not self.layer_norm:
            nn.utils.parametrizations.weight_norm(self.conv, dim=2)

    def forward(self, x, padding=None):
        """padding: (batch, frames, 1), True after the end of each utterance, or None."""
        for conv in self.convs if self.layer_norm else [self.conv]:
            if padding is not None:  # zeros, as after an utterance alone
                x = x.masked_fill(padding, 0)
            # An even kernel gives one frame more.
            x = position_conv(conv, x.transpose(1, 2)).transpose(1, 2)[:, : x.shape[1]]
            if self.layer_norm:
                x = F.layer_norm(x, x.shape[-1:])
            x = F.gelu(x)
        return x


def position_conv(conv, x):
    """conv(x); on a CPU, convolutions of under 16 channels per group run in float32.

    In bf16, oneDNN gives wrong values for 2 to 14 of them on CPUs with AMX, seen in torch 2.11.
    """
    if x.device.type != "cpu" or conv.in_channels // conv.groups >= 16:
        return conv(x)
    with torch.autocast("cpu", enabled=False):
        weight, bias = conv.weight.float(), conv.bias.float()
        y = F.conv1d(x.float(), weight, bias, padding=conv.padding, groups=conv.groups)
    return y.to(x.dtype)


class TransformerLayer(nn.Module):
    """Self-attention and feed-forward, (batch, frames, dim) to the same."""

    def __init__(self, config):
        super().__init__()
        self.pre_norm = config.pre_norm
        self.attention = SelfAttention(config)
        self.attention_norm = nn.LayerNorm(config.dim)
        self.ffn_in = nn.Linear(config.dim, config.ffn_dim)
        self.ffn_out = nn.Linear(config.ffn_dim, config.dim)
        self.ffn_norm = nn.LayerNorm(config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.apply(init_linear)

    def forward(self, x, mask=None, bias=None):
        if self.pre_norm:
            x = x + self.dropout(self.attention(self.attention_norm(x), mask, bias))
            return x + self.feed_forward(self.ffn_norm(x))
        x = self.attention_norm(x + self.dropout(self.attention(x, mask, bias)))
        return self.ffn_norm(x + self.feed_forward(x))

    def feed_forward(self, x):
        return self.dropout(self.ffn_out(self.dropout(F.gelu(self.ffn_in(x)))))


class SelfAttention(nn.Module):
    """Multi-head attention, with WavLM's gated relative position bias (arXiv:2110.13900)."""

    def __init__(self, config):
        super().__init__()
        self.heads = config.attention_heads
        self.dropout = config.dropout
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.out = nn.Linear(config.dim, config.dim)
        self.gated = config.relative_buckets > 0 and config.relative_gate
        if self.gated:
            self.gate = nn.Linear(config.dim // config.attention_heads, 8)
            self.gate_scale = nn.Parameter(torch.ones(1, config.attention_heads, 1, 1))

    def forward(self, x, mask=None, bias=None):
        """mask: (batch, 1, 1, keys), False in the padding. bias: (heads, frames, keys)."""
        batch, frames, dim = x.shape
        qkv = self.qkv(x).view(batch, frames, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (batch, heads, frames, dim of a head)
        if bias is not None:
            bias = bias.to(q.dtype)
            if self.gated:
                bias = self.gates(x).to(q.dtype) * bias
            mask = bias if mask is None else torch.where(mask, bias, -math.inf)
        if mask is not None:
            mask = mask[..., :frames]  # a view: its rows stay aligned
        dropout = self.dropout if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        return self.out(x.transpose(1, 2).reshape(batch, frames, dim))

    def gates(self, x):
        """Gate on the position bias per head and frame, (batch, heads, frames, 1).

        Source: forward of MultiheadAttention in Microsoft's wavlm/modules.py.
        """
        x = x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)
        x = self.gate(x).view(*x.shape[:3], 2, 4).sum(-1)
        update, reset = x.sigmoid().chunk(2, dim=-1)
        return update * (reset * self.gate_scale - 1) + 2


def init_linear(module):
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def normalize(x, lengths=None, eps=1e-5):
    """(batch, channels, time) to zero mean and unit variance over time, without padding."""
    x = x.float()
    if lengths is None:
        return F.layer_norm(x, x.shape[-1:], eps=eps)
    padding = padding_mask(lengths, x.shape[-1])[:, None]
    lengths = lengths[:, None, None]
    mean = x.masked_fill(padding, 0).sum(-1, keepdim=True) / lengths
    x = (x - mean).masked_fill(padding, 0)
    variance = x.square().sum(-1, keepdim=True) / lengths
    return x * torch.rsqrt(variance + eps)


def padding_mask(lengths, longest):
    """(batch, longest), True after the end of each utterance."""
    return torch.arange(longest, device=lengths.device) >= lengths[:, None]
