"""LLaVA's own command lines."""
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.transfusion.model.test_from_language_model import language_model
from tests.transfusion.train.own_data import paint, write_llava
from transfusion import Transfusion
from transfusion.cli import main
from transfusion.data.sources import LLaVASettings
from transfusion.recipes import llava
from transfusion.recipes.llava import is_llava, read_flags

FINETUNE_LORA = """
    --lora_enable True --lora_r 128 --lora_alpha 256 --mm_projector_lr 2e-5 --deepspeed ./scripts/zero3.json
    --model_name_or_path lmsys/vicuna-13b-v1.5 --version v1 --data_path ./playground/data/llava_v1_5_mix665k.json
    --image_folder ./playground/data --vision_tower openai/clip-vit-large-patch14-336
    --pretrain_mm_mlp_adapter ./checkpoints/llava-v1.5-13b-pretrain/mm_projector.bin --mm_projector_type mlp2x_gelu
    --mm_vision_select_layer -2 --mm_use_im_start_end False --mm_use_im_patch_token False --image_aspect_ratio pad
    --group_by_modality_length True --bf16 True --output_dir ./checkpoints/llava-v1.5-13b-lora --num_train_epochs 1
    --per_device_train_batch_size 16 --per_device_eval_batch_size 4 --gradient_accumulation_steps 1
    --evaluation_strategy "no" --save_strategy "steps" --save_steps 50000 --save_total_limit 1 --learning_rate 2e-4
    --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type "cosine" --logging_steps 1 --tf32 True
    --model_max_length 2048 --gradient_checkpointing True --dataloader_num_workers 4 --lazy_preprocess True
    --report_to wandb
"""


def test_the_script_for_lora_is_read_as_it_is(tmp_path):
    flags = read_flags(shlex.split(FINETUNE_LORA), tmp_path)
    (source,) = flags.mixture.sources
    assert source.source == LLaVASettings(
        tmp_path / "playground/data/llava_v1_5_mix665k.json", images=tmp_path / "playground/data"
    )
    mixture = flags.mixture
    assert (mixture.chat.template, mixture.pictures.mode, mixture.max_length) == ("vicuna_v1", "pad", 2048)
    assert mixture.chat.image_position == "front"  # as LLaVA puts them
    trainer = {name: str(value) for name, value in flags.trainer.items()}
    assert trainer == {
        "out": "checkpoints/llava-v1.5-13b-lora", "optim.rows": "16",
        "optim.accumulate": "1", "optim.seq_len": "2048", "optim.lr": "0.0002", "optim.weight_decay": "0.0",
        "save_every": "50000",
        "autocast": "True", "tune.lora_rank": "128", "tune.lora_alpha": "256", "tune.trained": "lora"}  # fmt: skip
    assert (flags.epochs, flags.warmup_ratio, flags.workers) == (1.0, 0.03, 4)
    assert flags.model == Path("lmsys/vicuna-13b-v1.5") and len(flags.given["sources"]) == 1
    silent = "--vision_tower openai/clip-vit-large-patch14-336 has no effect: this model has no CLIP"
    assert sum(line.startswith(silent) for line in flags.words) == 1 and len(set(flags.words)) == 19


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A tiny language model in llm/, twelve conversations in talk.json, and their pictures in images/."""
    where = tmp_path_factory.mktemp("llava")
    language_model(where / "llm", "llama")
    write_llava(where / "talk.json", paint(12))
    return where


SCRIPT = """
    --lora_enable True --lora_r 2 --lora_alpha 4 --deepspeed ./scripts/zero3.json --model_name_or_path llm --version v1
    --data_path talk.json --image_folder images --vision_tower openai/clip-vit-large-patch14-336
    --image_aspect_ratio pad --bf16 False --output_dir runs/lora --num_train_epochs 2
    --per_device_train_batch_size 1 --learning_rate 2e-4 --gradient_accumulation_steps 2 --warmup_ratio 0.5
    --lr_scheduler_type cosine --model_max_length 512 --dataloader_num_workers 0 --report_to wandb
    --image_size 16 --device cpu --model.patch-size 4
