"""Errors, requests and layouts."""

from __future__ import annotations

import ctypes
import errno
import os

import pytest

from outboard.errors import KernelError
from outboard.linux.libc import Request, close, io_request, layout, syscall, u8, u32


def test_an_error_names_its_operation_and_keeps_errno() -> None:
    with pytest.raises(KernelError, match="close of nothing: Bad file descriptor") as caught:
        syscall("close of nothing", 3, -1)
    assert (caught.value.operation, caught.value.errno) == ("close of nothing", errno.EBADF)


def test_a_struct_that_comes_out_otherwise_is_refused_at_import() -> None:
    with pytest.raises(ImportError, match="struct pair is 8 bytes, the kernel's is 5"):

        @layout(5)
        class pair(ctypes.Structure):
            one: u8
            other: u32


def test_request_numbers() -> None:
    assert io_request(3, 0xAA, 0x3F, 24) == 0xC018AA3F
    assert io_request(0, 0xAA, 0, 0) == 0xAA00


def test_a_request_that_fails_names_itself() -> None:
    @layout(4)
    class word(ctypes.Structure):
        value: u32

    fd = os.memfd_create("outboard-test")
    with pytest.raises(KernelError, match="WORD") as caught:
        Request("WORD", 0x1234, word)(fd, word())
    assert caught.value.errno == errno.ENOTTY
    close(fd)
    close(fd)
