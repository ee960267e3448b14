"""The CUDA path without a GPU: every network, aggregation, loss and head on pretend CUDA tensors.

Nothing is computed, but a tensor on the wrong device, or a value that the host reads from the device, raises.
"""

import processes

import contextlib
import weakref

import pytest
import torch
from conftest import flags_of, on_cpu, random_encoder, write_audio
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import aggregate
import data
import evaluate_asr
import evaluate_er
import evaluate_pr
import evaluate_sid
import probe
import train
from encoder import EncoderConfig, SpeechEncoder
from export import save_official
from losses import distillation_loss
from student import Student, initialise, student_config

SIZES = {
    "hubert": EncoderConfig(layers=3),
    "wavlm": EncoderConfig(layers=3, relative_buckets=320),
    "hubert large": EncoderConfig(
        conv_norm="layer", conv_bias=True, dim=1024, ffn_dim=4096, heads=16, layers=3, pre_norm=True, normalize=True
    ),
    "wavlm large": EncoderConfig(
        conv_norm="layer",
        dim=1024,
        ffn_dim=4096,
        heads=16,
        layers=3,
        pre_norm=True,
        normalize=True,
        relative_buckets=320,
    ),
    "data2vec": EncoderConfig(conv_norm="layer", layers=3, pos_depth=5, pos_kernel=19, normalize=True),
}
LENGTHS = [48000, 31234, 16000]


@pytest.fixture
def cuda():
    """Within the test, tensors on the device that it gives are pretended."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield torch.device("cuda", 0)


@contextlib.contextmanager
def autocast(on):
    """torch.autocast("cuda") turns itself off where there is no GPU."""
    torch.set_autocast_enabled("cuda", on)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", False)


def on(device, network, dtype=torch.float32):
    """A network whose weights lie on the device in a precision."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return network()
    finally:
        torch.set_default_dtype(before)


def test_a_value_that_the_host_reads_raises_here(cuda):
    with pytest.raises(Exception, match="_local_scalar_dense"):
        bool(torch.ones(3, device=cuda).sum() > 0)
    with pytest.raises(RuntimeError, match="device"):
        torch.ones(3, device=cuda) + torch.ones(3)


@pytest.mark.parametrize("given", ["none", "list", "tensor", "all full"])
@pytest.mark.parametrize("precision", ["fp32", "autocast", "bf16"])
@pytest.mark.parametrize("name", SIZES)
def test_networks_run_on_a_gpu_without_a_look_at_it(cuda, name, precision, given):
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    encoder = on(cuda, lambda: SpeechEncoder(SIZES[name]), dtype)
    lengths = {"none": None, "list": LENGTHS, "all full": [48000] * 3}.get(given)
    if given == "tensor":
        lengths = torch.tensor(LENGTHS, device=cuda)  # believed
    with autocast(precision == "autocast"):
        states = encoder(torch.randn(3, 48000, device=cuda), lengths)
    assert [tuple(state.shape) for state in states] == [(3, 149, SIZES[name].dim)] * 4
    assert all(state.device == cuda for state in states)
    if precision == "bf16":
        assert all(state.dtype == torch.bfloat16 for state in states)


