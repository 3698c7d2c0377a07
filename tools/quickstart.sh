#!/usr/bin/env bash
# Train the reference model on two processes with ZeRO-3 and expert parallelism, and widen it mid-way.
# Further arguments go to ds_sparkling/train.py (try --help).

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
exec deepspeed --num_gpus 2 ds_sparkling/train.py --deepspeed_config configs/quickstart.json "$@"
