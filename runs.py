"""What every program shares: torchrun's ranks, one-line errors, checkpoints, one run per folder.

Programs import this file first: OpenMP reads the environment once, when torch is imported.
"""

import argparse
import contextlib
import ctypes
import datetime
import errno
import json
import multiprocessing
import os
import signal
import sys
import traceback
import warnings
import zipfile

if "OMP_WAIT_POLICY" not in os.environ:  # threads that spin for long stall a shared machine
    os.environ["OMP_WAIT_POLICY"] = "passive"
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # 0.2 ms: with none, a step is 16% slower
if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
    os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"  # batches vary in length

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from filelock import FileLock, Timeout  # noqa: E402

if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6):
    sys.exit(f"torch {torch.__version__} is too old: install torch and torchaudio 2.6 or later")

RANK = int(os.environ.get("RANK", 0))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
LOCAL_WORLD_SIZE = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1

locks = {}  # folder: FileLock; without a reference a lock would be released


def run(program):
    """Calls program(), then exits without joining workers; with code 1 after an exception."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # for paths that are not UTF-8
    code = 0
    try:
        program()
    except SystemExit as end:
        code = end.code or 0
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except Exception:
        code = 1
        with contextlib.suppress(OSError):  # a pipe whose reader has ended, or a full disk
            traceback.print_exc()
    for worker in multiprocessing.active_children():
        worker.kill()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            code = code or 1
    os._exit(code)  # workers may wait for a disk or for this process


# ------------------------------------------------------------------ ranks and devices


def init():
    """Joins torchrun's other ranks, if there are any."""
    if WORLD_SIZE == 1:
        return
    env, store = os.environ, None
    if env.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and env.get("GROUP_WORLD_SIZE") == "1":
        # After --max-restarts, torchrun's store still holds the addresses of the dead ranks
        # (pytorch issue 135712), so every start has a prefix.
        store = dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), is_master=False)
        store = dist.PrefixStore(f"start-{env['TORCHELASTIC_RESTART_COUNT']}", store)
    backend = "cpu:gloo,cuda:nccl" if enough_gpus() else "gloo"
    timeout = datetime.timedelta(days=1)  # for a slow scan; torchrun detects dead ranks
    dist.init_process_group(backend, timeout=timeout, world_size=WORLD_SIZE, rank=RANK, store=store)


def enough_gpus():
    return torch.cuda.is_available() and LOCAL_WORLD_SIZE <= torch.cuda.device_count()


