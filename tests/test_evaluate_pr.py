"""evaluate_pr.py as a user runs it: on the synthetic corpus, on real speech where it lies beside the checkout."""

import functools
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import types

import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from conftest import ROOT, environment, flags_of, noise, on_cpu, read_symbols, refused, run, shared

import demo
import evaluate_pr
import probe
from states import States


def flags(corpus, out, **more):
    settings = dict(upstream="fbank", data=corpus, lexicon=corpus / "lexicon.txt", out=out)
    settings |= dict(steps=60, batch_size=16, lr=1e-2, workers=0, log_every=20, eval_every=20, seed=1)
    return flags_of(settings | more)


def score(corpus, out, **more):
    """result.json of a run in this process."""
    on_cpu(evaluate_pr, flags(corpus, out, **more))
    return json.loads((out / "result.json").read_text())


def refusal(capsys, arguments):
    return refused(capsys, evaluate_pr, arguments)


# ---------------------------------------------------------------- the score


@pytest.fixture(scope="module")
def fbank(corpus, tmp_path_factory):
    """A finished run on filter banks: (its folder, its result)."""
    out = tmp_path_factory.mktemp("fbank") / "pr"
    return out, score(corpus, out, steps=240, eval_every=60)


def test_a_probe_learns_to_read_phones_from_filter_banks(fbank):
    _, result = fbank
    assert [step for step, _ in result["curve"]] == [60, 120, 180, 240]
    assert result["per"] < 0.75 and result["curve"][-1][1] < 0.75 * result["curve"][0][1]
    assert result["best_step"] == min(result["curve"], key=lambda pair: pair[1])[0]
    low, high = result["interval"]
    assert low < result["per"] < high


def test_a_public_scorer_finds_the_same_per_in_the_files(fbank):
    jiwer = pytest.importorskip("jiwer")
    out, result = fbank
    hypotheses, references = read_symbols(out / "test.hyp"), read_symbols(out / "test.ref")
    assert list(hypotheses) == list(references) and len(references) == 16
    found = jiwer.process_words(
        [" ".join(phones) for phones in references.values()], [" ".join(phones) for phones in hypotheses.values()]
    )
    assert found.wer == pytest.approx(result["per"], abs=1e-12)
    edits = result["substitutions"] + result["deletions"] + result["insertions"]
    assert edits == found.substitutions + found.deletions + found.insertions
    assert result["reference_symbols"] == sum(map(len, references.values()))
    assert result["per"] == edits / result["reference_symbols"]


def test_the_references_are_the_transcripts_first_pronunciations(fbank):
    out, result = fbank
    name, phones = next(iter(read_symbols(out / "test.ref").items()))
    speaker = name.split("-")[0]
    transcript = (out / f"{result['settings']['data']}/test-clean/{speaker}/1/{speaker}-1.trans.txt").read_text()
    words = next(line for line in transcript.splitlines() if line.startswith(name)).split()[1:]
    assert phones == " ".join(demo.WORDS[word] for word in words).split()


def test_the_result_holds_what_was_run(fbank, corpus):
    _, result = fbank
    assert result["task"] == "phoneme recognition" and result["layer_weights"] == [1.0]
    assert result["upstream"] | {"states": 1, "dim": 240, "path": "fbank"} == result["upstream"]
    assert result["counts"]["test-clean"]["utterances"] == 16 and result["counts"]["train-clean-100"]["left_out"] == 0
    assert result["settings"]["lr"] == 1e-2 and result["settings"]["lexicon"] == [str(corpus / "lexicon.txt")]
    assert {"torch", "torchaudio", "numpy", "python"} <= result["versions"].keys()
    assert all(seconds > 0 for seconds in result["seconds"].values())
    assert set(result["phones"]) == set(" ".join(demo.WORDS.values()).split())


