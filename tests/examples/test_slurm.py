"""The SLURM script of examples/: it parses, its flags exist, and a signal before the limit ends in a requeue.

SLURM and torchrun are small scripts here: `srun` runs one task, `torchrun` one process of its node. Python is real.
"""
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed.run

from transfusion.command import saved_step
from transfusion.recipes.command_line import PRESETS, TRAINED_ON, read_preset

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "slurm_train.sh"
SMALL = ("digits", "--save-every", "3", "--device", "cpu", "--model.hidden", "32", "--model.layers", "1", "--model.mlp",
         "64", "--optim.rows", "1", "--optim.seq-len", "64", "--optim.steps")
COMMANDS = {
    "scontrol": 'echo "$*" >> "$HERE/scontrol"; [ "$1" = requeue ] || printf "node1\\nnode2\\n"',
    "srun": '[[ $1 == --kill-on-bad-exit=1 ]] || exit 9; shift; echo $$ > "$HERE/task"; exec "$@"',
    "squeue": 'cat "$HERE/state"',
    "torchrun": 'printf "%s\\n" "$@" > "$HERE/torchrun"; while [ "$1" != -m ]; do shift; done; python "$@" & wait $!',
}


@pytest.fixture
def cluster(tmp_path):
    """The environment of a job on a cluster of fakes, which take notes in HERE."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (tmp_path / "state").write_text("RUNNING\n")
    for name, body in COMMANDS.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return kept | {"PATH": f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}", "HERE": str(tmp_path),
                   "PYTHONPATH": str(ROOT), "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "OMP_NUM_THREADS": "1",
                   "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_GPUS_ON_NODE": "4", "CUDA_VISIBLE_DEVICES": ""}


def submit(cluster, *arguments):
    """Start a job in a process group of its own."""
    with (Path(cluster["HERE"]) / "errors").open("w") as errors:
        return subprocess.Popen(["bash", str(SCRIPT), *arguments], env=cluster, stdout=subprocess.DEVNULL,
                                stderr=errors, start_new_session=True)


def test_the_script_parses_and_shellcheck_finds_nothing():
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", str(SCRIPT)], check=True)


def test_flags_of_the_example_and_of_torchrun_exist():
    text = SCRIPT.read_text()
    out, *arguments = re.search(r"sbatch \S+ (.*)", text)[1].split()
    preset, _, mixture, *flags = arguments  # `--data FILE` is short for these two
    args = [preset, "data:mixture", "--data.file", mixture, *flags, "--out", out, "--auto-resume"]
    config = read_preset("train", "", PRESETS, args, TRAINED_ON)
    assert config.optim.steps == 100_000 and config.auto_resume and str(config.out) == out
    flags = re.findall(r"--[\w-]+", text[text.index("exec torchrun"):text.index("-m transfusion.train")])
    known = {option for action in torch.distributed.run.get_args_parser()._actions for option in action.option_strings}
    assert len(flags) == 6 and set(flags) <= known


def step_of(task):
    """A task's process and those below it."""
    below = subprocess.run(["pgrep", "--parent", str(task)], capture_output=True, text=True).stdout.split()
    return [task, *(one for child in below for one in step_of(int(child)))]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_saves_and_the_next_job_goes_on_to_the_end(cluster, tmp_path, number):
    """SIGUSR1 comes before the limit, and the job requeues itself. SIGTERM may come to all processes, from a SLURM that
    is ending the job and requeues it or does not."""
    out = tmp_path / "run"
    job = submit(cluster, str(out), *SMALL, "100000")
    try:
        deadline = time.monotonic() + 300
        while job.poll() is None and not (out / "resume" / "run.json").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        if number == signal.SIGTERM:
            (tmp_path / "state").write_text("COMPLETING\n")
        task = int((tmp_path / "task").read_text())
        for process in step_of(task) if number == signal.SIGTERM else [task]:
            os.kill(process, number)
        assert job.wait(timeout=300) == 0, (tmp_path / "errors").read_text()
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
            job.wait()
    done = saved_step(out)
    assert done >= 3 and "add --resume to the same command to go on" in (tmp_path / "errors").read_text()
    asked = (tmp_path / "scontrol").read_text().splitlines()
    assert asked == ["show hostnames node[1-2]", *(["requeue 7"] if number == signal.SIGUSR1 else [])]
    asked = (tmp_path / "torchrun").read_text().splitlines()
    assert asked[:asked.index("-m")] == [
        "--signals-to-handle", "SIGINT,SIGHUP,SIGQUIT", "--nnodes", "2", "--nproc-per-node", "4", "--rdzv-backend",
        "c10d", "--rdzv-id", "7", "--rdzv-endpoint", "node1:29400"]
    assert asked[-1] == "--auto-resume"

    job = submit(cluster, str(out), *SMALL, str(done + 1))
    assert job.wait(timeout=300) == 0, (tmp_path / "errors").read_text()
    assert saved_step(out) == done + 1
    assert (tmp_path / "scontrol").read_text().splitlines()[-1] == "show hostnames node[1-2]"


@pytest.mark.parametrize("state, asked", [("RUNNING", "requeue 7"), ("COMPLETING", ""), (None, "requeue 7")])
def test_a_job_that_saved_requeues_itself_unless_slurm_ends_it(cluster, tmp_path, state, asked):
    """None: the controller does not answer."""
    (tmp_path / "state").write_text(f"{state}\n") if state else (tmp_path / "state").unlink()
    end = SCRIPT.read_text().partition("\nstate=")[2]
    subprocess.run(["bash", "-euc", f"saved_run_has() {{ true; }}\nstate={end}"], env=cluster, check=True)
    file = tmp_path / "scontrol"
    assert (file.read_text() if file.exists() else "").strip() == asked


def test_a_command_that_fails_ends_the_job_without_a_requeue(cluster, tmp_path):
    job = submit(cluster, str(tmp_path / "run"), *SMALL, "no number")
    assert job.wait(timeout=300) not in (0, 9)
    assert (tmp_path / "scontrol").read_text().splitlines() == ["show hostnames node[1-2]"]
