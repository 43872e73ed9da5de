"""The sharing domains of this host, as its agent sees to them: it starts their processes, and replaces the dead."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec
import structlog

from outboard.agent.domains import Sharing, Tell, active, ask_domain, forget, wanted_of
from outboard.agent.engines import first_answer
from outboard.agent.sharer import domain_directory
from outboard.errors import KernelError, OutboardError, RefusedError
from outboard.linux import pidfd
from outboard.sharing.inside import Thresholds
from outboard.vmm.registry import Registry

_READY_S = 60.0
_RETRY_S = 1.0

log = structlog.get_logger()


class SharingDomains:
    """Starts the processes of domains, and keeps them running until they are told to stop.

    :param start: starts a process for a task; its pipe. :param manage: has a VM's memory managed.
    :param domains: what the administrator allows to be shared: the VMs of each domain, by its name.

    Synchronization: any thread.
    """

    def __init__(
        self,
        start: Callable[[Sharing], Connection],
        manage: Callable[[str], Path],
        registry: Registry,
        domains: Mapping[str, list[str]],
    ) -> None:
        self._start, self._manage, self._registry, self._domains = start, manage, registry, domains
        self._locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)

    def adopt(self) -> None:
        """Go on with the domains that shared when an earlier agent ended."""
        for directory in active(self._registry.root):
            threading.Thread(target=self._go_on, args=(directory,), daemon=True).start()

    def _go_on(self, directory: Path) -> None:
        try:
            process = ask_domain(directory, Tell()).process
        except OutboardError:
            self._replace(directory)
        else:
            self._watch(directory, process)

    def begin(self, name: str, every_s: float, reads_s: float, large: Thresholds) -> int:
        """Have a domain share: one that the administrator has named, or a VM alone; its process's pid.

        :raise NotFoundError: it is neither.
        :raise RefusedError: it shares already, or one of its VMs cannot be managed.
        """
        vms = tuple(self._domains.get(name, ()))
        if not vms:
            vms = (self._registry.get(name).name,)
        for other in active(self._registry.root):
            work = wanted_of(other)
            taken = set() if work is None else set(work.vms) & set(vms)
            if taken and other.name != name:
                raise RefusedError("sharing", f"{', '.join(sorted(taken))}: shared in the domain {other.name} already")
        with self._locks[name]:
            return self._run(Sharing(name, vms, every_s, reads_s, large=large))

    def _run(self, work: Sharing) -> int:
        for vm in work.vms:
            self._manage(vm)
        process = first_answer(self._start(work), _READY_S, f"the process of the sharing domain {work.domain}")
        log.info("pages are shared", domain=work.domain, process=process)
        directory = domain_directory(self._registry.root, work.domain)
        threading.Thread(target=self._watch, args=(directory, process), daemon=True).start()
        return process

    def _watch(self, directory: Path, process: int) -> None:
        """Wait for the end of a domain's process; one that was not told to stop has another take its place."""
        try:
            handle = pidfd.open(process)
        except KernelError:
            pass
        else:
            pidfd.wait(handle, None)
            pidfd.close(handle)
        self._replace(directory)

    def _replace(self, directory: Path) -> None:
        while (work := wanted_of(directory)) is not None:
            # What VMs are left of it goes on; those that have ended share nothing.
            alive = tuple(record.name for record in self._registry.list() if record.alive and record.name in work.vms)
            try:
                with self._locks[work.domain]:
                    if _answers(directory):
                        # It was begun again meanwhile, and is watched by whoever did.
                        return
                    if alive:
                        log.warning("the process of a sharing domain died, another takes over", domain=work.domain)
                        self._run(msgspec.structs.replace(work, vms=alive))
                        return
                    forget(self._registry.root, work.domain)
            except OutboardError as error:
                # What is in the way may be mended: an engine that is being replaced too, or want of memory.
                log.error("a sharing domain has no process", domain=directory.name, why=str(error))
                time.sleep(_RETRY_S)
        log.info("pages are shared no more", domain=directory.name)


def _answers(directory: Path) -> bool:
    try:
        ask_domain(directory, Tell())
    except OutboardError:
        return False
    return True
