"""The folders that a power cut can leave, for every moment of a recorded run.

What POSIX promises, and no more: the contents of a file are on the disk after `fsync` of the file, and the names in a
folder after `fsync` of the folder. Of what was done since, any part may be there: a later write without an earlier one,
a rename without the creation before it, half of a write, or its length with zeros. A rename is there or not as a whole.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations, product

from recorded_disk import ROOT, Call, Tree, write

ALL_SUBSETS_UP_TO = 4
"""Of so many calls that are not synced every selection is tried; of more, those that `_selections` lists."""


@dataclass(frozen=True)
class Crash:
    """A power cut after `done` calls. `tree` is what it leaves, `digest` is that of the tree's paths and contents."""

    done: int
    tree: Tree
    digest: bytes


@dataclass(frozen=True)
class _Content:
    data: bytes
    digest: bytes = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "digest", hashlib.sha256(self.data).digest())


@dataclass
class _File:
    synced: bytes = b""
    pending: list[Call] = field(default_factory=list)
    possible: list[_Content] | None = None

    def variants(self) -> list[_Content]:
        """What may be on the disk, without repetitions: all of what was written first, nothing of it last."""
        if self.possible is None:
            found = dict.fromkeys(_done(self.synced, calls) for calls in _parts(self.pending))
            self.possible = [_Content(data) for data in found]
        return self.possible


@dataclass
class _Folder:
    synced: dict[str, int] = field(default_factory=dict)
    pending: list[Call] = field(default_factory=list)

    def variants(self) -> list[tuple[dict[str, int], bool]]:
        """The names that may be on the disk, without repetitions, and whether they are those of some moment."""
        moments = [_renamed(self.synced, self.pending[:done]) for done in range(len(self.pending), -1, -1)]
        found = moments + [_renamed(self.synced, calls) for calls in _selections(self.pending)]
        return [(names, names in moments) for number, names in enumerate(found) if names not in found[:number]]


class PowerCuts:
    """`states` are those of all moments of `calls`; `settled` calls at their start are taken to be on the disk."""

    def __init__(self, calls: Sequence[Call], settled: int = 0) -> None:
        self._calls, self._settled = calls, settled
        self._files: dict[int, _File] = {}
        self._folders = {ROOT: _Folder()}
        self.points = 0

    def states(self) -> Iterator[Crash]:
        """Yields every state that can be left, for each moment once. `points` counts them as they come."""
        for done, call in enumerate(self._calls, start=1):
            self._apply(call)
            if done < self._settled:
                continue
            if done == self._settled:
                self._sync_all()
            seen: set[bytes] = set()
            for tree in self._trees():
                digest = hashlib.sha256(
                    b"".join(
                        b"%d %s %s" % (len(path), path.encode(), content.digest if content else b"folder")
                        for path, content in sorted(tree.items())
                    )
                ).digest()
                if digest not in seen:
                    seen.add(digest)
                    self.points += 1
                    yield Crash(
                        done, {path: content.data if content else None for path, content in tree.items()}, digest
                    )

    def _apply(self, call: Call) -> None:
        match call.kind:
            case "create" | "mkdir" | "unlink" | "rename":
                self._folders[call.inode].pending.append(call)
                if call.kind == "create":
                    self._files[call.node] = _File()
                elif call.kind == "mkdir":
                    self._folders[call.node] = _Folder()
            case "write" | "truncate":
                file = self._files[call.inode]
                file.pending.append(call)
                file.possible = None
            case "fsync":
                self._files[call.inode] = _File(_done(self._files[call.inode].synced, self._files[call.inode].pending))
            case "fsyncdir":
                folder = self._folders[call.inode]
                self._folders[call.inode] = _Folder(_renamed(folder.synced, folder.pending))

    def _sync_all(self) -> None:
        for inode, file in self._files.items():
            self._files[inode] = _File(_done(file.synced, file.pending))
        for inode, folder in self._folders.items():
            self._folders[inode] = _Folder(_renamed(folder.synced, folder.pending))

    def _trees(self) -> Iterator[dict[str, _Content | None]]:
        """Every selection of the changes of names, with all and with none of the contents that are not synced.

        With the first changes of each folder, up to any of them, also one file's contents varied at a time.
        """
        inodes = list(self._folders)
        for chosen in product(*(self._folders[inode].variants() for inode in inodes)):
            places = dict(
                self._walk(ROOT, "", {inode: names for inode, (names, _) in zip(inodes, chosen, strict=True)})
            )
            files = {inode for inode in places.values() if inode in self._files}
            in_order = all(first for _, first in chosen)
            for others in (0, -1):
                base = {inode: self._files[inode].variants()[others] for inode in files}
                yield {path: base.get(inode) for path, inode in places.items()}
                for varied in files if in_order else ():
                    for content in self._files[varied].variants()[1:-1]:
                        contents = {**base, varied: content}
                        yield {path: contents.get(inode) for path, inode in places.items()}

    def _walk(self, folder: int, path: str, names: dict[int, dict[str, int]]) -> Iterator[tuple[str, int]]:
        for name, inode in names[folder].items():
            yield path + name, inode
            if inode in names:
                yield from self._walk(inode, f"{path}{name}/", names)


