# Sourced by cc3m.sh and cc12m.sh: image-text pairs from a list of urls to shards that training takes.

SCRIPT="$(cd "$(dirname "$0")" && pwd)/${0##*/}"
source "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"

# img2dataset's own number; keys are the number of a shard x this + the place in it, hence the row of the list.
ROWS_PER_SHARD=10000
IMG2DATASET="${IMG2DATASET:-img2dataset}"

# absolute FOLDER PATH : the path as seen from the folder
absolute() { case "$2" in /*) printf '%s' "$2" ;; *) printf '%s/%s' "$1" "$2" ;; esac; }

# show_help : the comment at the head of the script
show_help() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p;}' "$SCRIPT"; exit 0; }

# list_with_header TSV COLUMNS TARGET : img2dataset wants the names of the columns as the first line, the published files have none
list_with_header() {
    local tsv="$1" columns="$2" target="$3" first
    first="$(head -n 1 "$tsv")"
    case "$first" in
        *$'\t'*) ;;
        *) die "$tsv: its first line has no tab; give the .tsv with ${columns/$'\t'/ and } in each line" ;;
    esac
    if [ "$tsv" -ef "$target" ]; then
        [ "$first" = "$columns" ] || die "$tsv is where the list with named columns goes: move it, or name the folder for the shards otherwise"
        return
    fi
    if [ -s "$target" ] && [ ! "$tsv" -nt "$target" ]; then return; fi
    if [ "$first" = "$columns" ]; then cp "$tsv" "$target.part"; else { printf '%s\n' "$columns"; cat "$tsv"; } > "$target.part"; fi
    mv "$target.part" "$target"
}

# need_img2dataset : it has requirements of its own (albumentations, an older webdataset) that training should not get
need_img2dataset() {
    command -v "$IMG2DATASET" > /dev/null ||
        die "$IMG2DATASET is not on PATH: python3 -m venv i2d && i2d/bin/pip install img2dataset, then IMG2DATASET=i2d/bin/img2dataset"
}

# need_all_shards FOLDER SHARDS : img2dataset writes NAME_stats.json when a shard is complete, and not before
need_all_shards() {
    local done
    done="$(find "$1" -maxdepth 1 -name '*_stats.json' | wc -l)"
    [ "$done" -ge "$2" ] || die "$1: $((done)) of $2 shards are complete; the same command goes on"
}

# forget_sizes FOLDER : img2dataset takes every .json of its folder for the record of a shard, and fails at another name
forget_sizes() { rm -f "$1/sizes.json"; }

# index_shards FOLDER : keys where there are none, sizes.json, and the flags of training
index_shards() {
    say "keys and sizes of $1"
    "$PYTHON" -m training.data.index "$1" --add-keys
}

# download_pairs TSV OUT COLUMNS FLAGS... : from the list to the flags of training
download_pairs() {
    local tsv="$1" out="${2%/}" columns="$3" rows
    shift 3
    mkdir -p "$out"
    list_with_header "$tsv" "$columns" "$out.tsv"
    rows=$(($(grep -c . "$out.tsv") - 1))
    say "$rows pairs of $tsv to $out"
    forget_sizes "$out"
    env -u PYTHONPATH "$IMG2DATASET" --url_list "$out.tsv" --input_format tsv --url_col url --caption_col caption \
        --output_format webdataset --output_folder "$out" --number_sample_per_shard "$ROWS_PER_SHARD" \
        --processes_count "${PROCESSES:-16}" --thread_count "${THREADS:-64}" --image_size 256 "$@"
    need_all_shards "$out" $(((rows + ROWS_PER_SHARD - 1) / ROWS_PER_SHARD))
    index_shards "$out"
}

# main_of_pairs COLUMNS ARGUMENTS... : the command line of both scripts
main_of_pairs() {
    local columns="$1" here="$2" tsv out
    shift 2
    case " $* " in *" -h "* | *" --help "*) show_help ;; esac
    [ $# -ge 2 ] || die "give the .tsv and the folder for the shards: $0 TSV OUT [more flags of img2dataset]"
    case " $* " in *" --number_sample_per_shard"*) die "--number_sample_per_shard: keys hang on it, it stays at $ROWS_PER_SHARD" ;; esac
    tsv="$(absolute "$here" "$1")" out="$(absolute "$here" "$2")"
    shift 2
    [ -f "$tsv" ] || die "$tsv does not exist: $0 --help says where the file comes from"
    [ -s "$tsv" ] || die "$tsv is empty: fetch it again"
    case "$out" in *.tsv | *.tar) die "$out: give the folder for the shards" ;; esac
    [ ! -e "$out" ] || [ -d "$out" ] || die "$out is not a folder: give another one"
    case "$IMG2DATASET" in */*) IMG2DATASET="$(absolute "$here" "$IMG2DATASET")" ;; esac
    need_img2dataset
    prepare_python
    install_once training -r requirements-training.txt
    download_pairs "$tsv" "$out" "$columns" "$@"
}
