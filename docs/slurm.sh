#!/bin/bash
# Trains over several nodes under Slurm: sbatch --nodes 2 docs/slurm.sh --run_name two-nodes
#
# Submit it from the repository's root, on a file system that all nodes share, where .venv is. Its
# arguments are train.py's. Before the time limit Slurm sends SIGTERM, upon which the run is saved.
# To go on, submit the same command again.
#SBATCH --job-name=llama-2-gsm8k
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@300
#SBATCH --output=slurm-%j.log

set -u
cd "$SLURM_SUBMIT_DIR" || exit 2

# All nodes meet at the first one, at a port that other jobs there are unlikely to have.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))

# After Slurm's signal, torchrun would kill the processes within 30 seconds, in the middle of a save
# (that of torch 2.11 does so all the same).
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=270

# Weights are spread over the GPUs of a node, and between nodes only gradients travel. Since Slurm
# 22.05, srun does not pass on the job's processor cores by itself.
srun --cpus-per-task "$SLURM_CPUS_PER_TASK" .venv/bin/torchrun \
  --nnodes "$SLURM_NNODES" \
  --nproc_per_node "$SLURM_GPUS_ON_NODE" \
  --rdzv_id "$SLURM_JOB_ID" \
  --rdzv_backend c10d \
  --rdzv_endpoint "$first:$port" \
  train.py --shard_over "$SLURM_GPUS_ON_NODE" "$@"
