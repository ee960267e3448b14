"""teachers.py: every official form, damaged and foreign files, downloads."""

import argparse
import collections
import enum
import http.server
import json
import multiprocessing
import os
import pickle
import shutil
import sys
import threading
import time
import tracemalloc
import types

import numpy as np
import pytest
import safetensors.torch
import soundfile
import torch
import torchaudio
import transformers
from conftest import (
    KINDS,
    LARGE,
    largest_difference,
    noise,
    random_encoder,
    relative_difference,
    shared,
    states,
)

import teachers
from export import official_state_dict, save_official
from teachers import load_teacher


def saved(folder, form="fairseq", **sizes):
    """(encoder, content of its checkpoint), for a test to change the content."""
    encoder = random_encoder(**sizes)
    save_official(encoder, folder / "saved.pt", form)
    return encoder, torch.load(folder / "saved.pt", weights_only=True)


# ------------------------------------------------------------------ against the official code

GOLDEN = """
hubert_fairseq.pt robust_hubert_fairseq.pt robust_hubert_s3prl.pt wavlm_unilm.pt
hubert_torchaudio.pth wavlm_torchaudio.pth distilhubert_s3prl.ckpt distilhubert_hf
hubert_hf hubert_hf/model.safetensors hubert_hf/pytorch_model.bin
wavlm_hf wavlm_hf/pytorch_model.bin wav2vec2_hf data2vec_hf data2vec_deep_hf
"""


@pytest.mark.parametrize("file", GOLDEN.split())
def test_every_official_form_gives_the_official_hidden_states(file, tmp_path):
    path = shared("golden") / file
    if "torchaudio" in file:  # the weights alone do not show the heads
        path = shutil.copy(path, tmp_path)
        (tmp_path / "config.json").write_text('{"num_attention_heads": 4}')
    encoder = load_teacher(path)
    encoder.config.normalize_eps = 1e-5  # these waveforms were normalised by F.layer_norm
    name = file.split("/")[0].split(".")[0].replace("torchaudio", "hf")
    official = np.load(shared("golden") / f"{name}.npz")
    paths = sorted(shared("speech/LibriSpeech/dev-clean/9001/1001").glob("*.flac"))
    waveforms = torch.zeros(2, 40000)
    for row, length in enumerate([40000, 27123]):
        audio = soundfile.read(paths[row], dtype="float32")[0][:length]
        waveforms[row, :length] = torch.from_numpy(audio)
    expected = list(official["layers" if "layers" in official else "single"])
    if "last" in official:  # transformers lists Large's last state before the final LayerNorm
        expected[-1] = official["last"]
    for batch, lengths in ((waveforms[:1], None), (waveforms, [40000, 27123])):
        found = [state[:1] for state in states(encoder, batch, lengths)]
        assert largest_difference(found[-len(expected) :], expected) < 1e-5
    found = states(encoder.bfloat16(), waveforms[:1])
    for state, exact in zip(found[-len(expected) :], expected):
        assert relative_difference(state.float(), torch.as_tensor(exact)) < 0.04


