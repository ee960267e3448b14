"""program.py: ranks, signals, streams, flags."""

import signal

import torch

import program


def test_a_signal_between_two_runs_of_a_process_ends_the_second(monkeypatch):
    monkeypatch.setattr(program.StopSignal, "number", 0)
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    program.StopSignal().record(signal.SIGTERM, None)
    assert program.StopSignal().received() == signal.SIGTERM


def test_numbers_alone_decide_the_seed():
    draws = []
    for numbers in [(0, 5, 1), (0, 5, 1), (0, 5, 2), (1, 5, 1)]:
        program.seed(*numbers)
        draws.append(float(torch.rand(())))
    assert draws[0] == draws[1] and len(set(draws)) == 3
