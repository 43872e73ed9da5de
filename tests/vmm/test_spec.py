"""Descriptions of VMs: what is accepted, what is refused and in which words, and that they survive being written."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outboard.errors import NotFoundError, SpecError
from outboard.vmm.spec import GIB, MIB, Boot, Disk, Network, VmSpec, parse_size, parse_spec, read_spec, read_toml

LEAST = 'name = "web"\nmemory = "1GiB"\n'


def refused(text: str) -> str:
    """The words in which a description is refused; they begin with where it came from."""
    with pytest.raises(SpecError, match=r"^web\.toml") as caught:
        parse_spec(text, "web.toml")
    return str(caught.value)


def test_the_least_has_defaults() -> None:
    spec = parse_spec(LEAST, "web.toml")
    assert (spec.memory_bytes, spec.page_bytes, spec.vcpus, spec.accel) == (GIB, 4096, 1, "auto")
    assert (spec.boot, spec.disks, spec.networks, spec.guest_agent) == (None, [], [], True)


@pytest.mark.parametrize(("text", "size"), [("512MiB", 512 * MIB), ("1 GiB", GIB), ("64KiB", 65536)])
def test_a_size(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "1G", "1gib", "0MiB", "-1MiB", "1.5GiB", "1GiB!", "99999999999GiB"])
def test_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="is no size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("vcpu = 2", "no key is called 'vcpu'; did you mean 'vcpus'?"),
        ("[boot]\nkernle = '/k'", "no key is called 'kernle' in boot; did you mean 'kernel'?"),
        (
            "[[networks]]\ntap = 't'\n[[networks]]\ntap = 'u'\nbrige = 'b'",
            "did you mean 'bridge'?",
        ),
        ("[[disks]]\npath = '/d'\nzzz = 1", "there are path, format, read_only"),
    ],
)
def test_an_unknown_key_names_the_nearest(more: str, words: str) -> None:
    assert words in refused(LEAST + more)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ('name = "web"', "memory"),
        ('memory = "1GiB"', "name"),
        ('name = "../web"\nmemory = "1GiB"', "name"),
        ('name = ""\nmemory = "1GiB"', "name"),
        ('name = "web"\nmemory = "1G"', "memory"),
        ('name = "web"\nmemory = "4KiB"', "memory"),
        ('name = "web"\nmemory = "3MiB"\npage_size = "2MiB"', "memory"),
        (LEAST + "vcpus = 0", "vcpus"),
        (LEAST + 'vcpus = "2"', "vcpus"),
        (LEAST + 'accel = "hvf"', "accel"),
        (LEAST + 'qemu = "bin/qemu"', "qemu"),
        (LEAST + "[boot]\nkernel = 'vmlinuz'", "kernel"),
        (LEAST + "[boot]\nkernel = '/k'\ninitrd = 'i'", "initrd"),
        (LEAST + "[[disks]]\npath = 'd'", "path"),
        (LEAST + "[[networks]]\ntap = 'a-name-that-is-too-long'", "tap"),
        (LEAST + "[[networks]]\ntap = 't'\nmac = '53:54:00:00:00:00'", "mac"),
        (LEAST + "[[networks]]\ntap = 't'\n[[networks]]\ntap = 't'", "tap"),
        ("name = ", "TOML"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_its_key(text: str, word: str) -> None:
    assert word in refused(text)


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "web.toml"
    with pytest.raises(NotFoundError, match=r"web\.toml"):
        read_spec(path)
    path.write_text(LEAST)
    assert read_spec(path) == parse_spec(LEAST, "")
    path.write_bytes(b"\xff")
    with pytest.raises(SpecError, match="cannot be read"):
        read_spec(path)


def test_another_schema_is_as_strict(tmp_path: Path) -> None:
    class Host(msgspec.Struct, forbid_unknown_fields=True):
        listen: str

    path = tmp_path / "host.toml"
    path.write_text('listem = "a"')
    with pytest.raises(SpecError, match="did you mean 'listen'"):
        read_toml(path, Host)


def test_settled_leaves_nothing_to_the_host() -> None:
    spec = parse_spec(LEAST + "[[networks]]\ntap = 't'\n[[networks]]\ntap = 'u'", "web.toml")
    settled = spec.settled("tcg")
    macs = [network.mac for network in settled.networks]
    assert settled.accel == "tcg"
    assert None not in macs
    assert len(set(macs)) == 2
    assert settled == spec.settled("tcg") == settled.settled("tcg")
    other = msgspec.structs.replace(spec, name="other").settled("tcg")
    assert not set(macs) & {network.mac for network in other.networks}


names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,14}", fullmatch=True)
text = st.text(st.characters(codec="utf-8", exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)
paths = text.map(lambda tail: f"/{tail}")


@given(
    st.builds(
        VmSpec,
        name=names,
        memory=st.integers(1, 1 << 20).map(lambda count: f"{count}MiB"),
        vcpus=st.integers(1, 1024),
        accel=st.sampled_from(["auto", "kvm", "tcg"]),
        guest_agent=st.booleans(),
        extra_args=st.lists(text, max_size=3),
        boot=st.none() | st.builds(Boot, kernel=paths, initrd=st.none() | paths, append=text),
        disks=st.lists(st.builds(Disk, path=paths, read_only=st.booleans()), max_size=2),
        networks=st.lists(st.builds(Network, tap=names), max_size=3, unique_by=lambda network: network.tap),
    )
)
def test_what_is_written_reads_back_the_same(spec: VmSpec) -> None:
    assert parse_spec(spec.to_toml(), "web.toml") == spec
