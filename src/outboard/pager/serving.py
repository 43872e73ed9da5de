"""The fault path of a guest whose absent pages are in stores of this host: one thread, no interpreter, no GIL.

What a fault asks for, by its flags and by where its page is:

===========  ==================  =====================================================================
flags        where               answer
===========  ==================  =====================================================================
WP           any                 lift the protection: nobody is evicting the page, or it would be claimed
MINOR        any                 map it: UFFDIO_CONTINUE
none         RESIDENT, ZERO      the page was never written: UFFDIO_ZEROPAGE
none         SHARED              wake: it is mapped from the sharing pool by now
none         POOL, FILE          read the slot, compare its digest, UFFDIO_COPY; then RESIDENT; then the slot is free
none         DISK                the same, of a block of the VM's disk, which stays
none         SNAPSHOT            read and unpack the chunk, UFFDIO_COPY; then RESIDENT; then its other pages likewise
===========  ==================  =====================================================================

While an image of the memory is being taken, a page that is still to be saved is saved before any of this is done
(:mod:`outboard.pager.saving`).

A page that is being evicted or fetched is *claimed*; so is one that is being answered for. Whoever fails to claim a
page leaves it alone, and whoever has claimed it wakes those who wait for it when done, so that they ask again: no lock,
and no fault is dropped. A fault may be answered long after it was told of: where the page has come (EEXIST) or, its
mapping missing, has gone (EFAULT), whoever waits is woken to ask again. EAGAIN means that the address space is
changing, and will be until its event has been read: the fault is kept and tried again after the messages that wait.

A slot that does not hold what was put there is not given out: the page is poisoned (Linux 6.6), an access to it is a
memory error, and the guest goes on without it or ends. Where the kernel cannot, the access waits for ever.

Sources: userfaultfd(2), ioctl_userfaultfd(2), Linux Documentation/admin-guide/mm/userfaultfd.rst.
"""

from __future__ import annotations

import errno

import numpy as np
from numba import njit, types
from numpy.typing import NDArray

from outboard.linux import native
from outboard.linux.userfaultfd import (
    UFFDIO_CONTINUE,
    UFFDIO_COPY,
    UFFDIO_POISON,
    UFFDIO_WAKE,
    UFFDIO_WRITEPROTECT,
    UFFDIO_ZEROPAGE,
    EventKind,
    FaultFlag,
)
from outboard.pager.batches import row_of
from outboard.pager.latency import record
from outboard.pager.saving import is_pending, must_save, save, save_from_file, save_zeros
from outboard.pager.table import DESK, LENDER, REGIONS, TABLE, Count, Desk, Reason, State, Table
from outboard.pages import PAGE_SIZE
from outboard.pages.content import page_digest
from outboard.pages.residency import Where
from outboard.pages.shared import claim_one, release_one
from outboard.stores import snapshot
from outboard.stores.disk import IMAGE_SHIFT
from outboard.stores.moving import UNIT_PAGES
from outboard.stores.snapshot_format import CHUNK_PAGES, SLOT_BITS

MESSAGE_WORDS = 4
"""struct uffd_msg in words of eight bytes: event, flags, address, thread."""
AT_ONCE = 64
_HEAR = 256
"""Looks at the userfaultfds between two looks at the commands, while faults keep coming."""
MOST_SPACES = 8
"""The guest's address space, and those of children that it has forked."""


