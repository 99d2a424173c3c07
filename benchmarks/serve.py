"""Serving over HTTP: requests a second, latency, and what thousands of requests leave behind.

    python -m benchmarks.serve --model DIR [--out benchmarks/results] [--requests 10000] [--rounds 5] [--quick]

Two servers of `transfusion serve` hold the same model: one runs up to 16 requests in each pass, the other one request
at a time. 1, 4, 16 and 64 clients ask them for pictures, texts or a mixture, a round of the one and a round of the
other in turn, so that whatever else the machine does meets both; the ratio is the median of those of the rounds. The
servers' own seconds of a core stand beside those of the clock. No number is recorded unless every answer is the one
that the same request got alone, from the server of one request at a time.

Before that, another server meets clients that misbehave (benchmarks/serve_endurance.py). The exit code is 1 where an
answer was wrong or something was left behind.
"""
import argparse
import importlib.util
import os
import statistics
import textwrap
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from benchmarks.command_line import common_parser, short_commit
from benchmarks.environment import environment
from benchmarks.harness import Result, quantiles
from benchmarks.report import Report
from benchmarks.serve_client import GUIDANCE, STEPS, Answer, Asked, Server, ask, ask_all, is_same, kinds
from benchmarks.serve_endurance import GROWTH, REST, SHARES, endure
from transfusion.model.loading import load_model

RESULTS = Path(__file__).parent / "results"
ROWS, QUEUE = 16, 64
CLIENTS = (1, 4, 16, 64)
LEAST, TURNS, MOST = 24, 4, 128  # requests of a round: so many for each client, but at least and at most so many
ENDURING = {"clients": 32, "queue": 8}
TOGETHER, ALONE = f"up to {ROWS} requests in a pass", "one request at a time"
WORDS = {"drawings": f"pictures of {STEPS} steps, guidance {GUIDANCE}", "previews": "the same with a preview each step",
         "texts": "up to 32 tokens", "mixture": "a picture, a text and the description of a picture in turn"}


class Case(NamedTuple):
    """What so many clients ask for."""

    kind: str
    clients: int


class Round(NamedTuple):
    """One server's share of a round."""

    answers: list[Answer]
    seconds: float
    cpu_seconds: float  # of the server


def alone(server: Server, asked: list[Asked]) -> list[Answer]:
    """What each request gets when no other is there. Seeds must matter, or comparing answers would show nothing."""
    found = [ask(server.port, one) for one in asked]
    assert not all(is_same(found[0].parts, other.parts) for other in found[1:]), "all answers are the same"
    return found


def one_round(server: Server, asked: list[Asked], expected: list[Answer], case: Case, least: int) -> Round:
    """Ask one server, and hold its answers against those of the same requests alone."""
    count = max(least, min(TURNS * case.clients, MOST))
    before, began = server.cpu_seconds(), time.perf_counter()
    answers = ask_all(server.port, [asked[number % len(asked)] for number in range(count)], case.clients)
    seconds, cpu = time.perf_counter() - began, server.cpu_seconds() - before
    for number, answer in enumerate(answers):
        right = expected[number % len(asked)]
        assert is_same(answer.parts, right.parts), f"{asked[number % len(asked)]} has another answer than alone"
    return Round(answers, seconds, cpu)


def measure_case(case: Case, report: Report, servers: dict[str, Server], asked: list[Asked], rounds: int,
                 least: int) -> None:
    """Measure both servers in turn and record a row for each."""
    expected = alone(servers[ALONE], asked)
    one_round(servers[TOGETHER], asked, expected, case, case.clients)  # its first batches compile kernels on a GPU
    found: dict[str, list[Round]] = {name: [] for name in servers}
    for number in range(rounds):
        for name in [*servers][::1 if number % 2 else -1]:
            found[name].append(one_round(servers[name], asked, expected, case, least))
    ratios = [theirs.seconds / ours.seconds for ours, theirs in zip(found[TOGETHER], found[ALONE])]
    for name, given in found.items():
        row = record(report, case, name, given, times_as_fast=statistics.median(ratios) if name == TOGETHER else None,
                     ratios=ratios if name == TOGETHER else None)
        print(f"{case.kind:9} {case.clients:3} clients, {name:29} {row['per_second']:7.1f} requests/s, latency "
              f"p50 {row['latency_ms']['p50']:7.1f} p99 {row['latency_ms']['p99']:7.1f} ms", flush=True)


