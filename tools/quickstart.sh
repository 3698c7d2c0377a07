#!/usr/bin/env bash
# Train the reference model on two processes with ZeRO-3 and expert parallelism, and widen it mid-way.
# With --compare also the wide model from scratch and the narrow one to the end, and compare the three.
# Further arguments go to ds_sparkling/train.py (try --help).

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
program=(deepspeed --num_gpus 2 ds_sparkling/train.py)
arguments=(--deepspeed_config configs/quickstart.json)
for argument in "$@"; do
    if [ "$argument" = --compare ]; then
        program=(python -m ds_sparkling.job.compare)
    else
        arguments+=("$argument")
    fi
done
exec "${program[@]}" "${arguments[@]}"
