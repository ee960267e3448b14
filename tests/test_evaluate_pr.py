"""evaluate_pr.py: lexicons, transcripts, CTC; with superb/ctc.py."""

import shutil

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT, read_symbols, refused, shared, write_audio
from test_probe import flags, score

import evaluate_pr
from demo import speech
from superb import ctc

TEACHER = {"upstream": f"{ROOT}/demo/hubert.pt", "steps": 40, "eval_every": 20, "batch_size": 16}


def lexicon_of(tmp_path, text):
    (tmp_path / "lexicon.txt").write_text(text)
    return ctc.read_lexicon([str(tmp_path / "lexicon.txt")])


# ------------------------------------------------------------------ the score


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """A run on a teacher that was trained on such speech: (its folder, its result)."""
    out = tmp_path_factory.mktemp("teacher") / "pr"
    return out, score(corpus, out, cache=out.parent / "cache", **TEACHER)


def test_probe_learns_phonemes(finished):
    _, result = finished
    assert result["interval"][0] < result["per"] < result["interval"][1] < 0.6


def test_noise_is_in_the_test_split_alone(finished, corpus, tmp_path, capsys):
    out, clean = finished
    write_audio(tmp_path / "noise", [50000] * 2)
    cached = set(out.parent.rglob("*.pt"))
    settings = TEACHER | {"cache": out.parent / "cache", "noise": tmp_path / "noise", "snr": -3}
    noisy = score(corpus, tmp_path / "pr", **settings)
    assert noisy["curves"] == clean["curves"] and noisy["per"] > clean["per"] + 0.1
    assert noisy["noise"] == {"folder": str(tmp_path / "noise"), "snr": [-3]}
    assert f"test split: mixed with noise of {tmp_path}/noise" in capsys.readouterr().out
    added = set(out.parent.rglob("*.pt")) - cached
    assert len(added) == 16 and all("test-clean" in str(path) for path in added)
    line = refused(capsys, evaluate_pr, flags(corpus, out, **settings))
    assert "noise changed" in line


def test_public_scorer_gives_the_same_per(finished):
    jiwer = pytest.importorskip("jiwer")
    out, result = finished
    hypotheses, references = read_symbols(out / "test.hyp"), read_symbols(out / "test.ref")
    assert list(hypotheses) == list(references) and len(references) == 16
    texts = [[" ".join(line) for line in lines.values()] for lines in (references, hypotheses)]
    assert jiwer.wer(*texts) == pytest.approx(result["per"], abs=1e-12)


def test_references_are_the_first_pronunciations_of_the_transcripts(finished, corpus):
    references = read_symbols(finished[0] / "test.ref")
    for path in corpus.glob("test-clean/*/*/*.trans.txt"):
        for name, *words in map(str.split, path.read_text().splitlines()):
            assert references[name] == " ".join(speech.WORDS[word] for word in words).split()


@pytest.mark.slow
def test_trained_teacher_reads_real_speech_better_than_chance(tmp_path):
    data, teacher = shared("speech/ocean"), shared("teachers/ocean_hubert.pt")
    settings = {"upstream": teacher, "splits": "dev,test,train", "steps": 150, "eval_every": 150}
    result = score(data, tmp_path, **settings)
    assert 0 < result["per"] < 0.9 and len(result["layer_weights"]) == 7


# ------------------------------------------------------------------ lexicons


LINES = "#HASH HH AE1\nMA m 1\noeuf 9 f\n"
ENTRIES = {"#HASH": ["HH", "AE1"], "MA": ["m", "1"], "OEUF": ["9", "f"]}  # X-SAMPA


@pytest.mark.parametrize(
    "line",
    [
        "READ  R EH1 D",
        "READ\tR EH1 D",
        "read R EH1 D",
        "READ R EH1 D # the past tense",
        "READ R EH1 D #1",
        "READ(1) R EH1 D",
        "READ R EH1 D, R IY1 D",
        "READ R EH1 D , R IY1 D ,",
        "READ\tR EH1 D\tR IY1 D",
        "READ\tR EH1 D\t# the past tense",
        "READ\tR\tEH1\tD\t# the past tense",
        "READ /R EH1 D/, /R IY1 D/",
        "READ [READ] R EH1 D",
        "READ [] R EH1 D",
        "#\n;;; a comment\n# another\nREAD R EH1 D\nREAD R IY1 D\nREAD(2) R IY1 D",
        "\ufeffREAD R EH1 D",
    ],
)
def test_every_form_of_lexicon_gives_the_first_pronunciation(tmp_path, line):
    expected = ENTRIES | {"READ": ["R", "EH1", "D"]}
    assert lexicon_of(tmp_path, f"{line}\n{LINES}") == expected


