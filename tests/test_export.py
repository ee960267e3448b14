"""What export.py writes loads again, here and in transformers, with equal hidden states."""

import json

import huggingface_hub
import pytest
import torch
import transformers
from conftest import (
    KINDS,
    LARGE,
    SMALL,
    largest_difference,
    noise,
    on_cpu,
    random_encoder,
    random_student,
    refused,
    relative_difference,
    run,
    states,
)

import export
from encoder import normalize
from student import save_student
from teachers import load_teacher

CONVOLUTIONS = tuple((48, kernel, stride) for _, kernel, stride in SMALL.conv_layers)
WITHOUT_PROJECTION = {"conv_layers": CONVOLUTIONS, "projection": False}
FORMATS = [
    ("hubert", "fairseq"),
    ("hubert", "s3prl"),
    ("hubert", "microsoft"),
    ("hubert_large", "fairseq"),
    ("hubert_large", "s3prl"),
    ("wavlm", "microsoft"),
    ("wavlm_large", "microsoft"),
]


@pytest.mark.parametrize("kind, form", FORMATS)
def test_a_saved_teacher_loads_with_equal_states(kind, form, tmp_path):
    source = random_encoder(**KINDS[kind])
    export.save_official(source, tmp_path / "t.pt", form)
    encoder = load_teacher(str(tmp_path / "t.pt"))
    assert encoder.config == source.config
    expected = states(source, noise(1, 4000))
    assert largest_difference(states(encoder, noise(1, 4000)), expected) < 1e-4


def test_a_teacher_without_a_projection_loads_with_equal_states(tmp_path):
    source = random_encoder(**WITHOUT_PROJECTION)
    export.save_official(source, tmp_path / "t.pt", "fairseq")
    found = states(load_teacher(str(tmp_path / "t.pt")), noise(1, 4000))
    assert largest_difference(found, states(source, noise(1, 4000))) < 1e-4


# ------------------------------------------------------------------ transformers


