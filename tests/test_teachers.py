"""teachers.py: every official form, damaged files, downloads."""

import argparse
import collections
import enum
import http.server
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
import types

import numpy as np
import pytest
import soundfile
import torch
import torchaudio
import transformers
from conftest import (
    KINDS,
    LARGE,
    ROOT,
    environment,
    largest_difference,
    noise,
    random_encoder,
    relative_difference,
    shared,
    states,
)

import aggregate
import data
import teachers
from export import official_state_dict, save_official
from teachers import load_teacher

# ---------------------------------------------------------------- against the official code


GOLDEN = {
    "hubert_fairseq.pt": "hubert_fairseq",
    "robust_hubert_fairseq.pt": "robust_hubert_fairseq",
    "robust_hubert_s3prl.pt": "robust_hubert_s3prl",
    "wavlm_unilm.pt": "wavlm_unilm",
    "hubert_hf": "hubert_hf",
    "hubert_hf/model.safetensors": "hubert_hf",
    "hubert_hf/pytorch_model.bin": "hubert_hf",
    "hubert_torchaudio.pth": "hubert_hf",
    "wavlm_hf": "wavlm_hf",
    "wavlm_hf/model.safetensors": "wavlm_hf",
    "wavlm_hf/pytorch_model.bin": "wavlm_hf",
    "wavlm_torchaudio.pth": "wavlm_hf",
    "wav2vec2_hf": "wav2vec2_hf",
    "data2vec_hf": "data2vec_hf",
    "data2vec_deep_hf": "data2vec_deep_hf",
    "distilhubert_hf": "distilhubert_hf",
}


def golden_waveforms():
    folder = shared("speech/LibriSpeech/dev-clean/9001/1001")
    first, second = sorted(folder.glob("*.flac"))[:2]
    batch = torch.zeros(2, 40000)
    batch[0] = torch.from_numpy(soundfile.read(first, dtype="float32")[0][:40000])
    batch[1, :27123] = torch.from_numpy(soundfile.read(second, dtype="float32")[0][:27123])
    return batch


@pytest.mark.parametrize("name", ["hubert_small", "robust_hubert_small", "wavlm_small"])
def test_trained_teachers_load_and_know_more_than_their_input(name):
    encoder = load_teacher(shared("teachers") / f"{name}.pt")
    everything = states(encoder, golden_waveforms()[:1])
    assert [tuple(state.shape) for state in everything] == [(1, 124, 192)] * 7
    assert all(state.isfinite().all() and relative_difference(state, everything[0]) > 0.1 for state in everything[1:])


@pytest.mark.parametrize("file", GOLDEN)
def test_every_official_form_gives_the_official_hidden_states(file):
    encoder, official = load_teacher(shared("golden") / file), np.load(shared("golden") / f"{GOLDEN[file]}.npz")
    batch, single = golden_waveforms(), list(official["single"])
    if "last" in official:  # transformers 5 lists the last state of pre-norm networks before the final LayerNorm
        single[-1] = official["last"]
    assert largest_difference(states(encoder, batch[:1]), single) < 1e-4
    padded = states(encoder, batch, [40000, 27123])
    assert largest_difference([state[:1] for state in padded], single) < 1e-4
    if "batch" in official:
        assert largest_difference([state[:1] for state in padded], official["batch"][:, :1]) < 1e-4


def test_s3prls_own_distilhubert_gives_its_layers_without_its_heads(capsys):
    path = shared("golden") / "distilhubert_s3prl.ckpt"
    encoder, official = load_teacher(path), np.load(path.with_suffix(".npz"))
    assert largest_difference(states(encoder, golden_waveforms()[:1])[1:], official["layers"]) < 1e-4
    assert capsys.readouterr().err == "" and not encoder.config.projection_norm


