"""Sockets that belong to a VM: who may connect, what is replaced and what is not."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from outboard.errors import KernelError, RefusedError
from outboard.linux import pidfd
from outboard.vmm import sockets


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_only_the_owner_and_the_group_may_connect(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with sockets.listen(tmp_path / "s"):
            assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == 0o660
    finally:
        os.umask(before)


def test_a_path_longer_than_an_address(tmp_path: Path) -> None:
    path = tmp_path / ("d" * 100) / "s"
    path.parent.mkdir()
    with sockets.listen(path) as listening, sockets.connect(path, 1, "a test"):
        listening.accept()[0].close()
    with pytest.raises(KernelError, match="File name too long"):
        sockets.listen(path.with_name("s" * 100))


def test_what_a_dead_process_left_is_replaced(tmp_path: Path) -> None:
    sockets.listen(tmp_path / "s").close()
    assert (tmp_path / "s").is_socket()
    with sockets.listen(tmp_path / "s"), sockets.connect(tmp_path / "s", 1, "a test"):
        pass


def test_what_is_in_use_is_not(tmp_path: Path) -> None:
    with sockets.listen(tmp_path / "s"), pytest.raises(RefusedError, match="another process does") as caught:
        sockets.listen(tmp_path / "s")
    assert caught.value.reason == "path-taken"
    (tmp_path / "f").write_text("kept")
    with pytest.raises(RefusedError, match="no socket"):
        sockets.listen(tmp_path / "f")
    assert (tmp_path / "f").read_text() == "kept"
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RefusedError, match="no socket"):
        sockets.listen(tmp_path / "link")
    assert not (tmp_path / "elsewhere").exists()


def test_a_directory_that_is_not_there_or_is_a_link(tmp_path: Path) -> None:
    with pytest.raises(KernelError, match=r"listen at .*No such file"):
        sockets.listen(tmp_path / "nowhere" / "s")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(KernelError, match=r"listen at .*Not a directory|Too many levels"):
        sockets.listen(tmp_path / "link" / "s")


def test_a_peer_by_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for option in (sockets.SO_PEERPIDFD, 0x7FFF):
            # An option that no kernel knows stands for one before Linux 6.5.
            monkeypatch.setattr(sockets, "SO_PEERPIDFD", option)
            found = sockets.peer_pidfd(ours)
            assert f"Pid:\t{os.getpid()}\n" in Path(f"/proc/self/fdinfo/{found}").read_text()
            pidfd.close(found)
        assert sockets.peer_pid(ours) == os.getpid()
