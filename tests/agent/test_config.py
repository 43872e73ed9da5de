"""The agent's file: strict, and helpful about what is wrong with it."""

from pathlib import Path

import pytest

from outboard.agent.config import PORT, AgentConfig, read_config
from outboard.errors import NotFoundError, SpecError


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_hosts_are_found_by_name(tmp_path: Path) -> None:
    text = 'name = "a"\nlisten = "10.0.0.1"\n\n[hosts]\nb = "10.0.0.2"\nc = "10.0.0.3:99"\n'
    config = read_config(write(tmp_path / "agent.toml", text))
    assert config.port == PORT
    assert (config.find("b").address, config.find("b").port) == ("10.0.0.2", PORT)
    assert (config.find("c").address, config.find("c").port) == ("10.0.0.3", 99)
    with pytest.raises(NotFoundError, match="known: b, c"):
        config.find("d")


@pytest.mark.parametrize(
    ("address", "where"),
    [
        ("b.example", ("b.example", PORT)),
        ("b.example:99", ("b.example", 99)),
        ("fd00::2", ("fd00::2", PORT)),
        ("[fd00::2]", ("fd00::2", PORT)),
        ("[fd00::2]:99", ("fd00::2", 99)),
    ],
)
def test_where_a_host_is(address: str, where: tuple[str, int]) -> None:
    found = AgentConfig(name="a", listen="::1", hosts={"b": address}).find("b")
    assert (found.address, found.port) == where


@pytest.mark.parametrize("address", ["10.0.0.2:x", "10.0.0.2:0", "[fd00::2]99999", "[fd00::2]:-1"])
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(SpecError, match="is no address"):
        AgentConfig(name="a", listen="10.0.0.1", hosts={"b": address}).find("b")


def test_no_hosts_at_all() -> None:
    with pytest.raises(NotFoundError, match="known: none"):
        AgentConfig(name="a", listen="10.0.0.1").find("b")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('name = "a"\nlisten = "x"\nprot = 3\n', "port"),
        ('name = "a"\n', "listen"),
        ('name = "a"\nlisten = "x"\nmigration_ports = [5, 4]\n', "no range of ports"),
        ("name = \n", "agent.toml"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(SpecError, match=words):
        read_config(write(tmp_path / "agent.toml", text))


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        read_config(tmp_path / "agent.toml")
