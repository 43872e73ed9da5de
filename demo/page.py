"""The report: one HTML file that needs nothing else, drawn from a session's document."""

from __future__ import annotations

import statistics
from html import escape
from pathlib import Path
from string import Template

from .charts import chart, scale_of
from .document import Arm, Document
from .figures import AFTER_S, BEFORE_S, SETTLE_S, Run
from .hosts import LINK_BYTES_PER_S
from .words import COLUMNS, extremes, median, percent

_HEADLINES = ("blackout_ms", "longest_gap_ms", "total_s", "bytes", "ops_lost")
_WIDEST_S = 40.0
"""Seconds after the command that the charts reach at most; what is longer is cut."""

PAGE = Template(Path(__file__).with_name("page.html").read_text())


def _arm(document: Document, name: str) -> Arm | None:
    return next((arm for arm in document.arms if arm.arm == name and arm.churned), None)


def _headline(document: Document) -> str:
    ours, peer = _arm(document, "outboard-enlightened"), _arm(document, "qemu-post-copy-preempt")
    if ours is None or peer is None:
        return ""
    cells = []
    for figure, heading, unit, write in COLUMNS:
        mine, other = getattr(ours, figure), getattr(peer, figure)
        if figure in _HEADLINES and mine is not None and other:
            own, theirs = f"{write(mine)} {unit}".strip(), f"{write(other)} {unit}".strip()
            ratio = f"QEMU {theirs}; ratio {mine / other:.2f}"
            cells.append(f"<div><span>{heading}</span><b>{own}</b><span>{ratio}</span></div>")
    return (
        f'<div class="headline">{"".join(cells)}</div>'
        '<p class="note">outboard-enlightened beside QEMU\'s own post-copy with preemption, in this session.</p>'
    )


def _table(document: Document) -> str:
    head = "".join(f"<th>{heading}{f'<br>{unit}' if unit else ''}</th>" for _, heading, unit, _ in COLUMNS)
    rows = []
    for arm in document.arms:
        cells = []
        for figure, _, _, write in COLUMNS:
            between = extremes(arm, figure, write)
            small = f"<small>{between}</small>" if between else ""
            style = ' class="never"' if figure == "total_s" and not arm.converged else ""
            cells.append(f"<td{style}>{median(arm, figure, write)}{small}</td>")
        verdict = '<td class="yes">yes</td>' if arm.verified else '<td class="no">NO</td>'
        style = ' class="ours"' if arm.arm.startswith("outboard-") else ""
        rows.append(f"<tr{style}><td>{escape(arm.name)}</td>{''.join(cells)}{verdict}</tr>")
    return f"<table><thead><tr><th>arm</th>{head}<th>verified</th></tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _typical(runs: list[Run]) -> Run:
    """The run whose total time is the median's; drawn for its arm."""
    times = [run.outcome.during_s for run in runs]
    middle = statistics.median_low(times)
    return runs[times.index(middle)]


def _charts(document: Document, evicted: str) -> str:
    drawn = [(arm, _typical(document.runs_of(arm))) for arm in document.arms]
    seconds = max(min(run.outcome.during_s + AFTER_S, _WIDEST_S) for _, run in drawn)
    scale = scale_of([run for _, run in drawn], seconds, LINK_BYTES_PER_S.get(document.settings.shape))
    parts = []
    for arm, run in drawn:
        which = f", the run of {arm.runs} with the median time" if arm.runs > 1 else ""
        parts.append(f"<h3>{escape(arm.name)}<span class=note>{which}</span></h3>{chart(run, evicted, scale)}")
    return "".join(parts)


def _lead(document: Document) -> str:
    leads = [run.outcome.lead_s for run in document.runs if run.outcome.lead_s]
    if not leads:
        return ""
    return f"The outboard command, a Python program, took {statistics.median(leads):.1f} s to start before that."


def _method(document: Document) -> str:
    settings, machine = document.settings, document.machine
    link = "unshaped" if settings.shape not in LINK_BYTES_PER_S else f"shaped by TBF to {settings.shape} at both ends"
    client = statistics.median(run.traffic.cpu_s / run.traffic.elapsed_s for run in document.runs)
    facts = {
        "Scene": f"Two hosts as network namespaces, a link between them {link}, a bridge in each for the guests, a "
        f"client in a third. Two VMs of {settings.memory} with memcached share one core of host A; one is evicted to "
        f"host B, where its vCPU gets the other core. Clients, agents and the VMMs' own threads run on either.",
        "Load": f"In the evicted VM a job writes {settings.writes_per_s:,} random pages a second over "
        f"{settings.working_set_mib} MiB. {settings.churn_mib} MiB were filled and freed before, so that free memory "
        "is not zero; arms called “unchurned” leave that out. The client keeps "
        f"{settings.connections} connections to each VM, one request outstanding on each, nine gets to one set, and "
        f"checks every value. It used {percent(client)} of a core.",
        "Command": f"The moment at which QEMU's monitor or Outboard's agent is asked. {_lead(document)}",
        "Resumed after": "Command to the RESUME event of the destination's QEMU.",
        "Blackout": "STOP event of the source's QEMU to RESUME event of the destination's, for both products.",
        "Longest gap": "The longest stall between two 20 ms ticks of the guest's clock, which stands still in the "
        "blackout, plus the blackout.",
        "Source free after": "Command to the moment when every page has left and the source's process may end.",
        "Sent": "Bytes that host A's end of the link counted between command and end; for all arms alike.",
        "Remote faults": "Pages that the resumed VM had to wait for, and the wait as the destination saw it. QEMU "
        "tells the number only.",
        "ops/s": f"Right answers of both VMs together: the {BEFORE_S:.0f} s before the command, from command to end, "
        f"and {AFTER_S:.0f} s from {SETTLE_S:.0f} s after the end on.",
        "ops lost": f"Over {settings.window_s:.0f} s from the command: what both VMs answer when each has a core (the "
        "rate after the end, measured in the same run) less what they did answer. An arm that did not converge is "
        "held against the median of the others' rates.",
        "Verified": "The job's own check of its whole working set after the migration (each page holds its number, a "
        "counter and a checksum; the counters are kept elsewhere), no wrong value and no broken connection at the "
        "client; for Outboard also a second migration of the same VM, back to host A, in which the VM is held paused "
        "at the switch-over until the digests of all pages that are not free were compared.",
        "Machine": f"{machine.cpu}, {machine.cores} cores, {machine.memory_gib:.0f} GiB, Linux {machine.kernel}, QEMU "
        f"{machine.qemu} with {machine.accelerator}. {document.made_at}.",
    }
    return "".join(f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>" for term, text in facts.items())


def render(document: Document, evicted: str) -> str:
    """The page as HTML.

    :param evicted: the VM that moves.
    """
    settings = document.settings
    runs = max(arm.runs for arm in document.arms)
    lead = (
        f"Two VMs of {settings.memory} contend for one core. One of them, writing {settings.writes_per_s:,} pages a "
        f"second and serving clients over TCP, is moved to another host. How long until the core is free, and what "
        f"does it cost the VMs' users?"
    )
    repeated = f"Medians of {runs} runs; least and most below." if runs > 1 else "One run of each arm."
    notes = [f'<p class="note">{escape(arm.name)}: {escape(note)}</p>' for arm in document.arms for note in arm.notes]
    return PAGE.substitute(
        lead=escape(lead),
        headline=_headline(document),
        table_note=f"{repeated} ops: memcached answers of both VMs together.",
        table=_table(document),
        notes="".join(notes),
        charts=_charts(document, evicted),
        method=_method(document),
    )
