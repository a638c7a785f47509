"""heft_exec.sh, tests/run, heft.sub and container.def, without a pool (tests/cluster.sh needs one)."""

import ast
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
from conftest import ROOT

PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
SCRIPT = """
import json, os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(85))
given = {"args": sys.argv[1:], "pid": os.getpid(), "path": sys.path, "env": dict(os.environ)}
print(json.dumps(given), flush=True)
time.sleep(30) if "wait" in sys.argv else sys.exit(7 if "fail" in sys.argv else 0)
"""
TOY = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "."}  # where pip finds the wheel of toy_repo
INSTALLING, WAITING = "heft: installing the packages", "heft: waiting for another run"


@pytest.fixture
def stub_repo(tmp_path):
    """heft_exec.sh, a script that shows what it was given, a requirement that the tests' Python has."""
    shutil.copy(ROOT / "heft_exec.sh", tmp_path)
    (tmp_path / "requirements.txt").write_text(f"pytest=={version('pytest')}\n")
    (tmp_path / "heft_finetuning.py").write_text(SCRIPT)
    return tmp_path


@pytest.fixture
def toy_repo(stub_repo):
    """The same, with a requirement that has to be installed. Its wheel has what tests/run starts, too."""
    (stub_repo / "requirements.txt").write_text("heft-toy==1.0\n")
    toy_wheel(stub_repo, "1.0")
    return stub_repo


