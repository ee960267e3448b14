"""A program of ours from its start to its end, alone or as one of torchrun's processes: flags, device, signals, stopping.

README's promises kept here: whatever goes wrong is one line, said once, before anything is lost; all processes end
together; a signal lets the step in hand be saved; torchrun's restarts find each other.
"""

import argparse
import contextlib
import ctypes
import datetime
import os
import signal
import sys
import threading
import time

# Ctrl-C while torch is imported is no traceback: for that long the system's own handler has it.
_IN_MAIN_THREAD = threading.current_thread() is threading.main_thread()
_BEFORE = signal.signal(signal.SIGINT, signal.SIG_DFL) if _IN_MAIN_THREAD else None

# Batches of many lengths would break a GPU's memory into pieces.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

if _IN_MAIN_THREAD:
    signal.signal(signal.SIGINT, _BEFORE)


def _who(environment):
    """((rank, local rank, processes, processes on this machine) as torchrun says them, what is wrong with them or "")."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    there = [name for name in names if name in environment]
    if not there:  # a plain `python train.py` is rank 0 of 1
        return (0, 0, 1, 1), ""
    lacking = [name for name in (*names, "MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if lacking:
        what = f"the environment has {', '.join(there)} but not {', '.join(lacking)}"
        return (0, 0, 1, 1), f"{what}; start with torchrun, or unset {', '.join(there)}"
    for name in (*names, "MASTER_PORT"):
        if not (environment[name].isascii() and environment[name].isdigit()):
            return (0, 0, 1, 1), f"the environment has {name}={environment[name]!r}, not a number; torchrun sets it"
    return tuple(int(environment[name]) for name in names), ""


(RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE), _WRONG = _who(os.environ)
DISTRIBUTED = "RANK" in os.environ and not _WRONG


# ---------------------------------------------------------------- the start and the end


def run(main, less_memory="a smaller --batch-size"):
    """A program's last line: main(), where Ctrl-C, a dead process of the loader and a full GPU are no traceback.

    less_memory: the setting that takes less of it.
    """
    code = 0
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a path need not be text that the terminal can show
    try:
        main()
    except SystemExit as end:
        code = end.code
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except RuntimeError as error:
        # Not by stop: the other processes may be anywhere. They fail when this one is gone, and torchrun ends them.
        if isinstance(error, torch.OutOfMemoryError):
            time.sleep(5 if RANK else 0)  # where all are out of memory, rank 0 says so and torchrun ends the others
            say(f"out of GPU memory; {less_memory} takes less, and the same command with it resumes")
        elif any(reader in str(error) for reader in ("DataLoader worker", "Pin memory thread")):
            say(f"a process that reads audio died ({error}); the same command resumes")
        else:
            raise
        sys.stdout.flush()
        os._exit(1)
    if DISTRIBUTED:
        # Not by Python's own end: a thread of gloo's that still lets go of a tensor then aborts the process.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)
    sys.exit(code)


def begin():
    """Joins torchrun's other processes, before anything can go wrong: a process that ended alone, rank 0 might be ended
    by torchrun before it has said why."""
    if _WRONG:
        say(_WRONG)
        sys.exit(2)
    if not DISTRIBUTED or dist.is_initialized():
        return
    env, store = os.environ, None
    if env.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and env.get("GROUP_WORLD_SIZE") == "1":
        # After a restart torchrun's store still holds the addresses of the processes before (pytorch issue 135712):
        # a part of it for each start. With several agents the count differs between them.
        store = dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), is_master=False)
        store = dist.PrefixStore(f"start-{env['TORCHELASTIC_RESTART_COUNT']}", store)
    backend = "cpu:gloo,cuda:nccl" if enough_gpus() else "gloo"
    # A process that died is torchrun's to notice; one that scans a network disk for hours is not dead.
    patience = datetime.timedelta(days=1)
    dist.init_process_group(backend, store=store, rank=RANK, world_size=WORLD_SIZE, timeout=patience)


def end():
    """Leaves the other processes; every process comes here together."""
    if dist.is_initialized():
        dist.barrier()  # none before rank 0 has said all that it has to say
        dist.destroy_process_group()


def stop(message, code=2):
    """Ends the program on every process, with one line on stderr; every process comes here together."""
    begin()  # where the program has not: one process alone might take the others down before the line is said
    if RANK == 0:
        say(message)
    end()
    sys.exit(code)


def warn(message):
    """A warning on stderr, from rank 0 only."""
    if RANK == 0:
        print(f"warning: {message}", file=sys.stderr, flush=True)


def say(message):
    """One line on stderr with the program's name."""
    print(f"{os.path.basename(sys.argv[0])}: {message}", file=sys.stderr, flush=True)