@pytest.mark.parametrize("columns", ["1.0", "1", "2.5e-05", "0.99\t0.2\t1.0\t0.85", "[X] 0.5"])
def test_first_numbers_are_probabilities_if_every_line_has_them(tmp_path, columns):
    lines = [f"{word}\t{columns}\t{' '.join(phones)}\n" for word, phones in ENTRIES.items()]
    assert lexicon_of(tmp_path, "".join(lines)) == ENTRIES
    assert lexicon_of(tmp_path, f"roi 1 w a\n{LINES}")["ROI"] == ["1", "w", "a"]
    with pytest.raises(ValueError, match="line 1: a number, but not in every line.*'ROI 0.5 w a'"):
        lexicon_of(tmp_path, f"roi 0.5 w a\n{LINES}")


def test_hash_before_phones_of_the_file_is_a_boundary_of_syllables(tmp_path):
    line = "airplane E r # p l ei n"
    phones = ["E", "r", "p", "l", "ei", "n"]
    assert lexicon_of(tmp_path, f"{line}\nplain p l ei n\n")["AIRPLANE"] == phones
    text = "airplane\tE r # p l ei n\tE r # p l e n\nplain p l ei n\n"
    assert lexicon_of(tmp_path, text)["AIRPLANE"] == phones
    with pytest.raises(ValueError, match="line 1: '# p l ei n' may be phones or a comment; remove"):
        lexicon_of(tmp_path, f"{line}\nno n @U\n")
    assert lexicon_of(tmp_path, "aalborg AO1 L B # place, danish\n") == {
        "AALBORG": ["AO1", "L", "B"]
    }


def test_words_of_one_symbol_are_refused(tmp_path):
    text = "hello\t/həlou/\nno\t/nou/, /nə/\na\tə l\n"
    with pytest.raises(
        ValueError, match="lexicon.txt: most words have one symbol.*'həlou'.*spaces"
    ):
        lexicon_of(tmp_path, text)
    assert lexicon_of(tmp_path, "a\tə\nno\tn ou\n")["A"] == ["ə"]


@pytest.mark.parametrize("line", ["SHE", "SHE 0.5", "SHE SH 0.5 IY1", "SHE # a word"])
def test_line_without_phones_is_refused_by_file_and_line(tmp_path, line):
    with pytest.raises(ValueError, match="lexicon.txt, line 3.*SHE"):
        lexicon_of(tmp_path, f"SEE S IY1\n\n{line}\n")
    with pytest.raises(ValueError, match="empty lexicon"):
        lexicon_of(tmp_path, "\n")
    with pytest.raises(FileNotFoundError, match="nowhere.*lexicon.*openslr"):
        ctc.read_lexicon(["nowhere"])


# ------------------------------------------------------------------ transcripts


def test_utterances_that_cannot_be_used_are_skipped_with_a_reason(corpus, tmp_path, capsys):
    folder = tmp_path / "corpus"
    shutil.copytree(corpus, folder)
    path = sorted(folder.glob("train-clean-100/*/*/*.trans.txt"))[0]
    lines = path.read_text().splitlines()
    empty = lines[1].split()[0]
    lines[:2] = [lines[0] + " cat, XYZZY", empty]
    for name in ("._x.flac", ".hidden.flac", "._x.trans.txt"):  # AppleDouble files
        (path.parent / name).write_bytes(b"\x00\x05\x16\x07")
    soundfile.write(path.parent / "untold.flac", np.zeros(8000), 16000)
    soundfile.write(path.parent / "short.flac", np.zeros(300), 16000)
    path.write_text("\n".join([*lines, "short SEE"]) + "\n")
    result = score(folder, tmp_path / "out")
    assert result["counts"]["train-clean-100"] == {"utterances": 130, "skipped": 4}
    printed = capsys.readouterr()
    form = "no transcript: no line 'untold WORD WORD' in a .trans.txt beside it"
    for reason in ("not in the lexicon: 'cat,', 'XYZZY'", "no words", form, "300 samples"):
        assert printed.err.count(reason) == 1
    assert f"PER {result['per']:.2%} over 16 utterances, 95%" in printed.out
    assert "symbols: 12: AA1, EH1, F, IY1, L, M, N, OW1, ..." in printed.out