def record(report: Report, case: Case, name: str, rounds: list[Round], **derived) -> dict:
    """Add a server's row: latency over all rounds, and medians of what a round has one of."""
    answers = [answer for one in rounds for answer in one.answers]
    latencies = [1000 * answer.seconds for answer in answers]
    count, first = len(rounds[0].answers), {}
    for kind in ("text", "preview"):
        if times := [1000 * answer.first[kind] for answer in answers if kind in answer.first]:
            first[f"first_{kind}_ms"] = percentiles(times)
    result = Result(name, checked=True, milliseconds={"latency": quantiles(latencies)}, timing={"latency": "wall"},
                    interleaved=True)
    return report.record(
        case._asdict(), result, requests_in_round=count, latency_ms=percentiles(latencies),
        per_second=statistics.median(count / one.seconds for one in rounds),
        cpu_ms_per_request=statistics.median(1000 * one.cpu_seconds / count for one in rounds),
        load_average=os.getloadavg()[0], **first, **derived)


def percentiles(times: list[float]) -> dict[str, float]:
    """p50, p95 and p99, and of how many."""
    return {**{f"p{q}": float(np.percentile(times, q)) for q in (50, 95, 99)}, "count": len(times)}


def measure_endurance(case: Case, report: Report, model: Path, requests: int) -> None:
    """Let clients misbehave and record what they left."""
    with Server(model, rows=ROWS, queue=ENDURING["queue"]) as server:
        asked = kinds(server.port)
        mixed = [*asked["mixture"], *asked["previews"]]
        found = endure(server, list(zip(mixed, alone(server, mixed))), requests, case.clients)
    found.check()
    report.record({**case._asdict(), "requests": requests},
                  Result(f"{TOGETHER}, {ENDURING['queue']} waiting", checked=True), counts=dict(found.counts),
                  seconds=found.seconds, held=found.after, resident=sorted(found.resident), growth=found.growth(),
                  load_average=os.getloadavg()[0])


def page(report: Report) -> str:
    """The Markdown page."""
    where, settings = report.environment, report.settings
    lines = [textwrap.fill(
        f"`python -m benchmarks.serve --model DIR`, commit {(where['commit'] or 'unknown')[:10]}, {where['device']}, "
        f"torch {where['versions']['torch']}. Model: {settings['parameters']:,} parameters, pictures of "
        f"{settings['image_size']}. Each server had {settings['rounds']} rounds of each line, in turn with the other; "
        f"numbers are medians of these, latencies those of all. Clients, servers and other work share {os.cpu_count()} "
        "cores (load averages are in the JSON): what the clock says varies from round to round, and the servers' own "
        "core time, and how many times less it is, says more. Every answer was compared with the one that the same "
        "request got alone.", 120), "",
        "| clients ask for | clients | requests/s | one at a time | times as many (rounds) | core ms a request | "
        "one at a time | times | latency p50, p95, p99, ms | first token p50, p95 | first preview p50, p95 |",
        "|---|---|---|---|---|---|---|---|---|---|---|"]
    rows = sorted((row for row in report.rows if row["kind"] in WORDS), key=lambda row: [*WORDS].index(row["kind"]))
    for ours in (row for row in rows if row["contender"] == TOGETHER):
        theirs = next(row for row in rows if row["contender"] == ALONE and
                      (row["kind"], row["clients"]) == (ours["kind"], ours["clients"]))
        cells = [WORDS[ours["kind"]], ours["clients"], f"{ours['per_second']:.1f}", f"{theirs['per_second']:.1f}",
                 f"{ours['times_as_fast']:.2f} ({min(ours['ratios']):.2f} to {max(ours['ratios']):.2f})",
                 f"{ours['cpu_ms_per_request']:.1f}", f"{theirs['cpu_ms_per_request']:.1f}",
                 f"{theirs['cpu_ms_per_request'] / ours['cpu_ms_per_request']:.2f}",
                 some(ours["latency_ms"], 50, 95, 99),
                 *(some(ours.get(f"first_{kind}_ms"), 50, 95) for kind in ("text", "preview"))]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    for row in report.rows:
        if row["kind"] == "endurance":
            lines += ["", textwrap.fill(endured(row), 120)]
    lines += [f"\n{note}" for note in report.notes]
    return "\n".join(lines) + "\n"


def some(found: dict[str, float] | None, *quantiles: int) -> str:
    """Some quantiles in words; nothing where there are none."""
    return ", ".join(f"{found[f'p{q}']:,.0f}" for q in quantiles) if found else ""