def toy_wheel(folder, version):
    about, ruff = f"heft_toy-{version}.dist-info", zipfile.ZipInfo(f"heft_toy-{version}.data/scripts/ruff")
    ruff.external_attr = 0o100755 << 16
    with zipfile.ZipFile(folder / f"heft_toy-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr("heft_toy.py", "")
        wheel.writestr("pytest.py", "import sys; print(sys.argv[1:])")
        wheel.writestr(ruff, "#!/bin/sh\n")
        wheel.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: heft-toy\nVersion: {version}\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")


def copy_tests_run(folder):
    (folder / "tests").mkdir()
    shutil.copy(ROOT / "tests/run", folder / "tests")
    (folder / "tests/requirements.txt").write_text("")


def start(folder, *arguments, command="./heft_exec.sh", user=None, **environment):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment, group = {"PATH": PATH} | environment, {"start_new_session": True, "user": user}
    return subprocess.Popen([command, *arguments], cwd=folder, env=environment, **pipes, **group)


def finish(process):
    stdout, stderr = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def run(*arguments, **environment):
    return finish(start(*arguments, **environment))


def shown(done):
    """What the script was given, if it ran and ended well."""
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def refused(done, words, lines=1):
    assert done.returncode == 2 and not done.stdout and (not lines or done.stderr.count("\n") == lines), done
    assert done.stderr.splitlines()[-1].startswith("heft: error: ") and words in done.stderr, done.stderr


def stand_in(folder, name, text):
    """Make a command in folder/bin. Returns a PATH on which it comes first."""
    (folder / "bin").mkdir(exist_ok=True)
    (folder / "bin" / name).write_text("#!/usr/bin/env bash\n" + text)
    (folder / "bin" / name).chmod(0o755)
    return f"{folder}/bin:{PATH}"


def half_installed(site):
    """What a pip that was killed may leave: a package that is said to be there, and is not."""
    (site / "heft_toy-1.0.dist-info").mkdir(parents=True)
    (site / "heft_toy-1.0.dist-info/METADATA").write_text("Name: heft-toy\nVersion: 1.0\n")


SITE = "lib/python{}.{}/site-packages".format(*sys.version_info)


# --- heft_exec.sh: arguments, status, a cluster job's directory


def test_shell_scripts_pass_shellcheck_and_keep_to_bash_3_2():
    for file in "heft_exec.sh tests/run .ci/run tests/cluster.sh".split():
        subprocess.run(["shellcheck", ROOT / file], check=True, env={"PATH": PATH})
    newer = r"\$\{\w+[,^@]|mapfile|readarray|declare -|local -n|coproc|wait -n|&>>|\|&|EPOCH|printf '%\("
    for file in "heft_exec.sh tests/run".split():
        assert not re.findall(newer, (ROOT / file).read_text()), file


def test_arguments_and_status_pass_through(stub_repo):
    assert shown(run(stub_repo, "--a b", "*", ""))["args"] == ["--a b", "*", ""]
    assert run(stub_repo, "fail").returncode == 7
    process = start(stub_repo, "wait")
    assert json.loads(process.stdout.readline())["pid"] == process.pid  # exec: no shell in between
    process.terminate()
    assert process.wait(10) == 85
    for file in "heft_finetuning.py requirements.txt".split():
        (stub_repo / file).rename(stub_repo / "away")
        refused(run(stub_repo), f"{file} is neither beside heft_exec.sh nor in {stub_repo}")
        (stub_repo / "away").rename(stub_repo / file)


def test_a_cluster_job_keeps_its_files_together_and_sends_no_old_reports_back(stub_repo):
    assert "HF_HOME" not in shown(run(stub_repo))["env"]  # a workstation has its own cache
    assert not (stub_repo / "results").exists()
    job = {"_CONDOR_SCRATCH_DIR": str(stub_repo)}
    caches = [shown(run(stub_repo, **job))["env"][name] for name in ("HF_HOME", "MPLCONFIGDIR")]
    assert caches == [f"{stub_repo}/.hf_home"] * 2
    assert shown(run(stub_repo, HF_HOME="/elsewhere", **job))["env"]["HF_HOME"] == "/elsewhere"
    assert (stub_repo / "results").is_dir() and (stub_repo / "output").is_dir()

    kept = "results/a.json results/smoke/a.predictions.jsonl output/a/checkpoint.pt output/a/heft.json"
    reports = "results/README.md results/report.py results/smoke/README.md results/figure1.svg"
    for file in map(Path, f"{kept} {reports}".split()):
        (stub_repo / file.parent).mkdir(parents=True, exist_ok=True)
        (stub_repo / file).write_text("")

    def files():
        return {file for file in f"{kept} {reports}".split() if (stub_repo / file).exists()}

    (stub_repo / "scratch").mkdir()
    run(stub_repo, _CONDOR_SCRATCH_DIR=str(stub_repo / "scratch"))  # at work in the user's own folder
    assert files() == {*kept.split(), *reports.split()}
    run(stub_repo, **job)
    assert files() == {*kept.split()}


# --- heft_exec.sh: the token


def write_token(folder, content, mode=0o600):
    (folder / ".hf_token").write_bytes(content)
    (folder / ".hf_token").chmod(mode)


def test_the_token_is_read_from_a_file(stub_repo):
    for content in (b"hf_secret", b"hf_secret\n", b"hf_secret\r\n", b"\n hf_secret \n\n"):
        write_token(stub_repo, content)
        assert shown(run(stub_repo))["env"]["HF_TOKEN"] == "hf_secret"
        assert shown(run(stub_repo, HF_TOKEN="hf_other"))["env"]["HF_TOKEN"] == "hf_other"
    for content in (b"", b"\n", b"\r\n"):  # no token, as for a cluster job that needs none
        write_token(stub_repo, content)
        assert "HF_TOKEN" not in shown(run(stub_repo, HF_TOKEN=""))["env"]


@pytest.mark.parametrize(
    "content",
    "\ufeffhf_secret\n|UTF-16|HF_TOKEN=hf_secret\n|export HF_TOKEN=hf_secret\n|token: hf_secret|'hf_secret'|"
    '"hf_secret"|hf_secret\nhf_secret2\n|hf_secret hf_secret2|# mine\nhf_secret|hf_secreté'.split("|"),
)
def test_a_file_with_more_than_the_token_is_refused(stub_repo, content):
    write_token(stub_repo, "hf_secret\n".encode("utf-16") if content == "UTF-16" else content.encode())
    done = run(stub_repo)
    refused(done, ".hf_token must hold the token alone")
    assert "secret" not in done.stderr


def test_a_token_file_that_is_not_private_or_not_readable_is_refused(stub_repo):
    for mode in (0o644, 0o640, 0o604, 0o620, 0o601):
        write_token(stub_repo, b"hf_secret", mode)
        refused(run(stub_repo), ".hf_token can be read by others: chmod 600 .hf_token")
    (stub_repo / "link").write_text("hf_secret")
    for target, words in zip(("link", "missing", "."), ("can be read by others", *["is not a file"] * 2)):
        (stub_repo / ".hf_token").unlink()
        (stub_repo / ".hf_token").symlink_to(target)
        refused(run(stub_repo), f".hf_token {words}")
    with tempfile.TemporaryDirectory() as folder:  # which another user can enter
        for file in "heft_exec.sh requirements.txt heft_finetuning.py".split():
            shutil.copy(stub_repo / file, folder)
        root = os.getuid() == 0  # reads everything
        write_token(Path(folder), b"hf_secret", 0o600 if root else 0)
        os.chmod(folder, 0o755)
        refused(run(folder, user=65534 if root else None), ".hf_token is not a file that you can read")


# --- heft_exec.sh: the packages


def test_the_users_environment_stays_out(toy_repo):
    """Neither pip nor the script sees packages of other folders, nor settings that install elsewhere."""
    config, evil = toy_repo / "home/.config/pip/pip.conf", toy_repo / "evil"
    for folder in (config.parent, evil):
        folder.mkdir(parents=True)
    config.write_text("[install]\nuser = true\n")
    (evil / "sitecustomize.py").write_text("raise SystemExit('sitecustomize of another Python')")
    folders = "PYTHONPATH PYTHONHOME PYTHONUSERBASE PIP_TARGET PIP_PREFIX PIP_ROOT CDPATH".split()
    flags = "PIP_USER PIP_NO_DEPS PIP_DRY_RUN PYTHONOPTIMIZE PYTHONVERBOSE".split()
    environment = TOY | {"HOME": str(toy_repo / "home")}
    done = run(toy_repo, "a", **environment, **dict.fromkeys(folders, evil), **dict.fromkeys(flags, "1"))
    given = shown(done)  # pip's progress is not on the script's own output
    assert given["args"] == ["a"] and "Successfully installed heft-toy-1.0" in done.stderr
    python = {name: value for name, value in given["env"].items() if name.startswith("PYTHON")}
    assert python == dict.fromkeys("PYTHONNOUSERSITE PYTHONSAFEPATH PYTHONUNBUFFERED".split(), "1")
    assert not {str(toy_repo), str(evil)} & {*given["path"]}
    assert shown(run(toy_repo)) and not run(toy_repo).stderr  # once is enough
    # what cannot be kept out is noticed
    shutil.rmtree(toy_repo / ".venv")
    config.write_text(f"[install]\ntarget = {evil}\n")
    refused(run(toy_repo, **environment), "pip did not install into", lines=None)


def test_packages_of_the_user_site_do_not_count(toy_repo):
    half_installed(toy_repo / "user" / SITE)
    base = Path(sys._base_executable).parent  # a Python outside of virtual environments sees that folder
    done = run(toy_repo, PATH=f"{base}:{PATH}", PYTHONUSERBASE=str(toy_repo / "user"), PIP_NO_INDEX="1")
    refused(done, "heft: error: pip could not install requirements.txt", lines=None)
    assert INSTALLING in done.stderr


def test_of_three_starts_at_once_one_installs(toy_repo):
    done = [finish(process) for process in [start(toy_repo, **TOY) for _ in range(3)]]
    assert all(map(shown, done))
    said = "".join(each.stderr for each in done)
    assert [said.count(words) for words in (INSTALLING, WAITING, "Successfully")] == [1, 2, 1]
    script = start(toy_repo, "wait")
    assert script.stdout.readline()
    with open(toy_repo / ".venv/.unfinished") as file:  # a run that is past this does not keep the lock
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    script.kill()
    script.communicate()


def test_a_killed_installation_is_repeated(toy_repo):
    process = start(toy_repo, **TOY)
    while not (toy_repo / ".venv/bin/python").exists():
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    half_installed(toy_repo / ".venv" / SITE)
    done = run(toy_repo, **TOY)
    assert shown(done) and INSTALLING in done.stderr and WAITING not in done.stderr
    assert (toy_repo / ".venv" / SITE / "heft_toy.py").exists()


def test_waiting_has_a_limit(toy_repo):
    (toy_repo / ".venv").mkdir()
    with open(toy_repo / ".venv/.unfinished", "w") as file:
        print("unfinished", file=file, flush=True)
        fcntl.flock(file, fcntl.LOCK_EX)
        done = run(toy_repo, HEFT_INSTALL_LIMIT="1", **TOY)
    refused(done, f"if none is running, remove {toy_repo}/.venv\n", lines=2)
    assert done.stderr.startswith(WAITING)


def test_a_file_system_without_locks(toy_repo):
    no_locks = "import fcntl\ndef flock(*_): raise OSError(38, 'no locks')\nfcntl.flock = flock\n"
    python = '[ "$1" != -c ] || set -- -c "$no_locks$2" "${@:3}"\nexec ' + f'{sys.executable} "$@"\n'
    path = stand_in(toy_repo, "python3", f'no_locks="{no_locks}"\n{python}')
    assert shown(run(toy_repo, PATH=path, **TOY))
    # a run that installs cannot be told from one that was killed
    (toy_repo / ".venv/.unfinished").write_text("unfinished\n")
    refused(run(toy_repo, PATH=path, **TOY), f"if none is running, remove {toy_repo}/.venv")


def test_the_tools_of_macos_suffice(toy_repo):
    """No `stat -c`, `flock` and the like, no long options; `ls` marks extended attributes, `wc` pads."""
    for name in "stat readlink realpath flock timeout nproc sha256sum md5sum tac setsid".split():
        stand_in(toy_repo, name, 'echo "$0: not here" >&2; exit 127\n')
    for name in "ls wc find grep tr mkdir rm dirname".split():
        check = 'for x; do case $x in --?*) echo "$0: illegal option" >&2; exit 64 ;; esac; done\n'
        output = {"ls": " | sed 's/ /@ /'", "wc": " | sed 's/^/       /'"}.get(name, "")
        path = stand_in(toy_repo, name, f'{check}{shutil.which(name, path=PATH)} "$@"{output}\n')
    write_token(toy_repo, b"hf_secret\n")
    job = TOY | {"_CONDOR_SCRATCH_DIR": str(toy_repo), "PATH": path}
    assert shown(run(toy_repo, **job))["env"]["HF_TOKEN"] == "hf_secret"
    write_token(toy_repo, b"hf_secret\n", 0o644)
    refused(run(toy_repo, **job), "chmod 600 .hf_token")


def files_of(folder):
    return {file: (os.lstat(file).st_ino, os.lstat(file).st_mtime_ns) for file in folder.rglob("*")}


STARTED_ELSEWHERE = {  # what .venv/bin/python is on a node that cannot start it, and what the message says
    "module not loaded": (None, "No such file"),
    "shared library": (
        "#!/bin/sh\necho 'libpython3.11.so.1.0: cannot open shared object file' >&2; exit 127",
        "libpython3.11",
    ),
    "architecture": ("\x7fELF\2\1\1" + "\0" * 11 + "\xb7" + "\0" * 45, "cannot execute binary file"),
}


@pytest.mark.parametrize("command", ["./heft_exec.sh", "tests/run"])
@pytest.mark.parametrize("kind", STARTED_ELSEWHERE)
def test_a_node_that_cannot_start_the_python_of_venv_deletes_nothing(toy_repo, kind, command):
    copy_tests_run(toy_repo)
    assert shown(run(toy_repo, **TOY))
    python = toy_repo / ".venv/bin/python"
    python.unlink()
    content, words = STARTED_ELSEWHERE[kind]
    if content is None:
        python.symlink_to("/opt/modules/python/3.11/bin/python3")
    else:
        python.write_text(content, encoding="latin-1")
        python.chmod(0o755)
    before = files_of(toy_repo / ".venv")
    done = run(toy_repo, command=command, **TOY)
    refused(done, f"{python} does not start on this machine (")
    assert (
        words in done.stderr and f"needs the Python in {Path(sys._base_executable).parent}: " in done.stderr
    )
    assert done.stderr.endswith(
        f"load its module or mount its disk. If that Python is gone for good, remove {toy_repo}/.venv\n"
    )
    assert files_of(toy_repo / ".venv") == before


def test_a_venv_that_others_made_is_not_touched(toy_repo):
    """One of Windows, in a folder that WSL shares; one whose Python is too new, or has no packages."""
    (toy_repo / ".venv/Scripts").mkdir(parents=True)
    (toy_repo / ".venv/Scripts/python.exe").write_text("")
    (toy_repo / ".venv/pyvenv.cfg").write_text("home = C:\\Python311\n")
    before = files_of(toy_repo / ".venv")
    refused(run(toy_repo, **TOY), "needs the Python in C:\\Python311: ")
    assert files_of(toy_repo / ".venv") == before
    shutil.rmtree(toy_repo / ".venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", toy_repo / ".venv"], check=True)
    before = files_of(toy_repo / ".venv")
    refused(run(toy_repo, **TOY), "heft-toy). When no run uses it, remove it")
    assert files_of(toy_repo / ".venv") == before
    (toy_repo / ".venv/bin/python").unlink()
    shutil.copy(pretend(toy_repo, "old", "3.14.0").split(":")[0] + "/old", toy_repo / ".venv/bin/python")
    before = files_of(toy_repo / ".venv")
    refused(run(toy_repo, **TOY), ".venv is not as requirements.txt asks (")
    assert files_of(toy_repo / ".venv") == before
    shutil.rmtree(toy_repo / ".venv")
    (toy_repo / ".venv").symlink_to("/scratch/not/mounted")
    refused(run(toy_repo, **TOY), f"cannot read or write {toy_repo}/.venv")
    (toy_repo / "large disk").mkdir()
    (toy_repo / ".venv").unlink()
    (toy_repo / ".venv").symlink_to("large disk")  # an empty folder is there to be used
    assert shown(run(toy_repo, **TOY)) and (toy_repo / "large disk/bin/python").exists()
    assert not run(toy_repo).stderr


