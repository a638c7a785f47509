#!/usr/bin/env bash
# Runs heft_finetuning.py with all arguments: inside the container of a cluster job, and on a workstation,
# where the first run makes .venv and installs requirements.txt into it.
set -euo pipefail

# Everything the run downloads stays in the job's directory.
export HF_HOME="${HF_HOME:-$PWD/.hf_home}" PYTHONUNBUFFERED=1

# HTCondor holds a job, and hides its message, when a folder that it should send back is missing.
[ -z "${_CONDOR_SCRATCH_DIR:-}" ] || mkdir -p results output

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

python=python3
if ! has_packages python3; then
    python=$here/.venv/bin/python
    if ! has_packages "$python"; then
        python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "Python 3.11 or newer is needed, not $(python3 --version 2>&1)"
        echo "heft: first run, installing the packages into $here/.venv (some minutes)" >&2
        python3 -m venv "$here/.venv" || fail "python3 -m venv failed: install Python's venv module"
        "$python" -m pip install --quiet --disable-pip-version-check -r "$here/requirements.txt" ||
            fail "pip could not install requirements.txt; mend that, then the same command goes on"
    fi
fi

# exec: signals and the exit status are the script's.
exec "$python" "$here/heft_finetuning.py" "$@"
