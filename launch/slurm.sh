#!/usr/bin/env bash
# Trains on the nodes of a Slurm allocation, one process a GPU. From the checkout, which every node
# must see under the same path (NFS, Lustre), as must the work directory:
#
#   sbatch launch/slurm.sh --config=configs/llama_300m.py --workdir=runs/llama_300m
#
# Options before the script's name win over those below: sbatch --nodes=4 launch/slurm.sh ...
#
# CHANGE: how many nodes, and how many GPUs each has. One task a GPU; the two numbers are equal.
# Do not use --gpus-per-task or --gpu-bind: a task must see all GPUs of its node to find its own.
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
# CHANGE: cores of a node divided by its tasks; the time; and what your cluster asks for besides,
# such as --partition and --account.
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --job-name=lmscale
# SIGTERM reaches the tasks 120 s before the time limit, so that they save and leave. CHANGE it if
# saving takes longer. No B: before TERM: the signal is meant for them, not for this script.
#SBATCH --signal=TERM@120
# A preempted job, or one whose node was lost, goes back into the queue, and its logs go on.
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=lmscale-%j.log

set -u
# CHANGE: the virtual environment, and modules to load before it (module load cuda).
PYTHON=${PYTHON:-.venv/bin/python}
# Prepared tokens and compiled programs: made once, read by every node and every restart.
export LMSCALE_CACHE=${LMSCALE_CACHE:-$PWD/runs/cache}

mkdir -p logs
echo "$(date): job $SLURM_JOB_ID, start ${SLURM_RESTART_COUNT:-0}, on $SLURM_JOB_NODELIST"

# The processes end one another when one dies, and leave at slightly different times when all have
# saved; so Slurm must not kill the rest at the first that leaves. srun no longer takes the number
# of cores from sbatch (since Slurm 22.05).
srun --kill-on-bad-exit=0 \
  --cpus-per-task="$SLURM_CPUS_PER_TASK" \
  --output="logs/$SLURM_JOB_ID-%t.log" \
  --open-mode=append \
  "$PYTHON" -m lmscale_jax.main --cluster=slurm "$@"
status=$?

# 143 is 128 + SIGTERM: everything is saved, and the same command goes on from there.
if [ "$status" -eq 143 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