_PAGEFAULT, _UNMAP = int(EventKind.PAGEFAULT), int(EventKind.UNMAP)
_WP_FAULT, _MINOR_FAULT = int(FaultFlag.WP), int(FaultFlag.MINOR)
_COPY, _ZEROPAGE, _CONTINUE = UFFDIO_COPY.number, UFFDIO_ZEROPAGE.number, UFFDIO_CONTINUE.number
_PROTECT, _WAKE, _POISON = UFFDIO_WRITEPROTECT.number, UFFDIO_WAKE.number, UFFDIO_POISON.number
_SHARED = int(Where.SHARED)
_PEER, _RESIDENT, _POOL, _FILE = int(Where.PEER), int(Where.RESIDENT), int(Where.POOL), int(Where.FILE)
_DISK, _BLOCK = int(Where.DISK), np.uint64((1 << IMAGE_SHIFT) - 1)
_SNAPSHOT, _SLOTS = int(Where.SNAPSHOT), (1 << SLOT_BITS) - 1
_DONT_WAKE = 2
"""UFFDIO_WRITEPROTECT_MODE_DONTWAKE."""
_EEXIST, _EAGAIN, _ENOENT, _ESRCH = errno.EEXIST, errno.EAGAIN, errno.ENOENT, errno.ESRCH
_EFAULT, _EIO = errno.EFAULT, errno.EIO
_DAMAGED = -4096
"""An answer that no errno is."""
_S_AT, _S_COUNT, _S_SPACE, _S_RETRIES, _S_DETAIL = (int(one) for one in list(State)[:5])
_C_POOL, _C_ZERO, _C_MINOR, _C_WP = int(Count.POOL), int(Count.ZERO), int(Count.MINOR), int(Count.WP)
_C_LEFT, _C_RACED, _C_AGAIN, _C_DAMAGED = int(Count.LEFT), int(Count.RACED), int(Count.AGAIN), int(Count.DAMAGED)
_C_DISK, _C_SNAPSHOT = int(Count.DISK), int(Count.SNAPSHOT)
_R_COMMAND, _R_EVENT, _R_GONE, _R_DAMAGED, _R_FAILED = (int(one) for one in Reason)


_I4, _I8 = types.int32[::1], types.int64[::1]


@njit(types.int64(REGIONS, types.int64), cache=True, nogil=True)
def page_of(regions: NDArray[np.int64], address: int) -> int:
    """The page at an address; -1 where the guest has none. ``regions``: first page, pages, HVA, each a row."""
    for row in range(regions.shape[0]):
        inside = (address - regions[row, 2]) // PAGE_SIZE
        if 0 <= inside < regions[row, 1]:
            return regions[row, 0] + inside  # type: ignore[no-any-return]
    return -1


@njit(types.void(types.int32, _I8, types.int64, types.int64), cache=True, nogil=True)
def _wake(uffd: int, room: NDArray[np.int64], hva: int, length: int) -> None:
    room[0], room[1] = hva, length
    native.ioctl(uffd, _WAKE, room.ctypes.data)


@njit(types.int64(types.int32, _I8, types.int64, types.int64), cache=True, nogil=True)
def _place(uffd: int, room: NDArray[np.int64], hva: int, source: int) -> int:
    room[0], room[1], room[2], room[3], room[4] = hva, source, PAGE_SIZE, 0, 0
    answer = native.ioctl(uffd, _COPY, room.ctypes.data)
    return room[4] if answer < 0 and room[4] < 0 else answer


@njit(types.int64(types.int32, types.uint64, _I8, types.int64), cache=True, nogil=True)
def _settle(uffd: int, request: int, room: NDArray[np.int64], hva: int) -> int:
    """UFFDIO_ZEROPAGE, UFFDIO_CONTINUE or UFFDIO_POISON of one page."""
    room[0], room[1], room[2], room[3] = hva, PAGE_SIZE, 0, 0
    answer = native.ioctl(uffd, request, room.ctypes.data)
    return room[3] if answer < 0 and room[3] < 0 else answer


@njit(types.int64(types.int32, _I8, types.int64, types.int64), cache=True, nogil=True)
def _unprotect(uffd: int, room: NDArray[np.int64], hva: int, mode: int) -> int:
    room[0], room[1], room[2] = hva, PAGE_SIZE, mode
    return native.ioctl(uffd, _PROTECT, room.ctypes.data)


@njit(types.int64(types.int32, _I8, types.int64, DESK), cache=True, nogil=True)
def _poison(uffd: int, room: NDArray[np.int64], hva: int, desk: Desk) -> int:
    # Punching leaves the mark of the protection in the page table, and a mark is not poisoned.
    _unprotect(uffd, room, hva, _DONT_WAKE)
    _settle(uffd, _POISON, room, hva)
    desk.counts[_C_DAMAGED] += 1
    return _DAMAGED