@pytest.mark.parametrize(
    "sizes", [{}, LARGE, WITHOUT_PROJECTION], ids=["base", "large", "no projection"]
)
def test_transformers_loads_a_student_with_equal_states(sizes, tmp_path):
    student, _ = random_student(**sizes)
    export.write_transformers(student, tmp_path / "student")
    model, report = transformers.HubertModel.from_pretrained(
        tmp_path / "student", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for loudness in (1, 0.1, 0.03, 0.01):  # an rms of 0.1 to 0.001
        waveforms = loudness * noise(2, 6000)
        found = states_in_transformers(tmp_path / "student", model, waveforms)
        assert largest_difference(found, states(student.encoder, waveforms)) < 1e-4


def states_in_transformers(folder, model, waveforms):
    extractor = transformers.Wav2Vec2FeatureExtractor.from_pretrained(folder)
    inputs = extractor(list(waveforms.numpy()), sampling_rate=16000, return_tensors="pt")
    with torch.no_grad():
        return model.eval()(inputs["input_values"], output_hidden_states=True).hidden_states


def test_the_card_of_a_student_trained_with_fairseqs_epsilon_says_how_far_quiet_speech_is(tmp_path):
    student, _ = random_student(**LARGE)
    student.encoder.config.normalize_eps = 1e-5
    export.write_transformers(student, tmp_path / "student")
    model = transformers.HubertModel.from_pretrained(tmp_path / "student")
    card = (tmp_path / "student" / "README.md").read_text()
    for rms, louder in ((0.01, "1.05"), (0.003, "1.44"), (0.001, "3.16")):
        waveforms = noise(1, 16000)
        waveforms = rms * (waveforms - waveforms.mean()) / waveforms.std(correction=0)
        here = normalize(waveforms[:, None], eps=1e-5)[:, 0]
        there = normalize(waveforms[:, None], eps=1e-7)[:, 0]
        assert f"{float((there / here).mean()):.2f}" == louder and louder in card
    expected = states(student.encoder, waveforms)[-1]
    found = states_in_transformers(tmp_path / "student", model, waveforms)[-1]
    assert relative_difference(found, expected) > 0.1
    waveforms = torch.nn.functional.layer_norm(waveforms, waveforms.shape)  # as the card says
    with torch.no_grad():
        found = model(waveforms).last_hidden_state
    assert largest_difference([found], [expected]) < 1e-4


def test_a_long_utterance_beside_it_changes_a_short_one_after_export_as_the_card_says(tmp_path):
    student, _ = random_student()
    export.write_transformers(student, tmp_path / "student")
    model = transformers.HubertModel.from_pretrained(tmp_path / "student").eval()
    waveforms = noise(2, 130000)
    waveforms[1, 41600:] = 0
    with torch.no_grad():
        alone = model(waveforms[1:, :41600]).last_hidden_state[0]
        padded = model(waveforms).last_hidden_state[1, : len(alone)]
    assert (padded - alone).norm() > 0.1 * alone.norm()
    assert "one utterance at a time" in (tmp_path / "student" / "README.md").read_text()


def test_with_a_mask_padding_does_not_change_an_exported_large_student_as_its_card_says(tmp_path):
    student, _ = random_student(**LARGE)
    export.write_transformers(student, tmp_path / "student")
    model = transformers.HubertModel.from_pretrained(tmp_path / "student").eval()
    waveforms, mask = noise(2, 30000), torch.ones(2, 30000, dtype=torch.long)
    waveforms[1, 9600:] = mask[1, 9600:] = 0
    with torch.no_grad():
        alone = model(waveforms[1:, :9600]).last_hidden_state[0]
        masked = model(waveforms, attention_mask=mask).last_hidden_state[1, : len(alone)]
        padded = model(waveforms).last_hidden_state[1, : len(alone)]
    assert (masked - alone).norm() < 1e-4 * alone.norm() < 1e-2 * (padded - alone).norm()
    card = (tmp_path / "student" / "README.md").read_text()
    assert "`attention_mask`" in card and "at 16 kHz, each of mean 0 and variance 1" in card


# ------------------------------------------------------------------ the program


@pytest.fixture
def trained(tmp_path):
    """The folder of a run, as train.py leaves it."""
    student, _ = random_student()
    about = {"teachers": ["hubert", "wavlm_plus"], "agg": "avg", "layers": [2, 4], "step": 1200}
    save_student(student, tmp_path / "student.pt", **about, data="LibriSpeech")
    settings = {"agg": "avg", "lr": 2e-4, "batch_size": 24, "data": "/home/me/LibriSpeech"}
    settings |= {"weights": None, "steps": 2000}
    settings |= {"noise": "/home/me/noise", "snr": [0, 20], "noise_probability": 0.5}
    (tmp_path / "config.json").write_text(json.dumps({"settings": settings, "commit": "c0ffee"}))
    return tmp_path


def test_the_model_card_says_how_the_student_was_trained(trained):
    folder = trained / "my-student"
    flags = ["--to", folder, "--language", "en", "--license", "cc-by-4.0"]
    done = run("export.py", trained, *flags, cwd=trained)
    assert done.returncode == 0 and "README.md" in done.stdout
    assert (
        done.stderr
        == f"warning: {trained}/student.pt: after step 1200 of 2000; train.py has not finished\n"
    )
    card = huggingface_hub.ModelCard.load(folder / "README.md")
    assert card.data.language == "en" and card.data.license == "cc-by-4.0"
    assert card.data.library_name == "transformers" and "hubert" in card.data.tags
    facts = ["hubert, wavlm_plus", "avg", "2, 4", "1200", "| training data | LibriSpeech |"]
    facts += ["| language | en |", "lr 0.0002;", "batch_size 24", "c0ffee", "2302.12757"]
    facts += ["snr [0, 20]; noise_probability 0.5"]
    assert [fact for fact in facts if fact not in card.text] == []
    absent = ["/home/me", "not recorded", "weights None"]
    assert [word for word in absent if word in card.text] == []


def test_the_model_card_of_a_weighted_average_on_a_manifest_has_weights_and_no_splits(trained):
    settings = {"agg": "avg", "weights": [1.0, 2.0], "splits": ["train-clean-100"]}
    config = {"settings": settings | {"data": "/home/me/speech.tsv"}}
    (trained / "config.json").write_text(json.dumps(config))
    on_cpu(export, [trained, "--to", trained / "new"])
    text = (trained / "new/README.md").read_text()
    assert "weights [1.0, 2.0]" in text and "splits" not in text


def test_the_model_card_says_what_is_not_recorded(tmp_path):
    student, _ = random_student()
    save_student(student, tmp_path / "student.pt")
    on_cpu(export, [tmp_path / "student.pt", "--to", tmp_path / "new"])
    card = huggingface_hub.ModelCard.load(tmp_path / "new" / "README.md")
    assert card.data.language is None and card.data.license is None
    for fact in ("teachers", "training data", "language", "licence", "commit of the code"):
        assert f"| {fact} | not recorded |" in card.text


def test_a_folder_with_files_and_a_missing_student_are_rejected(trained, capsys):
    line = refused(capsys, export, [trained, "--to", trained])
    assert "not empty" in line
    line = refused(capsys, export, [trained / "none.pt", "--to", trained / "new"])
    assert "none.pt" in line and not (trained / "new").exists()
