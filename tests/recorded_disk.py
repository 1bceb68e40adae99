"""A file system in memory that records every call which changes it, and makes the ones fail that a test chooses.

It answers the kernel through /dev/fuse, so it sees what any code of any process writes: Python, FFmpeg, memory maps. It
speaks the kernel's protocol itself (include/uapi/linux/fuse.h, version 7.31), because libfuse is a system library, and
its path interface renames files that are removed while they are open, which would be recorded in place of the removal.

A thread of this process answers. So this process must not open anything under the mount point; it looks into `tree()`.
"""

import ctypes
import errno
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread

ROOT = 1
"""Number of the root's inode."""

Tree = dict[str, bytes | None]
"""Contents of files by their paths from the root; None for a folder."""

CHANGES = ("create", "mkdir", "write", "truncate", "unlink", "rename", "fsync", "fsyncdir")
FALLIBLE = (*CHANGES, "open", "close")
"""Calls that `RecordedDisk.fail` counts."""
GROWING = ("create", "mkdir", "write")
"""Calls that need space."""

_HEADER = struct.Struct("<IIQQIIII")
_MAX_WRITE = 1 << 20
_FOREVER = 1 << 30
_BIG_WRITES, _MAX_PAGES, _SIZE_IS_SET = 1 << 5, 1 << 22, 1 << 3
_FOLDER, _FILE = 0o040755, 0o100644


@dataclass(frozen=True)
class Call:
    """A call that changes the disk, or a mark of the process that makes them.

    `inode` is what is written or synced, or the folder whose names change; `name` the name that changes there, `node`
    what it names, `source` the name before a rename. `data` lies at `offset`, which is the size for `truncate`.
    """

    kind: str
    inode: int = 0
    name: str = ""
    node: int = 0
    source: str = ""
    data: bytes = b""
    offset: int = 0


@dataclass
class _Node:
    data: bytearray | None = None
    names: dict[str, int] = field(default_factory=dict)


