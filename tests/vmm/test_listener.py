"""VMMs that hand over, live: what is served, what is refused, and that no descriptor is left behind."""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import select
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from outboard.errors import KernelError, PeerError, RefusedError
from outboard.linux.userfaultfd import Event, EventKind, Features, Mode
from outboard.vmm.attachment import Attachment
from outboard.vmm.cloud_hypervisor import CloudHypervisor
from outboard.vmm.firecracker import Firecracker
from outboard.vmm.guest import AnonymousMemory, Guest
from outboard.vmm.handoff import MAX_BODY
from outboard.vmm.listener import Listener, ListenerStatistics
from tests.support.machine import huge_pages
from tests.support.requirements import require
from tests.support.vmm_client import SHMEM, VmmClient, framed

ANSWER = "answer 1"


def open_here() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture(autouse=True)
def no_descriptor_is_left_behind() -> Iterator[None]:
    require("root")
    before = open_here()
    yield
    assert open_here() == before


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "uffd.sock"


@pytest.fixture
def client() -> Iterator[VmmClient]:
    with VmmClient() as running:
        running.register()
        yield running


@pytest.fixture
def listener(path: Path) -> Iterator[Listener]:
    with Listener(path, patience=0.3) as made:
        yield made


def accept(listener: Listener) -> Attachment:
    attachment = listener.accept(10)
    assert attachment is not None, "nobody handed anything over"
    return attachment