def test_compiling_makes_a_few_graphs_and_none_more_for_other_lengths(monkeypatch):
    """Teachers of different depth are one class: dynamo counts their graphs together, and past its limit falls back."""
    small = dict(conv_layers=((8, 10, 5),) + ((8, 3, 2),) * 4 + ((8, 2, 2),) * 2, dim=16, ffn_dim=32, heads=2)
    small |= dict(pos_kernel=8, pos_groups=2)
    sizes = [(2, 0), (3, 0), (4, 320), (5, 320), (6, 0)]
    teachers = [SpeechEncoder(EncoderConfig(**small, layers=n, relative_buckets=b)).eval() for n, b in sizes]
    student, graphs = Student(student_config(teachers[0].config), [("layer1", 16)]).train(), []
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", torch._dynamo.config.recompile_limit)
    processes.compile(*teachers, student, backend=lambda graph, inputs: graphs.append(graph) or graph.forward)

    def step(samples):
        with torch.no_grad():
            states = [teacher(torch.randn(2, samples), layers=[1, 2]) for teacher in teachers]
        student(torch.randn(2, samples))[0].sum().backward()
        return states

    step(6400)
    first = len(graphs)
    for samples in range(9600, 60000, 3200):  # an epoch of LibriSpeech has some 72 lengths
        found = step(samples)
    assert len(graphs) == first == len(teachers) + 1  # a whole graph each: nothing falls back
    assert torch._dynamo.config.recompile_limit >= 8 * len(teachers)
    for teacher, states in zip(teachers, found):
        assert states[0].shape == (2, teacher.frames(samples), 16)


def attention_of(cuda, monkeypatch, name, lengths, dtype=torch.bfloat16):
    """(q, k, v, mask) of the first layer's attention."""
    seen = []
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda q, k, v, attn_mask, dropout_p: seen.append((q, k, v, attn_mask)) or torch.empty_like(q),
    )
    on(cuda, lambda: SpeechEncoder(SIZES[name]), dtype)(torch.randn(3, 48000, device=cuda), lengths)
    return seen[0]


@pytest.mark.parametrize("lengths, masked", [(None, False), ([48000] * 3, False), (LENGTHS, True)])
def test_flash_attention_can_serve_where_nothing_is_padded(cuda, monkeypatch, capfd, lengths, masked):
    q, k, v, mask = attention_of(cuda, monkeypatch, "hubert", lengths)
    assert (mask is not None) == masked
    can = torch.backends.cuda.can_use_flash_attention(
        torch.backends.cuda.SDPAParams(q, k, v, mask, 0.1, False, False), True
    )
    reasons = [line for line in capfd.readouterr().err.splitlines() if "Warning" in line]
    if torch.cuda.is_available():
        assert can != masked
    else:  # torch says all that stands against it: without a mask, nothing but that there is no GPU
        assert all("requires a CUDA device" in line or "attn_mask" in line for line in reasons)
        assert any("attn_mask" in line for line in reasons) == masked


@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_wavlms_bias_is_in_the_precision_at_hand_and_needs_no_padding_by_attention(cuda, monkeypatch, lengths):
    q, k, v, mask = attention_of(cuda, monkeypatch, "wavlm", lengths)
    assert mask.shape == (3, 12, 149, 149) and mask.stride(-2) % 8 == 0 and mask.stride(-1) == 1
    assert mask.dtype == q.dtype == torch.bfloat16


def test_no_tensor_of_a_forward_pass_is_larger_than_the_first_convolutions_in_bf16(cuda):
    class Largest(TorchDispatchMode):
        bytes = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            found = function(*args, **(kwargs or {}))
            self.bytes = max([self.bytes, *(one.nbytes for one in tree_leaves(found) if torch.is_tensor(one))])
            return found

    student = on(cuda, lambda: Student(student_config(SIZES["hubert"]), [("layer4", 768)])).train()
    waveforms = torch.randn(2, 48000, device=cuda)
    with Largest() as largest, autocast(True):
        student(waveforms)
    assert largest.bytes == 2 * 512 * ((48000 - 10) // 5 + 1) * 2


@pytest.mark.parametrize("agg", aggregate.AGGREGATIONS)
@pytest.mark.parametrize("silent", [False, True])
def test_a_step_runs_on_a_gpu_without_a_look_at_it(cuda, agg, silent):
    teachers = [on(cuda, lambda name=name: SpeechEncoder(SIZES[name]), torch.bfloat16) for name in ("hubert", "wavlm")]
    heads = aggregate.heads(agg, [[1, 3]] * 2, [("hubert", 768), ("wavlm", 768)])
    student = on(cuda, lambda: Student(student_config(SIZES["hubert"]), heads)).train()
    initialise(student, on(cuda, lambda: SpeechEncoder(SIZES["hubert"])))
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, fused=True)
    waveforms = torch.randn(3, 48000, device=cuda)
    with torch.no_grad():
        targets = aggregate.AGGREGATIONS[agg]([teacher(waveforms, layers=[1, 3]) for teacher in teachers])
    with autocast(True):
        predictions = student(waveforms)
    valid = torch.tensor([True, False, True])[:, None].expand(3, 149).to(cuda) if silent else None
    loss, l1, cosine = distillation_loss(predictions, targets, valid)
    assert loss.device == l1.device == cuda and l1.shape == cosine.shape == (len(heads),)
    for parameter in student.parameters():
        parameter.grad = torch.zeros_like(parameter)
    norm = torch.nn.utils.clip_grad_norm_(student.parameters(), 5.0)
    optimizer.found_inf = (~(torch.isfinite(loss.detach()) & torch.isfinite(norm))).float()
    optimizer.step()


