"""A page about training runs, made of their logs: `transfusion report RUN [RUN ...]`.

Curves (losses and held-out losses, gradient norm, learning rate, speed, memory, whatever else the log has), the numbers
that sum a run up, the settings that differ from the nearest preset, and the samples. It is one HTML file that needs no
network; several runs stand in the same plots. `--png` writes the curves as a picture, too.
"""
import base64
import dataclasses
import html
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from tyro.conf import Positional

from transfusion.files import check_writable, write_text
from transfusion.settings import Count, NotNegative, check, flat
from transfusion.train.plots import Panel, colours, draw_alone, draw_panels, drawings
from transfusion.train.run_log import Run, column, read_runs, seen, speed, step_seconds, unit, units

OWN = ("step", "seconds", "tokens", "pictures", "samples_seconds", "tokens_per_second", "pictures_per_second")
"""What the log has beside curves."""
UNLIKE = ("out", "resume", "auto_resume", "stop_after", "device")
"""Settings that are no difference between runs."""


@dataclass(frozen=True)
class ReportSettings:
    """Make one page about runs: curves, numbers, settings and samples."""

    runs: Positional[tuple[Path, ...]]
    """directories of runs; several are compared"""
    out: Path | None = None
    """the page; none: report.html in the first run's directory"""
    png: bool = False
    """write the curves as a picture beside the page, too"""
    smooth: Count | None = None
    """steps of the running mean; none: a fiftieth of a run"""
    price: NotNegative | None = None
    """of one hour of what a run trains on, for the cost in the summary"""


def report(settings: ReportSettings, presets: Mapping[str, Mapping[str, object]]) -> Path:
    """Write the page; return its path. `presets` are flat settings by name.

    Raises:
        ValueError: a run that is not there or has no step, or a page that cannot be written.
    """
    if not settings.runs:
        raise ValueError("report: no run is named; the directory of one fits, such as runs/digits")
    check("report", settings)
    runs = read_runs(settings.runs)
    out = settings.out or runs[0].path / "report.html"
    if out.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"report: out is {str(out)!r}; a file that ends in .html fits")
    check_writable("report: the directory of out", out.parent)
    panels, title = panels_of(runs), ", ".join(run.name for run in runs)
    if settings.png:
        draw_panels(out.with_suffix(".png"), panels, runs, settings.smooth, title)
        print(out.with_suffix(".png"))
    write_text(out, page(title, panels, runs, presets, settings))
    print(out)
    return out


def panels_of(runs: Sequence[Run]) -> list[Panel]:
    """The panels that these runs' logs have something for; keys that no panel knows get one of their own."""
    def at(*keys: str, factor: float = 1.0) -> Callable:
        def curve(run: Run):
            steps, values = column(run, *keys)
            return steps, values * factor
        return curve

    known = [
        Panel("text loss", "nats per token", at("text_loss"), "validation_text_loss", True),
        Panel("diffusion loss", "mean squared error", at("diffusion_loss"), "validation_diffusion_loss", True),
        Panel("loss", "weighted sum", at("loss"), None, True),
        Panel("gradient norm", "before clipping", at("grad_norm"), None, True),
        Panel("learning rate", "", at("lr"), smooth=False),
        Panel("speed", f"{units(runs)} a second", speed, from_zero=True),
        Panel("drawing batches", "% of a step's time", at("data_share", factor=100), from_zero=True),
        Panel("wait for worker processes", "seconds a step", at("waited"), from_zero=True),
        Panel("memory, most in use so far", "GiB", at("memory", factor=2**-30), smooth=False, from_zero=True),
        Panel("use of the GPU's peak (MFU)", "%", at("mfu", factor=100), from_zero=True),
        Panel("steps skipped so far", "", at("skipped"), smooth=False, from_zero=True),
    ]
    names = {"text_loss", "diffusion_loss", "loss", "grad_norm", "lr", "data_share", "waited", "memory", "mfu",
             "skipped", *OWN}
    keys = dict.fromkeys(key for run in runs for record in run.records for key in record)
    other = [key for key in keys if key not in names and not key.startswith("validation_")]
    known += [Panel(key.replace("_", " "), "", at(key), None, "loss" in key or "norm" in key) for key in other]
    return [panel for panel in known if any(len(panel.curve(run)[0]) for run in runs)]


