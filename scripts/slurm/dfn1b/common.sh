# Sourced by the scripts of this folder: what all methods have in common on DFN-1B.
#
# Values: the table of hyperparameters of NeuCLIP (arXiv 2511.08417). We know of no count of the keys: 1.33B is the share of
# DFN-192M, 255 keys for 192 pairs. End the command with your own numbers, --train-num-samples N --data_size LARGEST_KEY+1.
# Every sample comes once. What methods do from epoch to epoch would never begin: see what their scripts do instead.

source "${NEUCLIP_ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}/scripts/slurm/common.sh" || exit 1

# Over all ranks, whatever their number and --accum-freq: --batch-size follows from it.
GLOBAL_BATCH=5120

RECIPE=(
    --model ViT-B-16 --train-num-samples 1000000000 --data_size 1330000000
    --epochs 1 # 1.0B samples seen / 1.0B
    --lr 3.125e-4 --wd 0.2 --warmup 500 --rho 11.0
    --workers 6 --seed 2026
    # Two, of what is saved within the epoch: should the last one be damaged, there is another.
    --save-frequency 1 --keep-last 2
)