@njit(types.int64(types.int32, _I8, types.int64, types.int64, TABLE, DESK), cache=True, nogil=True)
def _from_disk(uffd: int, room: NDArray[np.int64], hva: int, page: int, table: Table, desk: Desk) -> int:
    image = np.int64(table.locator[page] >> np.uint64(IMAGE_SHIFT))
    offset = int(np.int64(table.locator[page] & _BLOCK)) * PAGE_SIZE
    source = desk.staging.ctypes.data
    got = native.pread(table.images[image], source, PAGE_SIZE, offset) if image < table.images.size else 0
    if got != PAGE_SIZE or page_digest(source) != table.disk_digests[page]:
        return _poison(uffd, room, hva, desk)
    if must_save(table.saving, page):
        save(table.saving, page, desk.staging, 0)
    answer = _place(uffd, room, hva, source)
    if answer == 0 or answer == -_EEXIST:  # compiled as it stands
        table.where[page] = _RESIDENT
        desk.counts[_C_DISK] += 1
    return answer


@njit(types.int64(types.int32, _I8, types.int64, types.int64, TABLE, DESK), cache=True, nogil=True)
def _from_store(uffd: int, room: NDArray[np.int64], hva: int, page: int, table: Table, desk: Desk) -> int:
    at, slot = table.where[page], int(np.int64(table.locator[page]))
    taken, digests = (table.pool_taken, table.pool_digests) if at == _POOL else (table.file_taken, table.file_digests)
    source = desk.staging.ctypes.data
    file, place = table.files[at], slot
    if at == _FILE and table.file_lent.size:
        lent = table.file_lent[slot // UNIT_PAGES]
        if lent >= 2:
            file, place = table.files[LENDER], (lent - 2) * UNIT_PAGES + slot % UNIT_PAGES
    got = native.pread(file, source, PAGE_SIZE, place * PAGE_SIZE)
    if got != PAGE_SIZE or (digests.size and page_digest(source) != digests[slot]):
        return _poison(uffd, room, hva, desk)
    if must_save(table.saving, page):
        save(table.saving, page, desk.staging, 0)
    answer = _place(uffd, room, hva, source)
    if answer == 0 or answer == -_EEXIST:  # compiled as it stands
        table.where[page] = _RESIDENT
        release_one(taken, slot)
        desk.counts[_C_POOL + at - _POOL] += 1
    return answer


@njit(types.int64(types.int32, _I8, types.int64, types.int64, TABLE, DESK), cache=True, nogil=True)
def _from_snapshot(uffd: int, room: NDArray[np.int64], hva: int, page: int, table: Table, desk: Desk) -> int:
    unpacking, locator = table.unpacking, int(np.int64(table.locator[page]))
    row, at = locator >> SLOT_BITS, (locator & _SLOTS) * PAGE_SIZE
    if unpacking.held[snapshot.HELD] != row:
        if not snapshot.hold(table.rows, unpacking, row):
            return _poison(uffd, room, hva, desk)
        snapshot.note_wanted(unpacking, row)
    if must_save(table.saving, page):
        save(table.saving, page, unpacking.content, at)
    answer = _place(uffd, room, hva, unpacking.content.ctypes.data + at)
    if answer == 0 or answer == -_EEXIST:  # compiled as it stands
        table.where[page] = _RESIDENT
        desk.counts[_C_SNAPSHOT] += 1
    return answer


@njit(types.boolean(types.int64, types.int64, types.int64, TABLE), cache=True, nogil=True)
def _comes_along(page: int, row: int, slot: int, table: Table) -> bool:
    """Claim a page that is still in a chunk which is unpacked."""
    if page < 0 or table.where[page] != _SNAPSHOT or table.locator[page] != np.uint64(row << SLOT_BITS | slot):
        return False
    if is_pending(table.saving, page) or not claim_one(table.claimed, page):
        return False
    if table.where[page] != _SNAPSHOT:
        release_one(table.claimed, page)
        return False
    return True


@njit(types.void(types.int32, TABLE, DESK), cache=True, nogil=True)
def _bring_along(uffd: int, table: Table, desk: Desk) -> None:
    """Enter the other pages of the chunk that was unpacked for a fault, in as few calls as their places allow.

    Where the kernel refuses they stay where they are.
    """
    unpacking, regions, room = table.unpacking, table.regions, desk.room
    row = unpacking.held[snapshot.HELD]
    slot = 0
    while slot < CHUNK_PAGES:
        page = table.rows.members[row, slot]
        if not _comes_along(page, row, slot, table):
            slot += 1
            continue
        region = row_of(regions, page)
        edge = regions[region, 0] + regions[region, 1]
        count = 1
        while (
            slot + count < CHUNK_PAGES
            and page + count < edge
            and table.rows.members[row, slot + count] == page + count
            and _comes_along(page + count, row, slot + count, table)
        ):
            count += 1
        hva = regions[region, 2] + (page - regions[region, 0]) * PAGE_SIZE
        room[0], room[1] = hva, unpacking.content.ctypes.data + slot * PAGE_SIZE
        room[2], room[3], room[4] = count * PAGE_SIZE, 0, 0
        native.ioctl(uffd, _COPY, room.ctypes.data)
        done = max(room[4], 0) // PAGE_SIZE
        for index in range(count):
            if index < done:
                table.where[page + index] = _RESIDENT
            release_one(table.claimed, page + index)
        slot += count


@njit(types.void(types.int64, types.int64, TABLE, DESK), cache=True, nogil=True)
def _save(page: int, flags: int, table: Table, desk: Desk) -> None:
    """Save a pending page before its fault is answered; one that comes from a store is saved on the way."""
    if table.where[page] < _POOL:
        if flags & (_WP_FAULT | _MINOR_FAULT):
            save_from_file(table.saving, page, table.regions, desk.staging)
        elif table.where[page] != _PEER:
            save_zeros(table.saving, page)


@njit(types.int64(types.int32, types.int64, types.int64, types.int64, TABLE, DESK), cache=True, nogil=True)
def _answer(uffd: int, hva: int, page: int, flags: int, table: Table, desk: Desk) -> int:
    """Answer one fault; 0, or a negated errno, or _DAMAGED."""
    counts, room, where = desk.counts, desk.room, table.where
    if not claim_one(table.claimed, page):
        counts[_C_LEFT] += 1
        return 0
    if page < table.known.size:
        # Before it can be written, and a page that is mapped anew is no longer protected.
        table.known[page] = 0
    if must_save(table.saving, page):
        _save(page, flags, table, desk)
    if flags & _WP_FAULT:
        result = _unprotect(uffd, room, hva, 0)
        counts[_C_WP] += 1
    elif flags & _MINOR_FAULT:
        result = _settle(uffd, _CONTINUE, room, hva)
        if result == -_EFAULT:
            # It has been evicted since the fault: that is answered like one on a page which is there already.
            result = -_EEXIST
        counts[_C_MINOR] += 1
    elif where[page] == _SHARED:
        result = -_EEXIST
    elif where[page] == _DISK:
        result = _from_disk(uffd, room, hva, page, table, desk)
    elif where[page] == _SNAPSHOT:
        result = _from_snapshot(uffd, room, hva, page, table, desk)
    elif where[page] >= _POOL:
        result = _from_store(uffd, room, hva, page, table, desk)
    elif where[page] == _PEER:
        result = -_EIO
    else:
        result = _settle(uffd, _ZEROPAGE, room, hva)
        if result == 0:
            where[page] = _RESIDENT
            counts[_C_ZERO] += 1
    release_one(table.claimed, page)
    if result == -_EEXIST:
        _wake(uffd, room, hva, PAGE_SIZE)
        counts[_C_RACED] += 1
        return 0
    if result == -_EAGAIN:
        counts[_C_AGAIN] += 1
    return result


@njit(types.int64(_I4, types.int64, types.int64, TABLE, DESK), cache=True, nogil=True)
def _work_off(uffds: NDArray[np.int32], space: int, address: int, table: Table, desk: Desk) -> int:
    """Answer the fault at ``address``, whose flags are in ``state[DETAIL]``; its time goes into the histogram."""
    page = page_of(table.regions, address)
    if page < 0:
        return 0
    from_snapshot = desk.counts[_C_SNAPSHOT]
    began = native.monotonic_ns(desk.room)
    result = _answer(uffds[space], address & -PAGE_SIZE, page, desk.state[_S_DETAIL], table, desk)
    if result == 0:
        record(desk.histogram, native.monotonic_ns(desk.room) - began)
        if desk.counts[_C_SNAPSHOT] != from_snapshot:
            _bring_along(uffds[space], table, desk)
    elif result == -_EAGAIN:
        kept = desk.retries[desk.state[_S_RETRIES]]
        kept[0], kept[1], kept[2] = space, desk.state[_S_DETAIL], address
        desk.state[_S_RETRIES] += 1
    elif result == _DAMAGED:
        desk.state[_S_DETAIL] = page
    elif result == -_ENOENT:
        # The mapping has gone since, and with it whoever waited.
        return 0
    else:
        desk.state[_S_DETAIL], desk.state[_S_DETAIL + 1] = -result, page
    return result


@njit(types.int64(_I4, TABLE, DESK), cache=True, nogil=True)
def _messages(uffds: NDArray[np.int32], table: Table, desk: Desk) -> int:
    """Work off the messages that were read, and those kept from before; -1, or a Reason to come back."""
    state = desk.state
    again = state[_S_RETRIES]
    while state[_S_AT] < state[_S_COUNT] or again > 0:
        if state[_S_AT] < state[_S_COUNT]:
            at = state[_S_AT] * MESSAGE_WORDS
            state[_S_AT] += 1
            space = state[_S_SPACE]
            state[_S_DETAIL] = np.int64(desk.messages[at + 1])
            address = int(np.int64(desk.messages[at + 2]))
            kind = np.int64(desk.messages[at] & np.uint64(0xFF))
            if kind == _UNMAP:
                # Its author sleeps until it is read: nothing else is to be done for it.
                continue
            if kind != _PAGEFAULT:
                third = np.int64(desk.messages[at + 3])
                details = (kind, state[_S_DETAIL], address, third, space)
                for word in range(5):
                    state[_S_DETAIL + word] = details[word]
                return _R_EVENT
        else:
            # The oldest first; what fails again goes to the end.
            again -= 1
            space, state[_S_DETAIL], address = desk.retries[0, 0], desk.retries[0, 1], desk.retries[0, 2]
            state[_S_RETRIES] -= 1
            desk.retries[: state[_S_RETRIES]] = desk.retries[1 : state[_S_RETRIES] + 1]
        result = _work_off(uffds, space, address, table, desk)
        if result == -_ESRCH:
            state[_S_DETAIL] = space
            return _R_GONE
        if result == _DAMAGED:
            return _R_DAMAGED
        if result < 0 and result != -_EAGAIN:
            return _R_FAILED
    return -1


@njit(types.int64(_I4, types.int64, types.int64, TABLE, DESK), cache=True, nogil=True)
def serve(uffds: NDArray[np.int32], spaces: int, spin_ns: int, table: Table, desk: Desk) -> int:
    """Serve faults until something else is to be done; a :class:`Reason`.

    :param uffds: of ``spaces`` address spaces, and behind them a descriptor that is readable when a command has come.
    :param spin_ns: for how long after a fault to look for the next one before sleeping.
    """
    state, room = desk.state, desk.room
    last = native.monotonic_ns(room)
    turns = 0
    while True:
        reason = _messages(uffds, table, desk)
        if reason >= 0:
            return reason
        turns += 1
        found = False
        for space in range(spaces):
            # Every message read may have to be kept.
            free = min(AT_ONCE, desk.retries.shape[0] - 1 - state[_S_RETRIES])
            got = native.read(uffds[space], desk.messages.ctypes.data, free * MESSAGE_WORDS * 8)
            if got > 0:
                state[_S_AT], state[_S_COUNT], state[_S_SPACE] = 0, got // (MESSAGE_WORDS * 8), space
                found = True
                break
            if got != -_EAGAIN:
                state[_S_DETAIL] = space
                return _R_GONE
        timeout = -1
        if found:
            last = native.monotonic_ns(room)
            timeout = 0
        elif state[_S_RETRIES] > 0:
            timeout = 1
        elif native.monotonic_ns(room) - last < spin_ns:
            timeout = 0
        # However many faults come, commands are heard.
        if timeout == 0 and turns % _HEAR:
            continue
        for index in range(spaces + 1):
            # struct pollfd: int fd, short events (POLLIN), short revents.
            desk.polled[index] = np.uint64(uffds[index]) | np.uint64(1) << np.uint64(32)
        native.poll(desk.polled.ctypes.data, spaces + 1, timeout)
        if desk.polled[spaces] >> np.uint64(48):
            return _R_COMMAND
