"""Locks that killed starts leave in torch's cache of extensions, where every later start waits for ever, in silence.

While torch builds an extension, or sees that it needn't, it has a file ``lock`` in the extension's directory, which it
holds open. Others wait until the file is gone. It is left over if nobody holds it open any more. DeepSpeed's ops are
such extensions; the first may be loaded as early as ``deepspeed.init_distributed``.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterable
from pathlib import Path

logger = logging.getLogger(__name__)

#: File systems that other machines may see, whose processes this one doesn't.
_SHARED = ("nfs", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb", "glusterfs", "fuse", "9p", "virtiofs", "wekafs")

#: Seconds after which nobody builds any more, for locks that somebody may hold whom one can't see.
_LONG = 900.0

_warned: set[Path] = set()


def warn_of_left_locks() -> None:
    """Name every lock that is left over, once, with the command that removes it.

    Call it before DeepSpeed can have loaded an op. The first process of each machine looks, as the cache may be the
    machine's own; without a lock that is a directory listing, with one a look at what this machine's processes hold.
    """
    if os.environ.get("LOCAL_RANK", "0") not in ("", "0", "-1"):
        return
    for lock in left_locks():
        if lock not in _warned:
            _warned.add(lock)
            logger.warning(
                "%s is left over from a start that was killed while it built %s: no process on %s holds it, and every "
                "start that loads this extension waits for it for ever. If no other machine is building there, remove "
                "it: rm %s",
                lock,
                lock.parent.name,
                socket.gethostname(),
                shlex.quote(str(lock)),
            )


def left_locks() -> list[Path]:
    """The locks in torch's cache of extensions that nobody holds."""
    with contextlib.suppress(OSError):
        locks = sorted(_locks())
        held = _held_open({os.path.realpath(lock) for lock in locks}) if locks else set()
        return [lock for lock in locks if os.path.realpath(lock) not in held and _left(lock)]
    return []


def _locks() -> Iterable[Path]:
    """Where ``torch.utils.cpp_extension`` puts them, for this Python and any build of torch."""
    own = os.environ.get("TORCH_EXTENSIONS_DIR")
    if own is not None:
        return Path(own).glob("*/lock")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch_extensions"
    python = f"py{sys.version_info.major}{sys.version_info.minor}{getattr(sys, 'abiflags', '')}"
    return cache.glob(f"{python}_*/*/lock")


def _held_open(files: set[str]) -> set[str]:
    """Which of the files a process of this machine, whose open files one may see, holds open."""
    held = set()
    for process in Path("/proc").glob("[0-9]*/fd"):
        with contextlib.suppress(OSError):  # another user's, or gone
            for entry in os.scandir(process):
                with contextlib.suppress(OSError):
                    held.add(os.readlink(entry.path))
    return held & files


def _left(lock: Path) -> bool:
    """Whether a lock that nobody here is seen to hold is still there, and isn't one that somebody may just have taken
    whom one can't see: on another machine, or another user."""
    try:
        found = lock.stat()
    except FileNotFoundError:
        return False
    others = found.st_uid != os.getuid() and os.getuid() != 0
    unseen = others or _file_system(lock).startswith(_SHARED)
    return not unseen or time.time() - found.st_mtime > _LONG


def _file_system(path: Path) -> str:
    """The kind of the file system that a path lies on; "" if nothing tells."""
    place, best, kind = os.path.realpath(path), "", ""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mounts").read_text().splitlines():
            _, mount, found, *_ = line.split()
            mount = mount.replace("\\040", " ")
            inside = place == mount or place.startswith(mount.rstrip("/") + "/")
            if inside and len(mount) >= len(best):
                best, kind = mount, found
    return kind
