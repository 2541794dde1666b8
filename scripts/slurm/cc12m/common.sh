# Sourced by the scripts of this folder: what all methods have in common on CC12M.
#
# Values: the tables of hyperparameters of FastCLIP (arXiv 2407.01445, large scale) and NeuCLIP (arXiv 2511.08417).
# 9,187,328 of the 12,423,374 pairs could still be fetched (FastCLIP's release), and --data_size counts the keys that are missing
# too. Where you have other numbers, end the command with --train-num-samples N --data_size LARGEST_KEY+1.

source "${NEUCLIP_ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}/scripts/slurm/common.sh" || exit 1

# Over all ranks, whatever their number and --accum-freq: --batch-size follows from it.
GLOBAL_BATCH=2048

RECIPE=(
    --model ViT-B-32 --train-num-samples 9187328 --data_size 12423374
    --epochs 33 # 300M samples seen / 9.19M = 32.7
    --lr 4e-4 --wd 0.1 --warmup 10000 --rho 8.5
    --workers 6 --seed 2026
    # --keep-last is the number of epochs: every epoch_N.pt stays, but what is saved within epochs does not pile up.
    --save-frequency 1 --keep-last 33
)
