#!/usr/bin/env bash
# The main job, end to end: tools/demo.sh FOLDER DATASET MODEL [flags of `streamprep encode`]
#
# With an empty DATASET sample clips are made, with an empty MODEL a tiny one: nothing is downloaded.
set -euo pipefail

demo=$1 dataset=$2 model=$3
shift 3
: "${BIN:=.venv/bin}"
mkdir -p "$demo"

if [ -t 1 ]; then say() { printf '\n\033[1m%s\033[0m\n' "$*"; }; else say() { printf '\n%s\n' "$*"; }; fi

if [ -z "$dataset" ]; then
    dataset=$demo/dataset
    say "1. Sample clips"
    [ -d "$dataset" ] || "$BIN/python" tools/make_clips.py "$dataset"
fi
if [ -z "$model" ]; then
    model=$demo/model
    say "2. A tiny model of Wan's shape, with random weights"
    [ -d "$model" ] || "$BIN/python" tools/make_tiny_model.py "$model"
fi

say "3. streamprep pack $dataset $demo/shards"
"$BIN/streamprep" pack "$dataset" "$demo/shards"

say "4. streamprep encode $demo/shards $demo/latents --model-path $model $*"
"$BIN/streamprep" encode "$demo/shards" "$demo/latents" --model-path "$model" "$@"

say "5. streamprep verify $demo/latents"
"$BIN/streamprep" verify "$demo/latents"

say "What it made"
find "$demo/latents" -type f -printf '%10s  %p\n' | sort -k2
say "How to look at it"
cat <<EOF
$BIN/streamprep status $demo/latents
$BIN/python -c "
import pyarrow.parquet as pq
columns = ['id', 'caption', 'vae_latent_shape', 'text_embedding_shape', 'duration_sec', 'fps']
for row in pq.read_table('$demo/latents/combined_parquet_dataset', columns=columns).slice(0, 3).to_pylist():
    print(row)"
EOF
