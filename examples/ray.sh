#!/usr/bin/env bash
# The job of wan_t2v.sh on a Ray cluster, one process for each of its GPUs.
#
#   DATASET=my_dataset examples/ray.sh                          on this machine alone: Ray is started, and ended, for the job
#   RAY_ADDRESS=auto DATASET=my_dataset examples/ray.sh         on the cluster that this machine is a node of
#   DATASET=my_dataset examples/ray.sh --nproc 4 --device cpu   flags go to `streamprep encode`, and have the last word
#
# Every node needs streamprep (pip install "streamprep[ray]", the same versions of everything), and must find DATASET's
# shards, the model and the output under the same paths, and a folder of the name of the one where you give the command.
#
# Kill what you like: an actor, a process, a node. The others go on with its shards, and it is replaced when there is
# room. Stop this script whenever you like, the same command goes on. For other settings name another OUT.
set -euo pipefail

# Videos and captions, in one of the README's layouts:
: "${DATASET:=}"
# A hub id or a folder:
: "${MODEL_PATH:=Wan-AI/Wan2.1-T2V-1.3B-Diffusers}"
# The packed videos, for this job and others; all nodes must see them:
: "${SHARDS:=data/ray/shards}"
# The latents; all nodes must see them:
: "${OUT:=data/ray/latents}"

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
    --max-height 480 --max-width 832 --num-frames 77 --train-fps 16 --launcher ray --nproc auto "$@"
streamprep verify "$OUT"

echo "FastVideo's trainers read this as their data path: $OUT/combined_parquet_dataset"
