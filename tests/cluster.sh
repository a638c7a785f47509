#!/usr/bin/env bash
# heft.sub, heft_exec.sh and container.def on a real HTCondor pool. Run as root:
#
#   tests/cluster.sh RIG [image|smoke|sweep|resubmit|vacate|all]
#
# RIG is a script that runs such a pool on this machine: `RIG up`, `RIG submit DIR heft.sub ARGS...` (copies DIR,
# submits as a normal user, waits, copies back to DIR.out), `RIG user CMD...`, `RIG sif DIR container.def OUT.sif`.
# With RIG_NO_CONTAINER=1 the container line is taken out and the packages must be the execute machine's own.
set -euo pipefail
rig=$1
part=${2:-all}
cd "$(dirname "$0")/.."
work=${CLUSTER_WORK:-$(mktemp -d)}
export CLUSTER_WORK=$work
image=$work/container.sif

say() { printf '\n== %s\n' "$*"; }
wants() { [ "$part" = all ] || [ "$part" = "$1" ]; }

copy() { # DIR: the repository's files as they are now
    mkdir -p "$1"
    comm -23 <(git ls-files -co --exclude-standard | sort -u) <(git ls-files -d | sort) | tar -cf - -T - | tar -xf - -C "$1"
}

fresh() { # DIR: what a user has after cloning, with an image and an empty token file
    rm -rf "$1" "$1.out"
    copy "$1"
    (umask 077 && : >"$1/.hf_token")
    if [ -n "${RIG_NO_CONTAINER:-}" ]; then sed -i '/^container_image/d' "$1/heft.sub"; else cp "$image" "$1/"; fi
}

start() { # NAME ARGS...: submit $work/NAME in the background, as $submit; its words go to NAME.log
    RIG_WAIT=${RIG_WAIT:-1200} "$rig" submit "$work/$1" heft.sub "${@:2}" >"$work/$1.log" 2>&1 &
    submit=$! log=$work/$1.log
    execute=$("$rig" user condor_config_val EXECUTE)
}

sandbox() { # SIGN: the running job's file or folder of this name, if it is there
    "$rig" root find "$execute" -path "*/output/$1" -size +0 2>/dev/null || true
}

wait_for() { # SIGN: until the running job has this file
    until sandbox "smoke/$1" | grep -q .; do
        kill -0 "$submit" || { cat "$log"; exit 1; }
        sleep 0.3
    done
}

end_by() { # CMD...: end the running job so, and wait until its sandbox, not a later one, is gone
    local there
    there=$(sandbox smoke)
    "$@"
    while sandbox smoke | grep -qxF "$there"; do sleep 0.3; done
}

kill_job() { # as the kernel does where memory is short
    "$rig" root kill -KILL "$("$rig" root pgrep -of "python.*heft_finetuning.py")"
}

same() { # NAME: its result is that of the undisturbed run
    test -d "$work/smoke.out" || "$0" "$rig" smoke
    diff "$work"/{smoke,"$1"}.out/results/smoke/lora3-reft3.predictions.jsonl
    python3 - "$work"/{smoke,"$1"}.out/results/smoke/lora3-reft3.json <<'PYTHON'
import json, sys
a, b = (json.load(open(file)) for file in sys.argv[1:])
assert a["loss"] == b["loss"] and a["accuracy"] == b["accuracy"], "another result than undisturbed"
print("the result of the undisturbed run:", a["accuracy"])
PYTHON
}

if wants image && [ -z "${RIG_NO_CONTAINER:-}" ]; then
    say "image: apptainer build, with its %test"
    copy "$work/source"
    time "$rig" sif "$work/source" container.def "$image"
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
    test "$(cat "$work"/sweep.out/condor_outs/*_3.log | grep -c '^001 ')" = 1 # a mistake is not tried again
fi

if wants resubmit; then
    say "resubmit: killed hard after the first checkpoint, not tried again, submitted again from the same folder"
    fresh "$work/resubmit"
    start resubmit -append "max_retries = 0" extra=--smoke
    wait_for lora3/checkpoint.pt
    end_by kill_job
    wait "$submit" && { echo "the kill went unseen"; exit 1; }
    cat "$work/resubmit.log"
    test -s "$work/resubmit.out/output/smoke/lora3/checkpoint.pt"
    rm -rf "$work/again" "$work/again.out"
    mv "$work/resubmit.out" "$work/again"
    start again extra=--smoke
    wait "$submit" || { cat "$work/again.log"; exit 1; }
    cat "$work/again.log"
    grep -h "resuming from" "$work"/again.out/condor_outs/*.out
    same again

    say "retry: killed hard after the first checkpoint of each stage; the same job starts again by itself"
    fresh "$work/retry"
    start retry extra=--smoke
    for sign in lora3/checkpoint.pt lora3-reft3/checkpoint.pt; do
        wait_for "$sign"
        end_by kill_job
    done
    wait "$submit" || { cat "$work/retry.log"; exit 1; }
    cat "$work/retry.log"
    grep -h "resuming from" "$work"/retry.out/condor_outs/*.out
    test "$(cat "$work"/retry.out/condor_outs/*.log | grep -c '^001 ')" = 3
    same retry
fi

if wants vacate; then
    say "vacate: condor_vacate_job in stage 1, stage 2 and the evaluation of one job"
    fresh "$work/vacate"
    start vacate extra=--smoke
    for sign in lora3/checkpoint.pt lora3-reft3/checkpoint.pt lora3-reft3/heft.json; do
        wait_for "$sign"
        end_by "$rig" user condor_vacate_job -all
    done
    wait "$submit" || { cat "$work/vacate.log"; exit 1; }
    cat "$work/vacate.log"
    cat "$work"/vacate.out/condor_outs/*.out
    grep -c "Job was evicted\|Job was checkpointed" "$work"/vacate.out/condor_outs/*.log
    same vacate
fi
say "done: $part ($work)"
