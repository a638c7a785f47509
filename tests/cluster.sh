#!/usr/bin/env bash
# heft.sub, heft_exec.sh and container.def on a real HTCondor pool. Run as root:
#
#   tests/cluster.sh RIG [image|smoke|sweep|vacate|all]
#
# RIG is a script that runs such a pool on this machine: `RIG up`, `RIG submit DIR heft.sub ARGS...` (copies DIR,
# submits as a normal user, waits, copies back to DIR.out), `RIG user CMD...`, `RIG sif DIR container.def OUT.sif`.
# With RIG_NO_CONTAINER=1 the container line is taken out and the packages must be the execute machine's own.
set -euo pipefail
rig=$1
part=${2:-all}
cd "$(dirname "$0")/.."
work=${CLUSTER_WORK:-$(mktemp -d)}
image=$work/container.sif

say() { printf '\n== %s\n' "$*"; }
wants() { [ "$part" = all ] || [ "$part" = "$1" ]; }

fresh() { # DIR: what a user has after cloning, with an image and an empty token file
    rm -rf "$1" "$1.out"
    mkdir -p "$1"
    git ls-files | tar -cf - -T - | tar -xf - -C "$1"
    (umask 077 && : >"$1/.hf_token")
    if [ -n "${RIG_NO_CONTAINER:-}" ]; then sed -i '/^container_image/d' "$1/heft.sub"; else cp "$image" "$1/"; fi
}

if wants image && [ -z "${RIG_NO_CONTAINER:-}" ]; then
    say "image: apptainer build, with its %test"
    fresh_source=$work/source
    mkdir -p "$fresh_source"
    git ls-files | tar -cf - -T - | tar -xf - -C "$fresh_source"
    time "$rig" sif "$fresh_source" container.def "$image"
    ls -l "$image"
fi

if wants smoke; then
    say "smoke: condor_submit heft.sub extra=--smoke"
    fresh "$work/smoke"
    RIG_WAIT=${RIG_WAIT:-900} "$rig" submit "$work/smoke" heft.sub extra=--smoke
    ls -l "$work/smoke.out/results/smoke" "$work/smoke.out/condor_outs"
    test -s "$work/smoke.out/results/smoke/lora3-reft3.json"
fi

if wants sweep; then
    say "sweep: three rows, then one with a mistake among them"
    fresh "$work/sweep"
    # as a user would: the single queue off, a table on
    sed -i '/^queue$/,$d' "$work/sweep/heft.sub"
    printf 'queue epochs_lora, epochs_reft from (\n 0 0\n 0 1\n 1 0\n nought 1\n)\n' >>"$work/sweep/heft.sub"
    RIG_WAIT=${RIG_WAIT:-900} "$rig" submit "$work/sweep" heft.sub extra=--smoke && { echo "the mistake went unseen"; exit 1; }
    ls "$work/sweep.out/results/smoke"
    for run in lora0-reft0 lora0-reft1 lora1-reft0; do test -s "$work/sweep.out/results/smoke/$run.json"; done
    grep -h "heft: error" "$work"/sweep.out/condor_outs/*_3.err
    test "$(grep -l 'heft: error' "$work"/sweep.out/condor_outs/*.err | wc -l)" = 1
fi

if wants vacate; then
    say "vacate: condor_vacate_job in stage 1, stage 2 and the evaluation of one job"
    fresh "$work/vacate"
    RIG_WAIT=${RIG_WAIT:-1200} "$rig" submit "$work/vacate" heft.sub extra=--smoke >"$work/vacate.log" 2>&1 &
    submit=$!
    # The job's own words, as they come back with each eviction, and its sandbox tell where it is.
    execute=$("$rig" user condor_config_val EXECUTE)
    for sign in 'lora3/checkpoint-32/heft.json' 'lora3-reft3/checkpoint-32/heft.json' 'lora3-reft3/answers.jsonl'; do
        until "$rig" root find "$execute" -path "*/output/smoke/$sign" -size +0 2>/dev/null | grep -q .; do
            kill -0 $submit || { cat "$work/vacate.log"; exit 1; }
            sleep 0.3
        done
        "$rig" user condor_vacate_job -all
        while "$rig" root find "$execute" -path "*/output/smoke" 2>/dev/null | grep -q .; do sleep 0.3; done
    done
    wait $submit
    cat "$work/vacate.log"
    cat "$work"/vacate.out/condor_outs/*.out
    grep -c "Job was evicted\|Job was checkpointed" "$work"/vacate.out/condor_outs/*.log
    say "the same, undisturbed"
    test -d "$work/smoke.out" || "$0" "$rig" smoke
    diff "$work/smoke.out/results/smoke/lora3-reft3.predictions.jsonl" "$work/vacate.out/results/smoke/lora3-reft3.predictions.jsonl"
    python3 - "$work" <<'PYTHON'
import json, sys
a, b = (json.load(open(f"{sys.argv[1]}/{run}.out/results/smoke/lora3-reft3.json")) for run in ("smoke", "vacate"))
assert a["loss"] == b["loss"] and a["accuracy"] == b["accuracy"], "the vacated job gave another result"
print("the vacated job gave the result of the undisturbed one:", a["accuracy"])
PYTHON
fi
say "done: $part ($work)"
