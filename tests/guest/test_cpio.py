"""The archive, as cpio(1) of busybox and of the kernel would read it."""

from __future__ import annotations

import stat

from guest import cpio


def unpack(archive: bytes) -> dict[str, tuple[int, bytes]]:
    """Mode and data by path; an independent reading of the format."""
    found: dict[str, tuple[int, bytes]] = {}
    at = 0
    while True:
        assert archive[at : at + 6] == b"070701"
        fields = [int(archive[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(13)]
        mode, size, name_size = fields[1], fields[6], fields[11]
        name = archive[at + 110 : at + 110 + name_size - 1].decode()
        at = -(-(at + 110 + name_size) // 4) * 4
        if name == "TRAILER!!!":
            assert at == len(archive)
            return found
        found[name] = (mode, archive[at : at + size])
        at = -(-(at + size) // 4) * 4


def test_entries_come_back_and_directories_are_made() -> None:
    archive = cpio.pack(
        {"init": cpio.file(b"#!", executable=True), "a/b/c": cpio.file(b"12345"), "var/run": cpio.link("/run")}
    )
    assert unpack(archive) == {
        "a": (stat.S_IFDIR | 0o755, b""),
        "a/b": (stat.S_IFDIR | 0o755, b""),
        "a/b/c": (stat.S_IFREG | 0o644, b"12345"),
        "init": (stat.S_IFREG | 0o755, b"#!"),
        "var": (stat.S_IFDIR | 0o755, b""),
        "var/run": (stat.S_IFLNK | 0o777, b"/run"),
    }


def test_directories_come_before_what_is_in_them() -> None:
    names = list(unpack(cpio.pack({"a/b/c": cpio.file(b""), "a-b": cpio.file(b"")})))
    assert names.index("a") < names.index("a/b") < names.index("a/b/c")


def test_the_order_of_the_entries_does_not_show() -> None:
    entries = {"b": cpio.file(b"1"), "a": cpio.directory()}
    assert cpio.pack(entries) == cpio.pack(dict(reversed(entries.items())))
