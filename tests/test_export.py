"""export.py: what is written in an official form loads again, here and in the software whose form it is."""

import pytest
import torch
import transformers
from conftest import KINDS, LARGE, largest_difference, noise, random_encoder, random_student, run, states

from encoder import EncoderConfig
from export import save_official
from student import save_student
from teachers import load_teacher

FORMS = [
    (kind, form)
    for kind in KINDS
    for form in ("fairseq", "s3prl", "microsoft")
    if "hubert" in kind or form == "microsoft"
]


@pytest.mark.parametrize("kind, form", FORMS)
def test_what_is_saved_in_an_official_form_loads_again(kind, form, tmp_path):
    source = random_encoder(**KINDS[kind])
    save_official(source, tmp_path / "t", form)
    encoder = load_teacher(tmp_path / "t")
    assert encoder.config == source.config
    assert largest_difference(states(encoder, noise(1, 4000)), states(source, noise(1, 4000))) < 1e-4


def test_a_network_without_a_projection_loads(tmp_path):
    source = random_encoder(conv_layers=tuple((48, k, s) for _, k, s in EncoderConfig().conv_layers), projection=False)
    save_official(source, tmp_path / "t", "fairseq")
    assert (
        largest_difference(states(load_teacher(tmp_path / "t"), noise(1, 4000)), states(source, noise(1, 4000))) < 1e-4
    )


# ---------------------------------------------------------------- transformers


CONVS = tuple((48, kernel, stride) for _, kernel, stride in random_encoder().config.conv_layers)


@pytest.mark.parametrize(
    "sizes", [{}, LARGE, {"conv_layers": CONVS, "projection": False}], ids=["base", "large", "no projection"]
)
def test_transformers_loads_a_written_student_with_equal_hidden_states(sizes, tmp_path):
    student, _ = random_student(**sizes)
    save_student(student, tmp_path / "student.pt")
    done = run("export.py", "student.pt", "--to", "folder", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    model, report = transformers.HubertModel.from_pretrained(tmp_path / "folder", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    extractor = transformers.Wav2Vec2FeatureExtractor.from_pretrained(tmp_path / "folder")
    assert extractor.do_normalize == student.encoder.config.normalize
    waveforms = noise(2, 6000)
    given = torch.nn.functional.layer_norm(waveforms, (6000,)) if extractor.do_normalize else waveforms
    with torch.no_grad():
        output = model.eval()(given, output_hidden_states=True)
        ours = student.hidden_states(waveforms)
    theirs = [*output.hidden_states[:-1], output.last_hidden_state]
    assert max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True)) < 1e-4


def test_export_py_refuses_in_one_line(tmp_path):
    student, _ = random_student()
    save_student(student, tmp_path / "student.pt")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    for source, folder, word in [("student.pt", "full", "full"), ("none.pt", "new", "none.pt")]:
        done = run("export.py", source, "--to", folder, cwd=tmp_path)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and word in done.stderr
    assert (tmp_path / "full" / "mine.txt").read_text() == "mine" and not (tmp_path / "new").exists()


def test_help_says_what_export_py_does(tmp_path):
    done = run("export.py", "--help", cwd=tmp_path)
    assert done.returncode == 0 and "--to" in done.stdout


def test_the_folder_has_a_model_card_of_what_the_student_holds(tmp_path):
    student, _ = random_student()
    save_student(
        student, tmp_path / "student.pt", step=1200, teachers=["hubert", "wavlm_plus"], agg="avg", layers=[2, 4]
    )
    save_student(student, tmp_path / "old.pt")  # as written before teachers were kept
    for name in ("student", "old"):
        assert run("export.py", f"{name}.pt", "--to", f"my-{name}", cwd=tmp_path).returncode == 0
    card = (tmp_path / "my-student" / "README.md").read_text()
    front = card.split("---\n")[1]
    assert "library_name: transformers\n" in front and "- hubert\n" in front
    for fact in ("hubert, wavlm_plus", "layerwise average", "2, 4", "layer2, layer4", "1,200", "| 48 |", "2302.12757"):
        assert fact in card, fact
    assert (tmp_path / "my-old" / "README.md").read_text().count("not recorded") == 4