def test_a_distilhubert_in_s3prls_form_is_a_teacher(tmp_path):
    source = random_encoder(projection_norm=False)
    save_official(source, tmp_path / "fairseq.pt", "fairseq")
    whole = torch.load(tmp_path / "fairseq.pt", weights_only=True)
    settings = whole["cfg"]["model"]
    settings["extractor_conv_feature_layers"] = settings.pop("conv_feature_layers")
    weights = whole["model"] | {"output_layer.0.weight": torch.zeros(96, 48)}
    torch.save({"Distiller": weights, "Config": {"distiller": settings}, "Step": 1}, tmp_path / "distil.ckpt")
    found = load_teacher(tmp_path / "distil.ckpt")
    assert largest_difference(states(found, noise(1, 5000)), states(source, noise(1, 5000))) < 1e-4


def test_fairseqs_wav2vec2_loads_without_its_quantizer(tmp_path, capsys):
    source = random_encoder(**LARGE)  # XLS-R's shape
    save_official(source, tmp_path / "t.pt", "fairseq")
    content = torch.load(tmp_path / "t.pt", weights_only=True)
    extras = ["quantizer.vars", "quantizer.weight_proj.weight", "project_q.weight", "final_proj.bias", "mask_emb"]
    content["model"] |= {name: torch.zeros(3) for name in extras}
    torch.save(content, tmp_path / "t.pt")
    found = load_teacher(tmp_path / "t.pt")
    assert largest_difference(states(found, noise(1, 5000)), states(source, noise(1, 5000))) < 1e-4
    assert capsys.readouterr().err == ""


def test_fairseqs_data2vec_is_read_by_its_names(tmp_path):
    source = random_encoder(conv_norm="layer", pos_depth=3, pos_kernel=19)
    save_official(source, tmp_path / "t.pt", "fairseq")
    content = torch.load(tmp_path / "t.pt", weights_only=True)
    assert "encoder.pos_conv.2.0.weight" in content["model"]
    content["cfg"]["model"] |= {"conv_pos": 95, "pos_conv_depth": 3}  # fairseq says the kernels together
    torch.save(content, tmp_path / "t.pt")
    assert load_teacher(tmp_path / "t.pt").config == source.config
    assert (
        largest_difference(states(load_teacher(tmp_path / "t.pt"), noise(1, 5000)), states(source, noise(1, 5000)))
        < 1e-4
    )


@pytest.mark.parametrize("dim, heads", [(768, 12), (1024, 16), (1280, 16)])
def test_a_bare_state_dict_of_a_published_width_has_its_published_heads(tmp_path, dim, heads):
    source = random_encoder(dim=dim, heads=heads, layers=1, ffn_dim=64, pos_groups=16)
    torch.save(official_state_dict(source, "transformers"), tmp_path / "bare.bin")
    assert load_teacher(tmp_path / "bare.bin").config.heads == heads


def transformers_model(kind, **more):
    sizes = dict(hidden_size=48, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96, conv_dim=(32,) * 7)
    sizes |= dict(num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, vocab_size=11)
    if "large" in kind:
        sizes |= dict(feat_extract_norm="layer", do_stable_layer_norm=True, conv_bias=True)
    name = {"wavlm": "WavLM", "hubert": "Hubert", "wav2vec2": "Wav2Vec2", "data2vec": "Data2VecAudio"}[
        kind.split("_")[0]
    ]
    if name == "Data2VecAudio":
        sizes |= dict(num_conv_pos_embeddings=3, conv_pos_kernel_size=19)
    config = getattr(transformers, name + "Config")(**sizes)
    return randomise(getattr(transformers, name + more.get("head", "Model"))(config))


