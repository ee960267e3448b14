"""The network that HuBERT, WavLM, wav2vec 2.0, data2vec and the student are: waveforms to every layer's hidden states.

    encoder = SpeechEncoder(EncoderConfig())                       # HuBERT Base's sizes, random weights
    states = encoder(waveforms, lengths, layers=[4, 8, 12])        # three tensors (batch, frames, dim)

Papers: HuBERT arXiv:2106.07447, WavLM arXiv:2110.13900, wav2vec 2.0 arXiv:2006.11477, data2vec arXiv:2202.03555. Names follow bshall/hubert; the computation is that of fairseq's
HuBERT and Microsoft's WavLM, with one departure: padding never leaks. Works alone, with nothing but torch.
"""

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import nn


@dataclasses.dataclass
class EncoderConfig:
    """Sizes of a SpeechEncoder. The defaults are HuBERT Base.

    conv_layers: (channels, kernel, stride) of each convolution, in samples of the layer below.
    conv_norm: "group" normalises each channel over time after the first convolution (Base),
        "layer" normalises over channels after every convolution (Large).
    pre_norm: LayerNorm before (Large) or after (Base) attention and feed-forward.
    projection_norm: LayerNorm before the projection (DistilHuBERT has none).
    pos_depth: 0 for HuBERT's one positional convolution, or how many plain ones with a norm each (data2vec: 5).
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
    projection_norm: bool = True
    pos_depth: int = 0

    def __post_init__(self):
        self.conv_layers = tuple(tuple(layer) for layer in self.conv_layers)


class SpeechEncoder(nn.Module):
    """Waveforms to hidden states: convolutions, a projection, a positional convolution, Transformer layers.

    HuBERT, WavLM (with `relative_buckets`) and the student are this network at their own sizes.
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
        lengths: samples of each utterance, (batch,) tensor or list, for a padded batch. An utterance's states are then
            those it has alone (official code leaks: its first GroupNorm and its positional convolution see the
            padding), and 0 beyond its end. None, or all as long as the batch: nothing is padded, no mask is built.
            A tensor on a GPU is believed: a look at it would make the host wait for the device.
        layers: which hidden states, in this order. 0 is the input of layer 1, None means 0..N. With pre_norm
            (Large) state N is taken after the final LayerNorm, as fairseq and transformers give it.
        Returns a list of (batch, frames, dim), in the precision of the weights (or autocast's).
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
            lengths = self._where_padded(lengths, waveforms)
        if lengths is not None:
            waveforms = waveforms.masked_fill(~_valid(lengths, waveforms.shape[1]), 0)

        if config.normalize:
            waveforms = _normalize(waveforms, lengths)
        x = self.feature_extractor(waveforms.to(self.norm.weight.dtype), lengths)
        if config.conv_gradient_scale != 1 and x.requires_grad:
            x = ScaleGradient.apply(x, config.conv_gradient_scale)
        x = self.feature_projection(x)

        valid = attention_mask = bias = None
        if lengths is not None:
            valid = _valid(self.frames(lengths), x.shape[1])[:, :, None]
            # The positional convolution must see past an utterance's end what it sees past the batch's: zeros.
            x = x.masked_fill(~valid, 0)
            attention_mask = _valid(self.frames(lengths), _eights(x.shape[1]))[:, None, None]
        x = x + self.positional_embedding(x, valid)
        if not config.pre_norm:
            x = self.norm(x)
        x = self.dropout(x)

        if config.relative_buckets:
            bias = self.position_bias(x.shape[1])
        states = {0: x}
        for number, layer in enumerate(self.layers[: max([0, *layers])], start=1):
            x = layer(x, attention_mask, bias)
            if number in layers:
                states[number] = x
        if config.pre_norm and config.layers in layers:
            states[config.layers] = self.norm(x)
        if valid is not None:
            states = {number: state.masked_fill(~valid, 0) for number, state in states.items()}
        return [states[layer] for layer in layers]

    def _where_padded(self, lengths, waveforms):
        """lengths on the waveforms' device, or None where they pad nothing. Raises ValueError where they do not fit."""
        if torch.is_tensor(lengths) and lengths.device.type != "cpu":
            return lengths.to(waveforms.device)
        numbers, (batch, samples) = lengths.tolist() if torch.is_tensor(lengths) else list(lengths), waveforms.shape
        if len(numbers) != batch or max(numbers) > samples:
            raise ValueError(f"lengths {numbers} do not fit waveforms of shape {(batch, samples)}")
        if min(map(self.frames, numbers)) < 1:
            raise ValueError(f"lengths {numbers}: an utterance is too short for one frame")
        return torch.tensor(numbers, device=waveforms.device) if min(numbers) < samples else None

    def position_bias(self, frames):
        """WavLM's relative position bias, (heads, query frames, key frames), the same for every layer before its gate.

        There are keys up to a multiple of eight, of which attention takes its own: a GPU's kernels want rows so long.
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
        position = torch.arange(_eights(frames), device=device).clamp(max=frames - 1)
        return by_distance[:, position[None, :] - position[:frames, None] + frames - 1]


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
                x = (_normalize(x, lengths, norm.eps) * norm.weight[:, None] + norm.bias[:, None]).to(x.dtype)
            elif isinstance(norm, nn.GroupNorm):
                # In the precision at hand: autocast would make float32 of the largest tensor there is.
                with torch.autocast(x.device.type, enabled=False):
                    weight, bias = norm.weight.to(x.dtype), norm.bias.to(x.dtype)
                    x = F.group_norm(x, norm.num_groups, weight, bias, norm.eps)
            else:
                x = norm(x)
            x = F.gelu(x)
        return x.transpose(1, 2)


class FeatureProjection(nn.Module):
    """LayerNorm, then Linear from the convolutions' channels to the Transformer's width."""

    def __init__(self, config):
        super().__init__()
        channels = config.conv_layers[-1][0]
        self.norm = nn.LayerNorm(channels) if config.projection_norm else nn.Identity()
        # fairseq leaves the projection out where the widths agree.
        self.projection = nn.Linear(channels, config.dim) if config.projection else nn.Identity()
        self.apply(_init_linear)

    def forward(self, x):
        return self.projection(self.norm(x))


class PositionalEmbedding(nn.Module):
    """Grouped convolutions over time whose output is added to their input: (batch, frames, dim) to the same.

    HuBERT has one, data2vec several with a LayerNorm without weights each.
    """

    def __init__(self, config):
        super().__init__()
        kernel, self.norms = config.pos_kernel, config.pos_depth > 0
        convs = [
            nn.Conv1d(config.dim, config.dim, kernel, padding=kernel // 2, groups=config.pos_groups)
            for _ in range(max(1, config.pos_depth))
        ]
        for conv in convs:
            nn.init.normal_(conv.weight, std=math.sqrt(4 / (kernel * config.dim)))
            nn.init.zeros_(conv.bias)
        if self.norms:
            self.convs = nn.ModuleList(convs)
        else:
            (self.conv,) = convs
            if config.weight_norm:
                nn.utils.parametrizations.weight_norm(self.conv, dim=2)

    def forward(self, x, valid=None):
        """valid: (batch, frames, 1), True within each utterance, or None where nothing is padded."""
        frames = x.shape[1]
        for conv in self.convs if self.norms else [self.conv]:
            x = conv(x.transpose(1, 2))[..., :frames].transpose(1, 2)  # an even kernel gives one frame too many
            if self.norms:
                x = F.layer_norm(x, x.shape[-1:])
            x = F.gelu(x)
            if valid is not None:  # the next one must see zeros past an utterance's end
                x = x.masked_fill(~valid, 0)
        return x


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
        """x: (batch, frames, dim); mask: (batch, 1, 1, keys), True where a key counts; bias: (heads, frames, keys)."""
        batch, frames, dim = x.shape
        q, k, v = self.qkv(x).view(batch, frames, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if bias is not None:
            bias = bias.to(q.dtype)
            if self.gated:
                bias = self.gates(x).to(q.dtype) * bias
            mask = bias if mask is None else torch.where(mask, bias, -math.inf)
        if mask is not None:
            mask = mask[..., :frames]
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


def _eights(frames):
    return -(-frames // 8) * 8


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
