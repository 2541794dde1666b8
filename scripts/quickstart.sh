#!/usr/bin/env bash
# From nothing to a trained and evaluated small CLIP model: environment, data, training, evaluation.
#
#   ./scripts/quickstart.sh [--objective openclip|siglip|fastclip|amorlip|neuclip] [more flags of src/training/main.py]
#
# A second call goes on where the first one stopped, or shows what is there. Runs of several objectives are compared.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

DATA="${NEUCLIP_DATA:-data}/quickstart"
LOGS="${NEUCLIP_LOGS:-logs}"
EPOCHS=10

objective=neuclip
flags=()
# for the prototypes of neuclip; another network has other flags
network=(--npn_num_protos 1024 --npn_restart_iter 100)
while [ $# -gt 0 ]; do
    case "$1" in
        --objective) [ $# -gt 1 ] || die "--objective needs a value: openclip, siglip, fastclip, amorlip or neuclip"; objective="$2"; shift 2 ;;
        --objective=*) objective="${1#*=}"; shift ;;
        --name | --name=* | --logs | --logs=*) die "$1: the quickstart names its runs itself; set NEUCLIP_LOGS, or call src/training/main.py" ;;
        -h | --help) sed -n '2,6s/^# \{0,1\}//p' scripts/quickstart.sh; exit 0 ;;
        *) flags+=("$1"); shift ;;
    esac
done
case " ${flags[*]-} " in *" --npn_arch mlp "* | *" --npn_arch=mlp "*) network=() ;; esac
name="quickstart-$objective"

prepare_python
install_once training -r requirements-training.txt
install_once quickstart -r requirements-quickstart.txt
install_drawings

say "data: $DATA"
"$PYTHON" scripts/data/build_quickstart.py --out "$DATA"

precision=fp32
workers=1
if "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    precision=amp_bf16
    workers=4
fi

say "training: $LOGS/$name"
began=$SECONDS
"$PYTHON" -u src/training/main.py \
    --name "$name" --logs "$LOGS" --resume latest --objective "$objective" \
    --model quickstart --model-config src/training/model_configs/quickstart.json \
    --train-data "$DATA/train" --val-data "$DATA/test" --zeroshot-data "$DATA/zeroshot" \
    --epochs $EPOCHS --batch-size 256 --lr 1e-3 --wd 0.1 --warmup 100 --beta2 0.98 --eps 1e-6 \
    --lr_tau 2e-4 --rho 8 --data_size 30000 \
    --precision $precision --workers $workers --log-every-n-steps 20 --zeroshot-frequency 1 --save-most-recent \
    ${network[@]+"${network[@]}"} ${flags[@]+"${flags[@]}"}
say "trained in $((SECONDS - began)) s"

compared=()
for folder in "$LOGS"/quickstart-*/; do
    [ "$folder" = "$LOGS/$name/" ] || [ ! -f "$folder/evaluation.json" ] || compared+=("$folder")
done
say "evaluation: $LOGS/$name"
"$PYTHON" src/evaluation/main.py --train_output_dir "$LOGS/$name" \
    --pairs "$DATA/test" --zeroshot "$DATA/zeroshot" --queries "$DATA/queries.json" \
    ${compared[@]+--compare "${compared[@]}"}
"$PYTHON" src/evaluation/gallery.py --train_output_dir "$LOGS/$name" --pairs "$DATA/test" --queries "$DATA/queries.json"
