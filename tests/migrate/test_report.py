"""The verdict in words, and progress that never runs backwards."""

from dataclasses import dataclass

import pytest

from outboard.migrate.desk import Order
from outboard.migrate.method import Method, Options
from outboard.migrate.outbox import Outbox
from outboard.migrate.progress import Watch
from outboard.migrate.report import Progress, Summary, verdict
from outboard.migrate.states import Machine


@dataclass
class Copied:
    """Rounds as :class:`Watch` sees them."""

    dirty_rate: float | None
    held: str | None


class RecordingDesk:
    """Keeps what is reported."""

    def __init__(self) -> None:
        self.reports: list[Progress | Summary] = []

    def fileno(self) -> int:
        return -1

    def order(self) -> Order | None:
        return None

    def report(self, report: Progress | Summary) -> None:
        self.reports.append(report)


@pytest.mark.parametrize(
    ("dirty", "rate", "word"),
    [(None, 100e6, "measuring"), (10e6, 0.0, "measuring"), (10e6, 100e6, "converges:"), (80e6, 100e6, "slowly")],
)
def test_verdicts(dirty: float | None, rate: float, word: str) -> None:
    assert word in verdict(dirty, rate, resumes_early=False)


def test_a_guest_that_writes_faster_than_the_link_does_not_converge() -> None:
    said = verdict(160e6, 100e6, resumes_early=False)
    assert said.startswith("does not converge")
    assert "160 MB/s" in said
    assert "160%" in said
    assert verdict(160e6, 100e6, resumes_early=True).startswith("converges whatever")


def watch(outbox: Outbox, desk: RecordingDesk, clock: list[float], method: Method) -> Watch:
    made = Watch("m", "web", Options(method=method), Machine(), desk, lambda: clock[0], clock[0])
    made.outbox = outbox
    return made


def test_progress_comes_five_times_a_second_and_the_fraction_is_monotone() -> None:
    outbox, desk, clock = Outbox(100), RecordingDesk(), [0.0]
    outbox.rank[:] = 1
    looking = watch(outbox, desk, clock, Method.PRE_COPY)
    for step in range(20):
        clock[0] = step / 20
        outbox.sent[: 5 * step] = 1
        if step == 15:
            outbox.sent[:50] = 0  # written again
        outbox.count_bulk(5, 0, 5 * 4096)
        looking.look()
    fractions = [report.fraction for report in desk.reports if isinstance(report, Progress)]
    assert len(fractions) == 5
    assert fractions == sorted(fractions)
    assert fractions[-1] > 0.5


def test_the_eta_is_a_range_and_is_withheld_when_it_cannot_be_told() -> None:
    outbox, desk, clock = Outbox(1000), RecordingDesk(), [0.0]
    outbox.rank[:] = 1
    looking = watch(outbox, desk, clock, Method.PRE_COPY)
    looking.look(at_once=True)
    outbox.count_bulk(100, 0, 100 * 4096)
    outbox.sent[:100] = 1
    clock[0] = 1.0
    looking.look(at_once=True)
    report = desk.reports[-1]
    assert isinstance(report, Progress)
    assert report.eta is not None
    assert 0 < report.eta[0] < report.remaining_bytes / report.rate < report.eta[1]
    looking.rounds = Copied(report.rate, None)
    clock[0] = 2.0
    looking.look(at_once=True)
    report = desk.reports[-1]
    assert isinstance(report, Progress)
    assert report.eta is None
    looking.rounds = Copied(report.rate, "vCPU 0 held to 10%")
    looking.look(at_once=True)
    report = desk.reports[-1]
    assert isinstance(report, Progress)
    assert report.verdict == "vCPU 0 held to 10%"