def real(function):
    """A function that gives a tensor of the host's own, not a pretended one, as random draws are."""

    def call(*arguments, **settings):
        with unset_fake_temporarily():
            drawn = function(*arguments, **settings)
            return drawn if drawn.dim() else drawn.item()

    return call


def pretended_ctc(log_probabilities, targets, frames, lengths, zero_infinity):
    assert log_probabilities.device == targets.device and log_probabilities.device.type == "cuda"
    assert frames.device.type == lengths.device.type == "cpu"  # the kernel wants both on the host
    return log_probabilities.mean()


@pytest.mark.parametrize("task", ["pr", "asr", "sid"])
def test_probes_run_on_a_gpu_without_a_look_at_it(task, monkeypatch):
    frames, labels = torch.tensor([149, 97, 49]), [torch.tensor([1, 2, 2]), torch.tensor([3]), torch.tensor([4, 5])]
    classes = [torch.tensor(n) for n in (1, 2, 3)]
    for name in ("rand", "randint"):
        monkeypatch.setattr(torch, name, real(getattr(torch, name)))
    with FakeTensorMode(allow_non_fake_inputs=True):
        cuda = torch.device("cuda", 0)
        head = {
            "pr": lambda: evaluate_pr.PhoneHead(768, 70),
            "asr": lambda: evaluate_asr.CharacterHead(768, 64),
            "sid": lambda: evaluate_sid.MeanHead(768, 10),
        }[task]
        model = on(cuda, lambda: probe.Probe(4, head())).train()
        states = torch.randn(4, 3, 149, 768, device=cuda)
        if task == "sid":
            outputs = model(evaluate_sid.mean_over_frames(states, frames, longest=60), frames)
            loss = evaluate_sid.class_loss(outputs, frames, classes)
            assert outputs.shape == (3, 10)
        else:
            # cuDNN's LSTM asks for a real GPU.
            monkeypatch.setattr(torch.nn.LSTM, "forward", lambda self, x: (x.new_zeros(*x.shape[:2], 64), None))
            outputs = model(states, frames)
            monkeypatch.setattr(torch.nn.functional, "ctc_loss", pretended_ctc)  # torch has none for such tensors
            loss = evaluate_pr.ctc_loss(outputs, frames, labels)
            assert outputs.shape[:2] == (3, 149)
        assert outputs.device == loss.device == cuda and loss.shape == ()


# ---------------------------------------------------------------- reads, counted over real steps


