# Sourced by the scripts of this folder: what all methods have in common on DFN-14M.
#
# Values: the published sample command of NeuCLIP (arXiv 2511.08417), which agrees with the paper's table. 13,710,637 of 19,270,000
# pairs could still be fetched; --data_size counts the keys that are missing too. Where you have other numbers, end the command
# with --train-num-samples N --data_size LARGEST_KEY+1.

source "${NEUCLIP_ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}/scripts/slurm/common.sh" || exit 1

# Over all ranks, whatever their number and --accum-freq: --batch-size follows from it.
GLOBAL_BATCH=4096

RECIPE=(
    --model ViT-B-32 --train-num-samples 13710637 --data_size 19270000
    --epochs 24 # as published: 329M samples seen; the table's 320M / 13.71M would be 23.3
    --lr 5e-4 --wd 0.2 --warmup 500 --rho 11.0
    --workers 6 --seed 2026
    # --keep-last is the number of epochs: every epoch_N.pt stays, but what is saved within epochs does not pile up.
    --save-frequency 1 --keep-last 24
)
