"""What binutils would say of the same files, without them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from guest import elf


@pytest.fixture
def program(tmp_path: Path) -> Path:
    source = tmp_path / "program.c"
    source.write_text("#include <math.h>\nint main(int c, char **v) { (void)v; return (int)cos(c); }\n")
    made = tmp_path / "program"
    subprocess.run(["gcc", "-fno-builtin", "-o", made, source, "-lm"], check=True)
    return made


def test_a_dynamic_program_names_its_interpreter_and_libraries(program: Path) -> None:
    assert elf.is_dynamic(program)
    assert elf.needed(program) == ["/lib64/ld-linux-x86-64.so.2", "libm.so.6", "libc.so.6"]


def test_a_static_program_needs_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.c").write_text("int main(void) { return 0; }\n")
    subprocess.run(["gcc", "-static", "-o", tmp_path / "a", tmp_path / "a.c"], check=True)
    assert not elf.is_dynamic(tmp_path / "a")
    assert elf.needed(tmp_path / "a") == []


def test_a_modules_dependencies(tmp_path: Path) -> None:
    source = tmp_path / "module.c"
    section = '__attribute__((section(".modinfo"), used)) static const char'
    source.write_text(f'{section} a[] = "license=GPL";\n{section} b[] = "depends=virtio,virtio_ring";\n')
    subprocess.run(["gcc", "-c", "-o", tmp_path / "module.ko", source], check=True)
    assert elf.module_depends(tmp_path / "module.ko") == ["virtio", "virtio_ring"]
    source.write_text(f'{section} b[] = "depends=";\n')
    subprocess.run(["gcc", "-c", "-o", tmp_path / "module.ko", source], check=True)
    assert elf.module_depends(tmp_path / "module.ko") == []


def test_what_is_no_elf_file_is_refused(tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("#!/bin/sh\n")
    assert not elf.is_dynamic(script)
    with pytest.raises(ValueError, match="is no 64-bit little-endian ELF file"):
        elf.needed(script)
    assert elf.needed(Path(sys.executable).resolve())
