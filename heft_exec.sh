#!/usr/bin/env bash
# Runs heft_finetuning.py with all arguments: in the container of a cluster job, or on a workstation, where the
# first run installs requirements.txt into .venv. Keep it to bash 3.2 and POSIX tools, for macOS.
set -euo pipefail

fail() { echo "heft: error: $*" >&2; exit 2; }

# No packages but those of requirements.txt, whatever the user's environment says.
for name in ${!PYTHON@}; do unset "$name"; done
unset __PYVENV_LAUNCHER__ CDPATH PIP_USER PIP_TARGET PIP_PREFIX PIP_ROOT PIP_PYTHON PIP_NO_DEPS PIP_DRY_RUN
export PYTHONNOUSERSITE=1 PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1

if [ -n "${_CONDOR_SCRATCH_DIR:-}" ]; then # a cluster job: downloads and caches stay in its directory
    export HF_HOME="${HF_HOME:-$PWD/.hf_home}" MPLCONFIGDIR="${MPLCONFIGDIR:-$PWD/.hf_home}"
    # HTCondor holds a job, and hides its message, when a folder that it should send back is missing.
    mkdir -p results output
    # Reports that travelled in do not travel back: they may be newer at home by then.
    [ ! "$PWD" -ef "$_CONDOR_SCRATCH_DIR" ] || find results -type f ! -name '*.json*' -exec rm -f {} +
fi

# A batch system may run a copy of this file from elsewhere: the rest is then in the job's directory.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
[ -f "$here/heft_finetuning.py" ] || here=$PWD
for file in heft_finetuning.py requirements.txt; do
    [ -f "$here/$file" ] || fail "$file is neither beside heft_exec.sh nor in $PWD"
done

# The token, if there is one, comes from a file that nobody else may read. An empty file is no token.
if [ -z "${HF_TOKEN:-}" ] && { [ -e .hf_token ] || [ -L .hf_token ]; }; then
    if ! [ -f .hf_token ] || ! [ -r .hf_token ]; then
        fail ".hf_token is not a file that you can read: replace or remove it"
    fi
    case $(ls -ldL .hf_token) in
        -???------*) ;;
        *) fail ".hf_token can be read by others: chmod 600 .hf_token" ;;
    esac
    if [ "$(wc -w <.hf_token)" -gt 1 ] || LC_ALL=C grep -q '[^[:space:]A-Za-z0-9._-]' .hf_token; then
        fail ".hf_token must hold the token alone: one word, without a name, quotes or a byte order mark"
    fi
    HF_TOKEN=$(tr -d '[:space:]' <.hf_token)
    if [ -n "$HF_TOKEN" ]; then export HF_TOKEN; else unset HF_TOKEN; fi
fi

has_packages() { # does this Python have what requirements.txt names? If not, prints why
    "$1" - "$here/requirements.txt" <<'PYTHON' 2>&1 | tail -n 1
import sys
from importlib.metadata import version
for name, _, pin in (line.strip().partition("==") for line in open(sys.argv[1])):
    if pin and version(name).split("+")[0] != pin:
        sys.exit(f"{name} is {version(name)}, not {pin}")
PYTHON
}

loads() { "$1" -c 'import ssl, torch, pyarrow, scipy.stats' 2>&1 | tail -n 1; }

works() { # COMMAND...; if not, $why. Unset here, the libraries of these variables would be missing in a container.
    why=$("$@") && return
    for name in LD_LIBRARY_PATH LD_PRELOAD; do
        if [ -n "${!name:-}" ] && (unset "$name" && "$@" >/dev/null); then
            fail "$name is ${!name}, and with it Python fails ($why): unset it, or unload the module that sets it"
        fi
    done
    return 1
}

suits() { # is this a Python for which all packages have wheels?
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null
}

lock() { # file descriptor 9. The lock ends with the last process that has it open, however that ends
    "$system" -c '
import fcntl, os, sys, time
for second in range(int(sys.argv[1])):
    try:
        sys.exit(fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB))
    except BlockingIOError:
        if second == 0:
            print("heft: waiting for another run, which is installing the packages", file=sys.stderr)
        time.sleep(1)
    except OSError: # a file system without locks
        sys.exit(os.fstat(9).st_size > 0)
sys.exit(1)' "${HEFT_INSTALL_LIMIT:-3600}"
}

venv=$here/.venv
unfinished=$venv/.unfinished # not empty: an installation is under way, or was killed
occupied() { # does .venv hold anything else? Running jobs may use it: only its owner changes it
    set -- "$venv"/*
    [ ! -s "$unfinished" ] && { [ -e "$1" ] || [ -L "$1" ]; }
}

install_packages() { # requirements.txt into .venv, one run at a time
    for system in python3 python3.13 python3.12 python3.11; do suits "$system" && break; done ||
        fail "Python 3.11, 3.12 or 3.13 is needed; python3 is $(python3 --version 2>/dev/null || echo missing)"
    { mkdir -p "$venv" && : >>"$unfinished"; } 2>/dev/null || fail "cannot read or write $venv"
    exec 9>>"$unfinished"
    lock || fail "another run has not finished installing the packages: if none is running, remove $venv"
    if ! occupied; then # nor has another run done it meanwhile
        echo "heft: installing the packages into $venv (once, some minutes)" >&2
        rm -rf "${venv:?}"/*
        echo unfinished >"$unfinished"
        # venv refuses a link, such as one to a larger disk
        "$system" -m venv "$(cd "$venv" && pwd -P)" ||
            fail "$system -m venv failed, see above: is the disk full, or Python's venv module not installed?"
        "$venv/bin/python" -m pip install --no-user --disable-pip-version-check -r "$here/requirements.txt" >&2 ||
            fail "pip could not install requirements.txt; fix that, and run the same command again"
        has_packages "$venv/bin/python" >/dev/null || fail "pip did not install into $venv: look at 'pip config list'"
        : >"$unfinished"
    fi
    exec 9>&- # or the script would keep the lock
}

python=python3
if [ -n "${HEFT_INSTALL_ONLY:-}" ] || ! works has_packages python3; then
    python=$venv/bin/python
    occupied || install_packages
    if ! works has_packages "$python"; then
        home=$(sed -n 's/^home = //p' "$venv/pyvenv.cfg" 2>/dev/null) || home="another folder"
        "$python" -c '' 2>/dev/null || fail "$python does not start on this machine ($why). It needs the Python in" \
            "$home: load its module or mount its disk. If that Python is gone for good, remove $venv"
        fail "$venv is not as requirements.txt asks ($why). When no run uses it, remove it and run the same command" \
            "again, or update it: $python -m pip install -r $here/requirements.txt"
    fi
fi

if [ -n "${LD_LIBRARY_PATH:-}${LD_PRELOAD:-}" ]; then works loads "$python" || true; fi # or it has a traceback

[ -z "${HEFT_INSTALL_ONLY:-}" ] || exit 0 # for tests/run

# exec: signals and the exit status are the script's.
exec "$python" "$here/heft_finetuning.py" "$@"
