#!/usr/bin/env bash
# DFN (Data Filtering Networks) subsets of DataComp's pools: from published uids to webdataset shards, with DataComp's tools.
#
#   DATACOMP=/path/to/datacomp ./scripts/data/dfn.sh medium|large|xlarge OUT [more flags of download_upstream.py]
#
# medium is the list behind DFN-14M (19.2 M uids), large most of that behind DFN-192M (192 M), xlarge is DFN-2B (1.9 G).
# DATACOMP: a checkout of https://github.com/mlfoundations/datacomp. DATACOMP_PYTHON: python of its environment (python).
# OUT/uids.npy: the uids, fetched from https://huggingface.co/datasets/apf1/datafilteringnetworks_2b unless there.
# OUT/pool/metadata: urls and captions of the whole pool (30 GB, 300 GB, 3 TB). OUT/subset: those of the uids.
# OUT/shards: the images of the subset alone. Started again it goes on where it stopped.
set -euo pipefail

here="$PWD"
source "$(dirname "${BASH_SOURCE[0]}")/pairs.sh"

case " $* " in *" -h "* | *" --help "*) show_help ;; esac
[ $# -ge 2 ] || die "give a scale and a folder: $0 medium|large|xlarge OUT [more flags of download_upstream.py]"
scale="$1" out="$(absolute "$here" "${2%/}")"
shift 2
case "$scale" in
    medium) list=datacomp_medium_dfn_20m_inds.npy ;;
    large) list=datacomp_large_dfn_200m_inds.npy ;;
    xlarge) list=dfn_2b_inds.npy ;;
    *) die "$scale is no scale with a published list of uids: give medium, large or xlarge" ;;
esac
[ ! -e "$out" ] || [ -d "$out" ] || die "$out is not a folder: give another one"
# What is there would be taken for parts of the other list.
begun="$(cat "$out/scale" 2> /dev/null || printf '%s' "$scale")"
[ "$begun" = "$scale" ] || die "$out was begun with the scale $begun: give another folder for $scale"
[ -n "${DATACOMP:-}" ] || die "DATACOMP is not set: git clone https://github.com/mlfoundations/datacomp and set it to the folder"
datacomp="$(absolute "$here" "$DATACOMP")"
[ -f "$datacomp/download_upstream.py" ] || die "DATACOMP=$DATACOMP has no download_upstream.py: give a checkout of DataComp's code"
upstream="${DATACOMP_PYTHON:-python}"
case "$upstream" in */*) upstream="$(absolute "$here" "$upstream")" ;; esac
command -v "$upstream" > /dev/null || die "DATACOMP_PYTHON=$upstream cannot be run: give the python of DataComp's environment"
prepare_python
install_once training -r requirements-training.txt

mkdir -p "$out"
printf '%s\n' "$scale" > "$out/scale"
if [ ! -s "$out/uids.npy" ]; then
    say "uids: $list"
    curl --fail --location --continue-at - --output "$out/uids.npy.part" \
        "https://huggingface.co/datasets/apf1/datafilteringnetworks_2b/resolve/main/$list" ||
        die "the uids could not be fetched: put $list of the data set apf1/datafilteringnetworks_2b at $out/uids.npy"
    mv "$out/uids.npy.part" "$out/uids.npy"
fi

if [ ! -f "$out/pool.complete" ]; then
    say "metadata of DataComp's $scale pool"
    # What an interrupted call left would be taken for the whole; the files that it fetched are still in its cache.
    again=()
    [ ! -d "$out/pool/metadata" ] || again=(--overwrite_metadata)
    env -u PYTHONPATH "$upstream" "$datacomp/download_upstream.py" --scale "$scale" --data_dir "$out/pool" --skip_shards ${again[@]+"${again[@]}"}
    touch "$out/pool.complete"
fi

if [ ! -f "$out/subset.complete" ]; then
    say "the rows of the uids"
    "$upstream" scripts/data/select_uids.py --uids "$out/uids.npy" --metadata "$out/pool/metadata" --out "$out/subset"
    touch "$out/subset.complete"
fi

say "images to $out/shards"
forget_sizes "$out/shards"
env -u PYTHONPATH "$upstream" "$datacomp/download_upstream.py" --scale "$scale" --metadata_dir "$out/subset" --data_dir "$out" "$@"
# No file of the subset but the last has rows for a part of a shard.
shards="$("$upstream" scripts/data/select_uids.py --shards "$out/subset")"
need_all_shards "$out/shards" "$shards"
index_shards "$out/shards"
