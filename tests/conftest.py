"""Shared settings: which device and dtypes the kernels' tests use, what is skipped where, and memory that is NaN
until someone writes it."""
import os
import signal

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import HealthCheck, Phase, settings  # noqa: E402

import ptxrun  # noqa: E402
from tests.remembered import RememberedFiles  # noqa: E402
from tfkernels._library import INTERPRET  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRET else [torch.bfloat16])
EMULATED = ptxrun.active()  # pytest --emulate: the compiled kernels run on CPU tensors
SLOW = INTERPRET or EMULATED
KERNEL_RUNS = DEVICE == "cuda" or SLOW
cpu_only = pytest.mark.skipif(DEVICE != "cpu" or SLOW, reason="float64 runs in the CPU implementation only")
compiles = pytest.mark.skipif(
    SLOW, reason="under TRITON_INTERPRET=1 kernels are interpreted functions, under --emulate there is no machine code")
traced = pytest.mark.skipif(
    SLOW, reason="tracing does not see which implementation runs; once, with the CPU's, is enough")
adapts = pytest.mark.skipif(
    SLOW, reason="an adapter does not see which implementation runs; once, with the CPU's, is enough")

settings.register_profile(
    "project", deadline=None, derandomize=True, max_examples=15 if SLOW else 60,
    phases=[Phase.explicit, Phase.reuse, Phase.generate] + ([] if SLOW else [Phase.shrink]),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
settings.load_profile("project")
if DEVICE == "cuda":
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # convolutions are TF32 unless told
if DEVICE == "cpu" and not EMULATED:
    def pytest_configure(config):
        """Remember which files of slow tests have passed, and do not run them again."""
        config.pluginmanager.register(RememberedFiles(INTERPRET), "remembered")


# A shell's background jobs ignore Ctrl-C, those under nohup a closed terminal, and so would what tests start.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)
# On a shared machine set OMP_NUM_THREADS to 1: threads that wait for a core keep it busy.
if DEVICE == "cpu" and "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(min(2, os.cpu_count() or 1))


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fill `torch.empty` with NaN: a value that nobody wrote shows up as one."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)