@pytest.mark.parametrize("extra, words", [("nobody SEE", "no audio"), ("{first}", "second line")])
def test_transcript_that_does_not_fit_the_audio_is_refused(corpus, tmp_path, extra, words):
    folder = tmp_path / "corpus"
    shutil.copytree(corpus, folder)
    path = sorted(folder.glob("dev-clean/*/*/*.trans.txt"))[0]
    text = path.read_text()
    path.write_text(text + extra.format(first=text.splitlines()[0]) + "\n")
    with pytest.raises(ValueError, match=f"{path}, line {text.count(chr(10)) + 1}: .*{words}"):
        ctc.read_split(str(folder), "dev-clean", lambda words: [1])


def test_second_line_of_an_utterance_that_is_skipped_is_refused(corpus, tmp_path):
    folder = tmp_path / "corpus"
    shutil.copytree(corpus, folder)
    path = sorted(folder.glob("dev-clean/*/*/*.trans.txt"))[0]
    first = path.read_text().splitlines()[0]
    path.write_text(f"{first.split()[0]} OOV\n{path.read_text()}")

    def encode(words):
        if words == ["OOV"]:
            raise ValueError("not in the lexicon")
        return [1]

    with pytest.raises(ValueError, match=f"{path}, line 2: a second line of {first.split()[0]}"):
        ctc.read_split(str(folder), "dev-clean", encode)


def test_split_with_over_a_tenth_of_unusable_utterances_is_refused_with_a_reason(tmp_path):
    write_audio(tmp_path / "dev", [8000] * 11)
    task = evaluate_pr.PhonemeRecognition({"SEE": ["S", "IY1"]})
    for unusable, count in ((1, None), (2, "2 of 11"), (11, "11 of 11")):
        lines = [f"{n:03d} {'cat, SEE' if n < unusable else 'see'}\n" for n in range(11)]
        (tmp_path / "dev/x.trans.txt").write_text("".join(lines))
        if not count:
            assert ctc.read_split(str(tmp_path), "dev", task.encode).counts["skipped"] == 1
            continue
        with pytest.raises(ValueError) as error:
            ctc.read_split(str(tmp_path), "dev", task.encode)
        reason = "dev/000: not in the lexicon: 'cat,'"
        message = f"dev: {count} utterances cannot be used, over 10%: {reason}"
        assert str(error.value) == message


def test_apostrophes_and_composed_letters_are_one_in_lexicon_and_transcripts(tmp_path):
    lexicon = lexicon_of(tmp_path, "don\u2019t d @U n t\ncafe\u0301 k a f e\u0301\n")
    assert lexicon == {"DON'T": ["d", "@U", "n", "t"], "CAFÉ": ["k", "a", "f", "é"]}
    write_audio(tmp_path / "dev", [8000] * 2)
    text = "000 don't caf\u00e9\n001 don\u2019t cafe\u0301\n"
    (tmp_path / "dev/x.trans.txt").write_text(text)
    task = evaluate_pr.PhonemeRecognition(lexicon)
    split = ctc.read_split(str(tmp_path), "dev", task.encode)
    assert split.labels[0].tolist() == split.labels[1].tolist() and len(split.labels[0]) == 8


# ------------------------------------------------------------------ CTC and edit distances


def test_greedy_decoding_merges_repeats_and_stops_at_the_end_of_an_utterance():
    paths = torch.tensor([[0, 2, 2, 0, 2, 1, 1], [1, 1, 1, 0, 0, 3, 3]])
    log_probs = torch.nn.functional.one_hot(paths, 4).float().log_softmax(-1)
    assert ctc.ctc_greedy(log_probs, torch.tensor([7, 4])) == [[2, 2, 1], [1]]


def test_utterance_with_too_few_frames_for_ctc_adds_nothing_to_the_loss():
    label = torch.tensor([1, 1, 2])  # needs four frames
    outputs = torch.randn(2, 6, 4, requires_grad=True)
    log_probs = outputs.log_softmax(-1)
    loss = ctc.ctc_loss(log_probs, torch.tensor([6, 3]), [label, label])
    alone = ctc.ctc_loss(log_probs[:1], torch.tensor([6]), [label])
    assert loss.item() == pytest.approx(alone.item() / 2)
    loss.backward()
    assert outputs.grad.isfinite().all() and not outputs.grad[1].any()
    assert ctc.ctc_loss(log_probs[1:], torch.tensor([4]), [label]) > 0


def test_edit_distances_are_per_utterance():
    errors, totals = ctc.edit_distances([[1, 2, 3], [4]], [[1, 3], [4, 4, 4]])
    assert errors.tolist() == [1, 2] and totals.tolist() == [3, 1]
