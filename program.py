"""What every program shares: torchrun's ranks, devices, signals, flags, one-line errors."""

import argparse
import contextlib
import ctypes
import datetime
import math
import multiprocessing
import os
import re
import signal
import socket
import sys
import time
import traceback
import warnings

import numpy as np
import torch
import torch.distributed as dist

# Set by torchrun. Without RANK, or with a WORLD_SIZE of 1, the process is rank 0.
is_alone = not os.environ.get("RANK") or os.environ.get("WORLD_SIZE") in (None, "", "1")
ranks = {} if is_alone else os.environ
RANK = int(ranks.get("RANK", 0))
LOCAL_RANK = int(ranks.get("LOCAL_RANK", 0))
LOCAL_WORLD_SIZE = int(ranks.get("LOCAL_WORLD_SIZE", 1))
WORLD_SIZE = int(ranks.get("WORLD_SIZE", 1))
PARENT = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None  # torchrun

JOIN_LIMIT = 600  # seconds
ALONE = "to run one process, unset RANK and WORLD_SIZE"
# Ctrl-C; the end of a job; a closed terminal; the signals that SLURM and SGE send before the end.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def run(program):
    """Calls program(), then exits without joining workers; with code 1 after an exception."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, as by 2>&-: the next file would get its number
            setattr(sys, name, open(os.devnull, "r+"))
        if hasattr(getattr(sys, name), "reconfigure"):  # not in Jupyter
            getattr(sys, name).reconfigure(errors="backslashreplace")  # paths may not be UTF-8
    handlers = {number: signal.getsignal(number) for number in (*SIGNALS, signal.SIGCHLD)}
    code = 0
    try:
        try:
            program()
        finally:  # not later: when the frames of an exception are freed, they wait for each worker
            kill_workers()
    except SystemExit as end:
        code = end.code or 0
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except Exception:
        code = 1
        with contextlib.suppress(OSError):  # a pipe whose reader has ended, or a full disk
            traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            code = code or 1
    if hasattr(sys, "ps1"):  # an interactive session goes on, as after Jupyter's %run
        StopSignal.number = 0
        for number, handler in handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)
        sys.exit(code)
    os._exit(code)  # workers may wait for a disk or for this process


def kill_workers():
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises an error for each
    for worker in multiprocessing.active_children():
        worker.kill()


# ------------------------------------------------------------------ ranks and devices


def init():
    """Before anything else: torch's version, its GPU allocator, and warnings of one line each."""
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6):
        sys.exit(f"torch {torch.__version__} is too old: install torch and torchaudio 2.6 or later")
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        # Batches vary in length. Torch reads these at the first allocation on a GPU, up to 2.9
        # the old name alone; with both there is no warning about it.
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    warnings.showwarning = show_warning


def show_warning(message, *_):
    """Prints a warning in one line, on rank 0."""
    if RANK == 0:
        with contextlib.suppress(OSError):  # the terminal, or tee, may be gone
            print(f"warning: {' '.join(str(message).split())}", file=sys.stderr, flush=True)


def join():
    """Joins the other ranks, if there are any. Ends in one line after 10 minutes without them."""
    if WORLD_SIZE == 1:
        return
    host, port = os.environ.get("MASTER_ADDR", "localhost"), os.environ.get("MASTER_PORT", "29500")
    by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    has_store = RANK == 0 and not by_torchrun
    limit = datetime.timedelta(seconds=JOIN_LIMIT)
    with one_line_errors():
        try:
            if not has_store:
                wait_until(lambda: is_reachable(host, port), f"{host}:{port}")
            options = {"is_master": has_store, "timeout": limit, "wait_for_workers": False}
            store = dist.TCPStore("localhost" if has_store else host, int(port), **options)
            nonce = os.urandom(8).hex()
            wait_until(lambda: agree(store, nonce), f"{host}:{port}")
            store = dist.PrefixStore(agree(store, nonce), store)
            backend = "cpu:gloo,cuda:nccl" if enough_gpus() else "gloo"
            # Later operations wait a day, for a slow scan of audio; torchrun detects dead ranks.
            group = {"world_size": WORLD_SIZE, "rank": RANK, "store": store}
            dist.init_process_group(backend, timeout=datetime.timedelta(days=1), **group)
        except RuntimeError as error:
            raise ValueError(f"{host}:{port}: {str(error)[:80]}; {ALONE}") from None


