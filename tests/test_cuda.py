"""The CUDA path without a GPU: networks, aggregations, loss and probes on fake CUDA tensors.

Nothing is computed, but a tensor on the wrong device raises, and so does a sync: a value that
the host reads from the device.
"""

import contextlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import aggregate
from encoder import EncoderConfig, SpeechEncoder
from evaluate_pr import PhonemeRecognition
from losses import distillation_loss
from student import Student, initialise, student_config
from superb import asr, probe
from superb.sid import Classification

if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11):
    pytest.skip("before torch 2.11, fake CUDA tensors need a GPU", allow_module_level=True)

LARGE = {"conv_norm": "layer", "dim": 1024, "ffn_dim": 4096, "attention_heads": 16}
LARGE |= {"pre_norm": True, "normalize": True}
SIZES = {
    "hubert": EncoderConfig(layers=3),
    "wavlm": EncoderConfig(layers=3, relative_buckets=320),
    "hubert large": EncoderConfig(layers=3, conv_bias=True, **LARGE),
    "wavlm large": EncoderConfig(layers=3, relative_buckets=320, **LARGE),
    "data2vec": EncoderConfig(layers=3, conv_norm="layer", pos_depth=5, pos_kernel=19),
}
LENGTHS = [48000, 31234, 16000]


def on_host(function):
    """A function whose tensors on the host are real, since the host reads them."""

    def call(*arguments, **settings):
        if str(settings.get("device", "cpu")) != "cpu":
            return function(*arguments, **settings)
        with unset_fake_temporarily():
            made = function(*arguments, **settings)
            return made if made.dim() else made.item()

    return call


@pytest.fixture
def cuda(monkeypatch):
    """A device whose tensors are fake within the test."""
    for name in ("rand", "randint"):
        monkeypatch.setattr(torch, name, on_host(getattr(torch, name)))
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield torch.device("cuda", 0)


@contextlib.contextmanager
def autocast(enabled):
    """torch.autocast("cuda"), which is disabled without a GPU."""
    torch.set_autocast_enabled("cuda", enabled)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", False)


def make(device, network, dtype=torch.float32):
    """A network on the device in a precision, from a function that makes it."""
    torch.set_default_dtype(dtype)
    try:
        with device:
            return network()
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_sync_and_a_wrong_device_raise_on_fake_tensors(cuda):
    with pytest.raises(Exception, match="_local_scalar_dense"):
        bool(torch.ones(3, device=cuda).sum() > 0)
    with pytest.raises(RuntimeError, match="device"):
        torch.ones(3, device=cuda) + torch.ones(3)


# ------------------------------------------------------------------ networks


@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "autocast", "bf16"])
@pytest.mark.parametrize("name", SIZES)
def test_networks_run_on_a_gpu_without_a_sync(cuda, name, precision, is_padded):
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    encoder = make(cuda, lambda: SpeechEncoder(SIZES[name]), dtype)
    lengths = torch.tensor(LENGTHS, device=cuda) if is_padded else None
    with autocast(precision == "autocast"):
        states = encoder(torch.randn(3, 48000, device=cuda), lengths)
    assert [tuple(state.shape) for state in states] == [(3, 149, SIZES[name].dim)] * 4
    assert all(state.device == cuda for state in states)
    if precision == "bf16":
        assert all(state.dtype == torch.bfloat16 for state in states)


def test_compiled_networks_have_one_graph_each_for_all_lengths(monkeypatch):
    monkeypatch.setattr(torch._dynamo.config, "specialize_int", True)  # as train.py does
    sizes = {"conv_layers": ((8, 10, 5),) + ((8, 3, 2),) * 4 + ((8, 2, 2),) * 2, "dim": 16}
    sizes |= {"ffn_dim": 32, "attention_heads": 2, "pos_kernel": 8, "pos_groups": 2}
    teachers = []
    for layers, buckets in [(1, 0), (2, 320)]:
        config = EncoderConfig(**sizes, layers=layers, relative_buckets=buckets)
        teachers.append(SpeechEncoder(config).eval())
    student = Student(student_config(teachers[0].config), [("layer1", 16)]).train()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    for network in [*teachers, student]:
        network.compile(dynamic=True, backend=backend)
    for samples in (6400, 9600, 25600):
        with torch.no_grad():
            states = [teacher(torch.randn(2, samples), layers=[1]) for teacher in teachers]
        student(torch.randn(2, samples))[0].sum().backward()
        assert len(graphs) == len(teachers) + 1
        assert states[1][0].shape == (2, teachers[1].frames(samples), 16)


def attention(cuda, monkeypatch, name, is_padded):
    """(q, k, v, mask) of the first layer, in mixed precision."""
    calls = []

    def record(q, k, v, attn_mask, dropout_p):
        calls.append((q, k, v, attn_mask))
        return torch.empty_like(q)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
    encoder = make(cuda, lambda: SpeechEncoder(SIZES[name]))
    lengths = torch.tensor(LENGTHS, device=cuda) if is_padded else None
    with autocast(True):
        encoder(torch.randn(3, 48000, device=cuda), lengths)
    return calls[0]