def final_tree(calls: Sequence[Call]) -> Tree:
    """What the calls come to without a power cut."""
    *_, last = PowerCuts([*calls, Call("mark")], settled=len(calls) + 1).states()
    return last.tree


def _selections(calls: Sequence[Call]) -> Iterator[Sequence[Call]]:
    """All calls first, none last. Of many: each prefix, each suffix, each call alone or missing, each two missing."""
    count = len(calls)
    numbers = range(count)
    yield calls
    if count <= ALL_SUBSETS_UP_TO:
        for size in range(count - 1, 0, -1):
            yield from combinations(calls, size)
    else:
        for number in numbers:
            yield calls[:number]
            yield calls[number:]
            yield [calls[number]]
        for missing in (*combinations(numbers, 1), *combinations(numbers, 2)):
            yield [calls[number] for number in numbers if number not in missing]
    yield ()


def _parts(calls: Sequence[Call]) -> Iterator[Sequence[Call]]:
    """As `_selections`, with torn writes: of the first and the last, half, or zeros for all of it."""
    ends = list(dict.fromkeys(number for number, call in enumerate(calls) if call.kind == "write"))
    selections = list(_selections(calls)) if len(calls) <= ALL_SUBSETS_UP_TO else _of_many(calls)
    yield from selections[:-1]
    for number in {*ends[:1], *ends[-1:]}:
        call = calls[number]
        for data in (call.data[: len(call.data) // 2], bytes(len(call.data))):
            torn = Call("write", call.inode, data=data, offset=call.offset)
            yield [*calls[:number], torn, *calls[number + 1 :]]
            yield [torn]
    yield selections[-1]


def _of_many(calls: Sequence[Call]) -> list[Sequence[Call]]:
    """Of the many writes of a file, those that end at the newest one; at each moment another is the newest."""
    return [calls, calls[:-1], calls[1:], calls[-1:], [*calls[: len(calls) // 2], calls[-1]], calls[::2], ()]


def _done(data: bytes, calls: Sequence[Call]) -> bytes:
    content = bytearray(data)
    for call in calls:
        if call.kind == "write":
            write(content, call)
        else:
            content[call.offset :] = bytes(max(0, call.offset - len(content)))
    return bytes(content)


def _renamed(names: dict[str, int], calls: Sequence[Call]) -> dict[str, int]:
    found = dict(names)
    for call in calls:
        if call.kind in ("unlink", "rename"):
            gone = call.name if call.kind == "unlink" else call.source
            if found.get(gone) == call.node:
                del found[gone]
        if call.kind != "unlink":
            found[call.name] = call.node
    return found