"""  # the last flags of our own make it tiny


def test_the_script_runs_as_it_is_and_again_and_goes_on(here, monkeypatch, capsys):
    monkeypatch.chdir(here)
    main(["train", *shlex.split(SCRIPT), "--stop-after", "1"])
    printed = capsys.readouterr().out
    assert "--report_to wandb has no effect: rows are packed, saved and logged in this project's own way" in printed
    assert "--deepspeed ./scripts/zero3.json has no effect" in printed and "an epoch has 12 documents" in printed
    main(["train", *shlex.split(SCRIPT), "--resume", "--recompute", "full", "--max_hours", "1"])
    assert "runs/lora-from-llm was made of llm before" in capsys.readouterr().out
    run = json.loads((here / "runs" / "lora" / "resume" / "run.json").read_text())
    config, steps = run["config"], run["step"]
    tune = {"start": "runs/lora-from-llm", "trained": "lora", "lora_rank": 2, "lora_alpha": 4, "frozen": None}
    assert config["tune"] == tune
    optim = {
        name: config["optim"][name] for name in ("rows", "accumulate", "seq_len", "lr", "min_lr", "warmup", "steps")
    }
    assert optim == dict(rows=2, accumulate=2, seq_len=512, lr=2e-4, min_lr=0.0, warmup=-(-steps // 2), steps=steps)
    mixture = config["data"]["mixture"]
    assert (
        mixture["pictures"]["mode"] == "pad"
        and mixture["chat"]["template"] == "vicuna_v1"
        and mixture["max_length"] == 512
    )
    records = [json.loads(line) for line in (here / "runs" / "lora" / "log.jsonl").read_text().splitlines()]
    assert len(records) == steps and all(
        record["text_loss"] > 0 and record["diffusion_loss"] == 0 for record in records
    )
    assert Transfusion.from_pretrained(here / "runs" / "lora").config.patch_size == 4
    changed = SCRIPT.replace("--image_size 16", "--image_size 32").replace("patch-size 4", "patch-size 8")
    with pytest.raises(SystemExit, match=r"from-llm was made before with image_size \[16, 16\] \(now \[32, 32\]\), "
                                         r"patch_size 4 \(now 8\); the same settings, or another --output_dir, fit"):
        main(["train", *shlex.split(changed), "--resume"])
    language_model(here / "other" / "llm", "qwen2")
    with pytest.raises(SystemExit, match="from-llm was made before with another language model; the same settings, or"):
        main(["train", *shlex.split(SCRIPT.replace("_path llm", "_path other/llm")), "--resume"])
    again = SCRIPT.replace("--model_name_or_path llm", "--model_name_or_path runs/lora-from-llm").replace(
        "runs/lora ", "runs/again "
    )
    main(["train", *shlex.split(again), "--max_steps", "1"])
    assert (here / "runs" / "again" / "adapter_config.json").is_file() and not (
        here / "runs" / "again-from-lora-from-llm"
    ).exists()


@pytest.mark.parametrize(
    "words, said",
    [
        (("--data_path", "talk.json", "--output_dir", "runs/x"), "there is no --model_name_or_path"),
        (("--data_path", "talk.json", "--model_name_or_path", "llm"), "there is no --output_dir"),
        (
            ("--data_path", "talk.json", "--model_name_or_path", "lmsys/vicuna-7b-v1.5", "--output_dir", "runs/x"),
            "--model_name_or_path is 'lmsys/vicuna-7b-v1.5', which is no checkpoint's directory; nothing is downloaded",
        ),
        (
            (
                "--data_path",
                "gone.json",
                "--model_name_or_path",
                "llm",
                "--output_dir",
                "runs/x",
                "--model.patch-size",
                "4",
                "--image_size",
                "16",
            ),
            "sources\\[0\\] cannot be opened: llava: .*gone.json",
        ),
        (
            (
                "--data_path",
                "talk.json",
                "--model_name_or_path",
                "llm",
                "--output_dir",
                "runs/x",
                "--num_train_epochs",
                "0",
            ),
            "--num_train_epochs is 0.0; a number above 0 fits",
        ),
        (("--data_path", "talk.json", "--model_name_or_path", "llm", "--output_dirr", "x"), "did you mean output_dir"),
    ],
)
def test_a_command_line_that_does_not_fit_ends_in_one_line(here, monkeypatch, words, said):
    monkeypatch.chdir(here)
    with pytest.raises(SystemExit, match=f"^error: .*{said}") as stop:
        main(["train", "--device", "cpu", *words])
    assert "\n" not in str(stop.value)


@pytest.mark.parametrize("data, model", [("gone.json", "llm"), ("talk.json", "gone")])
def test_what_is_missing_is_told_before_anything_is_written(here, monkeypatch, data, model):
    monkeypatch.chdir(here)
    with pytest.raises(SystemExit, match="gone"):
        main(["train", "--data_path", data, "--model_name_or_path", model, "--output_dir", "runs/none"])
    assert not list(here.glob("runs/none*"))


def test_flags_of_the_trainer_keep_as_many_values_as_they_have():
    ours = "--parallel.offload --samples.prompts a b --resume --allow-changed --log wandb tensorboard --optim.steps=5"
    flags = read_flags(shlex.split(f"--data_path a.json {ours} --learning_rate 1e-3"))
    assert flags.ours == tuple(shlex.split(ours.replace("=", " "))) and flags.trainer["optim.lr"] == 1e-3


@pytest.mark.parametrize("ours, steps, warmup", [
    ("", 1000, 30), ("--warmup_steps 7", 1000, 7), ("--max_steps 100", 100, 3), ("--optim.warmup 500", 1000, 500),
    ("--optim.warmup=500 --optim.steps=2000", 2000, 500), ("--optim.steps 2000 --warmup_steps 7", 2000, 7)])
def test_steps_and_warm_up_that_a_flag_says_are_not_computed(here, monkeypatch, ours, steps, warmup):
    monkeypatch.chdir(here)
    monkeypatch.setattr(llava, "_start", lambda flags, config: Path("start"))
    monkeypatch.setattr(llava, "_steps", lambda config, epochs: 1000)
    given = f"--model_name_or_path llm --data_path talk.json --output_dir runs/said --warmup_ratio 0.03 {ours}"
    optim = llava.read_llava(shlex.split(given)).optim
    assert (optim.steps, optim.warmup) == (steps, warmup)


def test_a_start_that_our_own_flag_says_stands_above_the_model(here, monkeypatch):
    monkeypatch.chdir(here)
    given = "--model_name_or_path llm --data_path talk.json --output_dir runs/said --max_steps 1 --tune.start mine"
    assert llava.read_llava(shlex.split(given)).tune.start == Path("mine")
    assert not list(here.glob("runs/said-from*"))


def test_conversations_are_cut_at_llava_s_length_and_rows_may_be_longer(here, monkeypatch):
    monkeypatch.chdir(here)
    monkeypatch.setattr(llava, "_start", lambda flags, config: Path("start"))
    given = "--model_name_or_path llm --data_path talk.json --output_dir runs/said --max_steps 1"
    config = llava.read_llava(shlex.split(f"{given} --model_max_length 2048 --optim.seq-len 4096"))
    assert (config.optim.seq_len, config.data.mixture.max_length) == (4096, 2048)


def test_pretraining_is_plain_and_trains_the_image_layers(tmp_path):
    arguments = "--data_path=blip.json --version=plain --tune_mm_mlp_adapter=True --image_aspect_ratio square"
    flags = read_flags(arguments.split(), tmp_path)
    assert flags.mixture.chat.template == "plain" and flags.mixture.pictures.mode == "centre"
    assert flags.trainer == {"tune.trained": "images"} and flags.epochs is None
    assert read_flags(["--data_path", "a.json"]).mixture.sources[0].source.images is None


def test_a_command_line_is_known_by_its_data_path():
    assert is_llava(["--data_path", "a.json"]) and is_llava(["--data_path=a.json"])
    assert not is_llava(["digits", "--optim.steps", "10"]) and not is_llava(["--data", "mix.yaml"])


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("--data_path a.json --learning_rat 1", "--learning_rat is no flag of LLaVA's; did you mean learning_rate"),
        ("--data_path a.json --learning_rate fast", "--learning_rate is 'fast'; a number fits"),
        ("--data_path a.json --lora_r 1.5", "--lora_r is '1.5'; a whole number fits"),
        ("--data_path a.json --bf16 maybe", "--bf16 is 'maybe'; True or False fits"),
        ("--data_path a.json --version v9", "--version is 'v9'; one of 'v1', .* fits"),
        ("--data_path a.json --image_aspect_ratio padd", "--image_aspect_ratio is 'padd'; .*did you mean pad"),
        ("--data_path a.json --model_max_length", "--model_max_length has no value"),
        ("--data_path --image_folder b", "--data_path has no value"),
        ("--data_path a.json stray", "'stray' stands where a flag is due"),
        ("--image_folder b", "there is no --data_path"),
        ("--data_path a.json --seed -1", "train: seed is -1; a whole number of at least 0"),
    ],
)
def test_flags_that_do_not_fit_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        read_flags(shlex.split(arguments))


@pytest.mark.parametrize("script,written,processes", [
    ("train_lora.sh", "adapter_config.json", 1), ("train_full.sh", "config.json", 1),
    ("train_full.sh", "config.json", 2)])
def test_the_scripts_of_the_project_train_a_tiny_model_on_other_files(here, script, written, processes):
    root = Path(__file__).parents[3]
    out = here / "runs" / f"{script}-{processes}"
    several = f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node {processes}"
    tiny = f"""--model_name_or_path llm --data_path talk.json --image_folder images --output_dir {out} --bf16 False
              --lora_r 2 --lora_alpha 4 --model_max_length 512 --per_device_train_batch_size {processes} --max_steps 1
              --gradient_accumulation_steps 2 --dataloader_num_workers 0 --image_size 16 --device cpu
              --model.patch-size 4"""
    python = {"PYTHON": sys.executable, "LAUNCH": sys.executable if processes == 1 else several}
    variables = os.environ | python | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", str(root / "scripts" / script), *shlex.split(tiny)], cwd=here, env=variables,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (out / written).is_file()
    assert len((out / "log.jsonl").read_text().splitlines()) == 1