def agree(store, nonce):
    """The nonce of rank 0, a prefix of this start's keys, once all ranks have read it; else None.

    Rank 0 publishes the nonces that it has read; a rank accepts a list with its own nonce. So the
    keys of ranks that died before --max-restarts have no effect (pytorch issue 135712).
    """
    store.set(f"nonce of {RANK}", nonce)
    if RANK == 0:
        keys = [f"nonce of {rank}" for rank in range(WORLD_SIZE)]
        nonces = [store.get(key).decode() for key in keys if store.check([key])]
        store.set("nonces", " ".join(nonces))
    nonces = store.get("nonces").decode().split() if store.check(["nonces"]) else []
    if nonce not in nonces:  # a list of dead ranks, or too early a list
        return None
    store.set(f"{nonces[0]} {RANK}", "")
    everyone = [f"{nonces[0]} {rank}" for rank in range(WORLD_SIZE)]
    return nonces[0] if store.check(everyone) else None


def wait_until(condition, address):
    """Until condition(). Prints a line after 30 s; raises ValueError after 10 minutes."""
    start, is_printed = time.monotonic(), LOCAL_RANK > 0
    text = f"rank {RANK} waits for {WORLD_SIZE} processes at {address}"
    while not condition():
        waited = time.monotonic() - start
        if waited > 30 and not is_printed:
            is_printed = True
            print(f"{text}; {ALONE}", file=sys.stderr, flush=True)
        if waited > JOIN_LIMIT:
            raise ValueError(f"{text} for over {JOIN_LIMIT} s; {ALONE}")
        time.sleep(0.1)


def is_reachable(host, port):
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=5):
        return True
    return False


def enough_gpus():
    return torch.cuda.is_available() and LOCAL_WORLD_SIZE <= torch.cuda.device_count()


def find_device():
    """The device of this rank: a GPU, else the CPU with its share of the threads.

    Raises ValueError if this machine has GPUs, but fewer than ranks.
    """
    if enough_gpus():
        torch.backends.cudnn.allow_tf32 = False  # float32 is float32
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for every length
        torch.cuda.set_device(LOCAL_RANK)
        return torch.device("cuda", LOCAL_RANK)
    if torch.cuda.is_available():
        gpus = torch.cuda.device_count()
        raise ValueError(f"{LOCAL_WORLD_SIZE} processes but {gpus} GPUs; lower --nproc_per_node")
    with contextlib.suppress(OSError, AttributeError):
        # Keep freed tensors: glibc returned them to the system, and the page faults of new ones
        # took a fifth of a step with Base teachers.
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
        ctypes.CDLL("libc.so.6").mallopt(M_MMAP_MAX, 0)
        ctypes.CDLL("libc.so.6").mallopt(M_TRIM_THRESHOLD, -1)
    if LOCAL_WORLD_SIZE > 1 and os.environ.get("OMP_NUM_THREADS") == "1":  # torchrun's default
        torch.set_num_threads(cores())
    return torch.device("cpu")


def cores():
    """Number of cores per rank, of those that this process may use."""
    total = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, total // LOCAL_WORLD_SIZE)


def precision(requested, device):
    """ "bf16" or "fp32"; "auto" is bf16 if the device supports it natively."""
    if requested != "auto":
        return requested
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        since_2_11 = hasattr(torch.cpu, "get_capabilities")
        supported = torch.cpu.get_capabilities() if since_2_11 else {}
        names = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")
        native = any(supported.get(name) for name in names)
    return "bf16" if native else "fp32"


def seed(*numbers):
    """Seeds torch from numbers such as seed, step and rank, so that resuming needs no RNG state."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]))


def gather(value):
    """The values of all ranks, in order; before join(), this rank's alone."""
    if not dist.is_initialized():
        return [value]
    values = [None] * WORLD_SIZE
    dist.all_gather_object(values, value)
    return values


def mean(tensor):
    """The mean over all ranks of a tensor, on the CPU."""
    return torch.stack(gather(tensor.cpu())).mean(0)


