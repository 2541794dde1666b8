#!/usr/bin/env bash
# Evaluate a checkpoint of a run with the public DataComp code (the fork that the papers on these methods used), for numbers
# by the same program as published ones. scripts/evaluate.sh gives the same numbers faster, on several GPUs, and restarts.
#
#   ./scripts/evaluate_datacomp.sh --train_output_dir logs/NAME --data_dir DIR --epoch N [--arch MODEL] [more flags of evaluate.py]
#   ./scripts/evaluate_datacomp.sh --train_output_dir logs/NAME --data_dir DIR --iter S  …
#
# --arch is read from the run's params.txt unless given. Results: logs/NAME/eval_results/epoch_N_eval_results.jsonl; tasks
# that are in this file already are skipped, whoever measured them.
# DATACOMP_FORK: the code's folder (default: .datacomp/fork, cloned there from DATACOMP_FORK_URL).
# DATACOMP_VENV: its own virtual environment (default: .datacomp/venv), made once from requirements-eval.txt.
set -euo pipefail

case " $* " in *" -h "* | *" --help "*) sed -n '2,12s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;; esac
here="$PWD"
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
root="$PWD"
cd "$here"  # the paths of the flags are as the caller sees them

run="" data="" epoch="" iteration="" arch=""
flags=()
while [ $# -gt 0 ]; do
    flag="${1%%=*}"
    case "$flag" in
        --train_output_dir | --data_dir | --epoch | --iter | --arch)
            if [ "$flag" != "$1" ]; then value="${1#*=}"; shift
            else [ $# -gt 1 ] || die "$flag needs a value"; value="$2"; shift 2; fi ;;
        *) flags+=("$1"); shift; continue ;;
    esac
    case "$flag" in
        --train_output_dir) run="${value%/}" ;;
        --data_dir) data="$value" ;;
        --epoch) epoch="$value" ;;
        --iter) iteration="$value" ;;
        --arch) arch="$value" ;;
    esac
done

[ -n "$run" ] || die "which run? give --train_output_dir logs/NAME (see --help)"
[ -d "$run" ] || die "--train_output_dir $run does not exist: give the folder that training wrote, logs/NAME"
[ -n "$data" ] || die "--data_dir is missing: give the folder of the evaluation sets"
[ -d "$data" ] || die "--data_dir $data does not exist: python src/evaluation/download.py $data fetches the sets"
# Without the file of the epoch asked for, the public code evaluates epoch_latest.pt and files the result under the wrong name.
case "$epoch:$iteration" in
    : | *[!0-9:]*) die "which checkpoint? give --epoch N or --iter S, a number" ;;
    *:) name="epoch_$epoch"; choice=(--epoch "$epoch") ;;
    :*) name="iter_$iteration"; choice=(--iter "$iteration") ;;
    *) die "--epoch $epoch --iter $iteration: give one of them" ;;
esac
checkpoint="$run/checkpoints/$name.pt"
[ -f "$checkpoint" ] ||
    die "$checkpoint does not exist; there is: $(cd "$run/checkpoints" 2>/dev/null && echo *.pt || echo no folder checkpoints)"

if [ -z "$arch" ]; then
    [ -f "$run/params.txt" ] || die "$run has no params.txt: give --arch MODEL"
    arch="$(sed -n 's/^model: *//p' "$run/params.txt")"
    [ -n "$arch" ] || die "$run/params.txt names no model: give --arch MODEL"
fi
[ ! -f "$run/model_configs/$arch.json" ] ||
    die "model $arch has a configuration of its own, which the public code does not know: use scripts/evaluate.sh"

results="$run/eval_results/${name}_eval_results.jsonl"
if [ -s "$results" ]; then
    # It keeps no record of the checkpoint that a result is of.
    [ ! "$checkpoint" -nt "$results" ] || die "$checkpoint is newer than $results, whose tasks would be skipped: move that file away"
    [ -z "$(tail -c 1 "$results")" ] || die "the last line of $results is cut off: remove it, the public code cannot read it"
    say "$(grep -c . "$results") results in $results: these tasks are skipped"
fi

fork="${DATACOMP_FORK:-$root/.datacomp/fork}"
if [ ! -f "$fork/evaluate.py" ]; then
    [ -z "${DATACOMP_FORK:-}" ] || die "DATACOMP_FORK=$fork has no evaluate.py: give the folder of the public code"
    say "cloning the public code into $fork"
    rm -rf "$fork.partial"
    git clone --quiet --depth 1 "${DATACOMP_FORK_URL:-https://github.com/xywei00/datacomp}" "$fork.partial" ||
        die "cannot clone it: clone it yourself and set DATACOMP_FORK to its folder"
    mv "$fork.partial" "$fork"
fi

# Its own environment: what it needs is pinned to versions that training need not have.
unset VIRTUAL_ENV CONDA_PREFIX PYTHONPATH
NEUCLIP_VENV="${DATACOMP_VENV:-$root/.datacomp/venv}"
case "$NEUCLIP_VENV" in /*) ;; *) NEUCLIP_VENV="$here/$NEUCLIP_VENV" ;; esac
cd "$root"
prepare_python
install_once evaluation-with-the-public-code -r requirements-eval.txt
cd "$here"

say "evaluating $checkpoint ($arch)"
exec "$PYTHON" "$fork/evaluate.py" --train_output_dir "$run" --data_dir "$data" "${choice[@]}" --arch "$arch" \
    ${flags[@]+"${flags[@]}"}
