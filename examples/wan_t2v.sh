#!/usr/bin/env bash
# Videos and captions -> latents for training Wan text-to-video:
# 77 frames of 480x832 at 16 fps, as FastVideo's own scripts.
#
#   DATASET=my_dataset examples/wan_t2v.sh                    with the defaults below
#   DATASET=my_dataset examples/wan_t2v.sh --device cuda:1    flags go to `streamprep encode`, and have the last word
#
# Stop it whenever you like, the same command goes on. For other settings name another OUT.
#
# Wan 2.2 T2V-A14B has the same VAE and geometry: MODEL_PATH=Wan-AI/Wan2.2-T2V-A14B-Diffusers
# Wan 2.2 TI2V-5B has a VAE of its own:           MODEL_PATH=Wan-AI/Wan2.2-TI2V-5B-Diffusers and the flags
#                                     --max-height 704 --max-width 1280 --num-frames 121 --train-fps 24
set -euo pipefail

# Videos and captions, in one of the README's layouts:
: "${DATASET:=}"
# A hub id or a folder:
: "${MODEL_PATH:=Wan-AI/Wan2.1-T2V-1.3B-Diffusers}"
# The packed videos, for this job and others:
: "${SHARDS:=data/wan_t2v/shards}"
# The latents:
: "${OUT:=data/wan_t2v/latents}"

if [ ! -d "$DATASET" ]; then
    echo "DATASET must be a folder with videos and captions, got '$DATASET': DATASET=my_dataset $0" >&2
    exit 2
fi
command -v streamprep >/dev/null || {
    echo "there is no streamprep on the PATH: install it, or activate the environment it is in" >&2
    exit 1
}

streamprep pack "$DATASET" "$SHARDS"
streamprep encode "$SHARDS" "$OUT" --model-path "$MODEL_PATH" --workload-type t2v \
    --max-height 480 --max-width 832 --num-frames 77 --train-fps 16 "$@"
streamprep verify "$OUT"

echo "FastVideo's trainers read this as their data path: $OUT/combined_parquet_dataset"
