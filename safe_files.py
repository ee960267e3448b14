"""Files that are whole or not there, and the folder of a run: its settings, its newest whole save, one run at a time.

README's promises kept here: a kill or a full disk never costs what was saved before; a damaged save gives way to the one
before it; no file runs code; a second run in a folder is refused; locks go with their holder.
"""

import contextlib
import json
import os
import warnings
import zipfile

import torch

try:
    import fcntl
except ImportError:  # Windows: like a file system without locks
    fcntl = None


# ---------------------------------------------------------------- writing and reading


def write_whole(path, write, keep=1):
    """Calls write(file) on a temporary file beside `path`, and gives it the name only when it is whole on disk.

    keep: how many files stay, this one and those saved before it, under the names that `earlier` gives.
    Raises OSError with one line, the files that were there being whole.
    """
    partial = f"{path}.partial"
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        for age in range(keep - 1, 0, -1):
            if os.path.exists(earlier(path, age - 1)):
                os.replace(earlier(path, age - 1), earlier(path, age))
        os.replace(partial, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.remove(partial)
        while isinstance(error, (OSError, RuntimeError)) and error.__context__:
            error = error.__context__  # torch.save covers what went wrong first with a RuntimeError of its own
        if not isinstance(error, OSError):  # as that a process of the loader died: torch raises it wherever we are
            raise error
        raise OSError(f"{path}: not written ({error}); what was saved before is whole") from error


def write_text(path, text):
    """A text file in UTF-8, whole or not at all."""
    write_whole(path, lambda file: file.write(text.encode("utf-8", "surrogateescape")))


def earlier(path, age):
    """Where write_whole keeps what was saved `age` saves before the last one: last.pt, last.1.pt, last.2.pt, ..."""
    stem, ending = os.path.splitext(path)
    return f"{stem}.{age}{ending}" if age else path


def load_safely(path, mmap=False):
    """What a file of torch.save holds, tensors and plain types alone: no code in it is run.

    Raises nearly anything where it is damaged or holds something else, a changed byte of a zip (torch 1.6 and later)
    included, which torch.load does not look for.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()
        if damaged:
            raise ValueError(f"{damaged} does not match its checksum")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's remarks on the formats of old files
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


# ---------------------------------------------------------------- one at a time


@contextlib.contextmanager
def locked(path):
    """Within it this process alone holds the lock file `path`, after waiting for the one that does.

    The lock goes with its holder, however that ends. Where there are no locks (some network disks, Windows) it passes.
    """
    with open(path, "w") as file:
        _lock(file, wait=True)
        yield


@contextlib.contextmanager
def locked_now(path):
    """Within it this process alone holds the lock file `path`, or another does: gives which, without waiting."""
    with open(path, "w") as file:
        yield _lock(file, wait=False)


@contextlib.contextmanager
def claimed(folder):
    """Within it other runs are kept out of a folder. Raises ValueError where another is in it."""
    with open(os.path.join(folder, "lock"), "w") as file:
        if not _lock(file, wait=False):
            raise ValueError(f"{folder}: another run is at work in it; wait for its end, or give another --out")
        yield


def _lock(file, wait):
    """Whether nobody else holds the file's lock."""
    if fcntl is None:
        return True
    try:
        # lockf, not flock: a killed run's orphaned processes, which inherit the file, hold no such lock.
        fcntl.lockf(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # what POSIX allows for "held by another"
        return False
    except OSError:  # a file system without locks: others cannot be told
        pass
    return True


# ---------------------------------------------------------------- the folder of a run


def check_settings(folder, before, now, free):
    """Raises ValueError naming the settings that differ from those the run in `folder` began with, those in `free` apart."""
    differ = [
        f"--{key.replace('_', '-')} was {_text(before[key])}, is {_text(value)}"
        for key, value in now.items()
        if key not in free and key in before and before[key] != value and before[key] != "auto"  # as kept before
    ]
    if differ:
        what = f"holds a run with other settings: {'; '.join(differ)}"
        raise ValueError(f"{folder}: {what}; take its own, or another --out")


def _text(value):
    if not isinstance(value, list):
        return value
    return ("/" if isinstance(value[0], list) else ",").join(str(_text(one)) for one in value)


def read_settings(folder):
    """The settings in a training run's config.json, {} where the folder holds no run. Raises ValueError for anything else."""
    path = os.path.join(folder, "config.json")
    if not os.path.exists(path):
        for name in ("last.pt", "last.1.pt", "student.pt", "metrics.jsonl"):
            if os.path.exists(os.path.join(folder, name)):
                raise ValueError(f"{folder}: holds {name} but no config.json of a run; give --out another folder")
        return {}
    try:
        with open(path, encoding="utf-8") as file:
            return dict(json.load(file)["settings"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path}: not the settings of a run; give --out another folder") from None


def newest_save(folder, take):
    """(what the newest whole save of last.pt, last.1.pt, ... holds, a warning or ""); (None, "") before the first one.

    take(save): takes what it needs of a save; whatever it raises, the save counts as damaged.
    Raises ValueError where there are saves but none is whole.
    """
    damaged = []
    for path in (earlier(os.path.join(folder, "last.pt"), age) for age in range(100)):
        if not os.path.exists(path):
            continue
        try:
            save = load_safely(path)
            take(save)
        except Exception:  # a damaged file can raise nearly anything
            damaged.append(path)
            continue
        return save, f"{', '.join(damaged)}: damaged or not a run's; going on from {path}" if damaged else ""
    if damaged:
        raise ValueError(
            f"{', '.join(damaged)}: damaged or not a run's; move it away to start again, or give another --out"
        )
    return None, ""