def randomise(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize("kind", [*KINDS, "wav2vec2", "wav2vec2_large", "data2vec"])
def test_a_transformers_folder_gives_what_transformers_gives(kind, tmp_path):
    model = transformers_model(kind)
    model.save_pretrained(tmp_path)
    encoder, waveforms = load_teacher(tmp_path), noise(2, 9000)
    assert encoder.config.normalize == ("large" in kind or kind == "data2vec")
    given = torch.nn.functional.layer_norm(waveforms, (9000,)) if encoder.config.normalize else waveforms
    with torch.no_grad():
        output = model(given, output_hidden_states=True)
    # transformers 5 lists Large's last state before the final LayerNorm, transformers 4 after it; this one is after.
    theirs = [*output.hidden_states[:-1], output.last_hidden_state]
    assert largest_difference(states(encoder, waveforms), theirs) < 1e-4


@pytest.mark.parametrize("kind", ["hubert", "wavlm"])
def test_a_fine_tuned_transformers_model_loads_without_its_head(kind, tmp_path, capsys):
    model = transformers_model(kind, head="ForCTC")  # hubert. and wavlm. prefixes, and lm_head
    model.save_pretrained(tmp_path)
    capsys.readouterr()  # transformers' own progress
    with torch.no_grad():
        theirs = model(noise(1, 5000), output_hidden_states=True).hidden_states
    assert largest_difference(states(load_teacher(tmp_path), noise(1, 5000)), theirs) < 1e-4
    assert capsys.readouterr().err == ""


def test_do_normalize_of_a_transformers_folder_is_followed(tmp_path):
    transformers_model("hubert").save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"do_normalize": true}')
    assert load_teacher(tmp_path).config.normalize


@pytest.mark.parametrize("kind", KINDS)
def test_torchaudios_state_dict_gives_what_torchaudio_gives(kind, tmp_path):
    large = "large" in kind
    sizes = dict(
        extractor_mode="layer_norm" if large else "group_norm",
        extractor_conv_layer_config=[(32, 10, 5)] + [(32, 3, 2)] * 4 + [(32, 2, 2)] * 2,
        extractor_conv_bias=large,
        encoder_embed_dim=48,
        encoder_projection_dropout=0.0,
        encoder_pos_conv_kernel=16,
        encoder_pos_conv_groups=4,
        encoder_num_layers=3,
        encoder_num_heads=4,
        encoder_attention_dropout=0.0,
        encoder_ff_interm_features=96,
        encoder_ff_interm_dropout=0.0,
        encoder_dropout=0.0,
        encoder_layer_norm_first=large,
        encoder_layer_drop=0.0,
        aux_num_out=None,
    )
    if "wavlm" in kind:
        model = torchaudio.models.wavlm_model(encoder_num_buckets=320, encoder_max_distance=800, **sizes)
    else:
        model = torchaudio.models.wav2vec2_model(**sizes)
    torch.save(randomise(model).state_dict(), tmp_path / "teacher.pth")
    encoder, waveforms = load_teacher(tmp_path / "teacher.pth"), noise(2, 9000)
    given = torch.nn.functional.layer_norm(waveforms, (9000,)) if large else waveforms
    with torch.no_grad():
        theirs = [*model.extract_features(given)[0][:-1], model(given)[0]]  # forward adds Large's final LayerNorm
    assert largest_difference(states(encoder, waveforms)[1:], theirs) < 1e-4


def test_a_teacher_is_frozen_folded_and_in_eval_mode(tmp_path):
    source = random_encoder(weight_norm=True)
    save_official(source, tmp_path / "teacher.pt", "fairseq")
    encoder = load_teacher(str(tmp_path / "teacher.pt"))
    assert not encoder.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert {name for name, _ in encoder.positional_embedding.named_parameters()} == {"conv.weight", "conv.bias"}
    assert relative_difference(states(encoder, noise(1, 4000))[-1], states(source, noise(1, 4000))[-1]) < 1e-5


@pytest.mark.parametrize("trained", [False, True], ids=["random", "trained"])
@pytest.mark.parametrize("how", ["held", "autocast"])
def test_in_bf16_the_targets_are_within_two_percent_of_float32(trained, how):
    if trained:
        encoders = [load_teacher(shared(f"teachers/{name}_small.pt")) for name in ("hubert", "robust_hubert", "wavlm")]
        path = sorted(shared("speech/LibriSpeech/dev-clean").rglob("*.flac"))[0]
        waveforms = data.read_audio(path, 0, 64000)[None]
    else:
        encoders, waveforms = (
            [random_encoder(0), random_encoder(1), random_encoder(2, relative_buckets=320)],
            noise(2, 9000),
        )
    with torch.no_grad():
        exact = aggregate.average([encoder(waveforms, layers=[2, 4]) for encoder in encoders])
        if how == "held":  # as train.py does it
            encoders = [encoder.to(torch.bfloat16) for encoder in encoders]
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            rounded = aggregate.average([encoder(waveforms, layers=[2, 4]) for encoder in encoders])
    for a, b in zip(exact, rounded):
        assert 1e-4 < (a - b).norm() / a.norm() < 0.02


