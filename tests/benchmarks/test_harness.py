"""Measuring and recording: quantiles, files, what may be recorded and when, and what a lost device leaves."""
import json

import numpy
import pytest

from benchmarks import environment, harness
from benchmarks import report as report_module
from benchmarks.command_line import make_parser
from benchmarks.harness import Contender, Result, measure, quantiles
from benchmarks.report import Report
from benchmarks.timing import CpuTimer

checked = harness._checked_state


def passes(state):
    pass


def fails(state):
    raise AssertionError("out is wrong")


@pytest.mark.parametrize("count", [1, 2, 5, 100])
def test_quantiles_equal_numpys(count):
    samples = numpy.random.default_rng(count).normal(size=count)
    found = quantiles(samples.tolist())
    expected = numpy.quantile(samples, [0.2, 0.5, 0.8]).tolist()
    assert [found["p20"], found["p50"], found["p80"]] == pytest.approx(expected)
    assert found["repetitions"] == count


def test_no_samples_have_no_quantiles():
    with pytest.raises(ValueError, match="samples is empty"):
        quantiles([])


def test_a_report_reads_back_as_it_was_written(tmp_path):
    result, = measure([Contender("sum", {"forward": lambda state: sum(range(100))}, passes)], device="cpu", seconds=0)
    report = Report("attention", {"quick": True}, environment.environment("cpu"), notes=["a note"])
    row = report.record({"seq_len": 8}, result, tflops={"forward": 1.5})
    report.save(tmp_path / "deep" / "report.json")
    assert Report.load(tmp_path / "deep" / "report.json") == report
    assert json.loads((tmp_path / "deep" / "report.json").read_text())["rows"] == [row]
    assert row["seq_len"] == 8 and row["contender"] == "sum" and row["milliseconds"]["forward"]["repetitions"] >= 5
    assert {"python", "torch", "triton"} <= set(report.environment["versions"]) and not list(tmp_path.glob("**/*.part"))


def test_a_contender_without_a_check_is_refused():
    with pytest.raises(ValueError, match="no number is recorded without one"):
        Contender("fast", {"forward": passes}, None)


def test_a_contender_that_fails_its_check_gets_no_number_and_the_others_theirs():
    chosen = [Contender("wrong", {"forward": passes}, fails), Contender("right", {"forward": passes}, passes)]
    wrong, right = measure(chosen, device="cpu", seconds=0)
    assert (wrong.checked, wrong.milliseconds, wrong.error) == (False, {}, "AssertionError: out is wrong")
    assert right.checked and right.error is None and right.milliseconds["forward"]["p50"] > 0
    report = Report("attention", {}, {})
    assert report.record({}, wrong)["error"] and len(report.rows) == 1


@pytest.mark.parametrize("result,derived", [
    ({"p50": 1.0}, {}),
    (Result("by hand", milliseconds={"forward": {"p50": 1.0}}), {}),
    (Result("by hand"), {"tflops": 700})])
def test_a_report_refuses_numbers_that_no_check_stands_behind(result, derived):
    with pytest.raises(ValueError, match=r"measure\(\) fits"):
        Report("attention", {}, {}).record({}, result, **derived)


def test_an_error_in_the_middle_of_timing_costs_that_contender_its_numbers_alone():
    calls = []

    def breaks(state):
        calls.append(1)
        if len(calls) == 8:
            raise RuntimeError("out of luck")

    chosen = [Contender("broken", {"forward": breaks}, passes), Contender("right", {"forward": passes}, passes)]
    broken, right = measure(chosen, device="cpu", seconds=0)
    assert broken.error == "RuntimeError: out of luck" and broken.milliseconds == {}
    assert right.milliseconds["forward"]["repetitions"] == 5


def test_rounds_interleave_the_contenders():
    order = []
    chosen = [Contender(name, {"forward": lambda state, name=name: order.append(name)}, passes) for name in "ab"]
    measure(chosen, device="cpu", seconds=0, warmup=0)
    assert order == ["a", "a", "b", "b"] + ["a", "b"] * 5


def test_the_phases_share_one_state_and_the_check_sees_it():
    def check(state):
        assert state["out"] == 6

    phases = {"build": lambda s: s.update(mask=2), "forward": lambda s: s.update(out=s["mask"] * 3)}
    result, = measure([Contender("chain", phases, check)], device="cpu", seconds=0)
    assert result.checked and set(result.milliseconds) == {"build", "forward"}


def test_each_contenders_row_is_saved_before_the_next_begins_and_replaced_by_the_interleaved_one(tmp_path):
    report, path, seen = Report("attention", {}, {}), tmp_path / "report.json", []

    def contender(name):
        def check(state):
            rows = {row["contender"]: row for row in Report.load(path).rows} if path.exists() else {}
            seen.append(
                (name, [other for other, row in rows.items() if row["milliseconds"] and not row["interleaved"]])
            )

        return Contender(name, {"forward": passes}, check)

    def measure_case(case):
        for result in measure(
            [contender(n) for n in "abc"],
            device="cpu",
            seconds=0,
            record=lambda r: report.record({"n": case}, r),
            **report.limits,
        ):
            report.record({"n": case}, result)

    assert report.run([1], measure_case, path, 60.0) == 0
    assert seen == [("a", []), ("b", ["a"]), ("c", ["a", "b"])]
    assert [(row["contender"], row["interleaved"]) for row in Report.load(path).rows] == [
        ("a", True),
        ("b", True),
        ("c", True),
    ]