@pytest.mark.parametrize("upstream", ["student.pt", "hubert.pt"])
def test_hypotheses_do_not_depend_on_the_batch_size(upstreams, corpus, tmp_path, upstream):
    score(corpus, tmp_path, upstream=upstreams / upstream, steps=40)
    best = torch.load(tmp_path / "last.pt", weights_only=True)["progress"]["rates"][0]["best"]["probe"]
    lexicon = evaluate_pr.read_lexicon([corpus / "lexicon.txt"])
    phones = {phone: number for number, phone in enumerate(sorted(set(sum(lexicon.values(), []))), start=1)}
    spell = functools.partial(evaluate_pr.pronounce, lexicon=lexicon, numbers=phones)
    split = evaluate_pr.read_split(str(corpus), "test-clean", spell)
    network = probe.Upstream(str(upstreams / upstream))
    model = probe.Probe(network.states, evaluate_pr.PhoneHead(network.dim, len(phones)))
    model.load_state_dict(best)
    alone, together = (
        probe.predict([model], split, States(network, split.corpus), evaluate_pr.ctc_greedy, size)[0]
        for size in (1, 16)
    )
    assert alone == together and len(set(map(str, alone))) > 3
    names = sorted(phones)
    written = [[names[number - 1] for number in hypothesis] for hypothesis in together]
    assert list(read_symbols(tmp_path / "test.hyp").values()) == written


def test_the_score_is_the_same_wherever_the_states_are_kept(upstreams, corpus, tmp_path, capsys):
    results = {}
    for name, where in {"memory": {}, "nowhere": dict(cache_memory=0), "file": dict(cache=tmp_path / "c")}.items():
        results[name] = score(corpus, tmp_path / name, upstream=upstreams / "hubert.pt", steps=20, **where)
        said = {"memory": "kept in memory", "nowhere": "for every batch again", "file": f"kept in {tmp_path / 'c'}"}
        assert said[name] in capsys.readouterr().out
    for result in results.values():
        assert result["per"] == pytest.approx(results["memory"]["per"], abs=0.02)
        assert result["layer_weights"] == pytest.approx(results["memory"]["layer_weights"], abs=2e-3)
    assert len(list((tmp_path / "c").glob("*/*.states"))) == 3


def test_training_leaves_the_upstream_as_it_was_and_moves_its_weights(upstreams, corpus, tmp_path, monkeypatch):
    kept = []
    upstream = probe.Upstream
    monkeypatch.setattr(probe, "Upstream", lambda *a: kept.append(upstream(*a)) or kept[-1])
    before = upstream(str(upstreams / "student.pt"))
    result = score(corpus, tmp_path, upstream=upstreams / "student.pt", cache_memory=0, steps=20)
    for name, weight in kept[0].encoder.state_dict().items():
        assert torch.equal(weight, before.encoder.state_dict()[name]), name
    assert len(result["layer_weights"]) == 3 and sum(result["layer_weights"]) == pytest.approx(1)
    assert max(result["layer_weights"]) - min(result["layer_weights"]) > 0.01


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_score_of_the_cpu(upstreams, corpus, tmp_path):
    settings = dict(upstream=upstreams / "hubert.pt", precision="fp32", steps=200)
    done = run("evaluate_pr.py", *flags(corpus, tmp_path / "gpu", **settings), cwd=tmp_path, CUDA_VISIBLE_DEVICES="0")
    assert done.returncode == 0 and "fp32 on cuda" in done.stdout, done.stderr
    found = json.loads((tmp_path / "gpu" / "result.json").read_text())
    assert found["per"] == pytest.approx(score(corpus, tmp_path / "cpu", **settings)["per"], abs=0.05)


