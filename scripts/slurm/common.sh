# Sourced by every sbatch script of this folder: the environment of the ranks, and how training and evaluation are started.

die() { printf 'error: %s\n' "$*" >&2; exit 2; }

SCRIPT="$(realpath "$0")"
# Batch scripts are copied to a spool folder before they run; the checkout is where sbatch was called.
cd "${NEUCLIP_ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}" || exit 2
[ -f src/training/main.py ] || die "submit from the checkout, or set NEUCLIP_ROOT to its path (now $PWD)"

VENV="${VIRTUAL_ENV:-${NEUCLIP_VENV:-$PWD/.venv}}"
[ ! -f "$VENV/bin/activate" ] || source "$VENV/bin/activate"

export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
if [ -n "${SLURM_JOB_ID:-}" ]; then
    MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
    # One port per job: two jobs that share a node and a port would join each other's process group.
    MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
    export MASTER_ADDR MASTER_PORT
fi
# srun no longer takes over --cpus-per-task of the batch job by itself (since slurm 22.05): all loader processes of a rank
# would share one core.
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# train FLAGS... : one process per task; all end when one fails. Comes back only from a run that has reached its last epoch.
# The script sets GLOBAL_BATCH, which stays what it is on any number of ranks, and the caller TRAIN_DATA.
#
# The first flags let a run live through time limits and preemption. They need these lines in the sbatch script:
#   #SBATCH --signal=USR1@300     the ranks, not this shell, are warned 300 s before slurm ends them: time for a checkpoint
#   #SBATCH --requeue             the job may go back into the queue, where its number and its flags stay the same
#   #SBATCH --open-mode=append    the next start goes on in the same output file
# and a --name that is the same at every start. FLAGS come later, so that they can say otherwise (--save-every-minutes 10).
#
# Without slurm the same script runs by scripts/torchrun.sh, on the GPUs of this machine; or, with --dry-run, in one process.
train() {
    local flags=(--resume latest --requeue-on-signal --save-every-minutes 30) last=() start status=0
    # A link of scripts/slurm/chain.sh: the next one is in the queue already.
    [ -z "${NEUCLIP_CHAIN:-}" ] || flags=(--resume latest --save-every-minutes 30)
    if [ -n "${SLURM_JOB_ID:-}" ]; then
        RANKS="${SLURM_NTASKS:-}"
        [ -n "$RANKS" ] || die "SLURM_NTASKS has not been set by slurm: ask for --ntasks-per-node, as the top of the script does"
        check_job "$@"
        start=(srun --kill-on-bad-exit=1 python -u)
    elif [ -n "${NEUCLIP_PROCESSES:-}" ]; then
        RANKS="$NEUCLIP_PROCESSES"
        start=(python -m torch.distributed.run --standalone --nproc-per-node "$RANKS" --)
        flags=(--resume latest --save-every-minutes 30)
    elif given --dry-run "$@"; then
        RANKS="$(asked_ranks)"
        start=(python -u)
    else
        die "there is no slurm job: submit this script (sbatch $0), add --dry-run to try it here, or train on the GPUs of this \
machine (scripts/torchrun.sh DATASET METHOD)"
    fi
    if given --dry-run "$@"; then
        # --dry-run 16 tries what each of 16 ranks would have to do.
        [[ ! "$VALUE" =~ ^[1-9][0-9]*$ ]] || RANKS="$VALUE"
        [ -n "$RANKS" ] ||
            die "$0 has no lines '#SBATCH --nodes=N' and '#SBATCH --ntasks-per-node=N': say for how many ranks, --dry-run RANKS"
        # A run of this name may be there, and would go on.
        flags=(--resume latest)
        last=(--dry-run "$RANKS")
    fi
    if ! given --train-data "$@"; then
        if [ -n "${TRAIN_DATA:-}" ]; then
            flags+=(--train-data "$TRAIN_DATA")
        elif given --dry-run "$@"; then
            echo "TRAIN_DATA is not set: the plan relies on --train-num-samples"
        else
            die "set TRAIN_DATA to the shards, such as TRAIN_DATA='/data/{00000..00331}.tar', or to a folder of them"
        fi
    fi
    given --batch-size "$@" || { share_batch "$@" && flags+=(--batch-size "$BATCH_SIZE"); }

    "${start[@]}" src/training/main.py "${flags[@]}" "$@" "${last[@]}" || status=$?
    # No link that is left has anything to do when the run is through, nor after a mistake in flags or files.
    case "${NEUCLIP_CHAIN:+chain}$status" in chain0 | chain2) scancel --state=PENDING "$SLURM_ARRAY_JOB_ID" ;; esac
    # 75: interrupted. Nothing is left to be done: rank 0 has requeued a job that was warned or preempted, so that this shell is
    # being killed and its status counts for nothing. Any other job ends as failed with 75:0 (SIGTERM alone, or slurm refused);
    # were it requeued from here, one that a person has ended would come back.
    [ "$status" != 75 ] || echo "interrupted: unless slurm requeues the job, submit it again to go on" >&2
    [ "$status" = 0 ] || exit "$status"
}