def numbers(run: Run, price: float | None = None) -> dict[str, str]:
    """What sums a run up, as words by name; what the log does not have is left out."""
    planned, seconds, (_, took) = run.settings.get("optim.steps"), run.seconds, step_seconds(run)
    found = {"steps": f"{run.done:,}" + (f" of {planned:,}" if isinstance(planned, int) else "")}
    found["time"] = duration(seconds)
    if len(took):
        found["time of a step"] = f"{np.median(took):.3g} s (median), {np.percentile(took, 99):.3g} s (99 %)"
    if len(speed(run)[1]):
        found["speed"] = f"{np.median(speed(run)[1]):,.4g} {unit(run)} a second (median)"
    if count := seen(run):
        found[f"{unit(run)} seen"] = f"{count:,}" + " (padding among them)" * (unit(run) == "tokens")
    for key, name in (("text_loss", "text loss"), ("diffusion_loss", "diffusion loss"), ("loss", "loss")):
        steps, values = column(run, key)
        if len(values):
            last = max(1, len(values) // 50)
            found[name] = f"{values[-last:].mean():.4g} (mean of the last {last:,})"
    found |= {f"{name}, held out": words for key, name in (
        ("validation_text_loss", "text loss"), ("validation_perplexity", "perplexity"),
        ("validation_diffusion_loss", "diffusion loss")) if (words := last_and_best(run, key))}
    _, norms = column(run, "grad_norm")
    if len(norms):
        found["gradient norm"] = f"{np.median(norms):.3g} (median), {norms.max():.3g} (largest)"
    for key, name, pick, form in (
            ("memory", "memory, most in use", np.max, lambda x: f"{x / 2**30:.2f} GiB"),
            ("mfu", "use of the GPU's peak (MFU)", np.median, lambda x: f"{100 * x:.1f} % (median)"),
            ("data_share", "drawing batches", np.median, lambda x: f"{100 * x:.1f} % of a step's time (median)"),
            ("skipped", "steps skipped", np.max, lambda x: f"{x:,.0f}"),
            ("samples_failed", "samples that failed", np.max, lambda x: f"{x:,.0f}")):
        _, values = column(run, key)
        found |= {name: form(pick(values))} if len(values) else {}
    for key, name in (("left_out", "documents left out, too long"), ("failed", "documents that could not be read")):
        _, values = column(run, key)
        found |= {name: f"{values.sum():,.0f}"} if len(values) else {}
    for key, name in (("waited", "wait for worker processes"), ("validation_seconds", "held-out losses took"),
                      ("samples_seconds", "samples took")):
        _, values = column(run, key)
        found |= {name: share(values.sum(), seconds)} if len(values) else {}
    if price is not None:
        found["cost"] = f"{seconds / 3600 * price:,.2f} ({seconds / 3600:,.2f} h at {price:g})"
    return {name: words for name, words in found.items() if words}


def last_and_best(run: Run, key: str) -> str:
    """The last value of a held-out number, and the smallest one where that is an earlier one."""
    steps, values = column(run, key)
    if not len(values):
        return ""
    best = int(values.argmin())
    return f"{values[-1]:.4g}" + (f"; best {values[best]:.4g} after {steps[best]:,}" if best < len(values) - 1 else "")


def share(part: float, seconds: float) -> str:
    """Seconds, and which part of a run they are."""
    return duration(part) + (f" ({100 * part / seconds:.1f} %)" if seconds else "")


def duration(seconds: float) -> str:
    """Seconds in words."""
    if seconds < 90:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60:,} h {minutes % 60:02d} min"


def differences(runs: Sequence[Run], presets: Mapping[str, Mapping[str, object]]
                ) -> tuple[str, list[tuple[str, list[str]]]]:
    """The preset that the first run is nearest to, and settings that differ: their values there and in each run."""
    def differ(preset: Mapping, run: Run) -> list[str]:
        return [key for key, value in preset.items()
                if key not in UNLIKE and value != run.settings.get(key, value)]

    def distance(name: str) -> int:
        return len(differ(presets[name], known[0])) + len(presets[name].keys() ^ known[0].settings.keys())

    known = [run for run in runs if run.settings]
    if not known or not presets:
        return "", []
    nearest = min(presets, key=distance)
    keys = dict.fromkeys(key for run in known for key in differ(presets[nearest], run))
    for run in known[1:]:
        keys |= dict.fromkeys(key for key in run.settings if key not in UNLIKE
                              and run.settings[key] != known[0].settings.get(key, run.settings[key]))
    return nearest, [(key, [_plain(where.get(key)) for where in (presets[nearest], *(run.settings for run in runs))])
                     for key in keys]


