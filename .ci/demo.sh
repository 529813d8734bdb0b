#!/usr/bin/env bash
# Fine-tunes a small model with llep: on 4 GPUs, on 2 where there are 2 or 3, else on 4 CPU ranks.
source "$(dirname "$0")/env.sh"

gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
if ((gpus >= 2)); then
    ranks=$((gpus >= 4 ? 4 : 2)) config=ds_configs/demo_gpu_zero3_ep2.json
    echo "demo: $gpus GPUs: $ranks NCCL ranks, EP 2, EDP $((ranks / 2))"
else
    ranks=4 config=ds_configs/demo_cpu_zero3_ep2.json
    echo "demo: $gpus GPUs, fewer than the 2 that expert parallelism needs: 4 gloo ranks on the CPU," \
        "EP 2, EDP 2"
    # One thread a rank: four ranks with a thread for every core each would fight over the cores.
    export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1
fi
port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')

# shellcheck disable=SC2206
command=(examples/finetune.py --deepspeed_config "$config" --skew 1 ${DEMO_ARGS:-})
echo "demo: deepspeed --num_gpus $ranks ${command[*]}"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
# DeepSpeed calls a few PyTorch functions by their old names; the launcher logs what it spawns.
export PYTHONWARNINGS=ignore::FutureWarning
"$python" -m deepspeed.launcher.runner --log_level warning --num_gpus "$ranks" \
    --master_port "$port" "${command[@]}" | tee "$log" || fail "demo: FAILED, see above"
result=$(grep -E '^[0-9]+ steps on .* loss ' "$log") || fail "demo: FAILED, no result above"
read -r first last < <(sed -E 's/.* loss ([0-9.]+) -> ([0-9.]+).*/\1 \2/' <<<"$result")
awk "BEGIN {exit !($last < $first)}" || fail "demo: FAILED, the loss did not fall: $result"
echo "make demo: ok: $result"
