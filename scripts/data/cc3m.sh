#!/usr/bin/env bash
# Conceptual Captions 3M: from the published list of urls to webdataset shards, with img2dataset.
#
#   ./scripts/data/cc3m.sh TSV OUT [more flags of img2dataset]
#
# TSV: Train_GCC-training.tsv (500 MB, "caption<tab>url" a line) from https://ai.google.com/research/ConceptualCaptions/download
# OUT: folder for the shards; OUT.tsv beside it is the list with a first line that names its columns.
# The command is that of img2dataset's own example for this data set (256 x 256, white borders); flags given here come after
# it and win: --resize_mode keep_ratio --resize_only_if_bigger True leaves the borders away.
# Started again it goes on where it stopped. PROCESSES (16) and THREADS (64, of each) fit 16 cores; IMG2DATASET: the program.
set -euo pipefail

here="$PWD"
source "$(dirname "${BASH_SOURCE[0]}")/pairs.sh"
main_of_pairs $'caption\turl' "$here" "$@"