def test_contenders_that_the_time_does_not_reach_are_left_out_and_the_others_keep_their_first_numbers(monkeypatch):
    recorded, clock = {}, [0.0]
    monkeypatch.setattr(harness.time, "monotonic", lambda: clock[0])

    def slow(state):
        clock[0] += 10

    def record(result):
        recorded[result.name] = result.left_out or bool(result.milliseconds)

    found = measure(
        [Contender(n, {"forward": slow}, passes) for n in "abc"],
        device="cpu",
        seconds=1,
        warmup=0,
        record=record,
        until=25.0,
    )
    assert recorded == {"a": True, "b": "the time was over", "c": "the time was over"} and not found[0].interleaved
    assert found[0].milliseconds["forward"]["repetitions"] == 1 and found[1].error is None and not found[1].checked


def test_a_missing_package_is_left_out_with_the_reason_and_a_broken_maker_is_an_error():
    def missing():
        import a_package_that_nobody_has  # noqa: F401

    def unfit():
        raise harness.LeftOut("it has no such mask")

    def broken():
        raise RuntimeError("it broke")

    made, others = harness.present({"there": lambda: 1, "missing": missing, "unfit": unfit, "broken": broken})
    assert made == {"there": 1} and [(r.name, r.left_out, r.error) for r in others] == [
        ("missing", "not installed: No module named 'a_package_that_nobody_has'", None),
        ("unfit", "it has no such mask", None),
        ("broken", None, "RuntimeError: it broke"),
    ]
    assert not any(r.checked or r.milliseconds for r in others)


def test_a_lost_device_leaves_the_rows_of_those_before_and_the_loss(tmp_path, monkeypatch):
    lost = []

    def loses(state):
        lost.append(1)
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(harness, "device_answers", lambda: not lost)
    monkeypatch.setattr(harness, "_checked_state", lambda contender, result, device: checked(contender, result, "cpu"))
    chosen = [
        Contender(name, {"forward": phase}, passes)
        for name, phase in (("ours", passes), ("theirs", loses), ("last", passes))
    ]
    report, path = Report("attention", {}, {}), tmp_path / "x.json"

    def measure_case(case):
        measure(chosen, device="cuda", seconds=0, record=lambda result: report.record({}, result), timer=CpuTimer())

    assert report.run([1, 2], measure_case, path, 60.0) == 1
    rows, found = {row["contender"]: row for row in report.load(path).rows}, Report.load(path)
    assert (
        rows["ours"]["milliseconds"]
        and rows["theirs"]["error"] == "RuntimeError: an illegal memory access"
        and not rows["theirs"]["milliseconds"]
    )
    assert (
        not rows["last"]["checked"]
        and "the device was lost: theirs" in found.notes[0]
        and found.lost == {"case": 0, "contender": "theirs"}
    )


def test_a_device_that_is_lost_before_any_contender_begins_stops_the_run_there(tmp_path, monkeypatch):
    def measure_case(case):
        if case == 1:
            monkeypatch.setattr(report_module, "device_answers", lambda: False)
            raise RuntimeError("an illegal memory access")

    report = Report("attention", {}, {})
    assert report.run([0, 1, 2], measure_case, tmp_path / "x.json", 60.0) == 1
    assert Report.load(tmp_path / "x.json").lost == {"case": 1, "contender": None} and len(report.notes) == 1


def test_another_process_goes_on_without_the_contender_that_lost_the_device_and_keeps_its_error(tmp_path):
    path, lost = tmp_path / "x.json", harness.DeviceLost("theirs: an illegal memory access")
    lost.contender = "theirs"

    def cases(report, broken):
        def measure_case(case):
            if broken and case == 1:
                report.record({"n": case}, Result("theirs", error="an illegal memory access"))
                raise lost
            chosen = [Contender(name, {"forward": passes}, passes) for name in ("ours", "theirs")]
            for result in measure(chosen, device="cpu", seconds=0, **report.limits):
                report.record({"n": case}, result)

        return measure_case

    report = Report("attention", {}, {})
    assert report.run([0, 1, 2], cases(report, True), path, 60.0) == 1 and Report.load(path).lost == {
        "case": 1,
        "contender": "theirs",
    }
    report = Report("attention", {}, {})
    report.obey(make_parser("", "").parse_args(["--out", "x", "--skip", "1", "--without", "theirs"]))
    assert report.run([0, 1, 2], cases(report, False), path, 60.0) == 0
    rows = {(row["n"], row["contender"]): row for row in Report.load(path).rows}
    assert [(key, bool(row["milliseconds"])) for key, row in sorted(rows.items())] == [
        ((0, "ours"), True),
        ((0, "theirs"), True),
        ((1, "ours"), True),
        ((1, "theirs"), False),
        ((2, "ours"), True),
        ((2, "theirs"), False),
    ]
    assert (
        rows[1, "theirs"]["error"] == "an illegal memory access"
        and rows[2, "theirs"]["left_out"] == "it lost the device in another case"
    )
    assert Report.load(path).lost is None and len(Report.load(path).notes) == 1


def test_a_run_of_cases_survives_one_that_fails_stops_when_the_device_is_lost_and_ends_with_the_time(tmp_path):
    seen, path = [], tmp_path / "report.json"

    def measure_case(case):
        seen.append(case)
        if case == 2:
            raise ValueError("no such shape")
        if case == 4:
            raise harness.DeviceLost("gone")

    assert Report("attention", {}, {}).run([1, 3], measure_case, path, 60.0) == 0 and seen == [1, 3]
    report = Report("attention", {}, {})
    assert report.run([1, 2, 3, 4, 5], measure_case, path, 60.0) == 1 and seen == [1, 3, 1, 2, 3, 4]
    assert (
        report.notes
        == ["2 failed: ValueError: no such shape", "stopped at 4, the device was lost: gone"]
        == Report.load(path).notes
    )
    late = Report("attention", {}, {})
    assert (
        late.run([1], measure_case, path, -1.0) == 0
        and late.notes == ["cut before 1: the time was over"]
        and len(seen) == 6
    )