@pytest.mark.parametrize("command", ["./heft_exec.sh", "tests/run"])
def test_packages_of_running_jobs_are_not_changed(toy_repo, command):
    """After a `git pull` with other versions. The message has both ways on."""
    copy_tests_run(toy_repo)
    job = start(toy_repo, "wait", **TOY)
    assert job.stdout.readline()
    before = files_of(toy_repo / ".venv")
    (toy_repo / "requirements.txt").write_text("heft-toy==1.1\n")
    done = run(toy_repo, command=command, **TOY)
    refused(
        done, "heft-toy is 1.0, not 1.1). When no run uses it, remove it and run the same command again, or "
    )
    assert files_of(toy_repo / ".venv") == before
    job.kill()
    job.communicate()
    (toy_repo / "heft_toy-1.0-py3-none-any.whl").unlink()
    toy_wheel(toy_repo, "1.1")
    update = done.stderr.split("update it: ")[1].split()
    subprocess.run(update, cwd=toy_repo, env={"PATH": PATH} | TOY, check=True, stdout=subprocess.DEVNULL)
    assert shown(run(toy_repo))
    (toy_repo / "requirements.txt").write_text("heft-toy==1.1\nheft-toy2==1.0\n")
    refused(
        run(toy_repo, command=command, **TOY), "No package metadata was found for heft-toy2). When no run"
    )