# ---------------------------------------------------------------- flags


def parser(description):
    """An argparse.ArgumentParser whose refusals are one line, said by all processes together."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    made.error = stop
    made.exit = _exit
    return made


def _exit(status=0, message=None):
    """After --help."""
    end()
    sys.exit(status)


def number(kind, wanted, accepts):
    """A type of flag: an int or float that `accepts` takes, or else a line that says what is `wanted`."""

    def convert(text):
        value = kind(text)
        if not accepts(value):
            raise argparse.ArgumentTypeError(f"{text}: must be {wanted}")
        return value

    convert.__name__ = kind.__name__  # argparse names it where the text is no number
    return convert


count = number(int, "1 or more", lambda n: n >= 1)
whole = number(int, "0 or more", lambda n: n >= 0)
seed = number(int, "from 0 to 2^64 - 1", lambda n: 0 <= n < 2**64)
positive = number(float, "above 0", lambda x: 0 < x < float("inf"))
not_negative = number(float, "0 or more", lambda x: 0 <= x < float("inf"))
below_one = number(float, "0 or more, and below 1", lambda x: 0 <= x < 1)
share = number(float, "from 0 to 1", lambda x: 0 <= x <= 1)


def names(text):
    """A type of flag: names or paths with commas between them."""
    found = [name.strip() for name in text.split(",") if name.strip()]
    if not found:
        raise argparse.ArgumentTypeError("empty")
    return found


def layers(text):
    """A type of flag: layers with commas between them, such as 4,8,12."""
    try:
        found = [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: layer numbers with commas, such as 4,8,12") from None
    if min(found) < 1 or len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"{text!r}: layers count from 1, each once")
    return found


def layers_of_each(text):
    """A type of flag: layers for all teachers, 4,8,12, or for each its own, as many each, 4,8,12/8,16,24."""
    found = [layers(part) for part in text.split("/")]
    if len(found) == 1:
        return found[0]
    if len({len(part) for part in found}) > 1:
        raise argparse.ArgumentTypeError(f"{text!r}: each teacher needs as many layers as the others")
    return found


def rates(text):
    """A type of flag: a learning rate, or several with commas between them."""
    found = [positive(rate) for rate in text.split(",")]
    if len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"{text!r}: each rate once")
    return found if len(found) > 1 else found[0]


def states(text):
    """A type of flag: all, last, or hidden states with commas between them, counted from 0."""
    if text in ("all", "last"):
        return text
    if not all(number.isascii() and number.isdigit() for number in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r}: all, last, or hidden states such as 0,4,12")
    return sorted({int(number) for number in text.split(",")})


# ---------------------------------------------------------------- agreeing


@contextlib.contextmanager
def together(flag=""):
    """Around what bad input can spoil: where it raises OSError or ValueError on any process, all stop with that line.

    flag: the setting that the line begins with. No collective may stand within: the others would wait for it.
    """
    problem = None
    try:
        yield
    except (OSError, ValueError) as error:
        problem = f"{flag}: {error}" if flag else str(error)
    problem = next((p for p in gather(problem) if p), None)
    if problem:
        stop(problem)


def gather(value):
    """The values of all processes, in the order of their ranks."""
    if not dist.is_initialized():
        return [value]
    values = [None] * WORLD_SIZE
    dist.all_gather_object(values, value)
    return values


def agree(*numbers):
    """The largest of all processes' whole numbers, place by place, so that all go the same way."""
    largest = torch.tensor(numbers, dtype=torch.int64)
    if dist.is_initialized():
        dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.tolist()


