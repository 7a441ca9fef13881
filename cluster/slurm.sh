#!/usr/bin/env bash
# Slurm job: starts Ray on the nodes of the allocation, runs one `bsq-ray` command on it, and stops Ray.
#
#   sbatch --nodes 2 cluster/slurm.sh train tokenizer --config imagenet256-bsq18 --workers 16 --resume \
#     --data s3://bucket/imagenet/train --out s3://bucket/runs/bsq18
#
# Works for every command with the option --address. Environment variables (default):
#   BIN_FOLDER           folder of `ray` and `bsq-ray` on every node (/opt/bsq_ray/.venv/bin)
#   NETWORK_INTERFACE    network interface between the nodes         (eth0)
#   OBJECT_STORE_BYTES   bytes of the object store of each node      (64000000000)
# Exit status: that of the command.
#SBATCH --job-name=bsq-ray
#SBATCH --output=%x-%j.log
#SBATCH --exclusive
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
set -euo pipefail

(($#)) || {
  echo "slurm.sh: no command; give one such as train tokenizer --config imagenet256-bsq18 …" >&2
  exit 2
}
# `ray symmetric-run` calls `ray` by its name.
export PATH=${BIN_FOLDER:-/opt/bsq_ray/.venv/bin}:$PATH
export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
export NCCL_SOCKET_IFNAME=${NETWORK_INTERFACE:-eth0} GLOO_SOCKET_IFNAME=${NETWORK_INTERFACE:-eth0}
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${hosts%%$'\n'*}
nodes=$SLURM_JOB_NUM_NODES

# On the head's node it runs the command; on the others it waits until the head stops.
srun --nodes="$nodes" --ntasks="$nodes" ray symmetric-run --address "$head:6379" --min-nodes "$nodes" \
  --object-store-memory="${OBJECT_STORE_BYTES:-64000000000}" -- bsq-ray "$@" --address auto