def test_a_killed_tests_run_does_not_cost_the_packages(toy_repo):
    """Ctrl-C while it adds the packages of the tests: they are added again, and nothing is deleted."""
    copy_tests_run(toy_repo)
    assert shown(run(toy_repo, **TOY))
    (toy_repo / ".venv/kept").write_text("")
    third = f'echo >>calls; [ "$(wc -l <calls)" -lt 3 ] || kill -KILL 0\nexec {shutil.which("cat")} "$@"\n'
    path = stand_in(toy_repo, "cat", third)  # after two comparisons and pip
    assert run(toy_repo, command="tests/run", PATH=path, **TOY).returncode < 0
    assert shown(run(toy_repo, **TOY))
    assert run(toy_repo, command="tests/run", **TOY).returncode == 0
    assert (toy_repo / ".venv/kept").exists()


def test_a_finished_venv_may_be_read_only(toy_repo):
    """HOME, USER and the like may be missing (here they always are), as in some batch systems."""
    assert shown(run(toy_repo, **TOY))
    with tempfile.TemporaryDirectory() as folder:  # which another user can enter
        shutil.copytree(toy_repo, f"{folder}/repo", symlinks=True)
        subprocess.run(["chmod", "-R", "a+rX,a-w", folder], check=True)
        user = 65534 if os.getuid() == 0 else None  # root writes everywhere
        try:
            subprocess.run([f"{folder}/repo/.venv/bin/python", "-c", ""], user=user, check=True)
            assert shown(run(f"{folder}/repo", user=user))
        except PermissionError:
            pytest.skip("the tests' Python is in a folder of root")
        finally:
            subprocess.run(["chmod", "-R", "u+w", folder], check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="LD_LIBRARY_PATH is Linux's")