class Server:
    """Answers each missing page with a page that begins with its number plus ``base``, from a thread."""

    def __init__(self, attachment: Attachment, base: int = 1000) -> None:
        self._uffd = attachment.uffd
        self._guest: Callable[[], Guest] = lambda: attachment.guest
        self._base = base
        self._unit = attachment.guest.regions[0].page_size
        self._stopping = False
        self.served = 0
        self.events: list[Event] = []
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        with mmap.mmap(-1, self._unit) as page:
            words = (ctypes.c_uint64 * (self._unit // 8)).from_buffer(page)
            while not self._stopping:
                if not select.select([self._uffd], [], [], 0.02)[0]:
                    continue
                for message in self._uffd.read():
                    if isinstance(message, Event):
                        self.events.append(message)
                        continue
                    address = message.address - message.address % self._unit
                    first = page_at(self._guest(), address)
                    for index in range(self._unit // 4096):
                        words[index * 512] = self._base + first + index
                    self.served += 1
                    self._uffd.copy(address, ctypes.addressof(words), self._unit)
            del words

    def __enter__(self) -> Server:
        self._thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._stopping = True
        self._thread.join()


def page_at(guest: Guest, address: int) -> int:
    for region in guest.regions:
        if 0 <= address - region.hva < region.pages * 4096:
            return region.first + (address - region.hva) // 4096
    raise AssertionError(f"{address:#x} is not the guest's")


def first_word(guest: Guest, page: int) -> int:
    content = memoryview(bytearray(4096))
    guest.memory.read_into(page, content)
    return int.from_bytes(content[:8], "little")


def touched(pages: int, base: int = 1000) -> str:
    return f"touched {sum(range(base, base + pages))}"


def test_cloud_hypervisor_from_the_handoff_to_the_last_page(client: VmmClient, listener: Listener, path: Path) -> None:
    client.hand_over(path)
    with accept(listener) as attachment:
        assert (attachment.pid, attachment.mode, attachment.features) == (client.pid, Mode.MISSING, SHMEM)
        guest = attachment.guest
        assert guest.name == f"cloud-hypervisor-{client.pid}"
        assert [(one.first, one.pages, one.hva) for one in guest.regions] == [(0, client.pages, client.start)]
        assert client.answer_within(30) == "none"
        with Server(attachment) as server:
            attachment.acknowledge()
            attachment.acknowledge()
            assert client.answer_within(2000) == ANSWER
            assert client.answer_within(30) == "none"
            assert client.touch() == touched(client.pages)
        assert server.served >= client.pages
        assert first_word(guest, 7) == 1007
        assert attachment.alive
        assert listener.statistics() == ListenerStatistics(heard=0, attached=1, dropped=0)


def test_memory_that_is_plugged_in_later(client: VmmClient, listener: Listener, path: Path) -> None:
    client.hand_over(path)
    with accept(listener) as attachment, Server(attachment):
        attachment.acknowledge()
        assert client.answer_within(2000) == ANSWER
        before = attachment.guest
        client.add_memory(2)
        client.send(framed(client.added()))
        grown = attachment.receive()
        assert grown is attachment.guest
        assert [(one.first, one.pages, one.gpa) for one in grown.regions] == [(0, 1024, 0), (1024, 512, 4 << 30)]
        assert (before.pages, grown.pages) == (1024, 1536)
        attachment.acknowledge()
        assert client.answer_within(2000) == ANSWER
        assert client.touch() == touched(1536)
        assert first_word(grown, 1500) == 2500
        assert first_word(before, 100) == 1100
        client.ask("x")
        assert attachment.receive() is None
        assert attachment.fileno() == -1
        assert attachment.alive


def test_memory_that_is_added_and_is_not_there(client: VmmClient, listener: Listener, path: Path) -> None:
    client.hand_over(path)
    with accept(listener) as attachment, Server(attachment):
        attachment.acknowledge()
        assert client.answer_within(2000) == ANSWER
        client.send(framed({"type": "add_region", "region": client.region(0) | {"guest_phys_addr": 8 << 30}}))
        with pytest.raises(PeerError, match="addresses in common"):
            attachment.receive()
        assert client.answer_within(2000) == "closed"
        # What there was before is served on.
        assert client.touch() == touched(client.pages)


def test_half_a_message_after_the_handoff(client: VmmClient, listener: Listener, path: Path) -> None:
    client.hand_over(path)
    with accept(listener) as attachment:
        client.send(framed(client.added())[:20])
        with pytest.raises(PeerError, match="no whole message within"):
            attachment.receive(0.2)


def test_a_descriptor_after_the_handoff(client: VmmClient, listener: Listener, path: Path) -> None:
    client.hand_over(path)
    with accept(listener) as attachment:
        client.add_memory(2)
        client.send(framed(client.added()), "u")
        with pytest.raises(PeerError, match="1 descriptors with a message that has none"):
            attachment.receive()


def test_write_protection_without_messages(path: Path, listener: Listener) -> None:
    require("wp-async")
    with VmmClient() as client:
        client.register(Mode.MISSING | Mode.WP, SHMEM | Features.WP_ASYNC)
        client.hand_over(path, mode="MISSING|WP|WP_ASYNC")
        with accept(listener) as attachment:
            assert attachment.mode == Mode.MISSING | Mode.WP
            assert Features.WP_ASYNC in attachment.features


def test_private_memory_of_cloud_hypervisor(path: Path, listener: Listener) -> None:
    with VmmClient("anon") as client:
        client.register(Mode.MISSING, Features(0))
        client.hand_over(path)
        with accept(listener) as attachment, Server(attachment):
            assert isinstance(attachment.guest.memory, AnonymousMemory)
            assert client.touch() == touched(client.pages)
            assert first_word(attachment.guest, 7) == 1007


@pytest.mark.parametrize("kind", ["hugememfd", "huge"])
def test_large_pages(path: Path, kind: str) -> None:
    with (
        huge_pages(8),
        VmmClient(kind, 8) as client,
        Listener(path, CloudHypervisor if kind == "hugememfd" else Firecracker) as listener,
    ):
        client.register(Mode.MISSING, Features.MISSING_HUGETLBFS | Features.EVENT_REMOVE)
        client.connect(path)
        told = json.dumps(client.snapshot_regions(page_size=2 << 20)).encode()
        client.send(framed(client.handoff()) if kind == "hugememfd" else told, "u")
        with accept(listener) as attachment, Server(attachment) as server:
            guest = attachment.guest
            assert guest.regions[0].page_size == 2 << 20
            assert client.ask("r 515") == "1515"
            assert server.served == 1
            # hugetlbfs knows no holes (lseek SEEK_DATA).
            assert guest.memory.populated().runs().tolist() == [[512, 512] if kind == "huge" else [0, 2048]]
            assert [first_word(guest, page) for page in (0, 600)] == [0, 1600]
            assert client.touch() == touched(2048)


def test_an_answer_that_comes_too_late(client: VmmClient, listener: Listener, path: Path) -> None:
    client.hand_over(path)
    with accept(listener) as attachment:
        assert client.answer_within(50) == "none"
        client.ask("x")
        with pytest.raises(PeerError, match="did not wait for an answer"):
            attachment.acknowledge()


def test_a_manager_that_is_restarted_goes_on_where_the_first_stopped(client: VmmClient, path: Path) -> None:
    first = Listener(path)
    client.hand_over(path)
    with accept(first) as attachment:
        with Server(attachment):
            attachment.acknowledge()
            assert client.answer_within(2000) == ANSWER
            assert client.ask("r 5") == "1005"
            client.ask("w 5 77")
        # Some faults are read and never answered, others not even read.
        client.ask("g")
        assert select.select([attachment.uffd], [], [], 5)[0]
        os.read(attachment.uffd.fileno(), 32)
    # It dies: the file of its socket stays.
    first._socket.close()
    with Listener(path) as second:
        assert client.answer_within(2000) == "closed"
        client.ask("x")
        client.hand_over(path)
        with accept(second) as attachment, Server(attachment):
            attachment.acknowledge()
            assert client.answer_within(2000) == ANSWER
            assert client.ask("j") == f"touched {sum(range(1000, 1000 + client.pages)) - 1005 + 77}"
            assert first_word(attachment.guest, 5) == 77


def test_firecracker_from_the_handoff_to_the_balloon(path: Path) -> None:
    with VmmClient("anon") as client, Listener(path, Firecracker, name="micro") as listener:
        client.add_memory(2)
        client.register(Mode.MISSING, Features.EVENT_REMOVE)
        client.connect(path)
        client.send(json.dumps(client.snapshot_regions()).encode(), "u")
        with accept(listener) as attachment, Server(attachment) as server:
            guest = attachment.guest
            assert guest.name == "micro"
            assert attachment.features == Features.EVENT_REMOVE
            assert [(one.first, one.pages, one.gpa) for one in guest.regions] == [
                (0, 1024, 0),
                (1024, 512, 4 << 20),
            ]
            assert len(guest.memory.populated()) == 0
            attachment.acknowledge()
            assert client.answer_within(50) == "none"
            assert client.ask("r 3") == "1003"
            assert [first_word(guest, page) for page in (2, 3, 4)] == [0, 1003, 0]
            assert guest.memory.populated().runs().tolist() == [[3, 1]]
            assert client.touch() == touched(1536)
            client.ask("w 1030 5")
            assert [first_word(guest, page) for page in (1023, 1024, 1030)] == [2023, 2024, 5]
            assert client.ask("d 1024 4") == "0"
            # Served behind the event, so that has been noted by now.
            assert client.ask("r 1024") == "2024"
            (removed,) = server.events
            assert removed.kind is EventKind.REMOVE
            assert (removed.first, removed.second) == (client.regions[1][0], client.regions[1][0] + 4 * 4096)
            assert len(guest.memory.populated()) == 1533
            with pytest.raises(RefusedError, match="no file to punch a hole in") as caught:
                guest.memory.punch(3, 1)
            assert caught.value.reason == "anonymous-memory"
            guest.memory.write(3, memoryview((9).to_bytes(8, "little") * 512))
            assert client.ask("r 3") == "9"
            with pytest.raises(KernelError, match="write of 1 pages at page 1025 of the process's memory"):
                guest.memory.write(1025, memoryview(bytes(4096)))


def test_the_memory_of_a_firecracker_that_has_ended(path: Path) -> None:
    with VmmClient("anon") as client, Listener(path, Firecracker) as listener:
        client.register(Mode.MISSING, Features.EVENT_REMOVE)
        client.connect(path)
        client.send(json.dumps(client.snapshot_regions()).encode(), "u")
        with accept(listener) as attachment:
            client.say("q")
            client.ended()
            assert not attachment.alive
            assert attachment.receive() is None
            with pytest.raises(KernelError):
                first_word(attachment.guest, 0)


def region_with(client: VmmClient, **changes: int) -> bytes:
    return framed(client.handoff(regions=[client.region(0) | changes]))


HOSTILE: dict[str, tuple[Callable[[VmmClient], bytes], str, str]] = {
    "another's pid": (
        lambda client: framed(client.handoff(vmm_pid=os.getpid())),
        "u",
        f"says that it is process {os.getpid()}",
    ),
    "no descriptor": (lambda client: framed(client.handoff()), "-", "without the userfaultfd"),
    "two descriptors": (lambda client: framed(client.handoff()), "uu", "2 descriptors with a message that has one"),
    "twenty descriptors": (lambda client: framed(client.handoff()), "u" * 20, "more descriptors than any message"),
    "no userfaultfd": (lambda client: framed(client.handoff()), "n", "is no userfaultfd"),
    "too long": (lambda _: framed(b" " * (MAX_BODY + 1))[:4], "u", f"a message of {MAX_BODY + 1} bytes"),
    "cut JSON": (lambda client: framed(framed(client.handoff())[4:-9]), "u", "none of its own: Input data was trunc"),
    "unknown type": (lambda client: framed(client.handoff(type="snapshot")), "u", "type 'snapshot'"),
    "unknown version": (lambda client: framed(client.handoff(version=7)), "u", "by version 7"),
    "a feature that it has not": (lambda client: framed(client.handoff("WP|WP_ASYNC")), "u", "names .*WP_ASYNC"),
    "a region twice": (
        lambda client: framed(client.handoff(regions=[client.region(0)] * 2)),
        "u",
        "guest-physical addresses in common",
    ),
    "beyond its end": (lambda client: region_with(client, size=64 << 20), "u", "or changes|has no mapping|one file"),
    "at no mapping": (lambda client: region_with(client, host_virt_addr=4096), "u", "at 0x1000, where it has no"),
    "at another offset": (
        lambda client: region_with(client, size=4096, backing_file_offset=4096),
        "u",
        "at 0x1000 of '/memfd:guest .*the kernel has it at 0x0",
    ),
}


@pytest.mark.parametrize("case", list(HOSTILE))
def test_what_is_refused_leaves_nothing_open_and_the_next_is_heard(
    case: str, client: VmmClient, listener: Listener, path: Path
) -> None:
    data, descriptors, words = HOSTILE[case]
    before = open_here()
    client.connect(path)
    client.send(data(client), descriptors)
    with pytest.raises(PeerError, match=words):
        listener.accept(10)
    assert open_here() == before
    assert client.answer_within(2000) == "closed"
    client.ask("x")
    client.hand_over(path)
    with accept(listener) as attachment:
        assert attachment.guest.pages == client.pages
    assert listener.statistics() == ListenerStatistics(heard=0, attached=1, dropped=1)


def test_a_userfaultfd_that_nobody_agreed_on(path: Path, listener: Listener) -> None:
    with VmmClient() as client:
        assert client.ask("u 1 -") == "0"
        client.hand_over(path)
        with pytest.raises(PeerError, match=r"did not register its memory .*Invalid argument"):
            listener.accept(10)


def test_a_userfaultfd_that_does_not_have_the_memory(path: Path, listener: Listener) -> None:
    with VmmClient() as client:
        client.register()
        # The first one keeps it: the second cannot register anything.
        assert client.ask(f"u 1 {int(SHMEM)}") == str(errno.EBUSY)
        client.hand_over(path)
        with pytest.raises(PeerError, match=r"did not register its memory .*busy"):
            listener.accept(10)


def test_a_userfaultfd_that_would_open_descriptors_here(path: Path, listener: Listener) -> None:
    with VmmClient() as client:
        client.register(features=SHMEM | Features.EVENT_FORK)
        client.hand_over(path)
        with pytest.raises(PeerError, match=r"EVENT_FORK.*it is not served"):
            listener.accept(10)


def test_one_that_says_nothing_keeps_nobody_waiting(client: VmmClient, listener: Listener, path: Path) -> None:
    with VmmClient() as silent, VmmClient() as slow:
        silent.connect(path)
        slow.connect(path)
        slow.send(framed(slow.handoff())[:50])
        client.hand_over(path)
        with accept(listener) as attachment:
            assert attachment.pid == client.pid
        dropped = []
        for _ in range(2):
            with pytest.raises(PeerError, match=r"within 0\.3 s") as caught:
                listener.accept(10)
            dropped.append(str(caught.value))
        assert dropped == [
            f"Cloud Hypervisor, process {silent.pid}, connected and said nothing within 0.3 s",
            f"Cloud Hypervisor, process {slow.pid}, connected and said half of its handoff within 0.3 s",
        ]
        assert [silent.answer_within(2000), slow.answer_within(2000)] == ["closed", "closed"]


def test_one_reader_at_a_time(client: VmmClient, listener: Listener, path: Path) -> None:
    client.hand_over(path)
    with accept(listener) as attachment:
        client.ask("x")
        assert attachment.receive() is None
        client.hand_over(path)
        with pytest.raises(PeerError, match="close that attachment first"):
            listener.accept(10)
        assert client.answer_within(2000) == "closed"
        client.ask("x")
    client.hand_over(path)
    accept(listener).close()


def test_one_that_comes_in_pieces(client: VmmClient, listener: Listener, path: Path) -> None:
    data = framed(client.handoff())
    client.connect(path)
    client.send(data[:2])
    assert listener.accept(0.01) is None
    client.send(data[2:70], "u")
    assert listener.accept(0.01) is None
    assert listener.statistics().heard == 1
    client.send(data[70:])
    accept(listener).close()


def test_one_that_dies_in_the_middle(client: VmmClient, listener: Listener, path: Path) -> None:
    client.connect(path)
    client.send(framed(client.handoff())[:50], "u")
    client.say("q")
    client.ended()
    with pytest.raises(PeerError, match=r"after 50 bytes of a message|ended when it had connected"):
        listener.accept(10)
    assert listener.accept(0.01) is None


def test_one_that_dies_when_it_has_said_all(client: VmmClient, listener: Listener, path: Path) -> None:
    client.hand_over(path)
    client.say("q")
    client.ended()
    with pytest.raises(PeerError, match=r"is gone, or changes|ended when it had connected"):
        listener.accept(10)
    assert listener.accept(0.01) is None


def test_nobody_comes(listener: Listener) -> None:
    assert listener.accept(0.0) is None
    assert listener.accept(0.01) is None


def test_the_socket_goes_with_the_listener(path: Path) -> None:
    with Listener(path) as listener:
        assert path.is_socket()
        listener.close()
        assert not path.exists()
    with Listener(path) as listener:
        path.unlink()
        path.write_text("somebody else's")
    assert path.read_text() == "somebody else's"
