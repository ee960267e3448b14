"""evaluate_asr.py, evaluate_sid.py, evaluate_er.py, and the table over their results."""

import json
import os

import numpy as np
import pytest
import soundfile
import torch
from conftest import SMALL, noise, random_encoder, run, write_audio

import data
import evaluate_asr
import evaluate_er
import evaluate_sid
import probe
from student import Student, save_student, student_config
from teachers import save_official

PROGRAMS = {"asr": evaluate_asr, "sid": evaluate_sid, "er": evaluate_er}


@pytest.fixture(scope="module")
def upstreams(tmp_path_factory):
    folder = tmp_path_factory.mktemp("upstreams")
    torch.manual_seed(0)
    save_student(Student(student_config(SMALL), [("layer2", 48)]), folder / "student.pt")
    save_official(random_encoder(0), folder / "hubert.pt", "fairseq")
    return folder


@pytest.fixture(scope="module")
def speakers(corpus):
    """A manifest of the synthetic corpus's six speakers."""
    evaluate_sid.write_demo_manifest(str(corpus / "speakers.csv"))
    return corpus / "speakers.csv"


@pytest.fixture(scope="module")
def emotions(tmp_path_factory):
    """A manifest of two classes that differ in loudness of high frequencies, in three folds."""
    folder = tmp_path_factory.mktemp("emotions")
    rng, lines = np.random.default_rng(0), ["path,label,fold\n"]
    for number in range(36):
        hiss, name = rng.standard_normal(5000 + 100 * number), f"{number:02d}.flac"
        sound = hiss if number % 2 else np.convolve(hiss, np.hanning(32), "same")
        soundfile.write(folder / name, 0.1 * sound / np.abs(sound).max(), 16000)
        lines.append(f"{name},{'bright' if number % 2 else 'dull'},{number % 3}\n")
    (folder / "emotions.csv").write_text("".join(lines))
    return folder / "emotions.csv"


def flags(out, **more):
    settings = dict(out=out, batch_size=16, lr=1e-2, workers=0, log_every=100, eval_every=20, steps=40) | more
    return [str(part) for key, value in settings.items() for part in (f"--{key.replace('_', '-')}", value)]