# ---------------------------------------------------------------- forms of checkpoints


def test_the_older_args_of_fairseq_are_read(tmp_path, monkeypatch):
    source = random_encoder(heads=6, **LARGE)
    save_official(source, tmp_path / "new", "fairseq")
    content = torch.load(tmp_path / "new", weights_only=True)
    settings = argparse.Namespace(task="hubert_pretraining", **content["cfg"]["model"], normalize=True)
    torch.save({"args": settings, "cfg": None, "model": content["model"]}, tmp_path / "old")
    assert load_teacher(tmp_path / "old").config == source.config


def fake_fairseq(monkeypatch):
    """Classes as fairseq's checkpoints mention them; gone again before the file is loaded."""
    module = types.ModuleType("fairseq.data.dictionary")
    module.Dictionary = type("Dictionary", (), {"__module__": module.__name__})
    module.Mode = enum.Enum("Mode", {"default": "default", "layer_norm": "layer_norm"}, module=module.__name__)
    module.Mode.__reduce_ex__ = lambda self, protocol: (type(self), (self.value,))
    for name in ("fairseq", "fairseq.data", "fairseq.data.dictionary"):
        monkeypatch.setitem(sys.modules, name, module)
    return module


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before torch 1.6"])
def test_fairseqs_classes_come_out_inert_and_placeholders_give_way_to_the_tensors(legacy, tmp_path, monkeypatch):
    module, source = fake_fairseq(monkeypatch), random_encoder(**LARGE)
    save_official(source, tmp_path / "plain", "fairseq")
    content = torch.load(tmp_path / "plain", weights_only=True)
    dictionary = module.Dictionary()
    dictionary.symbols = ["<s>", "a"]
    content["cfg"]["model"]["extractor_mode"] = module.Mode.layer_norm
    content["task_state"] = {"dictionaries": [dictionary]}
    torch.save(content, tmp_path / "t", _use_new_zipfile_serialization=not legacy)
    for name in ("fairseq", "fairseq.data", "fairseq.data.dictionary"):
        monkeypatch.delitem(sys.modules, name)
    assert load_teacher(tmp_path / "t").config == source.config
    assert "fairseq" not in sys.modules


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before torch 1.6"])
def test_a_pickle_with_foreign_code_is_refused_and_runs_nothing(legacy, tmp_path):
    content = {
        "cfg": {},
        "model": official_state_dict(random_encoder(), "fairseq"),
        "task_state": Canary(tmp_path / "canary"),
    }
    torch.save(content, tmp_path / "t", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match="refused.*mkdir"):
        load_teacher(tmp_path / "t")
    (tmp_path / "bare").write_bytes(pickle.dumps(content["task_state"]))
    with pytest.raises(ValueError, match=str(tmp_path / "bare")):
        load_teacher(tmp_path / "bare")
    assert not (tmp_path / "canary").exists()


def test_weights_of_pretraining_are_passed_over_in_silence(tmp_path, capsys):
    weights = official_state_dict(random_encoder(), "fairseq")
    extras = ["mask_emb", "label_embs_concat", "final_proj.weight", "final_proj.bias", "domain_classifier.0.weight"]
    weights |= {name: torch.zeros(3) for name in extras}
    torch.save({"cfg": {"encoder_attention_heads": 4}, "model": weights}, tmp_path / "t")
    load_teacher(tmp_path / "t")
    assert capsys.readouterr().err == ""


def test_strangers_are_named_in_one_line(tmp_path, capsys):
    weights = official_state_dict(random_encoder(), "fairseq") | {"extra.vars": torch.zeros(3)}
    torch.save({"cfg": {"encoder_attention_heads": 4}, "model": weights}, tmp_path / "t")
    load_teacher(tmp_path / "t")
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "extra.vars" in line