@pytest.mark.parametrize("is_padded", [False, True])
def test_flash_attention_is_possible_without_padding(cuda, monkeypatch, capfd, is_padded):
    q, k, v, mask = attention(cuda, monkeypatch, "hubert", is_padded)
    assert (mask is not None) == is_padded
    parameters = torch.backends.cuda.SDPAParams(q, k, v, mask, 0.1, False, False)
    possible = torch.backends.cuda.can_use_flash_attention(parameters, True)
    if torch.cuda.is_available():
        assert possible != is_padded
    else:  # torch prints the reasons against it; the lack of a GPU is the only one without a mask
        reasons = [line for line in capfd.readouterr().err.splitlines() if "Warning" in line]
        assert all("requires a CUDA device" in line or "attn_mask" in line for line in reasons)
        assert any("attn_mask" in line for line in reasons) == is_padded


@pytest.mark.parametrize("is_padded", [False, True])
def test_the_position_bias_fits_the_attention_kernels(cuda, monkeypatch, is_padded):
    q, _, _, mask = attention(cuda, monkeypatch, "wavlm", is_padded)
    assert mask.shape == (3, 12, 149, 149) and mask.stride(-2) % 8 == 0 and mask.stride(-1) == 1
    assert mask.dtype == q.dtype == torch.bfloat16


def test_the_largest_activation_is_the_first_convolution_in_bf16(cuda):
    class Largest(TorchDispatchMode):
        bytes = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            output = function(*args, **(kwargs or {}))
            sizes = [x.nbytes for x in tree_leaves(output) if torch.is_tensor(x)]
            self.bytes = max([self.bytes, *sizes])
            return output

    config = student_config(SIZES["hubert"])
    student = make(cuda, lambda: Student(config, [("layer4", 768)])).train()
    waveforms = torch.randn(2, 48000, device=cuda)
    with Largest() as largest, autocast(True):
        student(waveforms)
    assert largest.bytes == 2 * 512 * ((48000 - 10) // 5 + 1) * 2


# ------------------------------------------------------------------ steps


@pytest.mark.parametrize("agg", aggregate.AGGREGATIONS)
def test_a_training_step_runs_on_a_gpu_without_a_sync(cuda, agg):
    teachers = {
        name: make(cuda, lambda name=name: SpeechEncoder(SIZES[name]), torch.bfloat16)
        for name in ("hubert", "wavlm")
    }
    ensemble = aggregate.Ensemble(teachers, [1, 3], agg)
    student = make(cuda, lambda: Student(student_config(SIZES["hubert"]), ensemble.heads)).train()
    initialise(student, make(cuda, lambda: SpeechEncoder(SIZES["hubert"])))
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, fused=True)
    waveforms = torch.randn(3, 48000, device=cuda)
    targets = ensemble(waveforms)
    with autocast(True):
        predictions = student(waveforms)
    loss, l1, cosine = distillation_loss(predictions, targets)
    assert loss.device == l1.device == cosine.device == cuda
    assert l1.shape == cosine.shape == (len(ensemble.heads),)
    for parameter in student.parameters():
        parameter.grad = torch.zeros_like(parameter)
    norm = torch.nn.utils.clip_grad_norm_(student.parameters(), 5.0)
    assert norm.device == cuda  # train.py reads it, the one sync per step
    optimizer.step()


def fake_ctc(log_probs, targets, frames, lengths, zero_infinity):
    assert log_probs.device == targets.device and log_probs.device.type == "cuda"
    assert frames.device.type == lengths.device.type == "cpu"  # as the CUDA kernel needs them
    return log_probs.mean()


def fake_pack(x, frames, batch_first, enforce_sorted):
    assert frames.device.type == "cpu"  # as packing needs them
    return x


def fake_lstm(lstm, x):
    return x.new_zeros(*x.shape[:2], 2 * lstm.hidden_size), None


TASKS = {
    "pr": PhonemeRecognition({"A": ["AA"], "B": ["B"], "C": ["K"], "D": ["S"], "E": ["Z"]}),
    "asr": asr.SpeechRecognition(64),
    "sid": Classification("speaker identification", ["a", "b", "c", "d"], crop=60),
}


@pytest.mark.parametrize("name", TASKS)
def test_a_probe_runs_on_a_gpu_without_a_sync(cuda, name, monkeypatch):
    task = TASKS[name]
    with unset_fake_temporarily():
        frames = torch.tensor([149, 97, 49])
        labels = [torch.tensor([1, 2, 2]), torch.tensor([3]), torch.tensor([4, 5])]
        if name == "sid":
            labels = [torch.tensor(number) for number in (1, 2, 3)]
    # Neither packing, cuDNN's LSTM nor torch's CTC has fake tensors.
    monkeypatch.setattr(asr, "pack_padded_sequence", fake_pack)
    monkeypatch.setattr(asr, "pad_packed_sequence", lambda x, batch_first: (x, None))
    monkeypatch.setattr(torch.nn.LSTM, "forward", fake_lstm)
    monkeypatch.setattr(torch.nn.functional, "ctc_loss", fake_ctc)
    model = make(cuda, lambda: probe.Probe(4, task.head(768))).train()
    outputs = model(torch.randn(4, 3, 149, 768, device=cuda), frames)
    loss = task.loss(outputs, frames, labels)
    assert outputs.shape[:2] == ((3, 4) if name == "sid" else (3, 149))
    assert outputs.device == loss.device == cuda and loss.shape == ()
