"""A report of runs: numbers that are the log's, one page that needs nothing else, and words for what is missing."""
import base64
import dataclasses
import json
import os
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image as Picture

from tests.transfusion.train.test_transfusion import small
from transfusion.cli import main
from transfusion.recipes.digits import digits
from transfusion.train.plots import running_mean, thinned
from transfusion.train.report import (
    ReportSettings,
    differences,
    duration,
    flat_presets,
    last_and_best,
    numbers,
    panels_of,
    report,
)
from transfusion.train.run_log import BIN, Run, bins, column, names_of, read_run, read_runs, seen, speed, step_seconds
from transfusion.train.samples import SamplesSettings
from transfusion.train.transfusion import train
from transfusion.train.validation import ValidationSettings


def record(step, **more):
    return {"step": step, "loss": 3.0 - step / 100, "text_loss": 2.0 - step / 100, "diffusion_loss": 0.5,
            "grad_norm": 1.0 + step, "lr": 1e-3, "seconds": 2.0 * (step + 1), **more}


def write(run, records, settings=None):
    """A run's log, and the settings of its save."""
    run.mkdir(parents=True, exist_ok=True)
    (run / "log.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    if settings is not None:
        (run / "resume").mkdir(exist_ok=True)
        (run / "resume" / "run.json").write_text(json.dumps({"step": len(records), "config": settings}))
    return run


class Page(HTMLParser):
    """What a page refers to, its pictures, its headings and the cells of its tables."""

    def __init__(self, text):
        super().__init__()
        self.links, self.headings, self.cells, self.inside = [], [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.links += [value for name, value in attributes if name in ("src", "href")]
        self.links += [tag] if tag in ("script", "link", "iframe") else []
        self.inside = tag

    def handle_data(self, data):
        if self.inside == "h2":
            self.headings.append(data.strip())
        if self.inside in ("td", "th"):
            self.cells.append(data.strip())

    def handle_endtag(self, tag):
        self.inside = None


def test_a_run_becomes_one_page_that_needs_nothing_else(tmp_path, capsys):
    train(small(tmp_path / "run", validate=ValidationSettings(every=4, rows=2, bins=2),
                samples=SamplesSettings(every=6, steps=1, count=2)))
    capsys.readouterr()
    main(["report", str(tmp_path / "run"), "--png", "--price", "3"])
    assert capsys.readouterr().out.split() == [str(tmp_path / "run" / f"report.{kind}") for kind in ("png", "html")]
    page = Page((tmp_path / "run" / "report.html").read_text())
    assert page.links and all(link.startswith("data:image/") for link in page.links)
    curves = [link for link in page.links if link.startswith("data:image/svg+xml;base64,")]
    assert len(curves) == len(panels_of(read_runs([tmp_path / "run"]))) + 1  # held-out losses by noise time
    assert all(b"<svg" in base64.b64decode(link.partition(",")[2]) for link in curves)
    assert base64.b64decode(page.links[-1].partition(",")[2]) == (tmp_path / "run" / "samples.png").read_bytes()
    assert page.headings == ["Summary", "Curves", "Settings that differ from the preset digits", "Samples"]
    cells = dict(zip(page.cells[1::2], page.cells[2::2]))  # behind the run's name at the top
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert cells["steps"] == "12 of 12" and cells["tokens seen"].startswith(f"{12 * 2 * 64:,} ")
    assert cells["text loss, held out"].startswith(f"{log[-1]['validation_text_loss']:.4g}")
    assert "model.hidden" in page.cells and "optim.steps" in page.cells and "model.objective" not in page.cells
    with Picture.open(tmp_path / "run" / "report.png") as picture:
        assert picture.width > 1000 and len(picture.convert("RGB").getcolors(2**20)) > 100


def test_numbers_are_those_of_the_log(tmp_path):
    more = dict(tokens_per_second=50.0, data_share=0.25, memory=3 * 2**30, mfu=0.4, waited=0.5)
    records = [record(step, tokens=100 * (step + 1), left_out=2, **more) for step in range(100)]
    records[30]["skipped"], records[60]["skipped"] = 1, 2
    records[49] |= {"validation_text_loss": 1.25, "validation_perplexity": 3.49, "validation_seconds": 20.0}
    records[99] |= {"validation_text_loss": 1.5, "validation_perplexity": 4.48, "validation_seconds": 20.0}
    run = read_run(write(tmp_path / "run", records, {"optim": {"steps": 200}}), "run")
    found = numbers(run, price=36.0)
    assert found == {
        "steps": "100 of 200", "time": "3 min", "time of a step": "2 s (median), 2 s (99 %)",
        "speed": "50 tokens a second (median)", "tokens seen": "10,000 (padding among them)",
        "text loss": "1.015 (mean of the last 2)", "diffusion loss": "0.5 (mean of the last 2)",
        "loss": "2.015 (mean of the last 2)", "text loss, held out": "1.5; best 1.25 after 50",
        "perplexity, held out": "4.48; best 3.49 after 50", "gradient norm": "50.5 (median), 100 (largest)",
        "memory, most in use": "3.00 GiB", "use of the GPU's peak (MFU)": "40.0 % (median)",
        "drawing batches": "25.0 % of a step's time (median)", "steps skipped": "2",
        "documents left out, too long": "200", "wait for worker processes": "50 s (25.0 %)",
        "held-out losses took": "40 s (20.0 %)", "cost": "2.00 (0.06 h at 36)"}
    assert last_and_best(run, "nothing") == "" and duration(7500) == "2 h 05 min"


def test_logs_of_earlier_versions_tell_their_speed_by_their_clock(tmp_path):
    run = read_run(write(tmp_path / "run", [record(step) for step in range(5)], {"optim": {"rows": 2, "seq_len": 50}}),
                   "run")
    assert step_seconds(run)[1].tolist() == [2.0] * 4 and speed(run)[0].tolist() == [2, 3, 4, 5]
    assert speed(run)[1].tolist() == [50.0] * 4 and numbers(run)["speed"] == "50 tokens a second (median)"
    bare = read_run(write(tmp_path / "bare", [record(step) for step in range(5)]), "bare")
    assert speed(bare)[1].tolist() == [0.5] * 4 and numbers(bare)["speed"] == "0.5 steps a second (median)"


def test_what_no_panel_knows_has_one_of_its_own_and_what_is_missing_none(tmp_path):
    plain = read_run(write(tmp_path / "plain", [record(step) for step in range(3)]), "plain")
    assert [panel.title for panel in panels_of([plain])] == [
        "text loss", "diffusion loss", "loss", "gradient norm", "learning rate", "speed"]
    records = [{"step": step, "reconstruction": 0.1, "discriminator_grad_norm": 2.0, "failed": 3} for step in range(3)]
    other = read_run(write(tmp_path / "other", records), "other")
    panels = {panel.title: panel for panel in panels_of([plain, other])}
    assert {"reconstruction", "discriminator grad norm", "failed"} <= panels.keys()
    steps, values = panels["failed"].curve(other)
    assert steps.tolist() == [1, 2, 3] and values.tolist() == [3, 3, 3]
    assert not len(panels["failed"].curve(plain)[1])


def test_values_that_are_not_finite_are_left_out(tmp_path):
    records = [record(0), record(1, text_loss=float("nan"), skipped=1), record(2, text_loss=float("inf")), record(3)]
    steps, values = column(read_run(write(tmp_path / "run", records), "run"), "text_loss")
    assert steps.tolist() == [1, 4] and values.tolist() == [2.0, 1.97]


def test_held_out_losses_by_noise_time_are_found_in_order_of_time(tmp_path):
    keys = [f"validation_diffusion_loss_{low:.2f}_{low + 0.1:.2f}" for low in (0.9, 0.1, 0.0)]
    run = read_run(write(tmp_path / "run", [record(0, **dict.fromkeys(keys, 0.5))]), "run")
    assert list(bins(run).items()) == [((0.0, 0.1), keys[2]), ((0.1, 0.2), keys[1]), ((0.9, 1.0), keys[0])]


def test_damaged_logs_are_read_as_far_as_they_go_and_empty_ones_are_named(tmp_path):
    run = write(tmp_path / "run", [record(0), record(1), record(1, loss=9.0), record(4)])
    with (run / "log.jsonl").open("a") as log:
        log.write('{"step": 5, "los\n[1, 2]\n\x00\x00\n')
    report(ReportSettings((run,)), {})
    text = (run / "report.html").read_text()
    assert "run: 3 lines of the log are damaged or no step, and left out." in text
    assert "run: the log holds 3 of 5 steps." in text and "run: no save holds its settings" in text
    assert column(read_run(run, "run"), "loss")[1].tolist() == [3.0, 9.0, 2.96]
    for contents, words in (("", "is empty"), ("half a rec\n", "holds no step in 1 lines: it is damaged")):
        (run / "log.jsonl").write_text(contents)
        with pytest.raises(ValueError, match=f"report: .*log.jsonl {words}"):
            report(ReportSettings((run,)), {})
    with pytest.raises(ValueError, match="nowhere holds no log.jsonl; the directory of a training run, its --out, fit"):
        report(ReportSettings((tmp_path / "nowhere",)), {})
    with pytest.raises(SystemExit, match="error: report: no run is named"):
        main(["report"])
    with pytest.raises(SystemExit, match="error: report: .*holds no log.jsonl"):
        main(["report", str(tmp_path)])
    (run / "log.jsonl").write_text(json.dumps(record(0)))
    with pytest.raises(ValueError, match="out is .*page.pdf'; a file that ends in .html fits"):
        report(ReportSettings((run,), out=tmp_path / "page.pdf"), {})


def test_damaged_settings_are_said_and_the_curves_are_shown(tmp_path, capsys):
    run = write(tmp_path / "run", [record(0), record(1)], {})
    (run / "resume" / "run.json").write_text('{"step": 2')
    assert report(ReportSettings((run / "log.jsonl",)), {}) == run / "report.html"
    assert "run.json is damaged" in capsys.readouterr().out


def test_several_runs_stand_in_the_same_plots_and_their_settings_beside_one_another(tmp_path):
    presets = flat_presets({"digits": digits(), "other": dataclasses.replace(digits(), seed=3, autocast=True)})
    plain = json.loads(json.dumps(dataclasses.asdict(digits()), default=str))
    changed = plain | {"optim": plain["optim"] | {"lr": 0.5}, "seed": 7}
    first = write(tmp_path / "a" / "run", [record(step) for step in range(30)], plain)
    second = write(tmp_path / "b" / "run", [record(step) for step in range(20)], changed | {"new": {"setting": 1}})
    runs = read_runs([first, second])
    assert [run.name for run in runs] == ["a/run", "b/run"]
    assert differences(runs, presets) == (
        "digits", [("seed", ["0", "0", "7"]), ("optim.lr", ["0.002", "0.002", "0.5"])])
    assert differences(runs[:1], presets) == ("digits", [])
    page = report(ReportSettings((first, second), out=tmp_path / "both.html", png=True), presets).read_text()
    assert page.count("data:image/svg+xml") == 6 and "a/run" in page and "b/run" in page
    assert (tmp_path / "both.png").is_file() and not (first / "report.html").exists()


@pytest.mark.filterwarnings("error")
def test_a_curve_of_zeros_is_drawn_without_a_warning(tmp_path):
    settings = json.loads(json.dumps(dataclasses.asdict(digits()), default=str))
    run = write(tmp_path / "run", [record(step, waited=0.0, data_share=0.0) for step in range(5)], settings)
    report(ReportSettings((run,), png=True), {})


def test_dollars_in_the_names_of_runs_are_no_formulas(tmp_path):
    settings = json.loads(json.dumps(dataclasses.asdict(digits()), default=str))
    runs = tuple(write(tmp_path / name, [record(0), record(1)], settings) for name in ("one", r"$\nothing{$"))
    report(ReportSettings(runs, out=tmp_path / "both.html", png=True), {})
    assert (tmp_path / "both.png").is_file()


def test_names_of_runs_that_are_no_utf8_are_spelled_out(tmp_path):
    run = write(tmp_path / os.fsdecode(b"caf\xe9"), [record(step) for step in range(4)])
    out = report(ReportSettings((run,), tmp_path / "out.html", png=True), {})
    assert r"<h1>caf\udce9</h1>" in out.read_text(encoding="utf-8") and out.with_suffix(".png").is_file()


def test_names_of_runs_are_as_long_as_it_takes_to_tell_them_apart(tmp_path):
    paths = [tmp_path / "x" / "digits", tmp_path / "y" / "digits"]
    assert names_of(paths) == ["x/digits", "y/digits"] and names_of(paths[:1]) == ["digits"]
    assert names_of(paths[:1] * 2) == ["digits", "digits"]


def test_markup_in_names_and_settings_is_text(tmp_path):
    run = write(tmp_path / "<b>run", [record(0)], {"optim": {"lr": "<script>"}})
    page = report(ReportSettings((run,), out=tmp_path / "page.html"), {"preset": {"optim.lr": "1"}}).read_text()
    assert "<b>run" not in page and "<script>" not in page and "&lt;script&gt;" in page


@pytest.mark.parametrize("width", [1, 2, 5, 50])
def test_a_running_mean_is_of_the_values_around_each_one_that_there_are(width):
    values = np.random.default_rng(0).normal(size=40)
    expected = [values[max(0, i - width // 2):i + width // 2 + 1].mean() for i in range(40)]
    np.testing.assert_allclose(running_mean(values, width), expected, atol=1e-12)


def test_a_thinned_curve_keeps_its_extremes(tmp_path):
    values = np.sin(np.arange(100_000) / 900)
    values[54_321], values[77_777] = 50.0, -40.0
    steps, kept = thinned(np.arange(1, 100_001), values)
    assert len(kept) <= 2000 and kept.max() == 50.0 and kept.min() == -40.0 and (np.diff(steps) > 0).all()
    assert steps[kept.argmax()] == 54_322 and len(thinned(np.arange(5), np.arange(5.0))[0]) == 5


def test_a_run_that_went_on_with_larger_batches_is_counted_as_it_was(tmp_path):
    records = [{"step": step, "tokens": 10 * (step + 1), "tokens_per_second": 10.0, "seconds": step + 1.0}
               for step in range(5)]
    records += [{"step": 5 + step, "tokens": 50 + 100 * (step + 1), "tokens_per_second": 100.0, "seconds": 6.0 + step}
                for step in range(2)]
    run = Run("a", tmp_path, records, {}, 0)
    assert seen(run) == 250 and step_seconds(run)[1].tolist() == [1.0] * 7


def test_a_bin_without_a_finite_loss_is_no_bin(tmp_path):
    name = "validation_diffusion_loss_0.0_0.5"
    runs = [Run(one, tmp_path, [{"step": 0, "seconds": 1.0, name: float("nan")}], {}, 0) for one in "ab"]
    assert BIN.fullmatch(name) and bins(runs[0]) == {}