def test_libraries_of_a_module_that_break_torch_are_named(stub_repo):
    folder = stub_repo / "libraries"
    folder.mkdir()
    variable = {"LD_LIBRARY_PATH": str(folder)}
    assert shown(run(stub_repo, **variable))["env"]["LD_LIBRARY_PATH"] == str(folder)  # a container needs it
    library = folder / "libstdc++.so.6"
    (other,) = {*re.findall(r"/\S+/libc\.so\.6", Path("/proc/self/maps").read_text())}
    for content in (b"cut short", Path(other).read_bytes()):  # the other has none of the symbols
        library.write_bytes(content)
        done = run(stub_repo, **variable)
        refused(done, f"heft: error: LD_LIBRARY_PATH is {folder}, and with it Python fails (")
        assert f"{library}: " in done.stderr
    if compiler := shutil.which("cc"):
        old = [compiler, "-shared", "-x", "c", "/dev/null", "-Wl,-soname,libstdc++.so.6", "-o", library]
        subprocess.run(old, check=True)
        done = run(stub_repo, LD_PRELOAD=str(library))
        refused(done, f"heft: error: LD_PRELOAD is {library}, and with it Python fails (")


def pretend(folder, name, version):
    """A command `name`: this Python, which says that it is of another version and has no packages."""
    lie = f"import sys; sys.version_info = ({version.replace('.', ', ')})\n"
    cases = f"""--version) echo Python {version} ;;
        -c) exec {sys.executable} -c "{lie}$2" "${{@:3}}" ;;
        -m) echo made by {name} >&2; exec {sys.executable} "$@" ;;
        *) exit 1 ;;"""
    return stand_in(folder, name, f'case "$1" in\n{cases}\nesac\n')