@pytest.mark.slow
def test_real_speech_is_read_better_by_a_trained_teacher_than_chance(tmp_path):
    speech, teacher = shared("speech"), shared("teachers/hubert_small.pt")
    for split, count in (("train-clean-100", 64), ("dev-clean", 16), ("test-clean", 16)):  # a part, for speed
        source = speech / "LibriSpeech" / split / "9001" / "1001"
        if split == "train-clean-100":
            source = speech / "LibriSpeech" / split / "9003" / "1001"
        place = tmp_path / "data" / split / source.parent.name / "1001"
        place.mkdir(parents=True)
        names = sorted(path.stem for path in source.glob("*.flac"))[:count]
        for name in names:
            os.symlink(source / f"{name}.flac", place / f"{name}.flac")
        lines = next(source.glob("*.trans.txt")).read_text().splitlines()
        (place / "x.trans.txt").write_text("".join(f"{line}\n" for line in lines if line.split()[0] in names))
    lexicon = speech / "lexicon.txt"
    result = score(tmp_path / "data", tmp_path / "out", upstream=teacher, lexicon=lexicon, steps=60, eval_every=60)
    assert 0 < result["per"] < 0.95 and len(result["layer_weights"]) == 7


# ---------------------------------------------------------------- CTC and edits


def test_greedy_decoding_merges_repeats_keeps_doubles_and_stops_at_an_utterances_end():
    paths = torch.tensor([[0, 2, 2, 0, 2, 1, 1], [1, 1, 1, 0, 0, 3, 3]])
    outputs = torch.nn.functional.one_hot(paths, 4).float().log_softmax(-1)
    assert evaluate_pr.ctc_greedy(outputs, torch.tensor([7, 4])) == [[2, 2, 1], [1]]


def test_an_utterance_with_fewer_frames_than_ctc_needs_is_known_and_does_not_spoil_the_loss():
    label = torch.tensor([1, 1, 2])
    assert evaluate_pr.ctc_frames(label) == 4 and evaluate_pr.ctc_frames(torch.tensor([1, 2, 1])) == 3
    outputs = torch.randn(2, 6, 4, requires_grad=True)
    loss = evaluate_pr.ctc_loss(outputs.log_softmax(-1), torch.tensor([6, 3]), [label, label])
    alone = evaluate_pr.ctc_loss(outputs[:1].log_softmax(-1), torch.tensor([6]), [label])
    assert torch.isfinite(loss) and loss.item() == pytest.approx(alone.item() / 2)
    loss.backward()
    assert torch.isfinite(outputs.grad).all() and not outputs.grad[1].any()
    enough = evaluate_pr.ctc_loss(outputs[1:].log_softmax(-1), torch.tensor([4]), [label])
    assert enough > 0


def test_edits_are_counted_by_kind_and_add_up_to_the_edit_distance():
    assert evaluate_pr.alignment("abcd", "abcd") == (0, 0, 0)
    assert evaluate_pr.alignment("abcd", "axcd") == (1, 0, 0)
    assert evaluate_pr.alignment("abcd", "acd") == (0, 1, 0)
    assert evaluate_pr.alignment("abcd", "abxcd") == (0, 0, 1)
    assert evaluate_pr.alignment("", "ab") == (0, 0, 2) and evaluate_pr.alignment("ab", "") == (0, 2, 0)
    assert evaluate_pr.alignment("ab", "ba") == (0, 1, 1)  # not two substitutions: one symbol is right
    rng = np.random.default_rng(0)
    for _ in range(100):
        one, other = (rng.integers(0, 4, rng.integers(0, 12)).tolist() for _ in range(2))
        counts = evaluate_pr.alignment(one, other)
        assert sum(counts) == torchaudio.functional.edit_distance(one, other)
        assert counts[2] - counts[1] == len(other) - len(one)


def test_edits_of_a_set_are_distances_and_lengths_of_the_references():
    wrong, total = evaluate_pr.edits([[1, 2, 3], [4]], [[1, 3], [4, 4, 4]])
    assert wrong.tolist() == [1, 2] and total.tolist() == [3, 1]


# ---------------------------------------------------------------- interruptions


def comparable(result):
    return {key: value for key, value in result.items() if key not in ("seconds", "settings")}


