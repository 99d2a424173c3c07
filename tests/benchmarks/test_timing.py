"""What a time is made of, on a device that is played: one clock of the host, one of the device, and launches that the
host does not wait for."""

import pytest

from benchmarks.harness import Contender, measure
from benchmarks.report import Report
from benchmarks.timing import CALIBRATION_CYCLES, HOST_BOUND, LONGEST_SPIN, QUEUED, WALL, CudaTimer, Sample, chosen

CYCLES = 1_700_000  # per millisecond


class Event:
    def __init__(self, machine):
        self.machine, self.at = machine, None

    def record(self):
        self.at = self.machine.enqueue(0.0)

    def query(self):
        return self.machine.host >= self.at

    def synchronize(self):
        self.machine.host = max(self.machine.host, self.at)

    def elapsed_time(self, other):
        return other.at - self.at


class Machine:
    """Milliseconds on the host and on the device, used as torch.cuda is.

    The device begins a kernel when it is enqueued and the one before is done.
    """

    def __init__(self, depth=1000):
        self.host = self.device = 0.0
        self.depth, self.flushed, self.waiting = depth, 0, []

    def Event(self, enable_timing):  # noqa: N802
        assert enable_timing
        return Event(self)

    def enqueue(self, milliseconds):
        self.waiting = [end for end in self.waiting if end > self.host]
        if len(self.waiting) >= self.depth:  # a full queue: the host waits
            self.host = self.waiting.pop(0)
        self.device = max(self.device, self.host) + milliseconds
        self.waiting.append(self.device)
        return self.device

    def _sleep(self, cycles):
        self.enqueue(cycles / CYCLES)

    def synchronize(self):
        self.host = max(self.host, self.device)

    def flush(self):
        self.flushed += 1
        self.enqueue(0.18)

    def clock(self):
        return self.host / 1e3

    def kernels(self, *each, python=0.0, waits=False):
        """A phase: `python` milliseconds of the host before each kernel, of so many milliseconds."""

        def phase(state):
            for milliseconds in each:
                self.host += python
                self.enqueue(milliseconds)
            if waits:
                self.synchronize()

        return phase


def run(machine, phases, times=8, wall=False):
    timer = CudaTimer(machine.flush, machine, machine.clock)
    return [timer.run("ours", phases, {}, wall) for _ in range(times)]


def test_a_kernel_shorter_than_its_python_is_timed_alone():
    machine = Machine()
    samples = [s["forward"] for s in run(machine, {"forward": machine.kernels(0.05, 0.02, python=0.9)})]
    for sample in samples[1:]:
        assert (
            sample.timing == QUEUED
            and sample.milliseconds == pytest.approx(0.07)
            and sample.host_us == pytest.approx(1800)
        )
    assert machine.flushed == 8


def test_a_slow_host_gets_a_longer_spin_until_it_is_covered():
    machine = Machine()
    samples = [s["forward"] for s in run(machine, {"forward": machine.kernels(0.05, python=15.0)})]
    assert samples[0].timing == HOST_BOUND and samples[0].milliseconds > 10
    assert [s.timing for s in samples[3:]] == [QUEUED] * 5 and samples[-1].milliseconds == pytest.approx(0.05)


def test_a_phase_that_waits_for_the_device_is_host_bound_and_costs_no_spin_for_long():
    machine = Machine()
    samples = [s["forward"] for s in run(machine, {"forward": machine.kernels(0.05, python=0.5, waits=True)}, 12)]
    assert all(s.timing == HOST_BOUND for s in samples)
    assert samples[-1].milliseconds == pytest.approx(0.5 + 0.05 - 0.18) and samples[-1].host_us == pytest.approx(
        550
    )  # no spin is in them


def test_more_launches_than_the_queue_holds_are_host_bound():
    machine = Machine(depth=100)
    samples = [s["forward"] for s in run(machine, {"forward": machine.kernels(*[0.01] * 500, python=0.005)})]
    assert all(s.timing == HOST_BOUND for s in samples)


def test_every_phase_gets_a_spin_of_its_own():
    machine = Machine()
    phases = {"build": machine.kernels(0.01, python=0.3), "forward": machine.kernels(0.5, python=8.0)}
    last = run(machine, phases)[-1]
    assert {name: s.timing for name, s in last.items()} == {"build": QUEUED, "forward": QUEUED}
    assert last["build"].milliseconds == pytest.approx(0.01) and last["forward"].milliseconds == pytest.approx(0.5)


def test_what_a_user_waits_for_holds_the_hosts_time_and_no_phase_waits_for_the_one_before():
    machine = Machine()
    phases = {
        "forward": machine.kernels(1.0, 1.0, python=3.0),
        "backward": machine.kernels(4.0, python=0.5),
        "update": machine.kernels(0.1, python=2.0),
    }
    begin = machine.host
    found = run(machine, phases, 1, wall=True)[0]
    assert all(sample.timing == WALL for sample in found.values())
    whole = machine.host - begin - 2 * CALIBRATION_CYCLES / CYCLES - 0.18
    assert (
        sum(sample.milliseconds for sample in found.values()) == pytest.approx(whole) == pytest.approx(6 + 1 + 4 + 0.1)
    )
    assert found["update"].host_us == pytest.approx(2000) and found["backward"].milliseconds == pytest.approx(4)


def test_one_slow_call_of_the_host_is_forgotten():
    machine, calls = Machine(), []

    def phase(state):
        calls.append(1)
        machine.host += 20.0 if len(calls) == 3 else 0.2
        machine.enqueue(0.05)

    timer = CudaTimer(machine.flush, machine, machine.clock)
    samples = [timer.run("ours", {"forward": phase}, {}, False)["forward"] for _ in range(60)]
    assert samples[2].timing == HOST_BOUND and all(s.timing == QUEUED for s in samples[3:])
    assert timer.spins["ours", "forward"] < 1.0 < LONGEST_SPIN


def test_queued_samples_count_where_they_are_the_most():
    queued, bound = Sample(1.0, 5.0, QUEUED), Sample(9.0, 5.0, HOST_BOUND)
    assert chosen([queued, bound, queued]) == ([queued, queued], QUEUED)
    assert chosen([bound, bound, queued]) == ([bound, bound, queued], HOST_BOUND)
    assert chosen([Sample(1.0, 1.0, WALL)]) == ([Sample(1.0, 1.0, WALL)], WALL)


def test_a_row_says_what_its_times_are_and_what_the_host_took():
    machine = Machine()
    contenders = [
        Contender("ours", {"forward": machine.kernels(0.05, python=0.7)}, lambda state: None),
        Contender("waits", {"forward": machine.kernels(0.05, python=0.7, waits=True)}, lambda state: None),
        Contender("step", {"forward": machine.kernels(0.05, python=0.7)}, lambda state: None, wall=True),
    ]
    report = Report("attention", {}, {})
    for result in measure(
        contenders, device="cpu", timer=CudaTimer(machine.flush, machine, machine.clock), seconds=0, warmup=6
    ):
        report.record({}, result)
    ours, waits, step = report.rows
    assert ours["timing"] == {"forward": QUEUED} and ours["milliseconds"]["forward"]["p50"] == pytest.approx(0.05)
    assert ours["host_us"]["forward"] == pytest.approx(700) and ours["interleaved"]
    assert waits["timing"] == {"forward": HOST_BOUND} and step["timing"] == {"forward": WALL}
    assert step["milliseconds"]["forward"]["p50"] == pytest.approx(0.75)
