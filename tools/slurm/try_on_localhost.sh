#!/usr/bin/env bash
# The check of encode.sbatch, against a real Slurm on this machine: sudo tools/slurm/try_on_localhost.sh [FOLDER]
#
# For people, in a container or a virtual machine: it needs root and Debian, installs slurm-wlm and munge, and starts
# their daemons with a config of its own, in FOLDER (default: a new one in /tmp), as two nodes of one CPU each. A Slurm
# that is there already is neither asked nor changed. A quarter of an hour on two cores, no GPU; nothing but the
# packages is downloaded. PYTHON names the interpreter that has streamprep (default: .venv/bin/python, of `make demo`).
#
# 1. Sample clips, shards and a tiny model; encode them here, undisturbed.
# 2. Start munged, slurmctld and two slurmds. They end with this script.
# 3. Submit encode.sbatch on both nodes several times, onto a new OUT each: left alone; requeued midway; warned of the
#    time limit midway; cancelled midway and submitted again; with a node that dies midway.
# 4. Each must end complete: `status` says done, `verify` finds nothing wrong, the files are those of the undisturbed
#    run.
set -euo pipefail
cd "$(dirname "$0")/../.."

: "${PYTHON:=$PWD/.venv/bin/python}"
FLAGS=(--max-height 128 --max-width 224 --num-frames 17)

main() {
    [ "$(id -u)" = 0 ] || fail "root is needed, to install and start Slurm"
    [ -e /etc/debian_version ] || fail "this is not Debian, and its packages are needed"
    PYTHONPATH=. "$PYTHON" -c 'import streamprep, diffusers' ||
        fail "PYTHON=$PYTHON must have what streamprep needs: \`make demo\` installs it"
    folder=${1:-$(mktemp -d /tmp/try_slurm.XXXXXX)}
    mkdir -p "$folder"
    folder=$(realpath "$folder")
    chmod 755 "$folder" # munge wants its socket where everyone may look

    say "In $folder: clips, shards, a tiny model, and what to expect"
    install_slurm
    make_inputs
    say "Start Slurm"
    trap stop_slurm EXIT
    start_slurm

    run_alone
    run_requeued
    run_warned
    run_cancelled
    run_with_a_node_that_dies
    say "All complete: left alone, requeued, warned, cancelled and submitted again, with a node that died"
}

install_slurm() {
    if ! type slurmctld slurmd sbatch munged >/dev/null 2>&1; then
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurm-wlm munge
    fi
    dpkg-query --show slurm-wlm
}

make_inputs() {
    export SHARDS=$folder/shards MODEL=$folder/model NPROC_PER_NODE=1 OMP_NUM_THREADS=1 PYTHON PYTHONPATH=$PWD
    "$PYTHON" tools/make_clips.py "$folder/clips" --num-clips 64 --seconds 7
    "$PYTHON" tools/make_tiny_model.py "$MODEL"
    "$PYTHON" -m streamprep pack "$folder/clips" "$SHARDS" --shard-size-mb 1
    "$PYTHON" -m streamprep encode "$SHARDS" "$folder/undisturbed" --model-path "$MODEL" "${FLAGS[@]}"
}

# Two nodes on one machine, which Debian's build allows (`slurmd -N`). No cgroups: containers rarely have them to give.
start_slurm() {
    export SLURM_CONF=$folder/slurm.conf
    cat >"$SLURM_CONF" <<CONF
ClusterName=try
SlurmctldHost=$(hostname)
SlurmctldPort=27817
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/%n.spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
SlurmdTimeout=15
NodeName=node[1-2] NodeHostname=$(hostname) NodeAddr=127.0.0.1 Port=27821-27822 CPUs=1
PartitionName=try Nodes=ALL Default=YES MaxTime=INFINITE
CONF
    mkdir -p "$folder"/{state,node1.spool,node2.spool}
    (umask 077 && head -c 1024 /dev/urandom >"$folder/munge.key")
    munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" --pid-file="$folder/munged.pid" \
        --log-file="$folder/munged.log" --seed-file="$folder/munge.seed"
    slurmctld -c
    slurmd -N node1
    slurmd -N node2
    wait_until 60 nodes_are_idle
    sinfo --Node
}

stop_slurm() {
    trap - EXIT
    say "Stop Slurm; its logs and those of the jobs stay in $folder"
    scancel --me 2>/dev/null || true
    wait_until 60 no_jobs || true
    local pid_file
    for pid_file in "$folder"/{node1,node2,slurmctld,munged}.pid; do
        [ ! -s "$pid_file" ] || kill "$(cat "$pid_file")" 2>/dev/null || true
    done
}