@pytest.fixture(scope="module")
def whole(upstreams, corpus, tmp_path_factory):
    """An uninterrupted run to compare with: (its folder, the settings beside flags')."""
    settings = dict(upstream=upstreams / "hubert.pt", steps=120, eval_every=40, log_every=1)
    out = tmp_path_factory.mktemp("whole") / "pr"
    assert run("evaluate_pr.py", *flags(corpus, out, **settings), cwd=out.parent).returncode == 0
    return out, settings


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, *(pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGINT, signal.SIGKILL))],
    ids=["SIGTERM", "Ctrl-C", "kill -9"],
)
def test_a_run_that_is_ended_and_started_again_scores_exactly_the_same(corpus, whole, tmp_path, number):
    out, settings = whole
    command = [sys.executable, str(ROOT / "evaluate_pr.py"), *flags(corpus, tmp_path / "pr", **settings)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(command, cwd=tmp_path, env=environment(), **pipes)
    for line in process.stdout:
        if line.startswith("step  50/120"):
            process.send_signal(number)
            break
    errors = process.communicate(timeout=120)[1]
    saved = torch.load(tmp_path / "pr" / "last.pt", weights_only=True)["progress"]
    if number == signal.SIGKILL:
        assert process.returncode == -9 and saved["step"] == saved["scored"] == 40
    else:
        assert process.returncode == 128 + number and errors.count("\n") == 1, errors
        assert f"after step {saved['step']} of 120" in errors and 50 <= saved["step"] < 120
    assert not (tmp_path / "pr" / "result.json").exists()

    resumed = run("evaluate_pr.py", *flags(corpus, tmp_path / "pr", **settings), cwd=tmp_path)
    assert resumed.returncode == 0 and f"resuming after step {saved['step']}" in resumed.stdout, resumed.stderr
    expected, found = (json.loads((folder / "result.json").read_text()) for folder in (out, tmp_path / "pr"))
    assert comparable(found) == comparable(expected)
    for name in ("test.hyp", "test.ref"):
        assert (tmp_path / "pr" / name).read_bytes() == (out / name).read_bytes()


def test_a_finished_run_is_left_as_it_is_and_its_result_shown_again(fbank, corpus, capsys):
    out, result = fbank
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert score(corpus, out, steps=240, eval_every=60) == result
    said = capsys.readouterr().out
    assert "finished" in said and f"{result['per']:.2%}" in said and "state  0" in said
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before


# ---------------------------------------------------------------- the lexicon and the transcripts


def copied(corpus, folder):
    """A copy of the synthetic corpus that a test may spoil."""
    shutil.copytree(corpus, folder)
    return folder


def transcript(folder, split):
    """The first transcript of a split, and its first line's ID and words."""
    path = sorted((folder / split).glob("*/*/*.trans.txt"))[0]
    name, *words = path.read_text().splitlines()[0].split()
    return path, name, words


def test_an_utterance_with_an_unknown_word_is_left_out_counted_and_the_word_listed(corpus, tmp_path, capsys):
    folder = copied(corpus, tmp_path / "corpus")
    path, name, _ = transcript(folder, "test-clean")
    path.write_text(path.read_text().replace(f"{name} ", f"{name} XYZZY ", 1))
    result = score(folder, tmp_path / "out", steps=2)
    assert result["counts"]["test-clean"] | {"utterances": 15, "left_out": 1} == result["counts"]["test-clean"]
    assert result["words_not_in_the_lexicon"]["test-clean"] == {"XYZZY": 1}
    assert name not in read_symbols(tmp_path / "out" / "test.ref") and name not in read_symbols(
        tmp_path / "out" / "test.hyp"
    )
    said = capsys.readouterr().out
    assert "XYZZY" in said and "1 left out" in said


def test_the_first_pronunciation_of_several_lexicons_counts(tmp_path):
    (tmp_path / "a.txt").write_text(";;; a comment\nREAD  R EH1 D\nREAD\tR IY1 D\n\n")
    (tmp_path / "b.txt").write_text("READ X\nBOOK B UH1 K\n")
    for arguments in (["--lexicon", "a.txt,b.txt"], ["--lexicon", "a.txt", "b.txt"]):
        assert evaluate_pr.parse(["--upstream", "fbank", *arguments]).lexicon == ["a.txt", "b.txt"]
    lexicon = evaluate_pr.read_lexicon([tmp_path / "a.txt", tmp_path / "b.txt"])
    assert lexicon == {"READ": ["R", "EH1", "D"], "BOOK": ["B", "UH1", "K"]}


def test_kaldis_lexicon_with_probabilities_is_understood_and_a_mixture_is_refused(tmp_path):
    (tmp_path / "lexiconp.txt").write_text("READ 1.0 R EH1 D\nREAD 0.5 R IY1 D\nBOOK 1 B UH1 K\nA 2.5e-05 AH0\n")
    lexicon = evaluate_pr.read_lexicon([tmp_path / "lexiconp.txt"])
    assert lexicon == {"READ": ["R", "EH1", "D"], "BOOK": ["B", "UH1", "K"], "A": ["AH0"]}
    (tmp_path / "mixed.txt").write_text("READ R EH1 D\nBOOK 0.5 B UH1 K\n")
    with pytest.raises(ValueError, match="line 2: a probability"):
        evaluate_pr.read_lexicon([tmp_path / "mixed.txt"])
    (tmp_path / "tones.txt").write_text("MA m a 1\nMAO m ao 0\n")
    assert evaluate_pr.read_lexicon([tmp_path / "tones.txt"])["MA"] == ["m", "a", "1"]


def test_a_byte_order_mark_costs_no_word(corpus, tmp_path):
    folder = copied(corpus, tmp_path / "corpus")
    for path in (folder / "lexicon.txt", transcript(folder, "dev-clean")[0]):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    result = score(folder, tmp_path / "out", steps=2)
    assert not any(result["words_not_in_the_lexicon"].values()) and result["counts"]["dev-clean"]["utterances"] == 16


@pytest.mark.parametrize(
    "splits", ["dev-clean,test-clean,test-clean", "dev-clean,linked,test-clean", "dev-clean,test-clean,."]
)
def test_splits_that_share_files_are_refused(corpus, tmp_path, capsys, splits):
    folder = copied(corpus, tmp_path / "corpus")
    (folder / "linked").symlink_to(folder / "test-clean")
    line = refusal(capsys, flags(folder, tmp_path / "out", splits=splits))
    assert "share files, such as" in line and "--splits" in line


def test_a_run_of_the_evaluation_goes_on_from_another_directory(fbank, corpus, tmp_path):
    shutil.copytree(fbank[0], tmp_path / "out")
    os.remove(tmp_path / "out" / "result.json")
    settings = dict(steps=240, eval_every=60, data="../" + corpus.name, lexicon="../" + corpus.name + "/lexicon.txt")
    (corpus.parent / "elsewhere").mkdir()
    done = run("evaluate_pr.py", *flags(corpus, tmp_path / "out", **settings), cwd=corpus.parent / "elsewhere")
    assert done.returncode == 0 and "resuming after step 240" in done.stdout, done.stderr
    assert json.loads((tmp_path / "out" / "result.json").read_text())["per"] == fbank[1]["per"]


def test_the_folder_of_a_run_stands_for_its_student(upstreams, corpus, tmp_path):
    (tmp_path / "run").mkdir()
    shutil.copy(upstreams / "student.pt", tmp_path / "run")
    args = evaluate_pr.parse(["--upstream", str(tmp_path / "run")])
    assert args.upstream == str(tmp_path / "run" / "student.pt") and args.out == str(tmp_path / "run" / "pr")


def test_utterances_with_fewer_frames_than_phones_are_counted(corpus, upstreams, tmp_path):
    folder = copied(corpus, tmp_path / "corpus")
    path, name, _ = transcript(folder, "train-clean-100")
    soundfile.write(path.parent / f"{name}.flac", noise(1200).numpy(), 16000)  # three frames
    result = score(folder, tmp_path / "out", upstream=upstreams / "student.pt", steps=20)
    assert result["counts"]["train-clean-100"]["fewer_frames_than_needed"] == 1
    assert result["counts"]["test-clean"]["fewer_frames_than_needed"] == 0


# ---------------------------------------------------------------- bad input, defaults and help


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(data="nowhere"), ["nowhere", "--data"]),
        (dict(splits="train-clean-100,dev-clean,test-other"), ["test-other", "--splits"]),
        (dict(splits="train-clean-100,dev-clean"), ["--splits", "three"]),
        (dict(lexicon="nowhere.txt"), ["nowhere.txt", "--lexicon", "openslr"]),
        (dict(lexicon="{tmp}/bad.txt"), ["bad.txt, line 3", "SHE"]),
        (dict(lexicon="{tmp}/empty.txt"), ["empty.txt", "empty"]),
        (dict(lexicon="{tmp}/binary.txt"), ["binary.txt", "UTF-8"]),
        (dict(lexicon="{tmp}/foreign.txt"), ["no transcript can be used", "not in the lexicon"]),
        (dict(upstream="nowhere.pt"), ["nowhere.pt", "no such upstream", "wavlm_plus"]),
        (dict(upstream="{upstreams}/other.pt"), ["other.pt", "web page"]),
        (dict(batch_size=500), ["a batch of 500", "132 utterances"]),
        (dict(steps=0), ["--steps", "1 or more"]),
        (dict(seed=2**64), ["--seed", "2^64"]),
        (dict(lr="fast"), ["--lr", "fast"]),
        (dict(lr="1e-2,1e-2"), ["--lr", "once"]),
        (dict(states="1,x"), ["--states", "0,4,12"]),
        (dict(upstream="{upstreams}/hubert.pt", states="0,9"), ["--states 9", "0 to 4"]),
        (dict(cache_memory=2), ["--cache-memory", "from 0 to 1"]),
        (dict(out="{tmp}/strange"), ["strange", "--out"]),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_bad_input_is_refused_in_one_line_before_anything_is_written(
    corpus, upstreams, capsys, tmp_path, change, words
):
    (tmp_path / "bad.txt").write_text("SEE S IY1\n\nSHE\n")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "binary.txt").write_bytes(b"SEE \xff\xfe\n")
    (tmp_path / "foreign.txt").write_text("HUND HH UH1 N D\n")
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "last.pt").write_text("mine")
    change = {key: str(value).format(tmp=tmp_path, upstreams=upstreams) for key, value in change.items()}
    line = refusal(capsys, flags(corpus, **{"out": tmp_path / "out", **change}))
    assert all(word in line for word in words), line
    assert not (tmp_path / "out").exists() and os.listdir(tmp_path / "strange") == ["last.pt"]


