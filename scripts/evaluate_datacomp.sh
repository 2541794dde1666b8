#!/usr/bin/env bash
# Evaluate a checkpoint of a run with the public DataComp code (the fork that the papers on these methods used), for numbers
# by the same program as published ones. scripts/evaluate.sh gives the same numbers faster, on several GPUs, and restarts.
#
#   ./scripts/evaluate_datacomp.sh --train_output_dir logs/NAME --data_dir DIR --epoch N [--arch MODEL] [more flags of evaluate.py]
#   ./scripts/evaluate_datacomp.sh --train_output_dir logs/NAME --data_dir DIR --iter S  …
#
# --arch is read from the run's params.txt unless given. Results: logs/NAME/eval_results/epoch_N_eval_results.jsonl; tasks
# that are in this file already are skipped, whoever measured them.
# DATACOMP_FORK: the code's folder (default: .datacomp/fork-COMMIT, cloned there from DATACOMP_FORK_URL).
# DATACOMP_FORK_COMMIT: which commit of it, in full (default: the one that this project's numbers are compared with).
# DATACOMP_VENV: its own virtual environment (default: .datacomp/venv), made once from requirements-eval.txt.
set -euo pipefail

case " $* " in *" -h "* | *" --help "*) sed -n '2,13s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;; esac
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

# The public code builds the model by its name alone. The names are those of MODEL_PARAMETERS in src/evaluation/run_folder.py.
if [ -f "$run/params.txt" ]; then
    for parameter in force_quick_gelu force_custom_text force_patch_dropout force_image_size force_context_length \
        image_mean image_std image_interpolation image_resize_mode; do
        value="$(sed -n "s/^$parameter: *//p" "$run/params.txt")"
        case "$value" in
            "" | None | False) ;;
            *) die "$run/params.txt says $parameter: $value, which the public code does not know: use scripts/evaluate.sh" ;;
        esac
    done
fi

results="$run/eval_results/${name}_eval_results.jsonl"
if [ -s "$results" ]; then
    # It keeps no record of the checkpoint that a result is of.
    [ ! "$checkpoint" -nt "$results" ] || die "$checkpoint is newer than $results, whose tasks would be skipped: move that file away"
    if [ -n "$(tail -c 1 "$results")" ]; then  # as a kill leaves it; the public code cannot read it
        { tail -n 1 "$results"; echo; } >> "$results.cut-off"
        whole="$(mktemp "$results.XXXXXX")"
        sed '$d' "$results" > "$whole"
        chmod --reference="$results" "$whole" 2>/dev/null || true
        touch -r "$results" "$whole"
        mv "$whole" "$results"
        say "the last line of $results was cut off: moved to $results.cut-off"
    fi
    say "$(grep -c . "$results") results in $results: these tasks are skipped"
fi

commit="${DATACOMP_FORK_COMMIT:-ba0a4676ce04122c77b4b3312746edb2c2ecff3b}"
fork="${DATACOMP_FORK:-$root/.datacomp/fork-$commit}"
if [ ! -f "$fork/evaluate.py" ]; then
    [ -z "${DATACOMP_FORK:-}" ] || die "DATACOMP_FORK=$fork has no evaluate.py: give the folder of the public code"
    say "cloning the public code into $fork"
    mkdir -p "$root/.datacomp"
    clone="$(mktemp -d "$root/.datacomp/clone.XXXXXX")"  # another job may be at it too
    url="${DATACOMP_FORK_URL:-https://github.com/xywei00/datacomp}"
    { git -C "$clone" init --quiet && git -C "$clone" fetch --quiet --depth 1 "$url" "$commit" &&
        git -C "$clone" checkout --quiet FETCH_HEAD; } || {
        rm -rf "$clone"
        die "cannot clone $url at $commit: clone it yourself and set DATACOMP_FORK to its folder"
    }
    # Into an empty name only: the folder that another job has put there meanwhile is as good.
    chmod 755 "$clone"
    [ ! -e "$fork" ] && mv "$clone" "$fork"
    rm -rf "$clone" "$fork/${clone##*/}"
    [ -f "$fork/evaluate.py" ] || die "$fork has no evaluate.py: remove it"
fi

# Its own environment: what it needs is pinned to versions that training need not have.
unset VIRTUAL_ENV CONDA_PREFIX PYTHONPATH
NEUCLIP_VENV="${DATACOMP_VENV:-$root/.datacomp/venv}"
case "$NEUCLIP_VENV" in /*) ;; *) NEUCLIP_VENV="$here/$NEUCLIP_VENV" ;; esac
cd "$root"
mkdir -p "$(dirname "$NEUCLIP_VENV")"
if command -v flock > /dev/null && (: >> "$NEUCLIP_VENV.lock") 2> /dev/null; then
    exec 9>> "$NEUCLIP_VENV.lock"  # two jobs at once must not install into one environment
    flock 9 || true  # some network file systems have no locks
fi
prepare_python
install_once evaluation-with-the-public-code -r requirements-eval.txt
exec 9>&-
cd "$here"

say "evaluating $checkpoint ($arch)"
exec "$PYTHON" "$fork/evaluate.py" --train_output_dir "$run" --data_dir "$data" "${choice[@]}" --arch "$arch" \
    ${flags[@]+"${flags[@]}"}
