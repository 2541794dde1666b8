# Sourced by the scripts of this folder: what all methods have in common on CC3M.
#
# Values: the tables of hyperparameters of FastCLIP (arXiv 2407.01445, medium scale) and NeuCLIP (arXiv 2511.08417).
# 2,723,840 of the 3,318,333 pairs could still be fetched (FastCLIP's release), and --data_size counts the keys that are missing
# too. Where you have other numbers, end the command with --train-num-samples N --data_size LARGEST_KEY+1.

source "${NEUCLIP_ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}/scripts/slurm/common.sh" || exit 1

# Over all ranks, whatever their number and --accum-freq: --batch-size follows from it.
GLOBAL_BATCH=1024

RECIPE=(
    --model RN50 --train-num-samples 2723840 --data_size 3318333
    --epochs 37 # 100M samples seen / 2.72M = 36.7
    --lr 1e-3 --wd 0.1 --warmup 10000 --rho 6.5
    --workers 6 --seed 2026
    # --keep-last is the number of epochs: every epoch_N.pt stays, but what is saved within epochs does not pile up.
    --save-frequency 1 --keep-last 37
)
