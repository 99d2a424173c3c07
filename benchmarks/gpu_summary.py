"""What benchmarks/gpu.py found, in a few lines."""


def passed(result: dict) -> bool:
    """Whether every test and step ended well: a cut step did not."""
    steps = [step for step in (result["tests"], *result["sanitizers"].values(), *result["benchmarks"].values()) if step]
    return all(step["status"] == 0 and not step["cut"] for step in steps if not step.get("left_out"))


def summary(result: dict) -> str:
    """A few lines: the device, the tests with what failed, and how each step ended."""
    where, tests = result["environment"], result["tests"] or {}
    versions = ", ".join(f"{name} {where['versions'][name]}" for name in ("torch", "triton"))
    lines = [f"{where['device']}, {versions}, commit {where['commit']}"]
    lines += [line_of("tests", tests)] * bool(tests)
    lines += [f"  {test}: {found['reason'][:120]}" for test, found in list(tests.get("failing", {}).items())[:40]]
    lines += [f"  not collected: {name}: {reason[:120]}" for name, reason in tests.get("not_collected", {}).items()]
    lines += [f"  had begun: {test}" for test in tests.get("begun", ())]
    if tests and tests["status"] not in (0, 1) and not tests.get("failing"):
        lines.append("  " + tests["tail"][-300:])
    return "\n".join(
        lines + [line_of(name, step) for store in ("benchmarks", "sanitizers") for name, step in result[store].items()]
    )


def line_of(name: str, step: dict) -> str:
    """How a step ended, in a line."""
    if step.get("left_out"):
        return f"{name}: left out, {step['left_out']}"
    ending = f"{name}: {'cut' if step['cut'] else 'ended'} after {step.get('seconds', 0)} s, status {step['status']}"
    if "counts" in step:
        done = sum(step["counts"].values())
        return f"{ending}, {done} tests ended, " + ", ".join(
            f"{n} {outcome}" for outcome, n in step["counts"].items() if n
        )
    if "report" not in step:
        return ending if step["status"] == 0 else f"{ending}: {step['tail'].strip()[-200:]}"
    rows = (step["report"] or {"rows": []})["rows"]
    return (
        f"{ending}, {len(rows)} rows, {sum(bool(r.get('milliseconds')) for r in rows)} with numbers, "
        f"{sum(bool(r.get('error')) for r in rows)} with errors, {sum(bool(r.get('left_out')) for r in rows)} left out"
    )
