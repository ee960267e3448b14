"""student.py: sizes, initialisation and file of the student."""

import os

import pytest
import torch
from conftest import HEADS, largest_difference, noise, random_encoder, random_student, states

from student import Student, initialise, load_student, save_student, student_config


def loss_of(student):
    return sum(p.square().sum() for p in student(noise(2, 4000)))


def test_predictions_have_the_dims_of_the_heads_and_a_loss_reaches_every_weight():
    student = random_student()[0].train()
    assert [tuple(p.shape) for p in student(noise(2, 4000))] == [(2, 12, 48), (2, 12, 96)]
    loss_of(student).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in student.parameters())


@pytest.mark.parametrize("sizes", [{}, {"relative_buckets": 320}, {"pos_depth": 3}])
def test_a_student_starts_as_the_first_layers_of_the_teacher(sizes):
    teacher = random_encoder(**sizes)
    student = Student(student_config(teacher.config), HEADS).eval()
    initialise(student, teacher)
    reference = random_encoder(layers=2, **sizes | {"relative_buckets": 0})
    names = reference.state_dict().keys()
    weights = {name: x for name, x in teacher.state_dict().items() if name in names}
    reference.load_state_dict(weights)
    expected = states(reference, noise(2, 4000))
    assert largest_difference(states(student.encoder, noise(2, 4000)), expected) < 1e-5


def test_training_the_student_does_not_change_the_teacher():
    teacher = random_encoder()
    before = {name: weight.clone() for name, weight in teacher.state_dict().items()}
    student = Student(student_config(teacher.config), HEADS)
    initialise(student, teacher)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    loss_of(student.train()).backward()
    optimizer.step()
    assert all(torch.equal(x, before[name]) for name, x in teacher.state_dict().items())
    trained = student.encoder.positional_embedding.conv.weight
    assert not torch.equal(trained, before["positional_embedding.conv.weight"])


def test_a_weight_of_the_student_that_the_teacher_lacks_is_an_error():
    teacher = random_encoder()
    weights = teacher.state_dict()
    weights["layers.0.renamed.weight"] = weights.pop("layers.0.ffn_in.weight")
    teacher.state_dict = lambda: weights
    with pytest.raises(AssertionError, match="layers.0.ffn_in.weight"):
        initialise(Student(student_config(teacher.config), HEADS), teacher)


def test_a_student_deeper_than_the_teacher_cannot_start_from_it():
    teacher = random_encoder(layers=2)
    with pytest.raises(ValueError, match="a student of 3 layers, a teacher of 2"):
        initialise(Student(student_config(teacher.config, layers=3), HEADS), teacher)


@pytest.mark.parametrize("dim, heads", [(32, 1), (112, 2), (192, 3), (100, 2)])
def test_a_thin_student_has_heads_of_at_most_64_dims_and_the_teachers_convolutions(dim, heads):
    teacher = random_encoder(layers=2, relative_buckets=320)
    config = student_config(teacher.config, layers=6, dim=dim)
    assert (config.dim, config.ffn_dim, config.attention_heads, config.layers) == (
        dim,
        4 * dim,
        heads,
        6,
    )
    student = Student(config, HEADS)
    before = {name: weight.clone() for name, weight in student.state_dict().items()}
    initialise(student, teacher)
    copied = {name for name, x in student.state_dict().items() if not torch.equal(x, before[name])}
    names = {f"encoder.{name}" for name in teacher.state_dict() if "extractor" in name}
    assert copied == names
    assert [tuple(p.shape) for p in student(noise(2, 4000))] == [(2, 12, 48), (2, 12, 96)]


def test_the_gradient_into_the_convolutions_is_scaled_by_a_tenth():
    student = random_student()[0]
    assert student.encoder.config.conv_gradient_scale == 0.1
    gradients = []
    for scale in (0.1, 1.0):
        student.encoder.config.conv_gradient_scale = scale
        student.zero_grad()
        loss_of(student).backward()
        gradients.append({name: p.grad.clone() for name, p in student.named_parameters()})
    for name, full in gradients[1].items():
        factor = 0.1 if "feature_extractor" in name else 1.0
        assert (gradients[0][name] - factor * full).norm() < 1e-5 * full.norm(), name


def test_dropout_is_active_in_training_mode_alone():
    student = random_student()[0]
    with torch.no_grad():
        assert torch.equal(student(noise(1, 4000))[0], student(noise(1, 4000))[0])
        student.train()
        assert not torch.equal(student(noise(1, 4000))[0], student(noise(1, 4000))[0])


def test_a_saved_student_loads_equal_from_plain_types(tmp_path):
    student, _ = random_student()
    os.makedirs(tmp_path / "run")
    save_student(student, tmp_path / "run" / "student.pt", step=7)
    assert torch.load(tmp_path / "run" / "student.pt", weights_only=True)["step"] == 7
    for path in (tmp_path / "run" / "student.pt", tmp_path / "run"):
        loaded = load_student(path)
        assert not loaded.training and loaded.head_names == ["layer2", "layer4"]
        assert loaded.encoder.config == student.encoder.config
        with torch.no_grad():
            expected = student.hidden_states(noise(2, 4000), [4000, 3000])
            found = loaded.hidden_states(noise(2, 4000), [4000, 3000])
            assert largest_difference(found, expected) == 0
            assert largest_difference(loaded(noise(2, 4000)), student(noise(2, 4000))) == 0


def test_a_file_without_an_epsilon_keeps_the_one_it_was_trained_with(tmp_path):
    student, teacher = random_student()
    assert student.encoder.config.normalize_eps == 1e-7 != teacher.config.normalize_eps
    save_student(student, tmp_path / "student.pt")
    content = torch.load(tmp_path / "student.pt", weights_only=True)
    del content["config"]["normalize_eps"]
    torch.save(content, tmp_path / "student.pt")
    assert load_student(tmp_path / "student.pt").encoder.config.normalize_eps == 1e-5


def test_other_files_are_errors_that_name_them(tmp_path):
    torch.save({"weights": {}}, tmp_path / "other.pt")
    torch.save([1], tmp_path / "list.pt")
    (tmp_path / "text.pt").write_text("no")
    for name in ("other.pt", "list.pt", "text.pt"):
        with pytest.raises(ValueError, match=name):
            load_student(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="none.pt"):
        load_student(tmp_path / "none.pt")
