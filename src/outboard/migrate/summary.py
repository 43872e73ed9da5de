"""The summary of a migration, from what its source has found out."""

from __future__ import annotations

import time

from outboard.errors import OutboardError
from outboard.migrate.report import Summary
from outboard.migrate.source import Outgoing
from outboard.pages import PAGE_SIZE
from outboard.wire.codecs import CODERS

_NO_ERROR = 0


def summarise(outgoing: Outgoing, *, source: str, attach_ms: float, error: OutboardError | None) -> Summary:
    """Sum up a migration that has ended.

    :param source: this host's name.
    """
    found = outgoing.findings
    elapsed = outgoing.watch.elapsed if found.total_s is None else found.total_s
    sent = outgoing.outbox.statistics()
    arrived, copied = found.arrived, outgoing.copied
    return Summary(
        migration=outgoing.migration,
        vm=outgoing.guest.name,
        source=source,
        destination=outgoing.destination.name,
        method=outgoing.options.method,
        started=time.time() - elapsed,
        state=outgoing.machine.state,
        safe_at=outgoing.machine.safe_at,
        error=None if error is None else str(error),
        total_s=elapsed,
        time_to_resume_s=found.resume_s,
        blackout_ms=found.blackout_ms,
        bytes=sent.bulk_bytes + sent.urgent_bytes + outgoing.line.control_bytes,
        pages=outgoing.guest.pages,
        data_pages=sent.data_pages,
        zero_pages=sent.zero_pages,
        urgent_pages=sent.urgent_pages,
        never_sent_pages=outgoing.guest.pages - len(outgoing.outbox.live()),
        resent_pages=found.resent_pages,
        hints=found.hints,
        trace=found.trace,
        attach_ms=attach_ms,
        arm_ms=found.arm_ms,
        rounds=[] if copied is None else copied.done,
        throttle=[] if copied is None else copied.throttle.steps,
        cut_short=None if copied is None else copied.cut_short,
        throttle_gain=1.0 if copied is None else copied.throttle.gain,
        remote_faults=None if arrived is None else arrived.remote_faults,
        zero_faults=None if arrived is None else arrived.zero_faults,
        minor_faults=None if arrived is None else arrived.minor_faults,
        fault_p50_us=None if arrived is None else arrived.fault_p50_us,
        fault_p99_us=None if arrived is None else arrived.fault_p99_us,
        mapped_before_resume=None if arrived is None else arrived.mapped_before_resume,
        large_mappings_before=found.large_mappings,
        large_mappings_after=found.large_mappings_after,
        bulk_rate=found.bulk_rate,
        verified=found.verified,
        queues=found.queues,
        queue_pages=found.queue_pages,
        loading_faults=None if arrived is None else arrived.loading_faults,
        device_faults=None if arrived is None else arrived.device_faults,
        queue_faults=None if arrived is None else outgoing.devices.hit(arrived.device_fault_pages),
        goal=outgoing.options.goal,
        exit_code=_NO_ERROR if error is None else error.exit_code,
        streams=outgoing.line.bulk_streams,
        content_bytes=sent.data_pages * PAGE_SIZE,
        packed_bytes=sent.content.packed_bytes,
        reference_pages=sent.content.same_pages,
        changed_pages=sent.content.changed_pages,
        pages_by_block=sent.content.block_pages,
        refused_blocks=sent.content.refused_blocks,
        blocks=outgoing.references.words,
        codecs={coder.name: pages for coder, pages in zip(CODERS, sent.content.codec_pages, strict=True) if pages},
        codec_s=sent.content.codec_ns / 1e9,
    )