def randomised(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def transformers_model(kind, head="Model"):
    names = {"wavlm": "WavLM", "hubert": "Hubert", "wav2vec2": "Wav2Vec2"}
    name = names.get(kind.split("_")[0], "Data2VecAudio")
    sizes = dict(hidden_size=48, num_hidden_layers=3, num_attention_heads=4, conv_dim=(32,) * 7)
    sizes |= dict(intermediate_size=96, num_conv_pos_embedding_groups=4, vocab_size=11)
    if kind == "data2vec":
        sizes |= dict(num_conv_pos_embeddings=3, conv_pos_kernel_size=19)
    else:
        sizes |= dict(num_conv_pos_embeddings=16)
    if "large" in kind:
        sizes |= dict(feat_extract_norm="layer", do_stable_layer_norm=True, conv_bias=True)
    if head == "ForXVector":
        sizes |= dict(tdnn_dim=(32, 32), tdnn_kernel=(5, 3), tdnn_dilation=(1, 2))
    return randomised(
        getattr(transformers, name + head)(getattr(transformers, name + "Config")(**sizes))
    )


@pytest.mark.parametrize(
    "kind, head",
    [(kind, "Model") for kind in [*KINDS, "wav2vec2", "wav2vec2_large", "data2vec"]]
    + [("hubert", "ForCTC"), ("wav2vec2", "ForCTC"), ("wavlm", "ForXVector")]
    + [("data2vec", "ForXVector"), ("wavlm", "ForSequenceClassification")],
)
def test_a_transformers_folder_gives_the_states_of_transformers(kind, head, tmp_path, recwarn):
    model = transformers_model(kind, head)
    model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"do_normalize": false}')
    recwarn.clear()
    encoder = load_teacher(tmp_path)
    assert not recwarn.list
    with torch.no_grad():
        output = model(noise(2, 9000), output_hidden_states=True)
    last = getattr(output, "last_hidden_state", output.hidden_states[-1])
    expected = [*output.hidden_states[:-1], last]
    assert largest_difference(states(encoder, noise(2, 9000)), expected) < 1e-4


def test_the_encoder_of_a_speech_encoder_decoder_has_the_settings_of_its_config(tmp_path, recwarn):
    encoder = transformers_model("wav2vec2_large")
    decoder = transformers.BertConfig(hidden_size=36, num_hidden_layers=1, vocab_size=9)
    decoder.update({"is_decoder": True, "add_cross_attention": True})
    both = transformers.SpeechEncoderDecoderModel(
        encoder=encoder, decoder=transformers.BertLMHeadModel(decoder)
    )
    both.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"do_normalize": false}')
    recwarn.clear()
    teacher = load_teacher(tmp_path)
    assert not recwarn.list
    with torch.no_grad():
        expected = encoder(noise(1, 9000)).last_hidden_state
    assert largest_difference(states(teacher, noise(1, 9000))[-1:], [expected]) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_torchaudios_state_dict_gives_the_states_of_torchaudio(kind, tmp_path):
    large = "large" in kind
    sizes = dict(
        extractor_mode="layer_norm" if large else "group_norm",
        extractor_conv_layer_config=[(32, 10, 5)] + [(32, 3, 2)] * 4 + [(32, 2, 2)] * 2,
        extractor_conv_bias=large,
        encoder_embed_dim=128,
        encoder_pos_conv_kernel=16,
        encoder_pos_conv_groups=4,
        encoder_num_layers=3,
        encoder_num_heads=2,
        encoder_ff_interm_features=96,
        encoder_layer_norm_first=large,
        encoder_layer_drop=0.0,
        aux_num_out=None,
    )
    sizes |= {
        f"encoder_{part}dropout": 0.0 for part in ("projection_", "attention_", "ff_interm_", "")
    }
    if "wavlm" in kind:
        sizes |= dict(encoder_num_buckets=320, encoder_max_distance=800)
    build = torchaudio.models.wavlm_model if "wavlm" in kind else torchaudio.models.wav2vec2_model
    model, waveforms = randomised(build(**sizes)), 0.01 * noise(2, 9000)  # quiet
    torch.save(model.state_dict(), tmp_path / "teacher.pth")
    given = torch.nn.functional.layer_norm(waveforms, (9000,)) if large else waveforms
    with torch.no_grad():  # forward adds Large's final LayerNorm
        expected = [*model.extract_features(given)[0][:-1], model(given)[0]]
    found = states(load_teacher(tmp_path / "teacher.pth"), waveforms)[1:]
    assert largest_difference(found, expected) < 1e-4