run_alone() {
    say "Left alone"
    submit alone
    expect_complete
    [ "$(restarts)" = 0 ] || fail "it was requeued"
}

run_requeued() {
    say "Requeued midway, as by preemption: Slurm ends it and queues it again"
    submit requeued
    wait_until 300 is_midway
    scontrol requeue "$job"
    expect_complete
    [ "$(restarts)" = 1 ] || fail "it was requeued $(restarts) times instead of once"
}

run_warned() {
    say "Warned midway, as before a time limit: the script stops the ranks and requeues"
    submit warned
    wait_until 300 is_midway
    scancel --batch --signal=TERM "$job"
    expect_complete
    [ "$(restarts)" = 1 ] || fail "it was requeued $(restarts) times instead of once"
    grep -q 'told to stop: yes' "$(log)" || fail "it did not notice"
}

run_cancelled() {
    say "Cancelled midway: it stays so, until it is submitted again"
    submit cancelled
    wait_until 300 is_midway
    scancel "$job"
    wait_until 120 has_ended
    [ "$(state)" = CANCELLED ] || fail "it is $(state)"
    [ "$(exit_code_of status)" = 4 ] || fail "it is not resumable"
    submit cancelled
    expect_complete
}

# All at once and by SIGKILL, as when the power goes: slurmd, slurmstepd, the agent, the rank and its children.
run_with_a_node_that_dies() {
    say "A node dies midway: Slurm notices and queues the job again"
    submit node_dies
    wait_until 300 is_midway
    kill_node node2
    wait_until 120 is_requeued
    slurmd -N node2
    # At once, Slurm 22.05 gave the job a node that it then held to be idle, and its srun waited for ever.
    wait_until 180 is_running
    expect_complete
}

submit() {
    export OUT=$folder/out_$1
    job=$(sbatch --parsable --nodes 2 --output "$folder/job-%j.log" tools/slurm/encode.sbatch "${FLAGS[@]}")
    echo "job $job, $(log)"
}

expect_complete() {
    wait_until 600 has_ended
    [ "$(state)" = COMPLETED ] || fail "the job is $(state)"
    [ "$(exit_code_of status)" = 0 ] || fail "status does not say done"
    "$PYTHON" -m streamprep verify "$OUT"
    # Their names hold their digests.
    diff <(files "$folder/undisturbed") <(files "$OUT") || fail "other files than in the undisturbed run"
}

# Slurm's own processes are known by the log they write, those of the step by their environment.
kill_node() {
    local process pids=()
    for process in /proc/[0-9]*; do
        if [ -n "$(find "$process/fd" -lname "$folder/$1.log" 2>/dev/null)" ] || {
            grep -qszxF "SLURMD_NODENAME=$1" "$process/environ" &&
                grep -qszxF "SLURM_CONF=$SLURM_CONF" "$process/environ"
        }; then
            pids+=("${process#/proc/}")
        fi
    done
    echo "killing ${#pids[@]} processes of $1"
    kill -KILL "${pids[@]}"
}

files() { (cd "$1" && find combined_parquet_dataset -type f | sort); }
log() { echo "$folder/job-$job.log"; }
state() { scontrol --oneliner show job "$job" | sed -n 's/.* JobState=\([^ ]*\) .*/\1/p'; }
restarts() { scontrol --oneliner show job "$job" | sed -n 's/.* Restarts=\([^ ]*\) .*/\1/p'; }
nodes_are_idle() { [ "$(sinfo --noheader --states idle --format %D)" = 2 ]; }
no_jobs() { [ -z "$(squeue --noheader)" ]; }
is_midway() { [ -n "$(compgen -G "$OUT/_streamprep/records/*.json")" ]; }
is_running() { [ "$(state)" = RUNNING ]; }
is_requeued() { [ "$(state)" = PENDING ]; }

# A requeued job waits for two minutes, so that nodes can recover; mostly there is nothing to wait for here.
has_ended() {
    case $(state) in
    COMPLETED | CANCELLED | FAILED | NODE_FAIL | TIMEOUT) true ;;
    PENDING) scontrol update "JobId=$job" StartTime=now 2>/dev/null && false ;;
    *) false ;;
    esac
}

exit_code_of() {
    local code=0
    "$PYTHON" -m streamprep "$1" "$OUT" >/dev/null 2>&1 || code=$?
    echo "$code"
}

wait_until() {
    local seconds=$1 started=$SECONDS
    until "$2"; do
        [ $((SECONDS - started)) -lt "$seconds" ] || fail "$2: not within $seconds seconds"
        sleep 0.5
    done
}

say() { printf '\n== %s\n' "$*"; }

fail() {
    echo "try_on_localhost.sh: $*${job:+; see $(log)}" >&2
    exit 1
}

main "$@"
