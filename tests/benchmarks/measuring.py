"""Contenders measured as quickly as can be, and what a benchmark's command left in its file."""
import json
from pathlib import Path

from benchmarks.harness import Contender, Result, measure


def measured_once(contenders: list[Contender]) -> list[Result]:
    """Check every contender and time it once, on the CPU."""
    return measure(contenders, device="cpu", seconds=0, warmup=0, least=1, most=1)


def rows_of(out: Path, name: str) -> list[dict]:
    """The rows that a benchmark wrote on the CPU into an empty folder."""
    path, = out.glob(f"{name}-cpu-*.json")
    return json.loads(path.read_text())["rows"]
