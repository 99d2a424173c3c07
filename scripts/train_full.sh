#!/usr/bin/env bash
# All weights of Vicuna-7B on LLaVA's data, in shards on 8 GPUs; options given to this script override these.
# LAUNCH starts it in another way, such as `LAUNCH="srun torchrun --nnodes 2 ..."`.
exec ${LAUNCH:-torchrun --nproc-per-node 8} -m transfusion.cli train --bf16 True --version v1 --image_aspect_ratio pad \
    --model_name_or_path ./vicuna-7b-v1.5 --output_dir ./runs/llava-full --image_folder ./playground/data \
    --data_path ./playground/data/llava_v1_5_mix665k.json --learning_rate 2e-5 --weight_decay 0. --warmup_ratio 0.03 \
    --num_train_epochs 1 --model_max_length 2048 --per_device_train_batch_size 16 --gradient_accumulation_steps 4 \
    --dataloader_num_workers 4 "$@"
