"""LLaVA's own command lines."""
import shlex

import pytest

from transfusion.data.llava_flags import is_llava, read_flags
from transfusion.data.sources import LLaVASettings

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
        "tune.start": "lmsys/vicuna-13b-v1.5", "out": "checkpoints/llava-v1.5-13b-lora", "optim.rows": "16",
        "optim.seq_len": "2048", "optim.lr": "0.0002", "optim.weight_decay": "0.0", "save_every": "50000",
        "autocast": "True", "tune.lora_rank": "128", "tune.lora_alpha": "256", "tune.trained": "lora"}  # fmt: skip
    assert (flags.epochs, flags.warmup_ratio, flags.workers) == (1.0, 0.03, 4)
    silent = "--vision_tower openai/clip-vit-large-patch14-336 has no effect: this model has no CLIP"
    assert sum(line.startswith(silent) for line in flags.words) == 1 and len(set(flags.words)) == 20


def test_pretraining_is_plain_and_trains_the_image_layers(tmp_path):
    arguments = "--data_path=blip.json --version=plain --tune_mm_mlp_adapter=True --image_aspect_ratio square"
    flags = read_flags(arguments.split(), tmp_path)
    assert flags.mixture.chat.template == "plain" and flags.mixture.pictures.mode == "centre"
    assert flags.trainer == {"tune.trained": "images"} and flags.epochs is None
    assert read_flags(["--data_path", "a.json"]).mixture.sources[0].source.images is None


def test_a_command_line_is_known_by_its_data_path():
    assert is_llava(["--data_path", "a.json"]) and is_llava(["--data_path=a.json"])
    assert not is_llava(["digits", "--optim.steps", "10"]) and not is_llava(["--data", "mix.yaml"])


@pytest.mark.parametrize("arguments, words", [
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
])
def test_flags_that_do_not_fit_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        read_flags(shlex.split(arguments))