class StopSignal:
    """Records signals to stop, so that the current step is finished and saved."""

    number = 0  # a class attribute: a signal between two main() calls stops the second

    def __init__(self):
        for number in SIGNALS:
            under_nohup = number.name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN
            if not under_nohup:
                signal.signal(number, self.record)

    def record(self, number, frame):
        if StopSignal.number and number == signal.SIGINT:  # a second Ctrl-C
            raise KeyboardInterrupt
        StopSignal.number = number

    def received(self):
        """The signal's number if any rank received one, else 0; for all ranks the same.

        SIGTERM if torchrun has died, since nothing else would end its ranks.
        """
        if PARENT and os.getppid() != PARENT:
            StopSignal.number = signal.SIGTERM
        number = torch.tensor(StopSignal.number)
        if dist.is_initialized():
            dist.all_reduce(number, dist.ReduceOp.MAX)
        return int(number)


def say(text):
    """Prints a line, unless the terminal, or tee, is gone: Ctrl-C ends tee too."""
    with contextlib.suppress(OSError):
        print(text, flush=True)


class Progress:
    """Of a long loop, prints a line about every 20 s with the time that is left, on rank 0.

    total: number of items, or None if it is unknown.
    """

    def __init__(self, name, total, start=0):
        self.name, self.total, self.start = name, total, start
        self.started = self.printed = time.monotonic()

    def show(self, number):
        """Call it after each item; number: of items so far."""
        now = time.monotonic()
        if RANK == 0 and now - self.printed > 20:
            self.printed = now
            if self.total is None:
                say(f"{self.name}: {number:,} so far")
            else:
                say(f"{self.name}: {number:,} of {self.total:,}, {self.left(number)}")

    def left(self, number):
        """Such as "90 s left" or "3 min left", by the mean speed since the start."""
        speed = (number - self.start) / (time.monotonic() - self.started)
        if not speed:
            return "..."
        seconds = (self.total - number) / speed
        return f"{seconds:.0f} s left" if seconds < 120 else f"{seconds / 60:.0f} min left"


# ------------------------------------------------------------------ flags and errors


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are ValueErrors, for one_line_errors."""

    def __init__(self, description):
        formatter = argparse.ArgumentDefaultsHelpFormatter
        super().__init__(description=description, formatter_class=formatter)
        self._negative_number_matcher = re.compile(r"-[\d.]")  # -5,5 is a value, not a flag

    def error(self, message):
        raise ValueError(message)


def count(text, lowest=1):
    """Flag type: a whole number from 1, or from `lowest`."""
    if not text.removeprefix("-").isdecimal() or int(text) < lowest:
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number of at least {lowest}")
    return int(text)


def whole(text):
    """Flag type: a whole number from 0."""
    return count(text, lowest=0)


def names(text):
    """Flag type: names or paths separated by commas."""
    parts = [name.strip() for name in text.split(",") if name.strip()]
    if not parts:
        raise argparse.ArgumentTypeError(f"{text!r}: nothing is named")
    return parts


def fraction(text):
    """Flag type: a number from 0 to 1."""
    return at_least_0(text, highest=1)


def at_least_0(text, highest=math.inf):
    """Flag type: a number from 0, up to `highest`."""
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 <= value <= highest:
        limits = "of at least 0" if highest == math.inf else f"from 0 to {highest}"
        raise argparse.ArgumentTypeError(f"{text}: must be a number {limits}")
    return value


def numbers(text):
    """Flag type: finite numbers separated by commas."""
    values = [float(number) for number in text.split(",")]
    if not all(map(math.isfinite, values)):
        raise argparse.ArgumentTypeError(f"{text}: not finite")
    return values


@contextlib.contextmanager
def one_line_errors():
    """Around set-up: an OSError or ValueError on any rank ends all ranks, with one line and code 2.

    No collective operation may be inside: the other ranks would wait for it.
    """
    message = None
    try:
        yield
    except (OSError, ValueError) as error:
        message = str(error) or type(error).__name__
    messages = [text for text in gather(message) if text]
    if messages:
        # Before join() the first rank of each machine prints.
        if (RANK if dist.is_initialized() else LOCAL_RANK) == 0:
            text = " ".join(messages[0].split())
            print(f"{os.path.basename(sys.argv[0])}: {text}", file=sys.stderr, flush=True)
        elif not dist.is_initialized():
            time.sleep(10)  # rank 0 prints first: torchrun ends all ranks as soon as one exits
        gather(None)  # until rank 0 has printed
        sys.exit(2)
