#!/usr/bin/env bash
# Train the reference model on two processes with ZeRO-3 and expert parallelism, and widen it mid-way.
# With --compare also the wide model from scratch and the narrow one, as long in tokens and as long in compute.
# Further arguments go to the job (try --help).

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
if ! compgen -G '/dev/nvidia*' > /dev/null && ! compgen -G '/dev/accel*' > /dev/null && [ ! -e /dev/kfd ] && [ ! -e /dev/dri ]; then
    export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}" # what DeepSpeed finds anyway, and warns of in every process
fi
command=train
arguments=(--deepspeed_config configs/quickstart.json)
for argument in "$@"; do
    if [ "$argument" = --compare ]; then
        command=compare
    else
        arguments+=("$argument")
    fi
done
exec python -m ds_sparkling.cli "$command" "${arguments[@]}"