def find_device(cpu_ok=False):
    """The device of this rank: a GPU, else the CPU with its share of the threads.

    Raises ValueError if this machine has GPUs, but fewer than ranks, unless cpu_ok.
    """
    if enough_gpus():
        torch.backends.cudnn.allow_tf32 = False  # float32 is float32
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for every length
        torch.cuda.set_device(LOCAL_RANK)
        return torch.device("cuda", LOCAL_RANK)
    if torch.cuda.is_available() and not cpu_ok:
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
        supported = getattr(torch.cpu, "get_capabilities", dict)()  # since torch 2.11
        native = any(map(supported.get, ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")))
    return "bf16" if native else "fp32"


def seed(*numbers):
    """Seeds torch from numbers such as seed, step and rank, so that resuming needs no RNG state."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]))


def warn(message):
    """Prints a warning to stderr, on rank 0."""
    if RANK == 0:
        print(f"warning: {message}", file=sys.stderr, flush=True)


def gather(value):
    """The values of all ranks, in order."""
    values = [value] * WORLD_SIZE
    if WORLD_SIZE > 1:
        dist.all_gather_object(values, value)
    return values


class StopSignal:
    """Records SIGTERM and Ctrl-C, so that the current step is finished and saved."""

    number = 0  # a class attribute: a signal between two main() calls stops the second

    def __init__(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.record)

    def record(self, number, frame):
        if self.number and number == signal.SIGINT:  # a second Ctrl-C
            raise KeyboardInterrupt
        StopSignal.number = number

    def received(self):
        """The signal's number if any rank received one, else 0; for all ranks the same."""
        number = torch.tensor(self.number)
        if WORLD_SIZE > 1:
            dist.all_reduce(number, dist.ReduceOp.MAX)
        return int(number)


# ------------------------------------------------------------------ flags and errors


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are ValueErrors, for one_line_errors."""

    def __init__(self, description):
        formatter = argparse.ArgumentDefaultsHelpFormatter
        super().__init__(description=description, formatter_class=formatter)

    def error(self, message):
        raise ValueError(message)


def count(text, lowest=1):
    """Flag type: a whole number from 1, or from `lowest`."""
    if int(text) < lowest:
        raise argparse.ArgumentTypeError(f"{text}: must be at least {lowest}")
    return int(text)


def whole(text):
    """Flag type: a whole number from 0."""
    return count(text, lowest=0)


def names(text):
    """Flag type: names or paths separated by commas."""
    found = [name.strip() for name in text.split(",") if name.strip()]
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r}: nothing is named")
    return found


def numbers(text):
    """Flag type: numbers separated by commas."""
    return [float(number) for number in text.split(",")]


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
        if RANK == 0:
            text = " ".join(messages[0].split())
            print(f"{os.path.basename(sys.argv[0])}: {text}", file=sys.stderr, flush=True)
        gather(None)  # until rank 0 has printed: torchrun ends all ranks as soon as one exits
        sys.exit(2)


# ------------------------------------------------------------------ files


def save(path, content, keep_previous=False):
    """Writes a text, or what torch.save takes; the file gets its name only once it is complete.

    keep_previous: for checkpoints, which survive a power cut too: the file that had the name
        before becomes PATH.old. Raises OSError.
    """
    partial = f"{path}.{os.urandom(4).hex()}.partial"  # PIDs of two containers can be equal
    try:
        with open(partial, "wb") as file:
            if isinstance(content, str):
                file.write(content.encode("utf-8", "surrogateescape"))
            else:
                torch.save(content, file)
            if keep_previous:
                file.flush()
                os.fsync(file.fileno())
        if keep_previous and os.path.exists(path):
            os.replace(path, f"{path}.old")
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError if the disk is full
        reason = error.__context__ or error
        raise OSError(f"{path}: not saved ({reason}); the file before it is intact") from error
    finally:
        with contextlib.suppress(OSError):
            os.remove(partial)


def read_json(path):
    """The dict in a JSON file, {} if there is no such file. Raises OSError and ValueError."""
    if not os.path.exists(path):
        return {}
    try:
        with open(path, encoding="utf-8-sig") as file:
            return dict(json.load(file))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None


def load(path, mmap=False):
    """torch.load of tensors and plain types, without running code; ValueError if damaged."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as file:
                damaged = file.testzip()  # torch.load verifies no checksums
            if damaged:
                raise ValueError(f"{damaged} fails its checksum")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the formats of old files
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:  # a damaged file can raise nearly anything
        reason = (str(error) or type(error).__name__).splitlines()[0][:80]
        raise ValueError(f"{path}: damaged, or not a checkpoint ({reason})") from error


# ------------------------------------------------------------------ the folder of a run


def lock(folder):
    """Locks a folder until this process ends. Raises ValueError if another run has locked it."""
    os.makedirs(folder, exist_ok=True)
    # A soft lock would outlive a killed run.
    locks[folder] = FileLock(os.path.join(folder, "lock"), fallback_to_soft=False)
    try:
        locks[folder].acquire(timeout=0)
    except Timeout:
        remedy = "wait until it ends, or choose another --out"
        raise ValueError(f"{folder}: another run is using this folder; {remedy}") from None
    except OSError as error:
        if error.errno != errno.ENOSYS:  # a file system without locks
            raise
    for name in os.listdir(folder):
        if name.endswith(".partial"):  # left by a killed run
            os.remove(os.path.join(folder, name))


def load_latest(folder, keys):
    """The newest undamaged checkpoint of a run, a dict with all `keys`; None if there are no files.

    A damaged last.pt is named in a warning. Raises ValueError if none is undamaged.
    """
    newest = os.path.join(folder, "last.pt")
    paths = [path for path in (newest, f"{newest}.old") if os.path.exists(path)]
    for path in paths:
        try:
            checkpoint = load(path)
            missing = [key for key in keys if key not in checkpoint]
            if not missing:
                return checkpoint
            warn(f"{path}: not a checkpoint of this program, it has no {missing[0]}")
        except (ValueError, TypeError) as error:
            warn(error)
    if paths:
        remedy = "move last.pt* away to start again, or choose another --out"
        raise ValueError(f"{folder}: no undamaged checkpoint; {remedy}")
    return None


def check_same(folder, before, now):
    """Raises ValueError naming the settings that differ from those that a run began with."""
    changed = [key for key in now if before.get(key) != now[key]]
    if changed:
        changes = "; ".join(f"{key} was {before.get(key)}, is {now[key]}" for key in changed)
        raise ValueError(f"{folder}: holds another run ({changes}); choose another --out")
