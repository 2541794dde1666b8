#!/usr/bin/env bash
# Train a recipe on the GPUs of this machine (on the CPU without one), without slurm.
#
#   TRAIN_DATA='/data/cc3m/{00000..00331}.tar' ./scripts/torchrun.sh cc3m neuclip [more flags of src/training/main.py]
#
# The recipes are the scripts in scripts/slurm: the global batch, and with it everything else, is theirs. Where a GPU cannot hold
# its part, add --accum-freq 4, say. NEUCLIP_PROCESSES=n sets the number of processes (default: one per GPU), NAME the run's name.
# A second call goes on where the first one was interrupted. Paths are relative to the checkout. --dry-run tries everything out.
set -euo pipefail

case " $* " in *" -h "* | *" --help "*) sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;; esac
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
script="scripts/slurm/${1:-}/${2:-}.sbatch"
if [ $# -lt 2 ] || [ ! -f "$script" ]; then
    sets="$(cd scripts/slurm && ls -d -- */ | tr -d / | xargs)"
    methods="$(cd scripts/slurm/cc3m && ls -- *.sbatch | sed 's/\.sbatch//' | xargs)"
    die "there is no $script: give a data set ($sets) and a method ($methods)"
fi
shift 2

prepare_python
install_once training -r requirements-training.txt
NEUCLIP_PROCESSES="${NEUCLIP_PROCESSES:-$("$PYTHON" -c 'import torch; print(max(1, torch.cuda.device_count()))')}"
case "$NEUCLIP_PROCESSES" in *[!0-9]* | "" | 0) die "NEUCLIP_PROCESSES=$NEUCLIP_PROCESSES is no number of processes: give 1 or more" ;; esac
VIRTUAL_ENV="$(dirname "$(dirname "$PYTHON")")"
PATH="$(dirname "$PYTHON"):$PATH"
NEUCLIP_ROOT="$PWD"
export NEUCLIP_PROCESSES NEUCLIP_ROOT VIRTUAL_ENV PATH
# In the shell of a slurm job too: this is not the way to its tasks.
unset SLURM_JOB_ID
exec bash "$script" "$@"
