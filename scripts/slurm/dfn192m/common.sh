# Sourced by the scripts of this folder: what all methods have in common on DFN-192M.
#
# Values: the table of hyperparameters of NeuCLIP (arXiv 2511.08417). 192,160,462 of 255,020,000 pairs could still be fetched
# (DRRho-CLIP's release); --data_size counts the keys that are missing too. Where you have other numbers, end the command with
# --train-num-samples N --data_size LARGEST_KEY+1.

source "${NEUCLIP_ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}/scripts/slurm/common.sh" || exit 1

# Over all ranks, whatever their number and --accum-freq: --batch-size follows from it.
GLOBAL_BATCH=5120

RECIPE=(
    --model ViT-B-16 --train-num-samples 192160462 --data_size 255020000
    --epochs 7 # 1.3B samples seen / 192M = 6.8
    --lr 3.125e-4 --wd 0.2 --warmup 500 --rho 11.0
    --workers 6 --seed 2026
    # --keep-last is the number of epochs: every epoch_N.pt stays, but what is saved within epochs does not pile up.
    --save-frequency 1 --keep-last 7
)