@pytest.mark.parametrize("rms", [0.01, 0.003, 0.001])
@pytest.mark.parametrize("form", ["fairseq", "s3prl", "microsoft", "transformers"])
def test_quiet_speech_is_normalised_as_in_the_official_code(form, rms, tmp_path):
    waveform = rms * torch.randn(9000, generator=torch.Generator().manual_seed(0))
    if form == "transformers":
        transformers_model("hubert_large").save_pretrained(tmp_path)
        extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=True)
        extractor.save_pretrained(tmp_path)
        normalised = extractor(waveform.numpy(), sampling_rate=16000)["input_values"][0]
        normalised, teacher = torch.from_numpy(normalised), load_teacher(tmp_path)
    else:
        normalised = torch.nn.functional.layer_norm(waveform, waveform.shape)
        teacher = load_teacher((saved(tmp_path, form, **LARGE), tmp_path / "saved.pt")[1])
    found = states(teacher, waveform[None])
    teacher.config.normalize = False
    assert largest_difference(found, states(teacher, normalised[None])) < 1e-4


# ------------------------------------------------------------------ forms and settings


def distilhubert(content):
    settings = content["cfg"]["model"]
    settings["extractor_conv_feature_layers"] = settings.pop("conv_feature_layers")
    weights = content["model"] | {"output_layer.0.weight": torch.zeros(96, 48)}
    return {"Distiller": weights, "Config": {"distiller": settings}, "Step": 1}


def fine_tuned(content):
    prefix = "w2v_encoder.w2v_model."
    weights = {prefix + name: weight for name, weight in content["model"].items()}
    weights |= {"w2v_encoder.proj.weight": torch.zeros(3, 48), "layer_norm.bias": torch.ones(3)}
    return {"cfg": {"model": {"w2v_args": content["cfg"]}, "task": {}}, "model": weights}


def pretraining(content):
    names = ["mask_emb", "label_embs_concat", "final_proj.bias", "quantizer.vars", "project_q.bias"]
    names.append("encoder.layer_norm_for_extract.weight")  # UniSpeech-SAT
    content["model"] |= {name: torch.zeros(3) for name in names}
    content["cfg"]["model"]["conv_pos"] = 95  # in data2vec, all kernels together
    return content


def older_args(content):
    settings = content["cfg"]["model"] | content["cfg"]["task"]
    settings = argparse.Namespace(task="hubert_pretraining", **settings)
    return {"args": settings, "cfg": None, "model": content["model"]}


def half(content):
    return content | {"model": {name: weight.half() for name, weight in content["model"].items()}}


@pytest.mark.parametrize(
    "change, sizes",
    [
        (distilhubert, {"projection_norm": False}),
        (fine_tuned, LARGE),
        (pretraining, LARGE),
        (pretraining, {"conv_norm": "layer", "pos_depth": 3, "pos_kernel": 19}),
        (older_args, {"attention_heads": 6, **LARGE}),
        (half, {}),
    ],
)
def test_other_forms_of_fairseq_and_s3prl_are_read(change, sizes, tmp_path, recwarn):
    encoder, content = saved(tmp_path, **sizes)
    torch.save(change(content), tmp_path / "t.pt")
    found = load_teacher(tmp_path / "t.pt")
    assert found.config == encoder.config and not recwarn.list
    assert {parameter.dtype for parameter in found.parameters()} == {torch.float32}
    assert not found.training and not any(p.requires_grad for p in found.parameters())
    tolerance = 1e-2 if change is half else 1e-5
    found = states(found, noise(1, 5000))[-1]
    assert relative_difference(found, states(encoder, noise(1, 5000))[-1]) < tolerance


@pytest.mark.parametrize("kind", [*KINDS, "data2vec"])
def test_what_tensors_do_not_show_is_assumed_in_one_line(kind, tmp_path, recwarn):
    sizes = KINDS.get(kind, {"conv_norm": "layer", "normalize": True, "pos_depth": 2})
    encoder = random_encoder(**sizes, dim=256, normalize_eps=1e-7)
    torch.save(official_state_dict(encoder, "transformers"), tmp_path / "bare.bin")
    assert load_teacher(tmp_path / "bare.bin").config == encoder.config
    (line,) = map(str, (warning.message for warning in recwarn.list))
    assert f"do_normalize {encoder.config.normalize}" in line
    assert ("num_attention_heads 4" in line) == ("wavlm" not in kind)  # its bias shows them
    assert f"do_stable_layer_norm {encoder.config.pre_norm}" in line and "conv_stride [5" in line