def test_a_transcript_without_audio_is_refused_by_file_and_line(corpus, capsys, tmp_path):
    folder = copied(corpus, tmp_path / "corpus")
    path, name, _ = transcript(folder, "dev-clean")
    os.remove(path.parent / f"{name}.flac")
    line = refusal(capsys, flags(folder, tmp_path / "out"))
    assert f"{path}, line 1" in line and name in line


def test_audio_that_cannot_be_read_in_mid_run_is_named_and_the_run_can_go_on_when_it_is_mended(
    corpus, capsys, tmp_path
):
    folder = copied(corpus, tmp_path / "corpus")
    path, name, _ = transcript(folder, "train-clean-100")
    audio = path.parent / f"{name}.flac"
    whole = audio.read_bytes()
    audio.write_bytes(whole[: len(whole) // 2])  # the header is whole
    line = refusal(capsys, flags(folder, tmp_path / "out", steps=10))
    assert str(audio) in line
    audio.write_bytes(whole)
    assert score(folder, tmp_path / "out", steps=10)["counts"]["train-clean-100"]["utterances"] == 132


def test_what_cannot_be_used_is_left_out_and_counted(corpus, tmp_path, capsys):
    folder = copied(corpus, tmp_path / "corpus")
    path, name, _ = transcript(folder, "test-clean")
    soundfile.write(path.parent / "untold.flac", np.zeros(8000), 16000)
    soundfile.write(path.parent / "short.flac", np.zeros(300), 16000)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([name, *lines[1:], "short SEE"]) + "\n")
    counts = score(folder, tmp_path / "out", steps=2)["counts"]["test-clean"]
    assert (counts["utterances"], counts["left_out"]) == (15, 3)
    said = capsys.readouterr().out
    assert all(reason in said for reason in ("no words", "no transcript", "300 samples, fewer than 400"))
    assert name not in read_symbols(tmp_path / "out" / "test.ref")


def test_another_runs_folder_and_changed_data_are_refused_and_named(corpus, upstreams, capsys, tmp_path):
    folder = copied(corpus, tmp_path / "corpus")
    score(folder, tmp_path / "out", steps=2)
    line = refusal(capsys, flags(folder, tmp_path / "out", steps=2, lr=2e-3))
    assert "--lr was 0.01, is 0.002" in line and "--steps" not in line
    path, name, words = transcript(folder, "dev-clean")
    path.write_text(
        path.read_text().replace(f"{name} {words[0]}", f"{name} SHAH" if words[0] != "SHAH" else f"{name} SEE", 1)
    )
    line = refusal(capsys, flags(folder, tmp_path / "out", steps=2))
    assert "dev-clean" in line and "test-clean" not in line


def test_the_protocols_defaults_are_superbs():
    args = evaluate_pr.parse(["--upstream", "runs/avg/student.pt"])
    assert (args.steps, args.batch_size, args.lr) == (100_000, 32, 1e-2)
    assert args.splits == "train-clean-100,dev-clean,test-clean" or args.splits == [
        "train-clean-100",
        "dev-clean",
        "test-clean",
    ]
    assert args.out == "runs/avg/pr" and evaluate_pr.parse(["--upstream", "hubert"]).out == "runs/hubert/pr"


def test_help_documents_every_setting_with_its_default(capsys):
    with pytest.raises(SystemExit):
        evaluate_pr.parse(["--help"])
    text = capsys.readouterr().out
    for flag in (
        "upstream",
        "data",
        "lexicon",
        "steps",
        "batch-size",
        "lr",
        "out",
        "seed",
        "workers",
        "precision",
        "cache",
    ):
        assert f"--{flag}" in text
    assert text.count("default: ") >= 12


# ---------------------------------------------------------------- what a run would take


def planned(program, arguments, capsys):
    """(the lines of --plan, the seconds it expects of states, steps, scores), by a clock that goes a second at each look."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(probe, "time", types.SimpleNamespace(monotonic=itertools.count().__next__))
        on_cpu(program, [*arguments, "--plan"])
    lines = capsys.readouterr().out.splitlines()
    assert end.value.code == 0
    clocks = re.fullmatch(r"about \S+: states (\S+), [\d,]+ steps (\S+), scores ([\d:]+).*", lines[-1]).groups()
    return lines, [sum(int(part) * 60**i for i, part in enumerate(reversed(clock.split(":")))) for clock in clocks]


def test_a_plan_says_what_the_run_would_take_from_four_of_its_steps_and_writes_nothing(corpus, tmp_path, capsys):
    def expected(**more):
        settings = dict(steps=4000, eval_every=10, batch_size=2) | more
        return planned(evaluate_pr, flags(corpus, tmp_path / "out", **settings), capsys)

    lines, (states, steps, scores) = expected()
    assert "kept in memory" in lines[-2] and not any(tmp_path.iterdir())
    splits = evaluate_pr.read_splits(
        str(corpus), ["train-clean-100", "dev-clean", "test-clean"], lambda words: ([1], "")
    )
    audio = [float(split.samples.sum()) for split in splits]
    tried = [float(split.some(2).samples.sum()) for split in splits]
    # A second for the states of two utterances of each split and for their scores, nine for four steps.
    assert states == pytest.approx(sum(audio) / sum(tried), abs=1) and steps == 4000 * 9 / 4
    assert scores == pytest.approx((400 * audio[1] + audio[2]) / sum(tried[1:]), abs=1)

    _, (again, longer, more) = expected(steps=8000)
    assert (again, longer) == (states, 2 * steps) and more > 1.9 * scores
    lines, (computed, same, _) = expected(cache_memory=0)
    heard = 4000 * 2 * audio[0] / len(splits[0].ids) + 400 * audio[1] + audio[2]
    assert "computed for every batch again" in lines[-2]
    assert same == steps and computed == pytest.approx(heard / sum(tried), abs=1)


# ---------------------------------------------------------------- several rates, and states that are chosen


@pytest.fixture(scope="module")
def sweep(upstreams, corpus, tmp_path_factory):
    settings = dict(upstream=upstreams / "hubert.pt", steps=60, eval_every=20, lr="1e-4,1e-3,4e-3", log_every=10)
    out = tmp_path_factory.mktemp("sweep") / "pr"
    return out, settings, score(corpus, out, **settings)


def test_several_rates_give_what_each_gives_alone_and_the_second_split_chooses(sweep, upstreams, corpus, tmp_path):
    _, settings, result = sweep
    assert list(result["curves"]) == ["0.0001", "0.001", "0.004"]
    for rate, curve in result["curves"].items():
        alone = score(corpus, tmp_path / rate, **settings | dict(lr=rate))
        assert curve == alone["curve"] and [step for step, _ in curve] == [20, 40, 60]
        if float(rate) == result["lr"]:
            assert result["per"] == alone["per"]
    best = min(min(value for _, value in curve) for curve in result["curves"].values())
    assert (
        min(value for _, value in result["curve"]) == best and result["curve"] == result["curves"][f"{result['lr']:g}"]
    )


def test_a_rate_at_the_edge_of_those_tried_is_said_so(corpus, tmp_path, capsys):
    result = score(corpus, tmp_path, steps=20, eval_every=20, lr="1e-7,1e-2")
    captured = capsys.readouterr()
    assert result["lr"] == 1e-2 and "--lr, 0.01, is at the edge" in captured.err and "best --lr" in captured.out


def test_a_sweep_that_is_killed_and_started_again_ends_exactly_the_same(sweep, corpus, tmp_path):
    _, settings, expected = sweep
    save = probe.save_run

    def save_and_die(args, fingerprints, probes, optimizer, progress):
        save(args, fingerprints, probes, optimizer, progress)
        if progress["scored"] == 40:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(probe, "save_run", save_and_die)
        score(corpus, tmp_path, **settings)
    assert comparable(score(corpus, tmp_path, **settings)) == comparable(expected)


def test_a_rate_that_is_far_too_high_costs_the_others_nothing(corpus, tmp_path):
    result = score(corpus, tmp_path, steps=160, eval_every=80, lr="1e20,1e-2,1e-3")
    assert result["lr"] == 1e-2 and result["per"] < 1


def test_a_save_of_the_time_of_one_rate_goes_on(fbank, corpus, tmp_path):
    shutil.copytree(fbank[0], tmp_path / "out")
    run = torch.load(tmp_path / "out" / "last.pt", weights_only=True)
    run |= {"format": "ekd-probe-1", "probe": run.pop("probes")[0], "optimizer": run.pop("optimizers")[0]}
    run["progress"] |= run["progress"].pop("rates")[0]
    torch.save(run, tmp_path / "out" / "last.pt")
    os.remove(tmp_path / "out" / "result.json")
    assert comparable(score(corpus, tmp_path / "out", steps=240, eval_every=60)) == comparable(fbank[1])


@pytest.mark.parametrize("which, layers", [("last", [4]), ("0,2", [0, 2]), ("all", [0, 1, 2, 3, 4])])
def test_the_probe_sees_the_states_that_are_asked_for(upstreams, corpus, tmp_path, capsys, which, layers):
    cache = tmp_path / "cache"
    result = score(corpus, tmp_path / "out", upstream=upstreams / "hubert.pt", steps=2, states=which, cache=cache)
    assert result["upstream"]["layers"] == layers and len(result["layer_weights"]) == len(layers)
    assert f"state {layers[-1]:>2}" in capsys.readouterr().out
    (folder,) = cache.iterdir()
    assert folder.name.endswith(f"states-{'-'.join(map(str, layers))}") == (which != "all")
