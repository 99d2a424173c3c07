#!/usr/bin/env bash
# LoRA of Vicuna-7B on LLaVA's data, with LLaVA's own flags; options given to this script override these.
exec "${PYTHON:-python3}" -m transfusion.cli train --lora_enable True --lora_r 128 --lora_alpha 256 --bf16 True \
    --model_name_or_path ./vicuna-7b-v1.5 --version v1 --image_aspect_ratio pad --output_dir ./runs/llava-lora \
    --data_path ./playground/data/llava_v1_5_mix665k.json --image_folder ./playground/data --learning_rate 2e-4 \
    --num_train_epochs 1 --model_max_length 2048 --per_device_train_batch_size 1 --gradient_accumulation_steps 8 \
    --warmup_ratio 0.03 --dataloader_num_workers 4 "$@"
