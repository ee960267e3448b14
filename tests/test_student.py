"""student.py: the student, its heads, its start, its file."""

import pytest
import torch
from conftest import HEADS, noise, random_encoder, random_student

from student import Student, initialise, load_student, save_student, student_config


def test_predictions_have_the_heads_widths_and_a_loss_reaches_every_weight():
    student = random_student()[0].train()
    predictions = student(noise(2, 4000))
    assert [tuple(p.shape) for p in predictions] == [(2, 12, 48), (2, 12, 96)]
    sum(p.square().sum() for p in predictions).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in student.parameters())


@pytest.mark.parametrize("relative_buckets", [0, 320])
def test_a_student_starts_as_the_teachers_first_layers(relative_buckets):
    teacher = random_encoder(relative_buckets=relative_buckets)
    student = Student(student_config(teacher.config), HEADS).eval()
    initialise(student, teacher)
    reference = random_encoder(layers=2)  # the same network without relative positions
    reference.load_state_dict({k: v for k, v in teacher.state_dict().items() if k in reference.state_dict()})
    with torch.no_grad():
        ours, theirs = student.hidden_states(noise(2, 4000)), reference(noise(2, 4000))
    assert len(ours) == 3
    assert max(float((a - b).abs().max()) for a, b in zip(ours, theirs)) < 1e-5


def test_training_a_student_that_started_from_a_teacher_leaves_the_teacher_as_it_was():
    teacher = random_encoder()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    student = Student(student_config(teacher.config), HEADS)
    initialise(student, teacher)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    sum(p.square().sum() for p in student.train()(noise(2, 4000))).backward()
    optimizer.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    own = student.encoder.positional_embedding.conv.weight
    assert not torch.equal(own, before["positional_embedding.conv.weight"])  # the student did move


def test_a_student_deeper_than_the_teacher_cannot_start_from_it():
    teacher = random_encoder(layers=2)
    with pytest.raises(ValueError, match="3 layers, the first teacher 2"):
        initialise(Student(student_config(teacher.config, layers=3), HEADS), teacher)


def test_gradients_into_the_convolutions_are_scaled_by_a_tenth():
    student = random_student()[0].eval()
    assert student.encoder.config.conv_gradient_scale == 0.1

    def gradients(scale):
        student.encoder.config.conv_gradient_scale = scale
        student.zero_grad()
        sum(p.square().sum() for p in student(noise(2, 4000))).backward()
        return {name: p.grad.clone() for name, p in student.named_parameters()}

    scaled, whole = gradients(0.1), gradients(1.0)
    for name in whole:
        factor = 0.1 if "feature_extractor" in name else 1.0
        assert (scaled[name] - factor * whole[name]).norm() < 1e-5 * whole[name].norm(), name


def test_dropout_works_in_training_only_and_weight_normalisation_stays():
    student = random_student()[0]
    with torch.no_grad():
        assert torch.equal(student(noise(1, 4000))[0], student(noise(1, 4000))[0])
        student.train()
        assert not torch.equal(student(noise(1, 4000))[0], student(noise(1, 4000))[0])
    names = {name for name, _ in student.encoder.positional_embedding.named_parameters()}
    assert names == {"conv.bias", "conv.parametrizations.weight.original0", "conv.parametrizations.weight.original1"}


def test_a_saved_student_comes_back_equal_and_in_plain_types(tmp_path):
    student, _ = random_student()
    save_student(student, tmp_path / "student.pt")
    torch.load(tmp_path / "student.pt", weights_only=True)
    again = load_student(tmp_path / "student.pt")
    assert (
        not again.training
        and again.head_names == ["layer2", "layer4"]
        and again.encoder.config == student.encoder.config
    )
    with torch.no_grad():
        for a, b in zip(
            student.hidden_states(noise(2, 4000), [4000, 3000]), again.hidden_states(noise(2, 4000), [4000, 3000])
        ):
            assert torch.equal(a, b)


def test_files_that_are_no_student_are_refused(tmp_path):
    torch.save({"weights": {}}, tmp_path / "other.pt")
    (tmp_path / "text.pt").write_text("no")
    for name in ("other.pt", "text.pt"):
        with pytest.raises(ValueError, match=name):
            load_student(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="none.pt"):
        load_student(tmp_path / "none.pt")
