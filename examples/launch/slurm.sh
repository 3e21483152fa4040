#!/bin/bash
# A run on several nodes of a SLURM cluster, one task a GPU. It saves before the time limit, and is queued again.
#
#   sbatch examples/launch/slurm.sh runs/x --config examples/sd35l/refl.yaml --model MODEL --prompts prompts.txt --shard node
#
# The first argument is the run folder; all others are dmdr-train's.
#SBATCH --job-name=dmdr
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append

folder=$1
shift
if compgen -G "$folder/checkpoints/step-*" > /dev/null; then
    begin=(--resume_from_checkpoint latest)
else # what a first try has left holds no checkpoint
    begin=(--overwrite_output_dir true)
fi

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT

# SLURM sends USR1 to each task ten minutes before the end: all finish their step, and the main one saves.
srun --kill-on-bad-exit=1 bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID
    export WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_JOB_NUM_NODES))
    exec dmdr-train "$@"' task "$@" --output_dir "$folder" "${begin[@]}"
code=$?
if [ "$code" -eq 138 ]; then # 128 + SIGUSR1: saved, not finished
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