def _plain(value) -> str:
    words = "none" if value is None else str(value)
    return words if len(words) <= 80 else f"{words[:77]}..."


STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 1240px; padding: 0 1rem; color: #222; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .6rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(380px, 1fr)); gap: .8rem; }
.plots img { width: 100%; } .samples { max-width: 100%; } .legend { height: 2.2rem; max-width: 100%; }
table { border-collapse: collapse; } th, td { text-align: left; padding: .25rem 1.2rem .25rem 0; vertical-align: top;
border-bottom: 1px solid #e4e4e4; } th { font-weight: 600; } td + td, th + th { font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; } .note { color: #666; }
"""


def page(title: str, panels: Sequence[Panel], runs: Sequence[Run], presets: Mapping[str, Mapping[str, object]],
         settings: ReportSettings) -> str:
    """The page as HTML."""
    parts = [f"<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'><title>{html.escape(title)}</title>"
             f"<style>{STYLE}</style></head><body>", f"<h1>{html.escape(title)}</h1>", *notes(runs), "<h2>Summary</h2>"]
    sums = [numbers(run, settings.price) for run in runs]
    names = dict.fromkeys(name for one in sums for name in one)
    parts.append(table(["", *(run.name for run in runs)],
                       [[name, *(one.get(name, "") for one in sums)] for name in names]))
    parts += ["<h2>Curves</h2>", *curves(panels, runs, settings.smooth)]
    nearest, rows = differences(runs, presets)
    if nearest:
        parts.append(f"<h2>Settings that differ from the preset {html.escape(nearest)}</h2>")
        head = ["", f"preset {nearest}", *(run.name for run in runs)]
        parts.append(table(head, [[key, *values] for key, values in rows]) if rows else "<p>None.</p>")
    for run in runs:
        samples = run.path / "samples.png"
        if samples.is_file():
            parts.append(f"<h2>Samples{f' of {html.escape(run.name)}' if len(runs) > 1 else ''}</h2>"
                         f"<img class='samples' alt='samples' src='{embedded(samples)}'>")
    return "\n".join([*parts, "</body></html>\n"])


def notes(runs: Sequence[Run]) -> list[str]:
    """What a reader should know of the logs."""
    said = []
    for run in runs:
        missing = run.done - len(run.records)
        if run.damaged:
            said.append(f"{run.name}: {run.damaged:,} lines of the log are damaged or no step, and left out")
        if missing:
            said.append(f"{run.name}: the log holds {len(run.records):,} of {run.done:,} steps")
        if not run.settings:
            said.append(f"{run.name}: no save holds its settings, so that these are not known")
    return [f"<p class='note'>{html.escape(line)}.</p>" for line in said]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of plain texts."""
    lines = ["".join(f"<th>{html.escape(cell)}</th>" for cell in head)]
    lines += ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    return "<div class='scroll'><table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table></div>"


def curves(panels: Sequence[Panel], runs: Sequence[Run], width: int | None) -> list[str]:
    """A picture of each panel, in the page itself."""
    parts = []
    with tempfile.TemporaryDirectory() as folder, matplotlib.rc_context({"svg.hashsalt": "transfusion"}):
        for draw in drawings(panels, runs, width):
            path = Path(folder) / "panel.svg"
            draw_alone(path, draw)
            parts.append(f"<img alt='curve' src='{embedded(path)}'>")
    named = " · ".join(f"<b style='color:{colour}'>{html.escape(run.name)}</b>"
                       for run, colour in zip(runs, colours(runs)))
    lines = "thin: each step; thick: running mean; dashed with dots: held out"
    return [f"<p>{named} <span class='note'>({lines})</span></p>", "<div class='plots'>", *parts, "</div>"]


def embedded(path: Path) -> str:
    """A picture as a data URL."""
    kinds = {".svg": "image/svg+xml", ".png": "image/png"}
    return f"data:{kinds[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}"


def flat_presets(presets: Mapping[str, object]) -> dict[str, dict[str, object]]:
    """Settings of presets as a saved run holds its own."""
    return {name: flat(json.loads(json.dumps(dataclasses.asdict(one), default=str))) for name, one in presets.items()}
