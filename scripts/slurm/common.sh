# Sourced by every sbatch script of this folder: the environment of the ranks, and how they are started.

# Batch scripts are copied to a spool folder before they run; the checkout is where sbatch was called.
cd "${NEUCLIP_ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}" || exit 1
[ -f src/training/main.py ] || { echo "error: submit from the checkout, or set NEUCLIP_ROOT to it (now $PWD)" >&2; exit 1; }

VENV="${VIRTUAL_ENV:-${NEUCLIP_VENV:-$PWD/.venv}}"
[ ! -f "$VENV/bin/activate" ] || source "$VENV/bin/activate"

export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
# One port per job: two jobs that share a node and a port would join each other's process group.
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT
# srun no longer takes over --cpus-per-task of the batch job by itself (since slurm 22.05): all loader processes of a rank
# would share one core.
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# train FLAGS... : one process per task; all end when one fails.
train() {
    srun --kill-on-bad-exit=1 python -u src/training/main.py "$@"
}
