#!/usr/bin/env bash
# Conceptual 12M: from the published list of urls to webdataset shards, with img2dataset.
#
#   ./scripts/data/cc12m.sh TSV OUT [more flags of img2dataset]
#
# TSV: cc12m.tsv (2.6 GB, "url<tab>caption" a line) from https://storage.googleapis.com/conceptual_12m/cc12m.tsv
# OUT: folder for the shards (331 GB when all links were alive); OUT.tsv beside it is the list with a first line that names its columns.
# The command is that of img2dataset's own example for this data set (256 x 256, white borders); flags given here come after
# it and win: --resize_mode keep_ratio --resize_only_if_bigger True leaves the borders away.
# Started again it goes on where it stopped. PROCESSES (16) and THREADS (64, of each) fit 16 cores; IMG2DATASET: the program.
set -euo pipefail

here="$PWD"
source "$(dirname "${BASH_SOURCE[0]}")/pairs.sh"
main_of_pairs $'url\tcaption' "$here" "$@"
