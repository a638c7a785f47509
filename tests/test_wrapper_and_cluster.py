"""heft_exec.sh, heft.sub and container.def, as far as they go without a pool (tests/cluster.sh needs one)."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"

# --- heft_exec.sh


@pytest.fixture
def place(tmp_path):
    """A folder with heft_exec.sh and a script that shows what it was given."""
    shutil.copy(ROOT / "heft_exec.sh", tmp_path)
    # the Python that runs the tests has the packages: nothing is installed
    shutil.copy(ROOT / "requirements.txt", tmp_path)
    (tmp_path / "heft_finetuning.py").write_text(
        "import os, sys, signal, time\n"
        "token, cache = os.environ.get('HF_TOKEN'), os.environ.get('HF_HOME')\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(85))\n"
        "print(sys.argv[1:], token, cache, os.getpid(), flush=True)\n"
        "time.sleep(30) if 'wait' in sys.argv else sys.exit(7 if 'fail' in sys.argv else 0)\n"
    )
    return tmp_path


def run(place, *arguments, **environment):
    environment = {"PATH": PATH} | environment
    return subprocess.run(
        [place / "heft_exec.sh", *arguments], cwd=place, capture_output=True, text=True, env=environment
    )


def test_wrapper_passes_shellcheck():
    for file in ("heft_exec.sh", "tests/run", ".ci/run", "tests/cluster.sh"):
        subprocess.run(["shellcheck", ROOT / file], check=True, env={"PATH": PATH})


def test_wrapper_passes_arguments_and_status_on(place):
    done = run(place, "--a b", "*", "")
    assert done.returncode == 0 and done.stdout.startswith("['--a b', '*', ''] None")
    assert run(place, "fail").returncode == 7


def test_wrapper_keeps_downloads_in_the_jobs_directory_only_in_a_job(place):
    assert run(place).stdout.split()[2] == "None"  # a workstation has its own cache, and a login
    assert not (place / "results").exists()
    assert run(place, HF_HOME="/elsewhere").stdout.split()[2] == "/elsewhere"
    job = {"_CONDOR_SCRATCH_DIR": str(place)}
    assert run(place, **job).stdout.split()[2] == f"{place}/.hf_home"
    assert run(place, HF_HOME="/elsewhere", **job).stdout.split()[2] == "/elsewhere"
    assert (place / "results").is_dir() and (place / "output").is_dir()


def test_reports_that_travelled_in_do_not_travel_back(place):
    files = {"a.json", "a.predictions.jsonl", "README.md", "report.py", "figure1.svg"}
    (place / "results/smoke").mkdir(parents=True)
    for folder in ("results", "results/smoke"):
        for file in files:
            (place / folder / file).write_text("")
    (place / "scratch").mkdir()

    def here(folder):
        return {path.name for path in (place / folder).iterdir() if path.is_file()}

    run(place)
    run(place, _CONDOR_SCRATCH_DIR=str(place / "scratch"))  # a job, at work in a user's own folder
    assert here("results") == here("results/smoke") == files
    run(place, _CONDOR_SCRATCH_DIR=str(place))
    assert here("results") == here("results/smoke") == {"a.json", "a.predictions.jsonl"}


def test_wrapper_becomes_the_script(place):
    process = subprocess.Popen(
        [place / "heft_exec.sh", "wait"], cwd=place, stdout=subprocess.PIPE, text=True, env={"PATH": PATH}
    )
    assert process.stdout.readline().split()[-1] == str(process.pid)  # exec: no shell in between
    process.terminate()
    assert process.wait(10) == 85


def test_wrapper_reads_the_token_from_a_private_file_only(place):
    token = place / ".hf_token"
    token.write_text("hf_secret\n")
    token.chmod(0o644)
    done = run(place)
    assert (
        done.returncode == 2
        and done.stderr == "heft: error: .hf_token can be read by others: chmod 600 .hf_token\n"
        and not done.stdout
    )
    token.chmod(0o600)
    assert "'hf_secret'" in run(place).stdout.replace(" hf_secret ", "'hf_secret'")
    assert " hf_other " in run(place, HF_TOKEN="hf_other").stdout
    token.write_text("")
    assert " None " in run(place).stdout  # an empty file is no token: a cluster job without one


def test_wrapper_says_what_is_missing(place):
    (place / "heft_finetuning.py").unlink()
    done = run(place)
    assert (
        done.returncode == 2
        and done.stderr.startswith("heft: error: heft_finetuning.py is neither")
        and done.stderr.count("\n") == 1
    )
    shutil.copy(ROOT / "heft_finetuning.py", place)
    (place / "requirements.txt").unlink()
    done = run(place)
    assert done.returncode == 2 and "requirements.txt is neither" in done.stderr


def test_wrapper_installs_what_is_not_there(place):
    """A Python without the right packages: .venv is made, and pip's failure is one line."""
    (place / "requirements.txt").write_text("heft-toy==1.0\n")
    done = run(place, PIP_NO_INDEX="1")
    assert (
        done.returncode == 2
        and "first run, installing" in done.stderr
        and "heft: error: pip could not install" in done.stderr
    )
    with zipfile.ZipFile(place / "heft_toy-1.0-py3-none-any.whl", "w") as wheel:
        about = "heft_toy-1.0.dist-info/"
        wheel.writestr(about + "METADATA", "Metadata-Version: 2.1\nName: heft-toy\nVersion: 1.0\n")
        wheel.writestr(about + "WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(about + "RECORD", "")
    done = run(place, "a", PIP_NO_INDEX="1", PIP_FIND_LINKS=str(place))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("['a']")  # pip's progress is shown, but not on the script's own output
    assert "Successfully installed heft-toy-1.0" in done.stderr
    done = run(place, "a", PIP_NO_INDEX="1")
    assert done.returncode == 0 and not done.stderr


def pretend(place, name, version):
    """A command `name`: this Python, which says that it is of another version and has no packages."""
    place.joinpath("bin").mkdir(exist_ok=True)
    path = place / "bin" / name
    said = version.replace(".", ", ")
    path.write_text(
        "#!/usr/bin/env bash\n"
        f'case "$1" in\n --version) echo Python {version} ;;\n'
        f' -c) exec {sys.executable} -c "import sys; sys.version_info = ({said})\n'
        '$2" ;;\n'
        f' -m) echo made by {name} >&2; exec {sys.executable} "$@" ;;\n'
        " *) exit 1 ;;\nesac\n"
    )
    path.chmod(0o755)


def test_wrapper_takes_a_python_that_has_wheels(place):
    """No package is compiled, or fails to be, after minutes of downloading."""
    path = f"{place / 'bin'}:/usr/bin:/bin"
    for name in ("python3", "python3.11", "python3.12", "python3.13"):
        pretend(place, name, "3.14.0")
    done = run(place, PATH=path)
    assert done.returncode == 2 and not done.stdout and not (place / ".venv").exists()
    assert done.stderr == ("heft: error: Python 3.11, 3.12 or 3.13 is needed; python3 is Python 3.14.0\n")
    for version in ("3.10.13", "2.7.18"):
        pretend(place, "python3", version)
        assert f"python3 is Python {version}\n" in run(place, PATH=path).stderr
    # another name helps, and what a wrong Python has left does not stay
    pretend(place, "python3.12", "3.12.1")
    (place / ".venv/bin").mkdir(parents=True)
    (place / ".venv/left").write_text("")
    shutil.copy(place / "bin/python3", place / ".venv/bin/python")
    (place / "requirements.txt").write_text("heft-toy==1.0\n")
    done = run(place, PATH=path, PIP_NO_INDEX="1")
    assert "made by python3.12\n" in done.stderr and "pip could not install" in done.stderr
    assert not (place / ".venv/left").exists()


# --- heft.sub


SUB = ROOT / "heft.sub"


def submit(text=None, **macros):
    """The submit description as HTCondor's own parser reads it; macros as on condor_submit's command line."""
    import htcondor2

    # condor_submit takes them before the file's first line: what the file defines itself would win
    return htcondor2.Submit(
        "".join(f"{name} = {value}\n" for name, value in macros.items())
        + (text if text is not None else SUB.read_text())
    )


def expanded(description, name, **row):
    for macro, value in row.items():
        description[macro] = value
    return description.expand(name)


def test_submit_file_runs_the_papers_main_run():
    assert expanded(submit(), "arguments").split() == "--epochs-lora 3 --epochs-reft 3".split()
    assert (
        expanded(submit(epochs_lora="20", epochs_reft="0"), "arguments").split()
        == "--epochs-lora 20 --epochs-reft 0".split()
    )
    assert (
        expanded(submit(extra="--smoke"), "arguments").split()
        == "--epochs-lora 3 --epochs-reft 3 --smoke".split()
    )


def test_submit_file_needs_what_the_run_needs():
    description = submit()
    for name, value in {
        "executable": "heft_exec.sh",
        "request_gpus": "1",
        "request_cpus": "1",
        "gpus_minimum_memory": "32000",
        "gpus_minimum_capability": "8.0",  # bfloat16 in hardware
        "gpus_minimum_runtime": "13.0",  # what PyPI's torch was built for
        "checkpoint_exit_code": "85",
        "max_retries": "2",
        "retry_until": "2",  # a mistake
        "when_to_transfer_output": "ON_EXIT_OR_EVICT",
        "container_image": "container.sif",
    }.items():
        assert description.expand(name) == value, name
    for name in ("transfer_output_files", "transfer_checkpoint_files"):
        assert set(description.expand(name).replace(" ", "").split(",")) == {"results", "output"}, name
    inputs = set(description.expand("transfer_input_files").replace(" ", "").split(","))
    assert {"heft_finetuning.py", "requirements.txt", "smoke", ".hf_token"} <= inputs
    # what a job has sent home is there when the same job is submitted again, or starts once more
    assert {"results", "output"} <= inputs
    for name in ("log", "output", "error"):
        assert expanded(submit(), name, Cluster="7", Process="2").startswith("condor_outs/7_2."), name


def test_folders_that_a_job_needs_are_in_the_repository():
    """Without them HTCondor holds the job (inputs), or writes no log and says nothing (condor_outs)."""
    ignored = (ROOT / ".gitignore").read_text().split()
    for folder in ("condor_outs", "output"):
        assert (ROOT / folder / ".gitignore").read_text().split() == ["*", "!.gitignore"], folder
        assert f"{folder}/" not in ignored and folder not in ignored
    for file in ("results/report.py", "results/smoke/README.md"):
        assert (ROOT / file).is_file()
    assert {"results/smoke/*.json", "results/smoke/*.jsonl"} <= set(ignored)  # a user's own


def test_every_row_of_the_sweep_is_one_of_table_1():
    """The rows behind comment signs parse once switched on, and are the paper's."""
    import json

    rows = re.search(r"# queue epochs_lora, epochs_reft from \(\n((?:#.*\n)+?)# \)", SUB.read_text())
    assert rows, "the sweep of Table 1 is there to be switched on"
    text = (
        SUB.read_text()
        .replace(rows.group(0), rows.group(0).replace("# ", "").replace("#", ""))
        .replace("\nqueue\n", "\n")
    )
    description = submit(text)
    items = [
        dict(item) if isinstance(item, dict) else dict(zip(("epochs_lora", "epochs_reft"), item))
        for item in description.itemdata()
    ]
    paper = json.loads((ROOT / "results/paper.json").read_text())["table_1"]
    assert {(int(item["epochs_lora"]), int(item["epochs_reft"])) for item in items} == {
        (row["lora_epochs"], row["reft_epochs"]) for row in paper.values()
    }
    for item in items:
        assert expanded(submit(text), "arguments", **item).split() == [
            "--epochs-lora",
            item["epochs_lora"],
            "--epochs-reft",
            item["epochs_reft"],
        ]


def test_submit_file_has_no_line_twice_and_no_old_trap():
    text = SUB.read_text()
    names = [
        line.split("=")[0].strip().lower()
        for line in text.splitlines()
        if "=" in line and not line.lstrip().startswith("#")
    ]
    assert len(names) == len(set(names)), "the last of two wins silently"
    code = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    for trap in ("${", "CUDADriverVersion", "environment", "getenv", "requirements =", "Requirements ="):
        assert trap not in code, trap


# --- container.def


def test_container_definition():
    text = (ROOT / "container.def").read_text()
    sections = re.findall(r"^%(\w+)", text, re.M)
    assert sections == ["files", "post", "environment", "test", "help"]
    assert re.search(r"^Bootstrap: docker\nFrom: python:3\.11[\w.-]*slim", text, re.M)
    post = re.search(r"%post\n(.*?)\n%", text, re.S).group(1)
    assert "-r /opt/heft/requirements.txt" in post
    active = "".join(line for line in post.lower().splitlines(True) if not line.lstrip().startswith("#"))
    for unwanted in ("conda", "token", "meta-llama", "hf_", "--index-url"):
        assert unwanted not in active, unwanted
    # the other CUDA: the same version, and a line that can be switched on
    (torch,) = re.findall(r"^torch==\S+", (ROOT / "requirements.txt").read_text(), re.M)
    (line,) = re.findall(r"^    # (python3 -m pip install .*--index-url .*)$", post, re.M)
    assert line.split()[-2:] == ["https://download.pytorch.org/whl/cu126", torch]
    assert post.index(line) < post.index("-r /opt/heft/requirements.txt")
    for package in ("torch", "transformers", "peft", "pyreft", "datasets", "huggingface_hub", "tqdm"):
        assert package in re.search(r"%test\n(.*?)\n%", text, re.S).group(1)


def test_requirements_are_exact():
    lines = [
        line
        for file in ("requirements.txt", "tests/requirements.txt")
        for line in (ROOT / file).read_text().splitlines()
        if line and line[0] != "#"
    ]
    assert all(re.fullmatch(r"[A-Za-z0-9_-]+==[0-9.]+", line) for line in lines)
    from importlib.metadata import version

    for line in lines:
        name, wanted = line.split("==")
        assert version(name).split("+")[0] == wanted