def test_a_python_that_has_wheels_is_taken(toy_repo):
    for name in "python3.11 python3.12 python3.13".split():
        pretend(toy_repo, name, "3.14.0")
    for wrong in "3.14.0 3.10.13 2.7.18".split():
        path = pretend(toy_repo, "python3", wrong)
        refused(run(toy_repo, PATH=path), f"Python 3.11, 3.12 or 3.13 is needed; python3 is Python {wrong}\n")
        assert not (toy_repo / ".venv").exists()
    pretend(toy_repo, "python3.12", "3.12.1")  # another name helps
    done = run(toy_repo, PATH=path, **TOY)
    assert shown(done) and "made by python3.12\n" in done.stderr


def test_tests_run_installs_in_turn_with_the_wrapper(toy_repo):
    copy_tests_run(toy_repo)
    environment = TOY | {"PYTHONPATH": "/evil", "PIP_USER": "1"}
    both = [start(toy_repo, command=command, **environment) for command in ("./heft_exec.sh", "tests/run")]
    wrapper, tests = [finish(process) for process in both]
    again = run(toy_repo, "--all", "-k", "a b", command="tests/run")
    assert shown(wrapper) and tests.returncode == again.returncode == 0, tests.stderr + again.stderr
    assert not again.stderr
    options = "-q -n 2 --dist loadfile --durations=5 -m".split()
    assert ast.literal_eval(tests.stdout) == [*options, "not slow", "tests"]
    assert ast.literal_eval(again.stdout) == [*options, "slow or not slow", "-k", "a b", "tests"]


# --- .gitattributes


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
@pytest.mark.parametrize("settings", ["core.autocrlf=true", "core.autocrlf=true core.eol=crlf"])
def test_a_clone_of_windows_has_the_same_bytes(stub_repo, settings):
    """bash does not run CRLF, and hashes of data and models would change."""
    files = (
        "heft_exec.sh tests/run heft.sub container.def requirements.txt smoke/data/train.jsonl .gitattributes"
    )
    files = (
        f"{files} smoke/model/config.json smoke/model/tokenizer.json smoke/model/model.safetensors LICENSE"
    )
    for file in files.split():
        if not (stub_repo / file).exists():
            (stub_repo / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, stub_repo / file)
    (stub_repo / "data.jsonl").write_bytes(b'{"question": "a"}\r\n{"question": "b"}\n')
    environment = {"PATH": PATH, "HOME": str(stub_repo), "GIT_CONFIG_NOSYSTEM": "1"}

    def git(*words):
        options = [word for setting in settings.split() for word in ("-c", setting)]
        options += ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(
            ["git", *options, *words], cwd=stub_repo, env=environment, check=True, capture_output=True
        )

    git("init")
    git("add", ".")
    git("commit", "-m", "all")
    git("clone", *[word for each in settings.split() for word in ("-c", each)], ".", "clone")
    for file in [*files.split(), "data.jsonl", "heft_finetuning.py"]:
        assert (stub_repo / "clone" / file).read_bytes() == (stub_repo / file).read_bytes(), file
    assert shown(run(stub_repo / "clone"))


# --- heft.sub