@pytest.mark.parametrize(
    "name", ["encoder.pos_conv_embed.batch_norm.weight", "encoder.layers.0.adapter_layer.norm.bias"]
)
def test_a_stranger_inside_the_encoder_is_refused(name, tmp_path):
    weights = official_state_dict(random_encoder(), "transformers") | {name: torch.zeros(48)}
    torch.save(weights, tmp_path / "bare.bin")
    with pytest.raises(ValueError, match=name):
        load_teacher(tmp_path / "bare.bin")


@pytest.mark.parametrize(
    "name", ["encoder.layers.2.fc1.weight", "encoder.layer_norm.bias", "encoder.pos_conv.0.weight_v"]
)
def test_a_missing_weight_is_named(name, tmp_path):
    save_official(random_encoder(), tmp_path / "t", "fairseq")
    content = torch.load(tmp_path / "t", weights_only=True)
    del content["model"][name]
    torch.save(content, tmp_path / "t")
    with pytest.raises(ValueError, match=name.replace("weight_v", "weight")):
        load_teacher(tmp_path / "t")


@pytest.mark.parametrize(
    "name",
    [
        "layers.0.self_attn.relative_attention_bias.weight",
        "layers.0.self_attn.grep_a",
        "layers.2.self_attn.grep_linear.bias",
    ],
)
def test_a_wavlm_without_a_part_of_its_relative_positions_is_refused(name, tmp_path):
    save_official(random_encoder(relative_buckets=320), tmp_path / "t", "microsoft")
    content = torch.load(tmp_path / "t", weights_only=True)
    del content["model"]["encoder." + name]
    for settings in (content["cfg"], {"encoder_attention_heads": 4}):
        torch.save({"cfg": settings, "model": content["model"]}, tmp_path / "t")
        with pytest.raises(ValueError, match="missing encoder." + name):
            load_teacher(tmp_path / "t")


def test_layers_that_the_settings_promise_must_be_there(tmp_path):
    save_official(random_encoder(), tmp_path / "t", "fairseq")
    content = torch.load(tmp_path / "t", weights_only=True)
    content["model"] = {name: tensor for name, tensor in content["model"].items() if ".layers.3." not in name}
    torch.save(content, tmp_path / "t")
    with pytest.raises(ValueError, match="missing encoder.layers.3"):
        load_teacher(tmp_path / "t")


