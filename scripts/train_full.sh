#!/usr/bin/env bash
# All weights of Vicuna-7B on LLaVA's data, with LLaVA's own flags; what follows on the command line stands above them.
exec ${LAUNCH:-"${PYTHON:-python3}"} -m transfusion.cli train --bf16 True --learning_rate 2e-5 --weight_decay 0. \
    --model_name_or_path ./vicuna-7b-v1.5 --version v1 --image_aspect_ratio pad --output_dir ./runs/llava-full \
    --data_path ./playground/data/llava_v1_5_mix665k.json --image_folder ./playground/data --gradient_checkpointing True \
    --num_train_epochs 1 --model_max_length 2048 --per_device_train_batch_size 4 --gradient_accumulation_steps 2 \
    --warmup_ratio 0.03 --dataloader_num_workers 4 "$@"