SUB = (ROOT / "heft.sub").read_text()
# what the run needs; 8.0 is bfloat16 in hardware, 12.4 is the paper's, status 2 is a mistake
ASKED = """executable=heft_exec.sh container_image=container.sif request_gpus=1 request_cpus=1
    gpus_minimum_memory=32000 gpus_minimum_capability=8.0 gpus_minimum_runtime=12.4 checkpoint_exit_code=85
    when_to_transfer_output=ON_EXIT_OR_EVICT max_retries=2 retry_until=2"""


def expanded(name, text=SUB, command_line=(), **row):
    """A value of the submit description as HTCondor reads it; condor_submit's macros come before the file."""
    import htcondor2

    description = htcondor2.Submit("".join(f"{macro}\n" for macro in command_line) + text)
    for macro, value in row.items():
        description[macro] = value
    return description.expand(name)


def test_submit_file_asks_for_what_the_run_needs():
    for name, value in (pair.split("=") for pair in ASKED.split()):
        assert expanded(name) == value, name

    def files(name):
        return {*expanded(name).replace(" ", "").split(",")}

    assert files("transfer_output_files") == files("transfer_checkpoint_files") == {"results", "output"}
    # what a job has sent home is there when it starts again
    needed = "heft_finetuning.py requirements.txt smoke .hf_token results output"
    assert files("transfer_input_files") == {*needed.split()}
    for name in ("log", "output", "error"):
        assert expanded(name, Cluster="7", Process="2").startswith("condor_outs/7_2."), name


def test_submit_file_runs_what_its_macros_say():
    for macros, arguments in {
        "": "--epochs-lora 3 --epochs-reft 3",
        "epochs_lora=20 epochs_reft=0": "--epochs-lora 20 --epochs-reft 0",
        "extra=--smoke": "--epochs-lora 3 --epochs-reft 3 --smoke",
    }.items():
        assert expanded("arguments", command_line=macros.split()).split() == arguments.split()
    for file in "heft.sub README.md condor_outs/README.md".split():
        used = re.findall(r"condor_submit heft\.sub((?: \w+=\S+)+)", (ROOT / file).read_text())
        used = {part.split("=")[0] for line in used for part in line.split()}
        assert used and used <= {*re.findall(r"\$\((\w+):", SUB)}, file


def test_the_sweep_is_table_1_in_the_order_that_saves_hours():
    """The rows behind comment signs parse once switched on; 20 + 0 follows, with the stage 1 of 20 + 20."""
    import htcondor2

    (rows,) = re.findall(r"^# queue epochs_lora, epochs_reft from \(\n(?:#.*\n)+?# \)", SUB, re.M)
    text = SUB.replace(rows, rows.replace("# ", "").replace("#", "")).replace("\nqueue\n", "\n")
    items = [tuple(item.values()) for item in htcondor2.Submit(text).itemdata()]
    assert items == [("0", "20"), ("3", "3"), ("20", "20")]
    for lora, reft in items:
        arguments = expanded("arguments", text, epochs_lora=lora, epochs_reft=reft)
        assert arguments.split() == f"--epochs-lora {lora} --epochs-reft {reft}".split()
    after = re.findall(r"^# condor_submit heft.sub epochs_lora=(\d+) epochs_reft=(\d+)$", SUB, re.M)
    paper = json.loads((ROOT / "results/paper.json").read_text())["table_1"].values()
    assert {*items, *after} == {(str(row["lora_epochs"]), str(row["reft_epochs"])) for row in paper}


def test_the_pages_recipe_trains_one_stage_1_per_seed(tmp_path):
    """Two settings, three seeds: on HTCondor, on a workstation, on Slurm (there in turn)."""
    page = (ROOT / "condor_outs/README.md").read_text()
    blocks = [block for block in re.findall(r"```\n(.*?)```", page, re.S) if "for seed" in block]
    (submit,) = re.findall(r"^submit=.*$", page, re.M)
    stand_in(tmp_path, "condor_submit", 'echo "$@"\n')
    path = stand_in(tmp_path, "sbatch", 'echo "${@: -8}"\n')
    (tmp_path / "heft_exec.sh").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "heft_exec.sh").chmod(0o755)

    def said(block):
        command = ["bash", "-c", f"{submit}\n{block}"]
        done = subprocess.run(
            command, cwd=tmp_path, env={"PATH": path}, capture_output=True, text=True, check=True
        )
        return done.stdout.splitlines()

    pool, workstation, slurm = map(said, blocks)
    seeds, layers = (42, 142, 242), (10, 15)
    assert pool == [
        f"heft.sub extra=--seed {seed} --reft-layer {layer}" for layer in layers for seed in seeds
    ]
    in_turn = [f"--seed {seed} --reft-layer {layer}" for seed in seeds for layer in layers]
    assert workstation == in_turn
    assert slurm == [f"seed{flags.split()[1]} -d singleton heft_exec.sh {flags}" for flags in in_turn]
    extra = expanded("arguments", command_line=["extra=--seed 142 --reft-layer 10"])
    assert extra.split() == "--epochs-lora 3 --epochs-reft 3 --seed 142 --reft-layer 10".split()


