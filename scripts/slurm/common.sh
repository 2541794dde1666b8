# Sourced by every sbatch script of this folder: the environment of the ranks, and how training and evaluation are started.

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

# train FLAGS... : one process per task; all end when one fails. Comes back only from a run that has reached its last epoch.
#
# The first flags let a run live through time limits and preemption. They need these lines in the sbatch script:
#   #SBATCH --signal=USR1@300     the ranks, not this shell, are warned 300 s before slurm ends them: time for a checkpoint
#   #SBATCH --requeue             the job may go back into the queue, where its number and its flags stay the same
#   #SBATCH --open-mode=append    the next start goes on in the same output file
# and a --name that is the same at every start. FLAGS come later, so that they can say otherwise (--save-every-minutes 10).
train() {
    local status=0
    srun --kill-on-bad-exit=1 python -u src/training/main.py \
        --resume latest --requeue-on-signal --save-every-minutes 30 "$@" || status=$?
    # 75: interrupted. Nothing is left to be done: rank 0 has requeued a job that was warned or preempted, so that this shell is
    # being killed and its status counts for nothing. Any other job ends as failed with 75:0 (SIGTERM alone, or slurm refused);
    # were it requeued from here, one that a person has ended would come back.
    [ "$status" != 75 ] || echo "interrupted: unless slurm requeues the job, submit it again to go on" >&2
    [ "$status" = 0 ] || exit "$status"
}

# evaluate FLAGS... : our suite, one process per task.
evaluate() {
    restartable srun --kill-on-bad-exit=1 python -u src/evaluation/main.py "$@"
}

# restartable COMMAND... : a command that keeps what it has finished, so that a job that slurm ends goes on where it was. After
# preemption slurm requeues it by itself; before its time limit this shell does, where the sbatch script has these lines:
#   #SBATCH --signal=B:USR1@120   this shell, not the command, is warned 120 s before slurm ends both
#   #SBATCH --requeue
#   #SBATCH --open-mode=append
restartable() {
    local status step
    trap evaluate_later USR1
    "$@" &
    step=$!
    # The warning ends the wait, not the command: it goes on until slurm ends it.
    while :; do
        status=0
        wait "$step" || status=$?
        kill -0 "$step" 2>/dev/null || break
    done
    exit "$status"
}

# Not for ever: a set that takes longer than the time limit would come back again and again.
evaluate_later() {
    if [ "${SLURM_RESTART_COUNT:-0}" -ge 20 ]; then
        echo "error: not requeued a 21st time: give the job more time" >&2
    else
        echo "the time limit is near: back into the queue"
        scontrol requeue "$SLURM_JOB_ID" || echo "slurm does not requeue this job: submit it again to go on" >&2
    fi
}
