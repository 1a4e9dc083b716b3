#!/usr/bin/env bash
# Train on several machines without a scheduler: run the same line on each of them.
#
#   NODES=2 HEAD=10.0.0.1:29500 scripts/torchrun.sh --config configs/digits.yaml --config configs/overlays/ddp.yaml
#
# NODES: machines. HEAD: address and port of one of them, where all meet. DEVICES: processes on each. RESTARTS: how often
# all begin again, from last.ckpt, where one of them dies. The folder of the runs must be the same on all machines.
set -euo pipefail
DEVICES="${DEVICES:-1}"
PYTHON="${PYTHON:-python}"

# A wrong key or value is one line here. torchrun starts all processes again after any mistake, and prints its own table.
"$PYTHON" -m project fit "$@" --print_config > /dev/null

exec "$PYTHON" -m torch.distributed.run \
    --nnodes="${NODES:-1}" --nproc-per-node="$DEVICES" --max-restarts="${RESTARTS:-3}" \
    --rdzv-backend=c10d --rdzv-endpoint="${HEAD:-localhost:29500}" --rdzv-id="${RUN:-batchwise}" \
    -m project fit "$@" --ckpt_path last --trainer.num_nodes "${NODES:-1}" --trainer.devices "$DEVICES"
