#!/usr/bin/env bash
# Evaluate a checkpoint of a run, on one or all GPUs of this machine (on the CPU without one).
#
#   ./scripts/evaluate.sh --train_output_dir logs/NAME --data_dir DIR [--epoch N] [more flags of src/evaluation/main.py]
#
# EVAL_PROCESSES=n sets the number of processes (default: one per GPU). A second call makes up for what is not finished.
set -euo pipefail

case " $* " in *" -h "* | *" --help "*) sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;; esac
here="$PWD"
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
[ $# -gt 0 ] || die "which run? give --train_output_dir logs/NAME and --data_dir DIR (see --help)"
root="$PWD"

prepare_python
install_once training -r requirements-training.txt
install_once evaluation pyarrow matplotlib  # the retrieval sets; the pictures

processes="${EVAL_PROCESSES:-$("$PYTHON" -c 'import torch; print(max(1, torch.cuda.device_count()))')}"
case "$processes" in *[!0-9]* | "" | 0) die "EVAL_PROCESSES=$processes is no number of processes: give 1 or more" ;; esac
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

cd "$here"  # the paths of the flags are as the caller sees them
if [ "$processes" = 1 ]; then
    exec "$PYTHON" -u "$root/src/evaluation/main.py" "$@"
fi
exec "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$processes" -- "$root/src/evaluation/main.py" "$@"
