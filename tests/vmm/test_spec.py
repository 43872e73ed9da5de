"""What a VM's description may say, and how it is told that it says something else."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from outboard.errors import NotFoundError, SpecError
from outboard.vmm import spec
from outboard.vmm.spec import MIB, parse_size, parse_spec, read_spec

LEAST = 'name = "web"\nmemory = "1GiB"\n'


def documented() -> str:
    """The example in the module's docstring."""
    assert spec.__doc__ is not None
    block = spec.__doc__.split("::\n\n", 1)[1].split("\n\n``name``", 1)[0]
    return "\n".join(line[4:] for line in block.splitlines())


def test_the_documented_example_fits_and_names_every_key() -> None:
    text = documented()
    found = parse_spec(text, "the example")
    written = tomllib.loads(text)
    assert set(written) == set(found.__struct_fields__)
    assert found.boot is not None
    for table, fields in ((written["boot"], found.boot), (written["disks"][0], found.disks[0])):
        assert set(table) == set(fields.__struct_fields__)
    assert set(written["networks"][0]) == set(found.networks[0].__struct_fields__)


def test_documented_defaults_are_the_defaults() -> None:
    least, example = parse_spec(LEAST, "x"), parse_spec(documented(), "x")
    for key in ("cpu", "machine", "accel", "page_size", "qemu", "guest_agent", "extra_args"):
        assert getattr(least, key) == getattr(example, key)
    assert least.vcpus == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('name = "web"\nmemry = "1GiB"', "x.toml: no key is called 'memry'; did you mean 'memory'?"),
        (LEAST + '[boot]\nkernel = "/k"\ninitd = "/i"', "'initd' in boot; did you mean 'initrd'?"),
        (LEAST + '[[networks]]\ntap = "t"\nbrigde = "b"', r"'brigde' in networks\[0\]; did you mean 'bridge'?"),
        (LEAST + "zzz = 1", "no key is called 'zzz'; there are name, memory"),
        ('name = "web"', "missing required field `memory`"),
        (LEAST + 'vcpus = "two"', "Expected `int`, got `str` - at `\\$.vcpus`"),
        ('name = "web"\nmemory = "1GB"', "memory = '1GB' is no size; sizes are written as 512MiB or 1GiB"),
        ('name = "web"\nmemory = "1500KiB"', "must be a multiple of 1 MiB"),
        ('name = "web"\nmemory = "3MiB"\npage_size = "2MiB"', "must be a multiple of 2 MiB"),
        ('name = "../web"\nmemory = "1GiB"', "name = '../web': a VM's name has"),
        (LEAST + "vcpus = 0", "vcpus = 0: must be 1 to 1024"),
        (LEAST + 'qemu = "bin/qemu"', "qemu = 'bin/qemu': paths are absolute"),
        (LEAST + '[[disks]]\npath = "root.img"', "path = 'root.img': paths are absolute"),
        (LEAST + '[[networks]]\ntap = "a-name-of-16-char"', "an interface's name has 1 to 15"),
        (LEAST + '[[networks]]\ntap = "t"\nmac = "53:54:00:00:00:01"', "a unicast MAC address"),
        (LEAST + '[[networks]]\ntap = "t"\n[[networks]]\ntap = "t"', "two networks have the same tap"),
        (LEAST + 'accel = "xen"', "Invalid enum value 'xen'"),
        ("name = ", "x.toml is no TOML: "),
    ],
)
def test_what_does_not_fit_is_told_by_its_key(text: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        parse_spec(text, "x.toml")


def test_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "web.toml"
    with pytest.raises(NotFoundError, match=f"there is no file {path}"):
        read_spec(path)
    path.write_text(LEAST)
    assert read_spec(path).memory_bytes == 1024 * MIB
    path.write_bytes(b'name = "\xff"')
    with pytest.raises(SpecError, match="cannot be read"):
        read_spec(path)


def test_sizes() -> None:
    assert [parse_size(text) for text in ("4KiB", "2 MiB", "1TiB")] == [4096, 2 * MIB, 1 << 40]
    for text in ("", "0MiB", "-1MiB", "1", "1.5GiB", "1MiBs", "99999999999GiB"):
        with pytest.raises(ValueError, match="is no size"):
            parse_size(text)


def test_settled_leaves_nothing_to_the_host_and_survives_writing() -> None:
    text = LEAST + '[[networks]]\ntap = "t0"\n[[networks]]\ntap = "t1"\nmac = "52:54:00:00:00:01"\n'
    settled = parse_spec(text, "x").settled("tcg")
    assert settled.accel == "tcg"
    derived, given = (network.mac for network in settled.networks)
    assert derived is not None
    assert derived.startswith("52:54:00:")
    assert given == "52:54:00:00:00:01"
    assert settled == parse_spec(text, "x").settled("tcg")
    assert parse_spec(settled.to_toml(), "y") == settled
    example = parse_spec(documented(), "x")
    assert parse_spec(example.to_toml(), "y") == example