def endured(row: dict) -> str:
    """An endurance run in words."""
    counts, held, memory = row["counts"], row["held"], [bytes_ / 2**20 for _, bytes_ in row["resident"]]
    fifth = max(1, len(memory) // 5)
    second, last = statistics.median(memory[fifth:2 * fifth]), statistics.median(memory[-fifth:])
    return (
        f"Endurance: {row['requests']:,} requests by {row['clients']} clients in {row['seconds']:,.0f} s, with "
        f"{ROWS} rows and {ENDURING['queue']} waiting. {counts['finished']:,} were asked to the end, and each had the "
        f"answer that it gets alone; {counts.get('leaves', 0):,} left a stream, {counts.get('cancelled', 0):,} left "
        f"while a picture was drawn, {counts.get('malformed', 0):,} were malformed and {counts.get('over', 0):,} over "
        "the limits, and these two were all refused with their status. Answers 429, after which a client asks again: "
        f"{counts['answered 429']:,}. Afterwards, {REST:.0f} s at rest: {held['running']} running, {held['waiting']} "
        f"waiting, {held['cache_tokens_used']} cached tokens held, {held['threads']} threads, {held['files']} open "
        f"files and {held['tasks']} tasks, no more than before. Resident memory: {second:,.1f} MB in the second fifth "
        f"of the requests, {last:,.1f} MB in the last (medians; {row['growth']:+.2%}, and {GROWTH:.0%} is the most "
        "that counts as flat).")


def plot(report: Report, path: Path) -> None:
    """Requests a second by clients, and memory by requests; nothing where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(WORDS) + 1, figsize=(3.2 * (len(WORDS) + 1), 3.4),
                                   layout="constrained")
    for one, kind in zip(axes, WORDS):
        for name in (TOGETHER, ALONE):
            rows = [row for row in report.rows if (row["kind"], row["contender"]) == (kind, name)]
            one.plot([row["clients"] for row in rows], [row["per_second"] for row in rows], "o-", label=name)
        one.set(title=kind, xscale="log", xlabel="clients", ylabel="requests a second", ylim=(0, None))
        one.set_xticks(CLIENTS, CLIENTS)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    for row in report.rows:
        if row["kind"] == "endurance":
            axes[-1].plot(*zip(*((number, bytes_ / 2**20) for number, bytes_ in row["resident"])))
    axes[-1].set(title="endurance", xlabel="requests", ylabel="resident memory, MB", ylim=(0, None))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> int:
    """Measure, write the JSON, the page and the plot. Returns 1 where an answer was wrong or something was left."""
    given = options(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)  # as the servers have
    report = Report("serve", {"quick": given.quick, **about(given.model), "rounds": given.rounds, "rows": ROWS,
                              "queue": QUEUE, "steps": STEPS, "guidance": GUIDANCE, "endurance": ENDURING | SHARES},
                    environment(device, given.commit))
    path = given.out / ("serve.json" if device == "cuda" else f"serve-cpu-{short_commit(report)}.json")
    end = time.monotonic() + given.seconds
    enduring = [Case("endurance", ENDURING["clients"])] if given.requests else []
    status = report.run(enduring, lambda case: measure_endurance(case, report, given.model, given.requests), path,
                        given.seconds)
    with (Server(given.model, rows=ROWS, queue=QUEUE) as together, Server(given.model, rows=1, queue=QUEUE) as single):
        servers, asked = {TOGETHER: together, ALONE: single}, kinds(single.port)
        cases = [Case(kind, clients) for clients in given.clients for kind in WORDS]
        status |= report.run(cases, lambda case: measure_case(case, report, servers, asked[case.kind], given.rounds,
                                                              given.least), path, end - time.monotonic())
    path.with_suffix(".md").write_text(page(report))
    plot(report, path.with_suffix(".png"))
    print(page(report))
    return status


def options(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = common_parser(__doc__.splitlines()[0], "one round of few requests, for the test", out=RESULTS)
    parser.add_argument("--model", type=Path, required=True, help="directory of a checkpoint")
    parser.add_argument("--requests", type=int, default=10_000, help="of the endurance run; 0 for none")
    parser.add_argument("--rounds", type=int, default=5, help="of each server, in turn")
    given = parser.parse_args(arguments)
    given.clients, given.least = CLIENTS, LEAST
    if given.quick:
        given.clients, given.least, given.rounds, given.requests = CLIENTS[:2], 8, 1, min(given.requests, 200)
    return given


def about(model: Path) -> dict:
    """How large the model is."""
    made = load_model(model, "cpu")
    return {"parameters": sum(p.numel() for p in made.parameters()),
            "image_size": "x".join(map(str, made.config.image_size))}


if __name__ == "__main__":
    raise SystemExit(main())
