"""Checkpoints: atomic saving, safe loading, the newest undamaged one, one run per folder.

Needs torch and filelock alone.
"""

import contextlib
import errno
import json
import os
import warnings
import zipfile

import torch
from filelock import FileLock, Timeout

# Of file systems without locks: NFS without lockd, gluster, FUSE.
WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
locks = {}  # folder: FileLock; keeps each lock referenced, else it is released


# ------------------------------------------------------------------ files


def save(path, content, keep_previous=False):
    """Writes text, bytes, or what torch.save takes; the file gets its name once it is complete.

    keep_previous: for checkpoints, which survive a power cut too: the file that had the name
        before becomes PATH.old. Raises OSError.
    """
    partial = f"{path}.{os.urandom(4).hex()}.partial"  # PIDs of two containers can be equal
    try:
        with open(partial, "wb") as file:
            if isinstance(content, str):
                content = content.encode("utf-8", "surrogateescape")
            if isinstance(content, bytes):
                file.write(content)
            else:
                torch.save(content, file)
            if keep_previous:
                file.flush()
                os.fsync(file.fileno())
        if keep_previous and os.path.exists(path):
            os.replace(path, f"{path}.old")
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError if the disk is full
        reason = error.__context__ or error  # torch.save's RuntimeError hides the OSError
        raise OSError(f"{path}: not saved ({reason}); the file before it is intact") from error
    finally:
        with contextlib.suppress(OSError):
            if keep_previous and not os.path.exists(path):  # interrupted between the two renames
                os.replace(f"{path}.old", path)
        with contextlib.suppress(OSError):
            os.remove(partial)
    if keep_previous:
        with contextlib.suppress(OSError):
            os.remove(f"{path}.damaged")


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
    """torch.load of tensors and plain types, without running code; ValueError if damaged.

    Raises OSError if the file cannot be read, and RuntimeError if memory is too small for it.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as file:
                damaged = file.testzip()  # torch.load verifies no checksums
            if damaged:
                raise ValueError(f"{damaged} fails its checksum")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the formats of old files
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # a damaged file can raise nearly anything
        if not is_damage(error):
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0][:80]
        raise ValueError(f"{path}: damaged, or not a checkpoint ({reason})") from error


def is_damage(error):
    """Whether an exception while a file is read is the fault of the file."""
    if isinstance(error, OSError):
        return error.errno == errno.EINVAL  # a seek to a damaged offset
    # torch raises the second one, at any line, when a worker dies.
    others = ("can't allocate memory", "DataLoader worker")
    return not isinstance(error, MemoryError) and not any(text in str(error) for text in others)


# ------------------------------------------------------------------ the folder of a run


def lock(folder):
    """Locks a folder until this process ends. Raises ValueError if another run has locked it."""
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, "lock")
    # A soft lock would outlive a killed run.
    locks[folder] = FileLock(path, fallback_to_soft=False)
    try:
        locks[folder].acquire(timeout=0)
    except Timeout:
        remedy = "wait until it ends, or choose another folder"
        raise ValueError(f"{folder}: another run is using this folder; {remedy}") from None
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise OSError(error.errno, error.strerror, path) from None
        remedy = "start no second run in this folder"
        warnings.warn(f"{path}: not locked ({error.strerror}); {remedy}")
    for name in os.listdir(folder):
        if name.endswith(".partial"):  # left by a killed run
            os.remove(os.path.join(folder, name))


def load_latest(folder, keys):
    """The newest undamaged checkpoint of a run, a dict with all `keys`; None if there are no files.

    A damaged last.pt is named in a warning, and renamed to last.pt.damaged if last.pt.old is
    undamaged: else the next save would make it last.pt.old. Raises ValueError if none is undamaged.
    """
    newest = os.path.join(folder, "last.pt")
    paths = [path for path in (newest, f"{newest}.old") if os.path.exists(path)]
    for path in paths:
        try:
            content = load(path)
            available = content if isinstance(content, dict) else ()
            missing = [key for key in keys if key not in available]
            if missing:
                raise ValueError(f"{path}: not a checkpoint of this program, no {missing[0]} in it")
        except FileNotFoundError:  # renamed by another rank, as below
            continue
        except ValueError as error:
            warnings.warn(str(error))
            continue
        if path != newest:
            with contextlib.suppress(OSError):
                os.replace(newest, f"{newest}.damaged")
        return content
    if paths:
        remedy = "move last.pt* away to start again, or choose another folder"
        raise ValueError(f"{folder}: no undamaged checkpoint; {remedy}")
    return None


def check_same(folder, before, now):
    """Raises ValueError listing the settings that differ from those that a run began with.

    before, now: {name: value}. Values of flags are shown, of others (hashes) the name alone.
    """
    changes = []
    for name in before | now:
        old, new = before.get(name), now.get(name)
        if old != new:
            values = f"was {'not given' if old is None else old}"
            values += f", is {'not given' if new is None else new}"
            changes.append(f"{name} {values if name.startswith('--') else 'changed'}")
    if changes:
        raise ValueError(
            f"{folder}: holds another run ({'; '.join(changes)}); choose another folder"
        )