def test_seeds_are_further_apart_than_the_epochs():
    """Epoch e of seed s has the order of epoch 0 of seed s + e; the paper's longest stage has 20 epochs."""
    loops = 0
    for file in "heft.sub README.md condor_outs/README.md".split():
        text = (ROOT / file).read_text()
        lists = [[int(seed) for seed in each.split()] for each in re.findall(r"for seed in ([\d ]+)", text)]
        lists += [[42, int(seed)] for seed in re.findall(r"--seed (\d+)", text) if seed != "42"]
        for seeds in lists:
            assert all(abs(a - b) > 20 for a in seeds for b in seeds if a != b), (file, seeds)
        loops += len(lists)
    assert loops > 3


def test_submit_file_has_no_line_twice_and_no_old_trap():
    code = [line for line in SUB.splitlines() if not line.startswith("#")]
    names = [line.split("=")[0].strip().lower() for line in code if "=" in line]
    assert len(names) == len(set(names)), "the last of two wins silently"
    for trap in ("${", "CUDADriverVersion", "environment", "getenv", "requirements =", "Requirements ="):
        assert trap not in "\n".join(code), trap


def test_folders_that_a_job_needs_are_in_the_repository():
    """Without them HTCondor holds the job (inputs), or writes no log and says nothing (condor_outs)."""
    ignored = (ROOT / ".gitignore").read_text().split()
    for folder, kept in {"condor_outs": "!.gitignore !README.md", "output": "!.gitignore"}.items():
        assert (ROOT / folder / ".gitignore").read_text().split() == ["*", *kept.split()], folder
        assert f"{folder}/" not in ignored and folder not in ignored
    for file in "results/report.py results/smoke/README.md condor_outs/README.md".split():
        assert (ROOT / file).is_file()
    assert {"results/smoke/*.json", "results/smoke/*.jsonl"} <= set(ignored)  # a user's own


# --- container.def, requirements.txt


def test_container_definition():
    head, *parts = re.split(r"^%(\w+)\n", (ROOT / "container.def").read_text(), flags=re.M)
    section = dict(zip(parts[::2], parts[1::2]))
    assert [*section] == "files post environment test help".split()
    assert re.search(r"^Bootstrap: docker\nFrom: python:3\.11[\w.-]*slim", head)
    assert "-r /opt/heft/requirements.txt" in section["post"]
    for unwanted in "conda token meta-llama hf_ index-url torch==".split():
        assert unwanted not in section["post"].lower(), unwanted
    # the host's variables, on which `unset` would have no effect there
    assert "export PYTHONNOUSERSITE=1 PYTHONPATH= PYTHONHOME=\n" in section["environment"]
    for package in "torch transformers peft pyreft datasets huggingface_hub httpx2 scipy tqdm".split():
        assert package in section["test"]


def pins(*files):
    lines = "\n".join((ROOT / file).read_text() for file in files).splitlines()
    lines = [line for line in lines if line and line[0] != "#"]
    assert all(re.fullmatch(r"[A-Za-z0-9_-]+==[0-9.]+", line) for line in lines)
    return dict(line.split("==") for line in lines)


def test_requirements_are_exact_installed_and_complete():
    for name, wanted in pins("requirements.txt", "tests/requirements.txt").items():
        assert version(name).split("+")[0] == wanted, name
    pinned = pins("requirements.txt")
    assert pinned["torch"] == "2.10.0"  # from PyPI a CUDA 12 build, as heft.sub asks for; later ones are not
    imported = set()
    for node in ast.walk(ast.parse((ROOT / "heft_finetuning.py").read_text())):
        imported |= {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
        imported |= {node.module} if isinstance(node, ast.ImportFrom) else set()
    assert {name.split(".")[0] for name in imported} - sys.stdlib_module_names - {*pinned} == set()
