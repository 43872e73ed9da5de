"""What heat, mrc and wss share: a guest's memory, sampled for as long as a command runs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import click
import numpy as np

from outboard.cli.output import C
from outboard.errors import RefusedError
from outboard.pages import PAGE_SIZE
from outboard.trace.accesses import AccessTrace, open_access_trace
from outboard.trace.sampling import Budget, Sampler, sample
from outboard.vmm.guest import Guest


@dataclass(frozen=True, slots=True)
class Sampled:
    """A guest that is being sampled; ``unit`` is the size of what is sampled, in pages: 512 with 2 MiB pages."""

    guest: Guest
    trace: AccessTrace
    sampler: Sampler
    unit: int

    def follow(self, seconds: float) -> float:
        """Sample for a time; how long it was."""
        began = time.monotonic()
        while (passed := time.monotonic() - began) < seconds:
            time.sleep(min(self.sampler.step(), seconds - passed))
        return passed

    @property
    def unit_bytes(self) -> int:
        """Bytes of what is sampled as one."""
        return self.unit * PAGE_SIZE


def slowdown_option(command: C) -> C:
    """The option ``--slowdown``."""
    return click.option(
        "--slowdown",
        type=click.FloatRange(0, 50, min_open=True),
        default=2.0,
        show_default=True,
        help="Percent of its running time that the VM may lose.",
    )(command)


def unit_of(guest: Guest) -> int:
    """How many pages are touched as one: 512 with 2 MiB pages.

    :raise RefusedError: ``mixed-pages``: its memory is in pages of several sizes.
    """
    sizes = {region.page_size for region in guest.regions}
    if len(sizes) > 1:
        raise RefusedError(
            "mixed-pages",
            f"{guest.name}: its memory is in pages of {sorted(sizes)} bytes, and a sample of pages needs one size",
        )
    return sizes.pop() // PAGE_SIZE


@contextmanager
def sampled(guest: Guest, slowdown: float) -> Iterator[Sampled]:
    """Sample ``guest`` so that it loses at most ``slowdown``, a fraction.

    :raise RefusedError: as :func:`unit_of` and :func:`~outboard.trace.accesses.open_access_trace`.
    """
    unit = unit_of(guest)
    with open_access_trace(guest) as trace:
        sampler = Sampler(
            trace,
            sample(guest.pages, unit),
            guest.pages // unit,
            Budget(trace.trap_s, slowdown),
            np.random.default_rng(),
            time.monotonic_ns,
        )
        yield Sampled(guest, trace, sampler, unit)