# check_job FLAGS... : what would train something other than was meant, or on fewer GPUs.
check_job() {
    local gpus="${SLURM_GPUS_ON_NODE:-}" tasks="${SLURM_NTASKS_PER_NODE:-}" task="${SLURM_ARRAY_TASK_ID:-}"
    given --name "$@" || :
    if [ -n "$task" ] && [ -z "${NEUCLIP_CHAIN:-}" ] && [[ ! "$VALUE" =~ (^|[-_.])"$task"($|[-_.]) ]]; then
        die "all jobs of an array would train the run $VALUE: chain them by scripts/slurm/chain.sh, or name a run for each in the \
script, --name $VALUE-\$SLURM_ARRAY_TASK_ID"
    fi
    [[ "$gpus" =~ ^[0-9]+$ && "$tasks" =~ ^[0-9]+$ ]] || return 0
    [ "$gpus" -ge "$tasks" ] || die "$tasks tasks on a node with $gpus GPUs: ask for as many, --ntasks-per-node=$gpus --gres=gpu:$gpus"
    [ "$gpus" = "$tasks" ] || echo "note: $gpus GPUs on a node and $tasks tasks, one GPU each: --ntasks-per-node=$gpus uses all" >&2
}

# share_batch FLAGS... : sets BATCH_SIZE, samples of a rank's (micro-)batch, so that a step has GLOBAL_BATCH of them.
share_batch() {
    local parts=1
    ! given --accum-freq "$@" || parts="$VALUE"
    [[ "$parts" =~ ^[1-9][0-9]*$ ]] || die "--accum-freq $parts is no number of micro-batches: give 1 or more"
    BATCH_SIZE=$((GLOBAL_BATCH / (RANKS * parts)))
    [ $((BATCH_SIZE * RANKS * parts)) = "$GLOBAL_BATCH" ] ||
        die "the global batch of $GLOBAL_BATCH does not divide by $RANKS ranks with --accum-freq $parts: choose numbers of nodes, \
GPUs and micro-batches whose product divides it, or give --batch-size yourself"
}

# given FLAG WORDS... : whether FLAG is among the words, spelled with - or _; its last value goes to VALUE.
given() {
    local flag="$1" word found=1
    VALUE=
    while shift && [ $# -gt 0 ]; do
        word="${1%%=*}"
        [ "${word//_/-}" = "$flag" ] || continue
        found=0
        VALUE="${2:-}"
        [ "$word" = "$1" ] || VALUE="${1#*=}"
    done
    return "$found"
}

# asked_ranks : the number of tasks that the running script asks of slurm; nothing if it does so in another way.
asked_ranks() {
    local nodes tasks
    nodes="$(asked nodes)" tasks="$(asked ntasks-per-node)"
    [ -z "$nodes" ] || [ -z "$tasks" ] || echo $((nodes * tasks))
}

# asked OPTION : a number that the running script asks of slurm.
asked() { sed -n "s/^#SBATCH  *--$1[= ]\([1-9][0-9]*\)\( .*\)\{0,1\}$/\1/p" "$SCRIPT" | tail -n 1; }

# evaluate FLAGS... : our suite, one process per task.
evaluate() {
    [ -n "${SLURM_JOB_ID:-}" ] || die "there is no slurm job: submit this script (sbatch $0); scripts/evaluate.sh needs no slurm"
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