class Reads(TorchDispatchMode):
    """Counts what the host reads of numbers that came of a network's weights: on a GPU it would wait for each.

    Run on the CPU, where every read is allowed; what depends on no weight, as a batch's list of files, is the host's own.
    """

    SIZED_BY_VALUES = {"aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_consecutive"}

    def __init__(self, monkeypatch):
        super().__init__()
        self.count, self.derived = 0, set()
        for name in ("tolist", "cpu", "numpy"):  # these do not come by here on a CPU
            read = getattr(torch.Tensor, name)
            monkeypatch.setattr(
                torch.Tensor, name, lambda tensor, *a, read=read, **k: self.note(tensor) or read(tensor, *a, **k)
            )

    def note(self, tensor):
        self.count += self.of_the_device(tensor)

    def of_the_device(self, tensor):
        return isinstance(tensor, torch.nn.Parameter) or tensor.untyped_storage()._cdata in self.derived

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
        if any(map(self.of_the_device, tensors)):
            name, indices = function._schema.name, args[1] if len(args) > 1 else ()
            boolean = name == "aten::index" and any(i is not None and i.dtype == torch.bool for i in indices)
            self.count += name in {"aten::_local_scalar_dense", *self.SIZED_BY_VALUES} or boolean
            for tensor in tree_leaves(found):
                if isinstance(tensor, torch.Tensor):
                    storage = tensor.untyped_storage()
                    if storage._cdata not in self.derived:
                        self.derived.add(storage._cdata)
                        weakref.finalize(storage, self.derived.discard, storage._cdata)
        return found


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    write_audio(folder / "audio", [6400 + 320 * i for i in range(16)])
    for number, form in enumerate(("fairseq", "s3prl")):
        save_official(random_encoder(number), folder / f"{form}.pt", form)
    return folder


def reads_of(program, settings, monkeypatch):
    with monkeypatch.context() as patch, Reads(patch) as reads:
        on_cpu(program, flags_of(settings))
    return reads.count


@pytest.mark.parametrize("more", [{}, {"cache": "memory"}, {"accumulate": 2, "agg": "none"}])
def test_a_training_step_is_not_waited_for_but_at_a_line_or_a_save(small, tmp_path, monkeypatch, more):
    whole = data.Batches.__getitem__

    def one_unreadable(batches, step):
        return whole(batches, step) | {"readable": torch.tensor([True, False, True, True])}

    monkeypatch.setattr(data.Batches, "__getitem__", one_unreadable)
    settings = dict(teachers=f"{small}/fairseq.pt,{small}/s3prl.pt", heads="2,4", data=small / "audio", splits=".")
    settings |= dict(batch_size=4, lr=1e-3, max_seconds=0.5, workers=0, log_every=100, save_every=100) | more
    counts = [reads_of(train, settings | dict(steps=n, out=tmp_path / str(n)), monkeypatch) for n in (2, 9)]
    assert counts[0] == counts[1] > 0  # the first step and the last have a line, the last a save
    assert reads_of(train, settings | dict(steps=9, log_every=1, out=tmp_path / "each"), monkeypatch) > counts[0]


@pytest.mark.parametrize("rates", [pytest.param("1e-2", marks=pytest.mark.slow), "1e-2,1e-3"])
@pytest.mark.parametrize("task", ["er", "pr", "asr"])
def test_a_probes_step_is_not_waited_for_but_at_a_line_or_a_score(small, corpus, tmp_path, monkeypatch, task, rates):
    program = {"er": evaluate_er, "pr": evaluate_pr, "asr": evaluate_asr}[task]
    settings = dict(upstream=small / "fairseq.pt", batch_size=4, lr=rates, workers=0, log_every=100, eval_every=100)
    if task == "er":
        names = sorted(path.name for path in (small / "audio").iterdir())
        lines = [f"audio/{name},{'ab'[n % 2]},{n // 8}\n" for n, name in enumerate(names)]
        (small / "table.csv").write_text("path,label,fold\n" + "".join(lines))
        settings |= dict(manifest=small / "table.csv")
    else:
        settings |= dict(data=corpus) | (dict(lexicon=corpus / "lexicon.txt") if task == "pr" else dict(hidden=8))
    counts = [reads_of(program, settings | dict(steps=n, out=tmp_path / str(n)), monkeypatch) for n in (2, 6)]
    assert counts[0] == counts[1] > 0
