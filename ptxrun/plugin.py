"""pytest -p ptxrun.plugin --emulate sm_90: tests on a machine without a GPU run the kernels' compiled PTX.

The driver is in place before any conftest.py is imported. Operators of `torch.library.custom_op` run their CUDA
implementation on CPU tensors. At the end each kernel's launches are listed.
"""
import contextlib

import pytest

SESSION = pytest.StashKey()


def pytest_addoption(parser):
    """The options of the command line."""
    group = parser.getgroup("ptxrun", "compiled Triton kernels without a GPU")
    group.addoption("--emulate", metavar="sm_90", help="run compiled kernels for this architecture in an emulator")
    group.addoption("--races", action="store_true", help="with --emulate: look for races")
    group.addoption("--schedule", default="late", choices=("early", "late", "random"),
                    help="with --emulate: when asynchronous copies and products are done")
    group.addoption("--seed", type=int, default=0, help="with --schedule random: which order")


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config):
    """Put the driver in place."""
    options = early_config.known_args_namespace
    if options.emulate:
        from ptxrun import emulate
        stack = contextlib.ExitStack()
        emulation = stack.enter_context(
            emulate(options.emulate, races=options.races, schedule=options.schedule, seed=options.seed))
        early_config.stash[SESSION] = stack, emulation


def pytest_collection_finish(session):
    """Let operators run their CUDA implementation, now that all are registered."""
    if SESSION in session.config.stash:
        from ptxrun import operators_on_cpu
        operators_on_cpu()


def pytest_unconfigure(config):
    """Give Triton its own driver back."""
    if SESSION in config.stash:
        config.stash[SESSION][0].close()


def pytest_terminal_summary(terminalreporter, config):
    """List the kernels."""
    if SESSION not in config.stash or not config.stash[SESSION][1].kernels:
        return
    emulation = config.stash[SESSION][1]
    terminalreporter.section(f"kernels emulated on sm_{emulation.architecture}")
    for name, counts in sorted(emulation.kernels.items()):
        terminalreporter.write_line(f"{name}: {counts.launches} launches, {emulation.seconds.get(name, 0):.1f} s")
