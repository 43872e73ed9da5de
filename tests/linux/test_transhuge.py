"""The kernel's setting, as it writes it."""

from pathlib import Path

import pytest

from outboard.linux import transhuge
from tests.support.machine import transparent_huge_pages


def test_the_chosen_word_is_found() -> None:
    with transparent_huge_pages():
        assert transhuge.shmem_enabled() == "advise"


@pytest.mark.parametrize(
    ("text", "word"), [("always within_size [never] deny", "never"), ("[force]", "force"), ("", "never")]
)
def test_what_the_file_may_say(text: str, word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transhuge, "SHMEM_ENABLED", tmp_path / "shmem_enabled")
    assert transhuge.shmem_enabled() == "never"
    (tmp_path / "shmem_enabled").write_text(text)
    assert transhuge.shmem_enabled() == word