def damaged_files(folder):
    """(path, a word of the error) of files that are no whole teacher."""
    save_official(random_encoder(), folder / "whole.pt", "fairseq")
    whole = (folder / "whole.pt").read_bytes()
    (folder / "short.pt").write_bytes(whole[: len(whole) // 2])
    (folder / "page.pt").write_text("\n<!DOCTYPE html><html><body>Sign in</body></html>")
    (folder / "empty.pt").write_bytes(b"")
    (folder / "text.pt").write_text("not a checkpoint at all")
    torch.save({"conv1.weight": torch.zeros(3, 3)}, folder / "resnet.pt")
    torch.save([1, 2, 3], folder / "list.pt")
    (folder / "hf").mkdir()
    (folder / "hf" / "config.json").write_text("{")
    (folder / "hf" / "pytorch_model.bin").write_bytes(whole)
    (folder / "bare").mkdir()
    header = b'{"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}'
    (folder / "cut.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    return {
        "short.pt": "damaged",
        "page.pt": "web page",
        "empty.pt": "damaged",
        "text.pt": "damaged",
        "resnet.pt": "not a HuBERT or WavLM",
        "list.pt": "not a HuBERT or WavLM",
        "bare": "config.json",
        "cut.safetensors": "damaged",
    }


def test_damaged_and_foreign_files_are_refused_in_one_line_that_names_them(tmp_path):
    for name, word in damaged_files(tmp_path).items():
        with pytest.raises(ValueError) as error:
            load_teacher(tmp_path / name)
        text = str(error.value)
        assert str(tmp_path / name) in text and word in text and "\n" not in text, text
    with pytest.raises(FileNotFoundError, match="hubert, hubert_large"):
        load_teacher(tmp_path / "nowhere.pt")


def test_a_checkpoint_of_half_precision_gives_a_teacher_in_float32(tmp_path):
    source = random_encoder()
    weights = {name: tensor.half() for name, tensor in official_state_dict(source, "fairseq").items()}
    torch.save({"cfg": {"encoder_attention_heads": 4}, "model": weights}, tmp_path / "t")
    encoder = load_teacher(tmp_path / "t")
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}
    assert relative_difference(states(encoder, noise(1, 4000))[-1], states(source, noise(1, 4000))[-1]) < 1e-2


def test_the_file_works_copied_with_the_two_it_imports_and_torch_only(tmp_path):
    for name in ("teachers.py", "encoder.py", "safe_files.py"):
        shutil.copy(ROOT / name, tmp_path)
    save_official(random_encoder(), tmp_path / "t.pt", "s3prl")
    code = (
        "import sys\n"
        "for name in ('numpy', 'torchaudio', 'soundfile', 'transformers', 'safetensors', 'fairseq'): sys.modules[name] = None\n"
        "import torch\nfrom teachers import load_teacher\n"
        "print([tuple(s.shape) for s in load_teacher('t.pt')(torch.randn(2, 4000), layers=[1, 4])])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment(PYTHONPATH=""), capture_output=True, text=True
    )
    assert done.stdout == "[(2, 12, 48), (2, 12, 48)]\n", done.stderr


def test_teachers_of_one_name_are_told_apart():
    names = teachers.short_names(["hubert", "a/hubert.pt", "wavlm_plus", "b/hubert.pt", "folder/"])
    assert names == ["hubert", "hubert-2", "wavlm_plus", "hubert-3", "folder"]


# ---------------------------------------------------------------- downloads


@pytest.fixture
def server(monkeypatch, tmp_path):
    """Serves one checkpoint on loopback as the address of `hubert`; `server.answer` decides how, `server.asked` counts."""
    save_official(random_encoder(), tmp_path / "t", "fairseq")
    body = (tmp_path / "t").read_bytes()
    torch.save(torch.load(tmp_path / "t", weights_only=True), tmp_path / "old", _use_new_zipfile_serialization=False)
    old = (tmp_path / "old").read_bytes()  # half a file of this kind looks like the start of a whole one
    state = types.SimpleNamespace(asked=collections.Counter(), answer="whole", body=body, seconds=0)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            state.asked[self.path] += 1
            if state.answer == "missing":
                return self.send_error(404)
            time.sleep(state.seconds)
            content = {"page": b"<html>Sign in</html>", "broken old": old}.get(state.answer, body)
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if "broken" in state.answer else content)

        def log_message(self, *_):
            pass

    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    state.url = f"http://127.0.0.1:{running.server_port}/{tmp_path.name}.pt"
    monkeypatch.setitem(teachers.TEACHERS, "hubert", state.url)
    yield state
    running.shutdown()


def cached():
    folder = os.path.join(torch.hub.get_dir(), "checkpoints")
    return {name for name in os.listdir(folder) if not name.endswith(".lock")} if os.path.isdir(folder) else set()


def test_a_name_is_downloaded_once_with_a_progress_bar(server, capsys):
    first = load_teacher("hubert")
    assert "100%" in capsys.readouterr().err
    assert largest_difference(states(load_teacher("hubert"), noise(1, 4000)), states(first, noise(1, 4000))) == 0
    assert sum(server.asked.values()) == 1


@pytest.mark.parametrize("answer", ["broken", "broken old", "page", "missing"])
def test_a_broken_download_leaves_no_file_and_the_next_try_works(server, answer):
    before, server.answer = cached(), answer
    with pytest.raises(OSError, match=server.url) as error:
        load_teacher("hubert")
    assert "\n" not in str(error.value)
    assert cached() == before
    server.answer = "whole"
    load_teacher("hubert")


def test_processes_of_a_machine_download_once_while_the_others_wait(server):
    server.seconds = 3  # long enough for all of them to be there
    code = f"import teachers, os; print(os.path.getsize(teachers.download({server.url!r})))"
    started = [
        subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    sizes = [int(process.communicate(timeout=120)[0]) for process in started]
    assert sizes == [len(server.body)] * 3
    assert sum(server.asked.values()) == 1