class RecordedDisk:
    """`calls` has what was done, in order. A look-up of a name that begins with "mark:" is noted there too."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self._nodes = {ROOT: _Node()}
        self._fallible = 0
        self._faults: Callable[[int, str], int] = lambda number, kind: 0
        self.failed: list[str] = []
        self._operations: dict[int, Callable[[int, bytes], bytes]] = {
            1: self._look_up,
            3: lambda node, _: struct.pack("<QII", _FOREVER, 0, 0) + self._attributes(node),
            4: self._set_attributes,
            9: lambda node, body: self._make(node, _text(body[8:]), "mkdir"),
            10: self._remove,
            11: self._remove,
            12: lambda node, body: self._rename(node, body[:8], body[8:]),
            14: self._open,
            15: self._read,
            16: self._write,
            17: lambda *_: struct.pack("<5Q4I24x", *[1 << 30] * 5, 4096, 255, 4096, 0),
            18: lambda *_: b"",
            20: lambda node, _: self._sync(node, "fsync"),
            25: self._close,
            26: self._begin,
            27: lambda *_: bytes(16),
            28: self._list,
            29: lambda *_: b"",
            30: lambda node, _: self._sync(node, "fsyncdir"),
            34: lambda *_: b"",
            35: lambda node, body: self._make(node, _text(body[16:]), "create") + bytes(16),
            45: lambda node, body: self._rename(node, body[:8], body[16:]),
        }

    def copy(self) -> "RecordedDisk":
        """A disk with the same content on which nothing was done yet."""
        disk = RecordedDisk()
        disk._nodes = deepcopy(self._nodes)
        return disk

    def fail(self, faults: Callable[[int, str], int]) -> None:
        """From now on each fallible call, counted from 0, fails with the errno that `faults` gives; 0 is none."""
        self._faults, self._fallible, self.failed = faults, 0, []

    @property
    def fallible(self) -> int:
        """Calls since `fail` that could have been made to fail."""
        return self._fallible

    def tree(self, path: str = "") -> Tree:
        """What is under a path; empty where there is nothing."""
        node = ROOT
        for name in filter(None, path.split("/")):
            if name not in self._nodes[node].names:
                return {}
            node = self._nodes[node].names[name]
        return dict(self._walk(node, ""))

    def answer(self, request: bytes) -> bytes | None:
        """The reply to a request of the kernel; None where it waits for none."""
        _, operation, unique, node, *_ = _HEADER.unpack_from(request)
        if operation in (2, 36, 42):  # to forget an inode, or to interrupt
            return None
        code, reply = 0, b""
        try:
            if operation not in self._operations:
                raise OSError(errno.ENOSYS, "")
            reply = self._operations[operation](node, request[_HEADER.size :])
        except OSError as error:
            code = error.errno or errno.EIO
        return struct.pack("<IiQ", 16 + len(reply), -code, unique) + reply

    def _begin(self, _: int, body: bytes) -> bytes:
        major, minor, read_ahead, _ = struct.unpack_from("<4I", body)
        flags = _BIG_WRITES | _MAX_PAGES
        return struct.pack("<4I2H2I2HI28x", major, min(minor, 31), read_ahead, flags, 8, 8, _MAX_WRITE, 1, 256, 0, 0)

    def _walk(self, node: int, path: str) -> Iterator[tuple[str, bytes | None]]:
        for name, child in self._nodes[node].names.items():
            data = self._nodes[child].data
            yield path + name, None if data is None else bytes(data)
            yield from self._walk(child, f"{path}{name}/")

    def _may_fail(self, kind: str, name: str) -> None:
        code = self._faults(self._fallible, kind)
        self._fallible += 1
        if code:
            self.failed.append(f"{kind} {name}")
            raise OSError(code, os.strerror(code))

    def _name_of(self, inode: int) -> str:
        names = (name for node in self._nodes.values() for name, child in node.names.items() if child == inode)
        return next(names, "/")

    def _entry(self, inode: int) -> bytes:
        return struct.pack("<4Q2I", inode, 0, _FOREVER, _FOREVER, 0, 0) + self._attributes(inode)

    def _attributes(self, inode: int) -> bytes:
        data = self._nodes[inode].data
        size, mode = (0, _FOLDER) if data is None else (len(data), _FILE)
        owner = (os.getuid(), os.getgid())
        return struct.pack("<6Q10I", inode, size, -(-size // 512), 0, 0, 0, 0, 0, 0, mode, 1, *owner, 0, 4096, 0)

    def _content(self, inode: int) -> bytearray:
        data = self._nodes[inode].data
        if data is None:
            raise OSError(errno.EISDIR, "")
        return data

    def _look_up(self, parent: int, body: bytes) -> bytes:
        name = _text(body)
        if name.startswith("mark:"):
            self.calls.append(Call("mark", name=name.removeprefix("mark:")))
        if name not in self._nodes[parent].names:
            raise OSError(errno.ENOENT, "")
        return self._entry(self._nodes[parent].names[name])

    def _make(self, parent: int, name: str, kind: str) -> bytes:
        self._may_fail(kind, name)
        inode = len(self._nodes) + 1
        self._nodes[inode] = _Node(bytearray() if kind == "create" else None)
        self._nodes[parent].names[name] = inode
        self.calls.append(Call(kind, parent, name, inode))
        return self._entry(inode)

    def _set_attributes(self, inode: int, body: bytes) -> bytes:
        valid, size = struct.unpack_from("<I12xQ", body)
        if valid & _SIZE_IS_SET:
            self._may_fail("truncate", self._name_of(inode))
            data = self._content(inode)
            data[size:] = bytes(max(0, size - len(data)))
            self.calls.append(Call("truncate", inode, offset=size))
        return struct.pack("<QII", _FOREVER, 0, 0) + self._attributes(inode)

    def _remove(self, parent: int, body: bytes) -> bytes:
        name, names = _text(body), self._nodes[parent].names
        self._may_fail("unlink", name)
        if self._nodes[names[name]].names:
            raise OSError(errno.ENOTEMPTY, "")
        self.calls.append(Call("unlink", parent, name, names.pop(name)))
        return b""

    def _rename(self, parent: int, new_parent: bytes, body: bytes) -> bytes:
        source, name = (part.decode() for part in body.split(b"\0")[:2])
        self._may_fail("rename", name)
        if int.from_bytes(new_parent, "little") != parent:
            raise OSError(errno.EXDEV, "")  # renders rename within a folder, and the model of a crash relies on it
        names = self._nodes[parent].names
        names[name] = names.pop(source)
        self.calls.append(Call("rename", parent, name, names[name], source))
        return b""

    def _open(self, inode: int, _: bytes) -> bytes:
        self._may_fail("open", self._name_of(inode))
        return bytes(16)

    def _close(self, inode: int, _: bytes) -> bytes:
        self._may_fail("close", self._name_of(inode))
        return b""

    def _read(self, inode: int, body: bytes) -> bytes:
        offset, size = struct.unpack_from("<8xQI", body)
        return bytes(self._content(inode)[offset : offset + size])

    def _write(self, inode: int, body: bytes) -> bytes:
        offset, size = struct.unpack_from("<8xQI", body)
        self._may_fail("write", self._name_of(inode))
        call = Call("write", inode, data=body[40 : 40 + size], offset=offset)
        write(self._content(inode), call)
        self.calls.append(call)
        return struct.pack("<II", size, 0)

    def _sync(self, inode: int, kind: str) -> bytes:
        self._may_fail(kind, self._name_of(inode))
        self.calls.append(Call(kind, inode))
        return b""

    def _list(self, inode: int, body: bytes) -> bytes:
        offset, size = struct.unpack_from("<8xQI", body)
        found = b""
        for number, (name, child) in enumerate(list(self._nodes[inode].names.items())[offset:], offset + 1):
            encoded, kind = name.encode(), 4 if self._nodes[child].data is None else 8
            entry = struct.pack("<QQII", child, number, len(encoded), kind) + encoded
            entry += bytes(-len(entry) % 8)
            if len(found) + len(entry) > size:
                break
            found += entry
        return found


def write(data: bytearray, call: Call) -> None:
    """Does a `write` on the contents of a file; what it skips becomes zeros."""
    data.extend(bytes(max(0, call.offset - len(data))))
    data[call.offset : call.offset + len(call.data)] = call.data


@contextmanager
def mounted(disk: RecordedDisk, folder: Path) -> Iterator[None]:
    """The disk under an empty folder. Raises OSError where this process cannot mount."""
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    libc = ctypes.CDLL(None, use_errno=True)
    options = f"fd={device},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()}"
    try:
        if libc.mount(b"ttt-video-test", bytes(folder), b"fuse", 6, options.encode()):  # MS_NOSUID | MS_NODEV
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(folder))
        server = Thread(target=_serve, args=(disk, device), daemon=True)
        server.start()
        try:
            yield
        finally:
            libc.umount2(bytes(folder), 2)  # MNT_DETACH
            server.join(timeout=10)
    finally:
        os.close(device)


def reason_not_to_mount(folder: Path) -> str | None:
    """Why this process cannot mount a disk; None where it can."""
    try:
        with mounted(RecordedDisk(), folder):
            return None
    except OSError as error:
        return f"FUSE cannot be mounted here: {error}"


def memory_folder() -> Path | None:
    """A folder in memory for what need not reach a disk; None where there is none."""
    folder = Path("/dev/shm")
    return folder if folder.is_dir() else None


def _serve(disk: RecordedDisk, device: int) -> None:
    while True:
        try:
            request = os.read(device, _MAX_WRITE + 4096)
            reply = disk.answer(request)
            if reply is not None:
                os.write(device, reply)
        except OSError as error:
            if error.errno == errno.ENODEV:  # it was unmounted
                return
            if error.errno not in (errno.EINTR, errno.EAGAIN, errno.ENOENT):  # ENOENT: the caller is gone
                raise


def _text(body: bytes) -> str:
    return body[: body.index(0)].decode()