def score(task, out, **more):
    """result.json of a run in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        PROGRAMS[task].main(flags(out, **more))
    return json.loads((out / "result.json").read_text())


def refusal(capsys, task, arguments):
    with pytest.raises(SystemExit) as end:
        PROGRAMS[task].main(arguments)
    line = capsys.readouterr().err
    assert end.value.code == 2 and line.count("\n") == 1, line
    return line


def read(path):
    return {name: rest for name, *rest in map(str.split, path.read_text().splitlines())}


# ---------------------------------------------------------------- speech recognition


@pytest.fixture(scope="module")
def asr(corpus, upstreams, tmp_path_factory):
    out = tmp_path_factory.mktemp("asr") / "asr"
    settings = dict(data=corpus, upstream=upstreams / "hubert.pt", hidden=32, steps=4, eval_every=2, lr=1e-3)
    return out, settings, score("asr", out, **settings)


def test_a_public_scorer_finds_the_same_wer_and_cer_in_the_files(asr):
    jiwer = pytest.importorskip("jiwer")
    out, _, result = asr
    references, hypotheses = read(out / "test.ref"), read(out / "test.hyp")
    assert list(references) == list(hypotheses) and len(references) == 16
    assert any(hypotheses.values()) and 0 < result["substitutions"]  # a few steps say something, if nothing right
    references, hypotheses = ([" ".join(text) for text in texts.values()] for texts in (references, hypotheses))
    assert jiwer.wer(references, hypotheses) == pytest.approx(result["wer"], abs=1e-12)
    assert jiwer.cer(references, hypotheses) == pytest.approx(result["cer"], abs=1e-12)
    for score, (low, high) in ((result["wer"], result["interval"]), (result["cer"], result["cer_interval"])):
        assert low <= score <= high


def test_the_words_are_the_transcripts(asr, corpus):
    out, _, _ = asr
    for name, text in read(out / "test.ref").items():
        speaker = name.split("-")[0]
        lines = (corpus / "test-clean" / speaker / "1" / f"{speaker}-1.trans.txt").read_text().splitlines()
        assert " ".join([name, *text]) in lines


@pytest.mark.slow
def test_a_bilstm_learns_to_spell(corpus, tmp_path):
    result = score("asr", tmp_path, data=corpus, upstream="fbank", hidden=48, steps=400, eval_every=100, lr=1e-2)
    assert result["cer"] < 0.5, result["curve"]


def test_asr_hypotheses_do_not_depend_on_the_batch_size(corpus, upstreams):
    split = evaluate_asr.read_split(str(corpus), "test-clean")
    network = probe.Upstream(str(upstreams / "hubert.pt"), precision="fp32")
    torch.manual_seed(0)
    model = probe.Probe(network.states, evaluate_asr.CharacterHead(network.dim, 32))
    with torch.no_grad():  # an untrained head that says something
        model.head.characters.weight.mul_(30)
    states = probe.States(network, split.corpus)
    # Kept: a batch's rounding in the upstream could tip what a random head says.
    states.keep(None, "test", 16, 0, lambda: None)
    alone, together = (probe.predict(model, split, states, probe.ctc_greedy, size) for size in (1, 16))
    assert alone == together and len(set(map(str, alone))) > 5


def test_a_run_with_dropout_that_is_killed_and_started_again_ends_the_same(asr, tmp_path, monkeypatch):
    out, settings, expected = asr
    save = probe.save_run

    def save_and_die(args, fingerprints, model, optimizer, progress):
        save(args, fingerprints, model, optimizer, progress)
        if progress["scored"] == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(probe, "save_run", save_and_die)
        score("asr", tmp_path / "asr", **settings)
    result = score("asr", tmp_path / "asr", **settings)
    for key in ("wer", "cer", "curve", "layer_weights"):
        assert result[key] == expected[key]


def test_the_bilstm_gives_what_torchs_gives_for_a_packed_sequence():
    x, frames = torch.randn(3, 9, 4), torch.tensor([9, 1, 6])
    lstm, packed = evaluate_asr.BiLSTM(4, 5), torch.nn.LSTM(4, 5, bidirectional=True, batch_first=True)
    weights = {name: weight for name, weight in lstm.onward.state_dict().items()}
    weights |= {f"{name}_reverse": weight for name, weight in lstm.reverse.state_dict().items()}
    packed.load_state_dict(weights)
    sequence = torch.nn.utils.rnn.pack_padded_sequence(x, frames, batch_first=True, enforce_sorted=False)
    expected, _ = torch.nn.utils.rnn.pad_packed_sequence(packed(sequence)[0], batch_first=True)
    found = lstm(x, frames)
    for number, length in enumerate(frames.tolist()):
        torch.testing.assert_close(found[number, :length], expected[number, :length])


def test_specaugment_masks_and_warps_in_training_alone():
    augment, x = evaluate_asr.SpecAugment(), torch.ones(8, 100, 200)
    frames = torch.full((8,), 100)
    assert augment.eval()(x, frames) is x
    augment.train()
    torch.manual_seed(0)
    masked = augment(x, frames) == 0
    rows, columns = masked.all(2).sum(1), masked.all(1).sum(1)  # frames and dimensions that are 0 throughout
    assert rows.max() <= 2 * 39 and columns.max() <= 4 * 49 and rows.sum() > 0 and columns.sum() > 0
    assert masked.sum() < masked.numel()

    ramp = torch.arange(60.0)[:, None].expand(60, 3).contiguous()
    warped = augment.warp(ramp, 50)
    assert warped.shape == ramp.shape and torch.equal(warped[50:], ramp[50:])
    assert (warped - ramp).abs().max() <= 7 and (warped[1:50] - warped[:49]).mean() == pytest.approx(1, abs=0.1)
    assert not torch.equal(warped, ramp)
    assert torch.equal(augment.warp(ramp[:10], 10), ramp[:10])  # too short to be warped


def test_dropout_follows_each_lstm_in_training_alone():
    torch.manual_seed(0)
    head, x, frames = evaluate_asr.CharacterHead(8, 64), torch.randn(2, 20, 8), torch.tensor([20, 20])
    seen = []
    head.characters.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    head.lstms[1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    head.train()(x, frames)
    assert all(0.15 < (part == 0).float().mean() < 0.25 for part in seen) and len(seen) == 2
    head.eval()(x, frames)
    assert all((part != 0).all() for part in seen[2:])


def test_transcripts_with_other_characters_are_left_out(tmp_path):
    write_audio(tmp_path / "dev" / "1" / "1", [8000, 9000])
    (tmp_path / "dev" / "1" / "1" / "x.trans.txt").write_text("000 DON'T GO\n001 42 TIMES\n")
    split = evaluate_asr.read_split(str(tmp_path), "dev")
    assert split.ids == ["000"] and evaluate_asr.words(split.labels[0]) == ["DON'T", "GO"]
    assert split.left_out == {"001": "characters 24"}


# ---------------------------------------------------------------- one label an utterance


def test_the_mean_is_over_an_utterances_own_frames():
    head, x = probe.MeanHead(4, 3).eval(), torch.randn(2, 10, 4)
    together = head(x, torch.tensor([10, 6]))
    torch.testing.assert_close(together[1:], head(x[1:, :6], torch.tensor([6])))
    by_hand = head.classes(head.projection(x[1, :6]).mean(0))
    torch.testing.assert_close(together[1], by_hand)


def test_training_sees_a_crop_and_scoring_all():
    head = probe.MeanHead(1, 1, longest=5)
    for layer in (head.projection, head.classes):
        torch.nn.init.constant_(layer.weight, 1 / len(layer.weight.flatten()))
        torch.nn.init.zeros_(layer.bias)
    x = torch.arange(20.0)[None, :, None].repeat(640, 1, 1)
    frames = torch.tensor([20, 4] * 320)
    torch.manual_seed(0)
    scale = head.eval()(torch.ones(1, 1, 1), torch.tensor([1])).item()
    seen = head.train()(x, frames)[:, 0] / scale
    assert torch.allclose(seen[1::2], torch.tensor(1.5))  # 0..3: shorter than the crop
    starts = (seen[::2] - 2).round()  # the mean of five frames from `start` on is start + 2
    torch.testing.assert_close(seen[::2], starts + 2)
    assert sorted(starts.unique().tolist()) == list(range(16))
    torch.testing.assert_close(head.eval()(x, frames)[::2, 0] / scale, torch.full((320,), 9.5))


# ---------------------------------------------------------------- speaker identification


@pytest.mark.parametrize("task", ["sid", "er"])
def test_the_crop_is_in_seconds_and_the_best_step_the_most_accurate(speakers, emotions, tmp_path, monkeypatch, task):
    class Asked(Exception):
        pass

    def evaluate(args, metric, upstream, *_, make_head, higher_is_better, **__):
        raise Asked(make_head(240).longest, higher_is_better)

    monkeypatch.setattr(probe, "evaluate", evaluate)
    more = {"manifest": speakers, "crop": 0.5} if task == "sid" else {"manifest": emotions}
    with pytest.raises(Asked) as asked:
        PROGRAMS[task].main(flags(tmp_path, upstream="fbank", **more))
    assert asked.value.args == (48 if task == "sid" else None, True)  # frames of half a second, 10 ms apart


def test_a_crop_without_frames_is_refused(tmp_path, capsys, speakers):
    arguments = flags(tmp_path / "out", manifest=speakers, upstream="fbank", crop=0.05)
    assert "--crop" in refusal(capsys, "sid", arguments)


def test_speakers_are_told_apart_better_than_by_chance(speakers, upstreams, tmp_path):
    result = score("sid", tmp_path, manifest=speakers, upstream=upstreams / "hubert.pt", steps=300, eval_every=100)
    assert result["accuracy"] > 2 / 6 and result["speakers"] == 6
    references, hypotheses = read(tmp_path / "test.ref"), read(tmp_path / "test.hyp")
    same = [references[name] == hypotheses[name] for name in references]
    assert result["accuracy"] == sum(same) / len(same) and len(same) == result["counts"]["test"]["utterances"] == 30
    assert all(name.split("/")[1] == speaker for name, (speaker,) in references.items())
    curve = dict(result["curve"])
    assert curve[result["best_step"]] == max(curve.values()) > min(curve.values())


@pytest.mark.parametrize("task", ["sid", "er"])
def test_classes_do_not_depend_on_the_batch_size(speakers, upstreams, task):
    _, splits = evaluate_sid.read_splits(*evaluate_sid.read_manifest(str(speakers)))
    network = probe.Upstream(str(upstreams / ("hubert.pt" if task == "sid" else "student.pt")), precision="fp32")
    torch.manual_seed(0)
    model = probe.Probe(network.states, probe.MeanHead(network.dim, 50, longest=20))
    states = probe.States(network, splits[2].corpus)
    alone, together = (probe.predict(model, splits[2], states, lambda x, frames: x.tolist(), size) for size in (1, 16))
    np.testing.assert_allclose(alone, together, atol=2e-3)  # bfloat16 states
    assert [np.argmax(one) for one in alone] == [np.argmax(one) for one in together]


def test_voxceleb1_is_read_as_it_unpacks(tmp_path):
    lines = []
    for speaker, root in (("id10001", "dev/wav"), ("id10002", "dev/wav"), ("id10003", "wav")):
        write_audio(tmp_path / root / speaker / "video", [6000] * 3, suffix=".wav")
        lines += [f"{number + 1} {speaker}/video/{number:03d}.wav\n" for number in range(3)]
    (tmp_path / "iden_split.txt").write_text("".join(lines))
    found, splits = evaluate_sid.read_splits(*evaluate_sid.read_iden_split(str(tmp_path)))
    assert found == ["id10001", "id10002", "id10003"] and [split.name for split in splits] == ["train", "dev", "test"]
    for number, split in enumerate(splits):
        assert [int(label) for label in split.labels] == [0, 1, 2]
        assert all(split.corpus.paths[place].endswith(f"{number:03d}.wav") for place in split.places)


@pytest.mark.parametrize(
    "text, words",
    [
        (None, ["iden_split.txt", "--data", "robots.ox.ac.uk"]),
        ("4 id10001/video/000.wav\n", ["iden_split.txt, line 1"]),
        ("1 id10001/video/000.wav\n2 id10001/video/009.wav\n", ["iden_split.txt, line 2", "009.wav"]),
        ("1 id10001/video/000.wav\n", ["split dev"]),
        ("1 id10001/video/000.wav\n1 id10001/video/000.wav\n", ["line 1", "twice"]),
        ("1 id10001/video/000.wav\n2 id10002/video/000.wav\n", ["line 2", "id10002"]),
    ],
)
def test_a_voxceleb1_that_is_not_whole_is_refused_by_name(tmp_path, capsys, text, words):
    for speaker in ("id10001", "id10002"):
        write_audio(tmp_path / "wav" / speaker / "video", [6000], suffix=".wav")
    if text:
        (tmp_path / "iden_split.txt").write_text(text)
    line = refusal(capsys, "sid", flags(tmp_path / "out", data=tmp_path, upstream="fbank"))
    assert all(word in line for word in words), line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "task, text, words",
    [
        ("sid", None, ["list.csv", "path,label,split"]),
        ("sid", "path,label\na.flac,x\n", ["line 1", "no column split"]),
        ("sid", "path,label,split\na.flac,x,training\n", ["line 2", "'training'"]),
        ("sid", "path,label,split\na.flac,,train\n", ["line 2", "empty"]),
        ("sid", "path,label,split\n", ["no lines"]),
        ("er", "path,label,fold\na.flac,x,1\n", ["line 2", "no file", "a.flac"]),
        ("er", b"path,label,fold\n\xff\xfe,x,1\n", ["UTF-8"]),
        ("er", "path,label,fold\n000.flac,x,1\n001.flac,y,1\n", ["one fold"]),
    ],
)
def test_a_manifest_that_is_wrong_is_refused_by_file_and_line(tmp_path, capsys, task, text, words):
    write_audio(tmp_path, [6000] * 2)
    if text is not None:
        (tmp_path / "list.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    line = refusal(capsys, task, flags(tmp_path / "out", manifest=tmp_path / "list.csv", upstream="fbank"))
    assert all(word in line for word in words), line
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- emotion recognition


@pytest.fixture(scope="module")
def er(emotions, upstreams, tmp_path_factory):
    out = tmp_path_factory.mktemp("er") / "er"
    settings = dict(manifest=emotions, upstream=upstreams / "student.pt", batch_size=8, steps=120, eval_every=40)
    return out, settings, score("er", out, **settings)


def test_emotion_recognition_holds_out_a_fold_each_time(er):
    out, _, result = er
    assert list(result["folds"]) == ["0", "1", "2"] and result["accuracy"] == pytest.approx(
        np.mean(list(result["folds"].values()))
    )
    assert result["deviation"] == pytest.approx(np.std(list(result["folds"].values()), ddof=1))
    assert result["accuracy"] > 0.65
    references, hypotheses = read(out / "test.ref"), read(out / "test.hyp")
    assert len(references) == 36 and sum(sum(row.values()) for row in result["confusion"].values()) == 36
    for label, row in result["confusion"].items():
        for other, count in row.items():
            assert count == sum(references[n] == [label] and hypotheses[n] == [other] for n in references)
    folds = []
    for fold, accuracy in result["folds"].items():
        mine = [name for name in references if int(name[:2]) % 3 == int(fold)]
        same = np.array([references[name] == hypotheses[name] for name in mine], float)
        assert accuracy == pytest.approx(same.mean())
        folds.append((same, np.ones(len(same))))
    low, high = probe.bootstrap(*folds)
    assert result["interval"] == pytest.approx([low, high], abs=1e-9) and low <= result["accuracy"] <= high <= 1


def test_folds_share_no_utterance_and_train_on_eighty_percent_of_the_others(emotions):
    classes, folds = evaluate_er.read_folds(*evaluate_er.read_manifest(str(emotions)), seed=0)
    assert classes == ["bright", "dull"]
    for train, dev, test in folds.values():
        assert (len(train.ids), len(dev.ids), len(test.ids)) == (19, 5, 12)
        assert len({*train.ids, *dev.ids, *test.ids}) == 36
        assert all((int(name[:2]) % 2 == 0) == bool(label) for name, label in zip(dev.ids, dev.labels))


@pytest.mark.parametrize("task", ["sid", "er"])
def test_an_utterance_without_a_frame_is_left_out_and_counted(tmp_path, task):
    write_audio(tmp_path, [6000] * 6 + [100])
    splits, column = ["train", "dev", "test"], "split" if task == "sid" else "fold"
    lines = [f"{number:03d}.flac,{'ab'[number % 2]},{splits[number // 2 % 3]}\n" for number in range(7)]
    (tmp_path / "list.csv").write_text(f"path,label,{column}\n{''.join(lines)}")
    if task == "sid":
        _, (found, _, _) = evaluate_sid.read_splits(*evaluate_sid.read_manifest(str(tmp_path / "list.csv")))
    else:
        _, folds = evaluate_er.read_folds(*evaluate_er.read_manifest(str(tmp_path / "list.csv")), seed=0)
        found = folds["train"][2]
    assert found.ids == ["000.flac", "001.flac"]
    assert found.left_out == {"006.flac": "100 samples, fewer than 400"}


def test_the_upstream_runs_once_for_all_folds(er, tmp_path, monkeypatch):
    _, settings, expected = er
    seen, call = [], probe.Upstream.__call__
    monkeypatch.setattr(probe.Upstream, "__call__", lambda *a: seen.append(len(a[1])) or call(*a))
    assert score("er", tmp_path, **settings)["folds"] == expected["folds"]
    assert sum(seen) == 36


def test_finished_folds_are_not_run_again(er, capsys, monkeypatch):
    out, settings, expected = er
    monkeypatch.setattr(probe.Upstream, "__call__", lambda *_: pytest.fail("the upstream ran"))
    result = score("er", out, **settings)
    assert {**result, "settings": 0} == {**expected, "settings": 0}
    assert capsys.readouterr().out.count("finished") == 3


def test_iemocap_is_read_as_it_unpacks(tmp_path):
    for session in range(1, 6):
        folder, name = tmp_path / f"Session{session}", f"Ses0{session}F_impro01"
        (folder / "dialog" / "EmoEvaluation" / "Categorical").mkdir(parents=True)
        lines = ["% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]\n\n"]
        write_audio(folder / "sentences" / "wav" / name, [6000] * 6, suffix=".wav")
        for number, label in enumerate(["neu", "exc", "hap", "ang", "fru", "xxx"]):
            os.rename(
                folder / "sentences/wav" / name / f"{number:03d}.wav",
                folder / "sentences/wav" / name / f"{name}_F{number:03d}.wav",
            )
            lines.append(
                f"[6.2901 - 8.2357]\t{name}_F{number:03d}\t{label}\t[2.5000, 2.5000, 2.5000]\nC-E2:\tNeutral;\t()\n\n"
            )
        (folder / "dialog" / "EmoEvaluation" / f"{name}.txt").write_text("".join(lines))
    classes, folds = evaluate_er.read_folds(*evaluate_er.read_iemocap(str(tmp_path)), seed=0)
    assert classes == ["angry", "happy", "neutral"] and list(folds) == ["1", "2", "3", "4", "5"]
    assert [classes[int(label)] for label in folds["2"][2].labels] == ["neutral", "happy", "happy", "angry"]
    assert all(name.startswith("Session2/") for name in folds["2"][2].ids)
    with pytest.raises(FileNotFoundError, match="Session1.*--data"):
        evaluate_er.read_iemocap(str(tmp_path / "Session1"))


# ---------------------------------------------------------------- the table, the demos, the defaults


def test_the_table_has_upstreams_by_tasks(er, asr, capsys, tmp_path):
    same, other = tmp_path / "same", tmp_path / "other"  # emotions of the same upstream, and of another
    for folder, path in ((same, asr[2]["upstream"]["path"]), (other, "fbank")):
        folder.mkdir()
        (folder / "result.json").write_text(json.dumps(er[2] | {"upstream": {"path": path}}))
    probe.main([str(asr[0]), str(same), str(other)])
    head, _, first, second = capsys.readouterr().out.splitlines()
    assert head.index("ER (accuracy, up)") < head.index("ASR (WER, down)")
    low, high = er[2]["interval"]
    assert f"{er[2]['accuracy']:.2%} ({low:.2%} to {high:.2%})" in first and f"{asr[2]['wer']:.2%}" in first
    assert second.startswith("fbank") and second.endswith("-")
    for folders, word in (([same, same], "second"), ([tmp_path], "no such result")):
        with pytest.raises(SystemExit):
            probe.main([str(folder) for folder in folders])
        assert word in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("task", ["asr", "sid", "er"])
def test_the_demo_scores_the_demo_student_in_two_minutes(demo, task):
    folder, _, _ = demo
    done = run(f"evaluate_{task}.py", "--demo", cwd=folder, OMP_NUM_THREADS="2")
    assert done.returncode == 0, done.stderr
    result = json.loads((folder / "runs" / "demo-avg" / task / "result.json").read_text())
    assert sum(result["seconds"].values()) < 110 and "not the quality" in done.stdout


def test_the_protocols_defaults_are_superbs():
    found = {}
    for task, program in PROGRAMS.items():
        args = program.parse(["--upstream", "runs/avg/student.pt"])
        found[task] = (args.steps, args.batch_size, args.lr, args.out)
    assert found["asr"] == (200_000, 32, 1e-4, "runs/avg/asr") and found["sid"] == (200_000, 32, 1e-4, "runs/avg/sid")
    assert found["er"] == (30_000, 32, 1e-4, "runs/avg/er")
    assert evaluate_asr.parse(["--upstream", "fbank"]).hidden == 1024
    assert evaluate_sid.parse(["--upstream", "fbank"]).crop == 8.0
    head = evaluate_asr.CharacterHead(8)
    assert [lstm.onward.hidden_size for lstm in head.lstms] == [1024, 1024] and head.dropout.p == 0.2


def test_the_demos_voices_are_made(tmp_path, monkeypatch):
    data.write_demo_corpus(tmp_path / "data" / "demo")
    monkeypatch.chdir(tmp_path)
    evaluate_er.write_demo_manifest("data/demo/emotion/emotions.csv")
    classes, folds = evaluate_er.read_folds(*evaluate_er.read_manifest("data/demo/emotion/emotions.csv"), seed=0)
    assert classes == ["angry", "happy", "neutral", "sad"] and len(folds) == 5
    assert noise(1).isfinite().all() and all(len(splits[2].ids) == 20 for splits in folds.values())