def anywhere(flag):
    """Where a bool tensor, on any device, is true on some process. On a GPU the host does not wait for it."""
    if not dist.is_initialized():
        return flag
    flag = flag.to(torch.uint8)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return flag.bool()


def mean(tensor):
    """The mean over all processes, place by place, of a tensor on the CPU."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
        tensor = tensor / WORLD_SIZE
    return tensor


class Interrupted(Exception):
    """SIGTERM or Ctrl-C came; the argument is its number."""


@contextlib.contextmanager
def signals():
    """Within it SIGTERM and Ctrl-C end nothing: gives the list of those that came. A second Ctrl-C is not waited for."""
    asked = []

    def on_signal(number, frame):
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def heed(asked):
    """Raises Interrupted where a signal has come."""
    if asked:
        raise Interrupted(asked[0])


# ---------------------------------------------------------------- the machine


def readers(asked):
    """How many processes that read audio this process may have: what is asked for, four a core at most."""
    most = 4 * cores()
    if asked > most:
        warn(f"--workers {asked}: {most} are taken, four for each core")
    return min(asked, most)


def device(anywhere=False):
    """This process's GPU where there is one, or the CPU with its share of the threads.

    anywhere: the CPU will do where processes outnumber GPUs; otherwise that stops the program.
    """
    if enough_gpus():
        # float32 is float32: torch's default is so for matrix products, not for convolutions.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        torch.cuda.set_device(LOCAL_RANK)
        return torch.device("cuda", LOCAL_RANK)
    if torch.cuda.is_available() and not anywhere:
        stop(f"{LOCAL_WORLD_SIZE} processes but {torch.cuda.device_count()} GPUs; lower --nproc_per_node")
    reuse_memory()
    if LOCAL_WORLD_SIZE > 1 and os.environ.get("OMP_NUM_THREADS") == "1":
        torch.set_num_threads(max(1, cores() // LOCAL_WORLD_SIZE))  # 1 is torchrun's default, on any machine
    return torch.device("cpu")


def enough_gpus():
    return torch.cuda.is_available() and LOCAL_WORLD_SIZE <= torch.cuda.device_count()


def cores():
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def precision(asked, device):
    """ "bf16" or "fp32": what is asked for; "auto" is bf16 where the device computes in it rather than emulating it."""
    if asked != "auto":
        return asked
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        able = torch.cpu.get_capabilities()
        native = any(able.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))
    return "bf16" if native else "fp32"


def compile(*networks, backend="inductor"):
    """torch.compile in place: each network one graph for all lengths, and room for so many before dynamo falls back."""
    torch._dynamo.config.recompile_limit = 8 * len(networks)  # networks of one class count together
    torch._dynamo.config.specialize_int = True  # the numbers of layers are none that vary
    for network in networks:
        network.compile(dynamic=True, backend=backend)
    if RANK == 0:
        print(f"compiling {len(networks)} networks: some minutes at the first step, and at the first of another shape")


def reseed(*numbers):
    """Seeds torch by these numbers alone, such as seed, step and rank: a resume then needs no generator's state."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]))


def reuse_memory():
    """For a program that computes on a CPU: memory given back is kept for the next tensor.

    glibc otherwise asks the system for every tensor over 32 MB anew, and clearing its pages took a fifth of a training
    step of Base teachers. Does nothing where the C library is another one.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: large tensors from the heap too
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never give the heap's end back


def peak_memory(device):
    """Bytes, at most so far: of the GPU where there is one, else of this process; 0 where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