@pytest.mark.parametrize("dim, heads", [(384, 6), (768, 12), (1024, 16), (1280, 16), (1920, 16)])
def test_without_settings_a_head_has_64_dims_or_the_published_number(tmp_path, dim, heads):
    encoder = random_encoder(
        dim=dim, attention_heads=heads, layers=1, ffn_dim=8, pos_kernel=2, pos_groups=16
    )
    torch.save(official_state_dict(encoder, "transformers"), tmp_path / "bare.bin")
    assert load_teacher(tmp_path / "bare.bin").config.attention_heads == heads


@pytest.mark.parametrize("key", [None, "model", "model_weight"])
def test_without_settings_another_width_is_refused_until_a_config_beside_it_has_the_heads(
    key, tmp_path
):
    weights = official_state_dict(random_encoder(attention_heads=6), "fairseq")
    torch.save({key: weights} if key else weights, tmp_path / "t.pt")
    with pytest.raises(ValueError, match="t.pt: .*48 dims.*num_attention_heads into a config.json"):
        load_teacher(tmp_path / "t.pt")
    (tmp_path / "config.json").write_text('{"num_attention_heads": 6}')
    assert load_teacher(tmp_path / "t.pt").config.attention_heads == 6


@pytest.mark.parametrize(
    "file, text",
    [
        ("preprocessor_config.json", '{"do_normalize": true}'),
        ("processor_config.json", '{"feature_extractor": {"do_normalize": true}}'),
    ],
)
def test_do_normalize_of_a_transformers_folder_is_read(file, text, tmp_path, recwarn):
    transformers_model("hubert").save_pretrained(tmp_path)
    recwarn.clear()
    assert not load_teacher(tmp_path).config.normalize
    (warning,) = recwarn.list
    assert "do_normalize False" in str(warning.message)
    recwarn.clear()
    (tmp_path / file).write_text(text)
    assert load_teacher(tmp_path).config.normalize
    assert not recwarn.list


def test_names_and_digests_of_teachers():
    names = teachers.short_names(["hubert", "a/wavlm.pt", "folder/"])
    assert names == ["hubert", "wavlm", "folder"]
    names = teachers.short_names(["hubert-2", "hubert.pt", "b/hubert.pt"])
    assert names == ["hubert-2-1", "hubert-2", "hubert-3"]
    encoder = random_encoder()
    before = teachers.digest(encoder)
    assert before == teachers.digest(random_encoder()) != teachers.digest(random_encoder(seed=1))
    assert before != teachers.digest(random_encoder(normalize=True))
    assert before == teachers.digest(random_encoder(conv_gradient_scale=1.0))


# ------------------------------------------------------------------ what is refused


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_foreign_code_in_a_pickle_is_refused_and_not_run(zipped, tmp_path):
    canary = Canary(tmp_path / "canary")
    content = saved(tmp_path)[1] | {"task_state": canary}
    torch.save(content, tmp_path / "t", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="refused.*mkdir"):
        load_teacher(tmp_path / "t")
    (tmp_path / "bare").write_bytes(pickle.dumps(canary))
    with pytest.raises(ValueError, match=str(tmp_path / "bare")):
        load_teacher(tmp_path / "bare")
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_fairseqs_classes_are_read_as_placeholders(zipped, tmp_path, monkeypatch):
    module = types.ModuleType("fairseq.data")
    module.Dictionary = type("Dictionary", (), {"__module__": module.__name__})
    module.Mode = enum.Enum("Mode", {"layer_norm": "layer_norm"}, module=module.__name__)
    module.Mode.__reduce_ex__ = lambda self, protocol: (type(self), (self.value,))
    for name in ("DictConfig", "AnyNode"):
        setattr(module, name, type(name, (), {"__module__": "omegaconf"}))

    def node(value):  # of omegaconf, in checkpoints of 2020
        found, is_dict = module.AnyNode(), isinstance(value, dict)
        if is_dict:
            found, value = module.DictConfig(), {name: node(x) for name, x in value.items()}
        metadata = {"object_type": dict, "resolver_cache": collections.defaultdict(dict)}
        vars(found).update({"_content" if is_dict else "_val": value, "_metadata": metadata})
        return found

    encoder, content = saved(tmp_path, **LARGE)
    content["cfg"]["model"]["extractor_mode"] = module.Mode.layer_norm
    content["task_state"] = module.Dictionary()
    content["task_state"].symbols = ["<s>", "a"]
    content["cfg"] = node(content["cfg"])
    with monkeypatch.context() as patch:  # fairseq is there when the file is written
        for name in ("fairseq", "fairseq.data", "omegaconf"):
            patch.setitem(sys.modules, name, module)
        torch.save(content, tmp_path / "t", _use_new_zipfile_serialization=zipped)
    assert load_teacher(tmp_path / "t").config == encoder.config
    assert "fairseq" not in sys.modules


