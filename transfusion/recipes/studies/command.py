"""`python -m transfusion.studies NAME --data digits|emoji`; see transfusion/recipes/studies/__init__.py."""
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro

import transfusion.recipes.studies
from transfusion.command import plain_errors
from transfusion.recipes.studies.arms import DATA, Measuring, StudyData, studies
from transfusion.recipes.studies.report import report
from transfusion.recipes.studies.run import Bench, run_all
from transfusion.settings import Seed, check
from transfusion.train.classifier import ClassifierSettings


@dataclass(frozen=True)
class StudySettings:
    """A study of a data set."""

    name: tyro.conf.Positional[Literal["attention", "image-layers", "noise-limit", "patch-size", "tokens", "all"]]
    """which; all makes every one"""
    data: Literal["digits", "emoji"] = "digits"
    """the pictures"""
    seeds: tuple[Seed, ...] = (0, 1, 2)
    """runs of each arm; two processes may share the work by seeds, and one command afterwards finds them all done"""
    out: Path = Path("runs/studies")
    """directory of runs, tables and pictures"""
    fast: bool = False
    """two steps of everything, in `out`/fast: to see that it runs, not for its numbers"""


def fast(data: StudyData) -> StudyData:
    """The same data set with two steps of everything."""
    base = replace(data.base, optim=replace(data.base.optim, steps=2, rows=1, warmup=1),
                   model=replace(data.base.model, hidden=24, layers=1, mlp=32))
    return replace(data, base=base, measuring=Measuring(draws=2 * len(data.captions), steps=2),
                   channels=(8,) * len(data.channels),
                   autoencoder=replace(data.autoencoder, steps=3, batch=8, codes=8),
                   classifier=ClassifierSettings(size=16, width=8, depths=(1,), steps=2, batch=8, device=base.device))


def run_studies(settings: StudySettings) -> list[Path]:
    """Run one study or all of a data set; return their tables."""
    check("studies", settings)
    data = DATA[settings.data]()
    data, out = (fast(data), settings.out / "fast") if settings.fast else (data, settings.out)
    known, arms = studies(data), data.arms()
    chosen = list(known.values()) if settings.name == "all" else [known[settings.name]]
    names = list(dict.fromkeys(row.arm for study in chosen for row in study.rows))
    bench = Bench(data, out)
    results = run_all(bench, [arms[name] for name in names], settings.seeds)
    tables = [report(study, data, results, bench) for study in chosen]
    for path in tables:
        print(path.read_text(), f"\ntable        {path}\nplot         {path.with_suffix('.png')}\n", sep="")
    return tables


def main(args: list[str] | None = None) -> None:
    """Entry point of `python -m transfusion.studies`."""
    settings = tyro.cli(StudySettings, prog="python -m transfusion.studies",
                        description=transfusion.recipes.studies.__doc__, args=args)
    with plain_errors(resumes=True):
        run_studies(settings)
