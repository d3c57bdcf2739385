"""The forgetful disk's own process: mounts, answers the kernel, and takes orders from its owner.

Speaks the kernel's FUSE protocol (linux/fuse.h, version 7.31) itself. A path-based library would
give each hard link an inode of its own, with a page cache of its own, and hide unlinked files
that are still open behind renames that nobody asked for: both would be in the way here.

The kernel keeps its page cache in write-through mode, so mapped memory and writes are one; it
does the locks itself; a write through an O_DSYNC descriptor arrives as a write and a sync.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import heapq
import os
import select
import socket
import stat
import struct
import subprocess
import time
from collections.abc import Callable
from typing import Any

import msgspec

from .forgetful_files import Fault, Files, Inode, NoRoomError, error
from .forgetful_model import PAGE_BYTES, ROOT

MAX_WRITE_BYTES = 1 << 20
CACHE_S = 3600  # nobody but the kernel changes anything, so it may cache names for long
MINOR_VERSION = 31
BIG_WRITES, NO_OPEN, MAX_PAGES, NO_OPENDIR = 1 << 5, 1 << 17, 1 << 22, 1 << 24
MARK_ATTRIBUTE = b"user.mark"
MNT_DETACH = 2
NAME_BYTES = 255
FORGETS_PUT_OFF = 64

IN_HEADER = struct.Struct("<IIQQIIIHH")
OUT_HEADER = struct.Struct("<IiQ")
ATTRIBUTES = struct.Struct("<QQQQQQIIIIIIIIII")
ENTRY = struct.Struct("<QQQQII")
SETATTR = struct.Struct("<IIQQQQQQIIIIIIII")
READ_OR_WRITE = struct.Struct("<QQIIQII")
DIRENT = struct.Struct("<QQII")

Order = dict[str, Any]


class UnavailableHere(Exception):
    """This machine has no FUSE, or does not let this user mount."""


# -- mounting -------------------------------------------------------------------------------------


def mount(folder: str) -> int:
    """Mounts and returns the descriptor that speaks with the kernel. UnavailableHere, OSError."""
    if not os.path.exists("/dev/fuse"):
        raise UnavailableHere("there is no /dev/fuse")
    if os.geteuid() == 0:
        return _mount_as_root(folder)
    return _mount_by_helper(folder)


def _mount_as_root(folder: str) -> int:
    try:
        device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    except OSError as problem:
        raise UnavailableHere(f"/dev/fuse cannot be opened: {problem}") from problem
    options = f"fd={device},rootmode=40755,user_id=0,group_id=0,default_permissions,allow_other"
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"forgetful", os.fsencode(folder), b"fuse.forgetful", 0, options.encode()):
        number = ctypes.get_errno()
        os.close(device)
        if number in (errno.EPERM, errno.EACCES, errno.ENODEV):
            raise UnavailableHere(f"mounting is refused: {os.strerror(number)}")
        raise error(number)
    return device


def _mount_by_helper(folder: str) -> int:
    """Lets fusermount3, which is setuid root, mount and hand over the descriptor."""
    ours, theirs = socket.socketpair()
    command = ["fusermount3", "-o", "default_permissions,fsname=forgetful", "--", folder]
    environment = os.environ | {"_FUSE_COMMFD": str(theirs.fileno())}
    with ours, theirs:
        try:
            done = subprocess.run(
                command,
                env=environment,
                pass_fds=[theirs.fileno()],
                capture_output=True,
                text=True,
                check=False,
            )
        except FileNotFoundError as problem:
            raise UnavailableHere("fusermount3 (Debian: fuse3) is not installed") from problem
        if done.returncode:
            raise UnavailableHere(f"fusermount3 refused: {done.stderr.strip()}")
        _, descriptors, _, _ = socket.recv_fds(ours, 1, 1)
        return descriptors[0]


def unmount(folder: str) -> None:
    """Takes the mount away even while it is in use; harmless when it is gone already."""
    if os.geteuid() == 0:
        ctypes.CDLL(None, use_errno=True).umount2(os.fsencode(folder), MNT_DETACH)
    else:
        subprocess.run(["fusermount3", "-uzq", "--", folder], check=False)


# -- the protocol ---------------------------------------------------------------------------------


def _attributes(inode: Inode) -> bytes:
    seconds, nanoseconds = zip(*(divmod(moment, 10**9) for moment in inode.times), strict=True)
    links = inode.names + (1 if stat.S_ISDIR(inode.mode) else 0)
    return ATTRIBUTES.pack(
        *(inode.number, inode.size, len(inode.pages) * (PAGE_BYTES // 512)),
        *seconds,
        *nanoseconds,
        *(inode.mode, links, *inode.owner, 0, PAGE_BYTES, 0),
    )


def _entry(inode: Inode | None) -> bytes:
    """What a name leads to; the kernel remembers that one leads nowhere, too."""
    if inode is None:
        return ENTRY.pack(0, 0, CACHE_S, 0, 0, 0) + bytes(ATTRIBUTES.size)
    inode.known += 1
    return ENTRY.pack(inode.number, 0, CACHE_S, CACHE_S, 0, 0) + _attributes(inode)


def _names(body: memoryview) -> list[bytes]:
    return bytes(body).split(b"\0")[:-1]


class Protocol:
    """Turns the kernel's requests into calls on `Files`, and their results into replies."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self._owner = (0, 0)  # of the process that asks
        self._methods: dict[int, Callable[[Inode, memoryview], bytes]] = {
            1: self._lookup,
            3: self._getattr,
            4: self._setattr,
            5: self._readlink,
            6: self._symlink,
            8: self._mknod,
            9: self._mkdir,
            10: self._unlink,
            11: self._unlink,
            12: self._rename,
            13: self._link,
            15: self._read,
            16: self._write,
            17: self._statfs,
            21: self._setxattr,
            26: self._init,
            28: self._readdir,
            43: self._fallocate,
            45: self._rename2,
            46: self._lseek,
        }

    def answer(self, opcode: int, inode: Inode, owner: tuple[int, int], body: memoryview) -> bytes:
        """The reply to any request but syncs and forgets. OSError, ENOSYS for what is not known:
        the kernel then does without (opens, flushes, locks) or never asks again."""
        method = self._methods.get(opcode)
        if method is None:
            raise error(errno.ENOSYS)
        self._owner = owner
        return method(inode, body)

    def _init(self, inode: Inode, body: memoryview) -> bytes:
        _, _, readahead, offered = struct.unpack_from("<IIII", body)
        wanted = offered & (BIG_WRITES | NO_OPEN | MAX_PAGES | NO_OPENDIR)
        return struct.pack(
            "<IIIIHHIIHHI28x",
            *(7, MINOR_VERSION, readahead, wanted),
            *(64, 48, MAX_WRITE_BYTES, 1, MAX_WRITE_BYTES // PAGE_BYTES, 0, 0),
        )

    def _lookup(self, folder: Inode, body: memoryview) -> bytes:
        return _entry(self._files.entry(folder.number, _names(body)[0]))

    def _getattr(self, inode: Inode, body: memoryview) -> bytes:
        return struct.pack("<QII", CACHE_S, 0, 0) + _attributes(inode)

    def _setattr(self, inode: Inode, body: memoryview) -> bytes:
        given = SETATTR.unpack_from(body)
        valid, size, seconds, nanoseconds = given[0], given[3], given[5:8], given[8:11]
        mode, user, group = given[11], given[13], given[14]
        if valid & 0x8:
            self._files.resize(inode, size)
        if valid & 0x1:
            inode.mode = stat.S_IFMT(inode.mode) | stat.S_IMODE(mode)
        inode.owner = (
            user if valid & 0x2 else inode.owner[0],
            group if valid & 0x4 else inode.owner[1],
        )
        for index, (here, now) in enumerate([(0x10, 0x80), (0x20, 0x100), (0x400, 0)]):
            if valid & now:
                inode.times[index] = time.time_ns()
            elif valid & here:
                inode.times[index] = seconds[index] * 10**9 + nanoseconds[index]
        return self._getattr(inode, body)

    def _readlink(self, inode: Inode, body: memoryview) -> bytes:
        return inode.target

    def _symlink(self, folder: Inode, body: memoryview) -> bytes:
        name, target = _names(body)
        mode = stat.S_IFLNK | 0o777
        return _entry(self._files.make(folder.number, name, mode, self._owner, target))

    def _mknod(self, folder: Inode, body: memoryview) -> bytes:
        mode = struct.unpack_from("<I", body)[0]
        name = _names(body[16:])[0]
        return _entry(self._files.make(folder.number, name, mode, self._owner))

    def _mkdir(self, folder: Inode, body: memoryview) -> bytes:
        mode = stat.S_IFDIR | struct.unpack_from("<I", body)[0]
        name = _names(body[8:])[0]
        return _entry(self._files.make(folder.number, name, mode, self._owner))

    def _unlink(self, folder: Inode, body: memoryview) -> bytes:
        self._files.remove(folder.number, _names(body)[0])
        return b""

    def _rename(self, folder: Inode, body: memoryview) -> bytes:
        return self._rename_to(folder, struct.unpack_from("<Q", body)[0], 0, body[8:])

    def _rename2(self, folder: Inode, body: memoryview) -> bytes:
        to_folder, flags = struct.unpack_from("<QI", body)
        return self._rename_to(folder, to_folder, flags, body[16:])

    def _rename_to(self, folder: Inode, to_folder: int, flags: int, names: memoryview) -> bytes:
        old, new = _names(names)
        self._files.rename((folder.number, old), (to_folder, new), flags)
        return b""

    def _link(self, folder: Inode, body: memoryview) -> bytes:
        inode = self._files.inodes[struct.unpack_from("<Q", body)[0]]
        self._files.link(inode, folder.number, _names(body[8:])[0])
        return _entry(inode)

    def _read(self, inode: Inode, body: memoryview) -> bytes:
        _, offset, length, *_ = READ_OR_WRITE.unpack_from(body)
        return self._files.read(inode, offset, length)

    def _write(self, inode: Inode, body: memoryview) -> bytes:
        _, offset, length, *_ = READ_OR_WRITE.unpack_from(body)
        data = bytes(body[READ_OR_WRITE.size : READ_OR_WRITE.size + length])
        return struct.pack("<II", self._files.write(inode, offset, data), 0)

    def _statfs(self, inode: Inode, body: memoryview) -> bytes:
        total, free = self._files.total_pages, self._files.free_pages
        return struct.pack(
            "<QQQQQIIII24x",
            *(total, free, free, 1 << 30, 1 << 30, PAGE_BYTES, NAME_BYTES, PAGE_BYTES, 0),
        )

    def _setxattr(self, inode: Inode, body: memoryview) -> bytes:
        """Attributes are not kept: the one that is understood leaves a mark in the log."""
        length = struct.unpack_from("<I", body)[0]
        name, _, value = bytes(body[8:]).partition(b"\0")
        if name != MARK_ATTRIBUTE:
            raise error(errno.EOPNOTSUPP)
        self._files.mark(value[:length].decode(errors="replace"))
        return b""

    def _readdir(self, folder: Inode, body: memoryview) -> bytes:
        _, after, room, *_ = READ_OR_WRITE.unpack_from(body)
        listing = bytearray()
        for name, (number, cookie) in folder.entries.items():
            if cookie <= after:
                continue
            kind = stat.S_IFMT(self._files.inodes[number].mode) >> 12
            record = DIRENT.pack(number, cookie, len(name), kind) + name
            record += bytes(-len(record) % 8)
            if len(listing) + len(record) > room:
                break
            listing += record
        return bytes(listing)

    def _fallocate(self, inode: Inode, body: memoryview) -> bytes:
        _, offset, length, mode, _ = struct.unpack_from("<QQQII", body)
        self._files.allocate(inode, offset, length, mode)
        return b""

    def _lseek(self, inode: Inode, body: memoryview) -> bytes:
        _, offset, whence, _ = struct.unpack_from("<QQII", body)
        return struct.pack("<Q", self._files.seek(inode, offset, whence))


# -- the process ----------------------------------------------------------------------------------


class Answer(msgspec.Struct):
    """What the disk answers to an order: an encoded value, or why there is none."""

    value: msgspec.Raw = msgspec.Raw(msgspec.msgpack.encode(None))
    problem: str = ""


def send(control: socket.socket, message: object) -> None:
    """Sends one message over the channel between the disk and its owner."""
    data = msgspec.msgpack.encode(message)
    control.sendall(struct.pack(">Q", len(data)) + data)


def receive(control: socket.socket) -> bytes:
    """One encoded message. EOFError when the other side is gone."""
    (length,) = struct.unpack(">Q", _receive_exactly(control, 8))
    return _receive_exactly(control, length)


def _receive_exactly(control: socket.socket, length: int) -> bytes:
    data = bytearray()
    while len(data) < length:
        part = control.recv(min(length - len(data), 1 << 20))
        if not part:
            raise EOFError("the other side of the channel is gone")
        data += part
    return bytes(data)


class Server:
    """One mounted disk: its requests, its owner's orders, and the syncs that are being delayed."""

    def __init__(
        self, device: int, control: socket.socket, owner: int, log_limit_bytes: int
    ) -> None:
        self._device = device
        self._owner = owner  # a pidfd: a fork of the owner may keep its end of the channel open
        self._control = control
        self._files = Files(log_limit_bytes)
        self._protocol = Protocol(self._files)
        self._buffer = bytearray(MAX_WRITE_BYTES + PAGE_BYTES)
        self._sync_delay_s = 0.0
        # Of each delayed sync: due time, request, inode, position it covers, errno.
        self._delayed: list[tuple[float, int, int, int, int]] = []
        self._stopping = False

    def run(self) -> None:
        """Serves until the owner says stop or is gone, or somebody unmounts the disk."""
        poller = select.poll()
        for descriptor in (self._device, self._control.fileno(), self._owner):
            poller.register(descriptor, select.POLLIN)
        while not self._stopping:
            for descriptor, _ in poller.poll(self._patience_ms()):
                if descriptor == self._device:
                    self._request()
                elif descriptor == self._owner:
                    self._stopping = True
                else:
                    self._order()
            while self._delayed and self._delayed[0][0] <= time.monotonic():
                self._finish_sync(*heapq.heappop(self._delayed)[1:])

    def _patience_ms(self) -> float | None:
        if not self._delayed:
            return None
        return max(self._delayed[0][0] - time.monotonic(), 0) * 1000

    def _request(self) -> None:
        try:
            length = os.readv(self._device, [self._buffer])
        except OSError as problem:
            # ENOENT: the asker was killed meanwhile. ENODEV: no longer mounted.
            self._stopping = problem.errno == errno.ENODEV
            if problem.errno not in (errno.ENOENT, errno.EINTR, errno.EAGAIN, errno.ENODEV):
                raise
            return
        _, opcode, unique, node, user, group, *_ = IN_HEADER.unpack_from(self._buffer)
        body = memoryview(self._buffer)[IN_HEADER.size : length]
        if opcode == 2:
            self._files.forget(node, struct.unpack_from("<Q", body)[0])
        elif opcode == 42:
            for forgotten in struct.iter_unpack("<QQ", body[8:]):
                self._files.forget(*forgotten)
        elif opcode in (20, 30):
            self._sync(unique, self._files.inodes[node])
        else:
            try:
                self._reply(unique, 0, self._ask(opcode, node, (user, group), body))
            except OSError as problem:
                self._reply(unique, problem.errno or errno.EIO, b"")

    def _ask(self, opcode: int, node: int, owner: tuple[int, int], body: memoryview) -> bytes:
        inode = self._files.inodes[node or ROOT]
        try:
            return self._protocol.answer(opcode, inode, owner, body)
        except NoRoomError:
            # The kernel puts off telling which deleted files are closed, and so may be freed.
            body = memoryview(bytes(body))
            for _ in range(FORGETS_PUT_OFF):
                if select.select([self._device], [], [], 0)[0]:
                    self._request()
            return self._protocol.answer(opcode, inode, owner, body)

    def _sync(self, unique: int, inode: Inode) -> None:
        rest = unique, inode.number, self._files.position, self._files.fails("sync", inode)
        if self._sync_delay_s:
            heapq.heappush(self._delayed, (time.monotonic() + self._sync_delay_s, *rest))
        else:
            self._finish_sync(*rest)

    def _finish_sync(self, unique: int, number: int, before: int, failure: int) -> None:
        self._files.sync(number, before, bool(failure))
        self._reply(unique, failure, b"")

    def _reply(self, unique: int, failure: int, body: bytes) -> None:
        header = OUT_HEADER.pack(OUT_HEADER.size + len(body), -failure, unique)
        try:
            os.writev(self._device, [header, body])
        except OSError as problem:
            if problem.errno not in (errno.ENOENT, errno.ENODEV):  # nobody waits any more
                raise

    def _order(self) -> None:
        try:
            order: Order = msgspec.msgpack.decode(receive(self._control))
        except (EOFError, ConnectionError):
            self._stopping = True
            return
        try:
            answer = Answer(msgspec.Raw(msgspec.msgpack.encode(self._obey(**order))))
        except ValueError as problem:
            answer = Answer(problem=str(problem))
        with contextlib.suppress(BrokenPipeError):  # who says stop does not wait
            send(self._control, answer)

    def _obey(self, order: str, **facts: Any) -> object:
        match order:
            case "log":
                return self._files.take_log()
            case "position":
                return self._files.position
            case "settings":
                self._files.full = facts["full"]
                self._files.capacity_bytes = facts["capacity_bytes"]
                self._sync_delay_s = facts["sync_delay_s"]
            case "fail":
                self._files.faults.append(Fault(**facts))
            case "heal":
                self._files.faults.clear()
            case "stop":
                self._stopping = True
            case _:
                raise ValueError(f"no such order: {order}")
        return None


def serve(folder: str, control: socket.socket, owner_pid: int, log_limit_bytes: int) -> None:
    """Mounts on `folder`, serves its parent process, and unmounts, whatever ends it."""
    owner = os.pidfd_open(os.getppid())
    if os.getppid() != owner_pid:
        return  # it is gone already
    try:
        device = mount(folder)
    except UnavailableHere as problem:
        send(control, Answer(problem=str(problem)))
        return
    try:
        send(control, Answer())
        Server(device, control, owner, log_limit_bytes).run()
    finally:
        os.close(device)  # first: an unmount would wait for answers that nobody gives any more
        unmount(folder)