INFINITE = torch.full((48, 48), torch.inf)
GREP = "encoder.layers.2.self_attn.grep_linear.bias"
BIAS = "encoder.layers.0.self_attn.relative_attention_bias.weight"


@pytest.mark.parametrize(
    "form, name, change, words",
    [
        ("fairseq", "encoder.layers.2.fc1.weight", None, "is missing"),
        ("fairseq", "encoder.layer_norm.bias", None, "is missing"),
        ("fairseq", "encoder.layers.1.self_attn.k_proj.bias", None, "is missing"),
        ("microsoft", GREP, None, "is missing"),
        ("microsoft", BIAS, None, "is missing"),
        ("fairseq", "encoder.layers.3.", None, "encoder.layers.3.* is missing"),
        ("fairseq", "encoder.layers.0.fc2.bias", torch.zeros(7), "shape .7,., not .48,."),
        ("fairseq", "encoder.pos_conv.0.weight", torch.zeros(48), "shape .48,., not 3 dim"),
        ("fairseq", "encoder.pos_conv.1.running_mean", torch.zeros(48), "unsupported"),
        ("fairseq", "encoder.layers.0.adapter.bias", torch.zeros(48), "unsupported"),
        ("fairseq", "encoder.layers.0.fc2.bias", torch.full((48,), torch.nan), "NaN or infinite"),
        ("microsoft", "encoder.layers.3.self_attn.v_proj.weight", INFINITE, "NaN or infinite"),
        ("fairseq", "encoder.layers.1.fc1.weight", INFINITE.char(), "dtype int8 is not read"),
        ("fairseq", "encoder.pos_conv.0.weight_g", INFINITE.to(torch.float8_e5m2), "float8_e5m2"),
    ],
)
def test_a_missing_misshapen_or_unknown_weight_is_named(form, name, change, words, tmp_path):
    sizes = {"relative_buckets": 320} if form == "microsoft" else {}
    content = saved(tmp_path, form, **sizes)[1]
    weights = content["model"]
    if change is None:
        weights = {key: x for key, x in weights.items() if not key.startswith(name)}
    else:
        weights[name] = change
    if name == "encoder.pos_conv.0.weight":  # as with batch norm in place of weight norm
        weights = {key: x for key, x in weights.items() if not key.endswith(("_g", "_v"))}
    torch.save(content | {"model": weights}, tmp_path / "t.pt")
    with pytest.raises(ValueError, match=words) as error:
        load_teacher(tmp_path / "t.pt")
    text = str(error.value)
    assert text.startswith(f"{tmp_path}/t.pt: ") and name in text and "\n" not in text


def with_prefixes(*prefixes):
    return lambda weights: {p + name: x for p in prefixes for name, x in weights.items()}


def unmerged(weights):
    weights = {name.replace("q_proj.", "q_proj.base_layer."): x for name, x in weights.items()}
    return weights | adapter(weights)


def adapter(weights):
    return {"base_model.model.encoder.layers.0.attention.q_proj.lora_A.weight": torch.zeros(8, 48)}


