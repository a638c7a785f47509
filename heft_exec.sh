#!/usr/bin/env bash
# Runs heft_finetuning.py with all arguments: inside the container of a cluster job, and on a workstation,
# where the first run makes .venv and installs requirements.txt into it.
set -euo pipefail

export PYTHONUNBUFFERED=1

if [ -n "${_CONDOR_SCRATCH_DIR:-}" ]; then # a cluster job: everything it downloads stays in its directory
    export HF_HOME="${HF_HOME:-$PWD/.hf_home}"
    # HTCondor holds a job, and hides its message, when a folder that it should send back is missing.
    mkdir -p results output
    # Reports that travelled in do not travel back: they may be newer at home by then.
    [ ! "$PWD" -ef "$_CONDOR_SCRATCH_DIR" ] || find results -type f ! -name '*.json*' -delete
fi

fail() { echo "heft: error: $*" >&2; exit 2; }

# A batch system may run a copy of this file from elsewhere: the rest is then in the job's directory.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
[ -f "$here/heft_finetuning.py" ] || here=$PWD
for file in heft_finetuning.py requirements.txt; do
    [ -f "$here/$file" ] || fail "$file is neither beside heft_exec.sh nor in $PWD"
done

# The token, if there is one, comes from a file that nobody else may read; the script says where one is needed.
if [ -z "${HF_TOKEN:-}" ] && [ -e .hf_token ]; then
    [ -r .hf_token ] || fail ".hf_token cannot be read"
    case $(stat -c %a .hf_token) in
        *00) ;;
        *) fail ".hf_token can be read by others: chmod 600 .hf_token" ;;
    esac
    HF_TOKEN=$(tr -d '[:space:]' <.hf_token)
    if [ -n "$HF_TOKEN" ]; then export HF_TOKEN; else unset HF_TOKEN; fi
fi

has_packages() { # does this Python have what requirements.txt names?
    "$1" - "$here/requirements.txt" <<'PYTHON' 2>/dev/null
import sys
from importlib.metadata import version
pins = [line.strip().split("==") for line in open(sys.argv[1]) if "==" in line]
sys.exit(any(version(name).split("+")[0] != pin for name, pin in pins))
PYTHON
}

suits() { # is this a Python for which all packages have wheels?
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null
}

python=python3
if ! has_packages python3; then
    python=$here/.venv/bin/python
    if ! has_packages "$python"; then
        for system in python3 python3.13 python3.12 python3.11; do suits "$system" && break; done ||
            fail "Python 3.11, 3.12 or 3.13 is needed; python3 is $(python3 --version 2>/dev/null || echo missing)"
        echo "heft: first run, installing the packages into $here/.venv (some minutes)" >&2
        suits "$python" || rm -rf "$here/.venv" # none yet, or another Python's
        "$system" -m venv "$here/.venv" || fail "$system -m venv failed: install Python's venv module"
        "$python" -m pip install --disable-pip-version-check -r "$here/requirements.txt" >&2 ||
            fail "pip could not install requirements.txt; mend that, then the same command goes on"
    fi
fi

# exec: signals and the exit status are the script's.
exec "$python" "$here/heft_finetuning.py" "$@"
