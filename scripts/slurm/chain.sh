#!/usr/bin/env bash
# A run chained over time limits, for clusters that do not let jobs go back into the queue.
#
#   TRAIN_DATA='…' scripts/slurm/chain.sh 8 [--option=value of sbatch …] scripts/slurm/dfn14m/neuclip.sbatch [more flags]
#
# submits a job array of 8 links, one running at a time. Slurm warns a link before its time limit, it saves a checkpoint and ends
# (as failed, with 75:0); the next one goes on from there, after a crash too. Links that are left when the run is through, or when a
# flag is wrong, are cancelled. Too few links? The same command again goes on.
#
# Evaluation when the training has ended, of a chain (whose number this prints) or of any other job:
#   RUN=logs/neuclip-dfn14m DATA_DIR=/data/datacomp sbatch --dependency=afterany:NUMBER scripts/slurm/evaluate.sbatch --epoch 24
# It says so in one line where there is no such epoch: afterok would wait for ever for links that were interrupted.
set -euo pipefail

die() { printf 'error: %s\n' "$*" >&2; exit 2; }

case " $* " in *" -h "* | *" --help "*) sed -n '2,12s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;; esac
links="${1:-}"
[[ "$links" =~ ^[1-9][0-9]*$ ]] || die "how many links? the first argument is '$links': give a number, then the script (see --help)"
shift
options=()
while [[ "${1:-}" = --* ]]; do
    options+=("$1")
    shift
done
script="${1:-}"
[ -f "$script" ] || die "which run? there is no script '$script': give one of scripts/slurm/*/*.sbatch, before it options as --name=value (see --help)"
command -v sbatch > /dev/null || die "there is no sbatch here: call this where you submit jobs"
shift

# Told to the ranks by the environment: sbatch hands it on.
NEUCLIP_CHAIN=1 sbatch --parsable --no-requeue --array="1-$links%1" "${options[@]}" "$script" "$@"