@pytest.mark.parametrize(
    "change, words",
    [
        (with_prefixes("teacher.", "student."), "2 .*student.feature_.*, teacher.feature_.*alone"),
        (with_prefixes("", "ema."), "2 encoders .feature_extractor, ema.feature_extractor.*alone"),
        (unmerged, "(base_layer|lora_A); merge the adapter"),
        (adapter, "lora_A; merge the adapter"),
    ],
)
@pytest.mark.parametrize("file", ["pytorch_model.bin", "adapter_model.safetensors"])
def test_two_encoders_and_an_unmerged_adapter_are_refused(change, words, file, tmp_path):
    weights = change(official_state_dict(random_encoder(), "transformers"))
    write = torch.save if file.endswith("bin") else safetensors.torch.save_file
    write({name: weight.clone() for name, weight in weights.items()}, tmp_path / file)
    (tmp_path / "config.json").write_text('{"num_attention_heads": 4}')
    with pytest.raises(ValueError, match=f"{tmp_path}: .*{words}"):
        load_teacher(tmp_path)


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_a_model_of_transformers_in_several_files_is_read(ending, tmp_path):
    model = transformers_model("hubert")
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "several", max_shard_size="40KB")
    files = sorted((tmp_path / "several").glob("*.safetensors"))
    assert len(files) > 2
    if ending == "bin":
        for path in files:
            torch.save(safetensors.torch.load_file(path), path.with_suffix(".bin"))
            path.unlink()
        index = tmp_path / "several/model.safetensors.index.json"
        text = index.read_text().replace(".safetensors", ".bin")
        index.unlink()
        (tmp_path / "several/pytorch_model.bin.index.json").write_text(text)
    a, b = (load_teacher(tmp_path / name).state_dict() for name in ("one", "several"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    files[1].with_suffix(f".{ending}").unlink()
    with pytest.raises(FileNotFoundError, match=files[1].stem):
        load_teacher(tmp_path / "several")


def test_safetensors_are_read_without_a_copy(tmp_path):
    safetensors.torch.save_file({"x": torch.ones(5_000_000)}, tmp_path / "x.safetensors")
    tracemalloc.start()
    assert teachers.read_file(tmp_path / "x.safetensors")["x"].sum() == 5_000_000
    assert tracemalloc.get_traced_memory()[1] < 1.1 * 20_000_000
    tracemalloc.stop()


def test_a_file_named_like_a_known_teacher_is_asked_about(tmp_path, monkeypatch):
    (tmp_path / "hubert").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"^hubert: a known name and a file here; write ./hubert"):
        load_teacher("hubert")
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        load_teacher("./hubert")


@pytest.mark.parametrize("dtype, words", [(torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3")])
def test_a_dtype_of_safetensors_that_is_not_read_is_named(dtype, words, tmp_path):
    weights = official_state_dict(random_encoder(), "transformers")
    name = "encoder.layers.0.attention.q_proj.weight"
    weights |= {name: weights[name].to(dtype), "steps": torch.tensor(3)}
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"model.safetensors: {name}: the dtype {words} is not"):
        load_teacher(tmp_path)


@pytest.mark.parametrize("form, heads", [("transformers", 5), ("transformers", 0), ("fairseq", 7)])
def test_a_number_of_heads_that_does_not_divide_the_width_is_refused(form, heads, tmp_path):
    transformers_model("hubert").save_pretrained(tmp_path)
    if form == "fairseq":
        content = saved(tmp_path)[1]
        content["cfg"]["model"]["encoder_attention_heads"] = heads
        torch.save(content, tmp_path / "t.pt")
    else:
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | {"num_attention_heads": heads}))
    with pytest.raises(ValueError, match=f"num_attention_heads {heads} does not divide .* 48"):
        load_teacher(tmp_path / "t.pt" if form == "fairseq" else tmp_path)


def test_damaged_and_foreign_files_are_refused_in_one_line_that_names_them(tmp_path):
    whole = (saved(tmp_path), (tmp_path / "saved.pt").read_bytes())[1]
    header = b'{"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}'
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{")
    torch.save({}, tmp_path / "hf" / "pytorch_model.bin")
    torch.save({"conv1.weight": torch.zeros(3, 3)}, tmp_path / "resnet.pt")
    torch.save([1, 2, 3], tmp_path / "list.pt")
    torch.save({0: torch.zeros(3)}, tmp_path / "numbers.pt")
    torch.save({"model_weight": [1]}, tmp_path / "s3prl.pt")
    torch.save({"Distiller": torch.zeros(3)}, tmp_path / "distiller.pt")
    torch.save({"format": "ekd-student-1"}, tmp_path / "student.pt")
    content = {
        "short.pt": whole[: len(whole) // 2],
        "flipped.pt": whole[:-9000] + bytes([whole[-9000] ^ 1]) + whole[-8999:],
        "page.pt": b"\n<!DOCTYPE html><html><body>Sign in</body></html>",
        "empty.pt": b"",
        "cut.safetensors": len(header).to_bytes(8, "little") + header + bytes(8),
    }
    for name, data in content.items():
        (tmp_path / name).write_bytes(data)
    words = dict.fromkeys(content, "damaged") | {"hf": "config.json: not JSON"}
    others = ("resnet.pt", "list.pt", "numbers.pt", "s3prl.pt", "distiller.pt")
    words |= dict.fromkeys(others, "not a HuBERT or WavLM")
    words |= {"student.pt": "a student; give the folder that export.py", "none": "hubert_large"}
    for name, expected in words.items():
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            load_teacher(tmp_path / name)
        text = str(error.value)
        assert str(tmp_path / name) in text and expected in text and "\n" not in text, text


# ------------------------------------------------------------------ downloads


@pytest.fixture
def server(monkeypatch, tmp_path):
    """Serves a checkpoint as "hubert"; `answer`: "whole", or how it is broken."""
    content = saved(tmp_path)[1]
    torch.save(content, tmp_path / "old", _use_new_zipfile_serialization=False)
    bodies = {"page": b"<html>Sign in</html>", "broken old": (tmp_path / "old").read_bytes()}
    body = (tmp_path / "saved.pt").read_bytes()
    state = types.SimpleNamespace(requests=0, answer="whole", size=len(body), seconds=0)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            state.requests += 1
            if state.answer == "missing":
                return self.send_error(404)
            time.sleep(state.seconds)
            data = bodies.get(state.answer, body)
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2] if "broken" in state.answer else data)

        def log_message(self, *_):
            pass

    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    state.url = f"http://127.0.0.1:{running.server_port}/{tmp_path.name}.pt"
    monkeypatch.setitem(teachers.TEACHERS, "hubert", state.url)
    yield state
    running.shutdown()


@pytest.mark.parametrize("answer", ["broken", "broken old", "page", "missing"])
def test_a_broken_download_leaves_no_file_and_the_next_one_happens_once(server, answer, capsys):
    server.answer = answer
    with pytest.raises(OSError, match=server.url) as error:
        load_teacher("hubert")
    assert "\n" not in str(error.value)
    folder = os.path.join(torch.hub.get_dir(), "checkpoints")
    name = os.path.basename(server.url)
    assert not [file for file in os.listdir(folder) if name in file and ".lock" not in file]
    server.answer = "whole"
    server.requests = 0
    assert load_teacher("hubert").config == load_teacher("hubert").config
    assert "100%" in capsys.readouterr().err and server.requests == 1


def test_processes_of_a_machine_download_once(server):
    server.seconds = 1  # long enough for all to start
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=teachers.download, args=(server.url,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 3 and server.requests == 1


def test_a_folder_that_cannot_be_written_matters_to_downloads_alone(server, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: "/proc/.cache/torch/hub")  # HOME=/proc
    load_teacher(tmp_path / "saved.pt")
    with pytest.raises(OSError, match="not downloaded to /proc/.*set TORCH_HOME"):
        load_teacher("hubert")
