"""heft_exec.sh, heft.sub and container.def, as far as they can be checked without a pool (tests/cluster.sh needs one)."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT


PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"

# --- heft_exec.sh


@pytest.fixture
def place(tmp_path):
    """A folder with heft_exec.sh and a script that shows what it was given."""
    for file in ("heft_exec.sh", "requirements.txt"):  # the Python that runs the tests has the packages: nothing is installed
        shutil.copy(ROOT / file, tmp_path)
    (tmp_path / "heft_finetuning.py").write_text(
        "import os, sys, signal, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(85))\n"
        "print(sys.argv[1:], os.environ.get('HF_TOKEN'), os.environ['HF_HOME'], os.getpid(), flush=True)\n"
        "time.sleep(30) if 'wait' in sys.argv else sys.exit(7 if 'fail' in sys.argv else 0)\n")
    return tmp_path


def run(place, *arguments, **environment):
    environment = {"PATH": PATH} | environment
    return subprocess.run([place / "heft_exec.sh", *arguments], cwd=place, capture_output=True, text=True, env=environment)


def test_wrapper_passes_shellcheck():
    for file in ("heft_exec.sh", "tests/run", ".ci/run", "tests/cluster.sh"):
        subprocess.run(["shellcheck", ROOT / file], check=True, env={"PATH": PATH})


def test_wrapper_passes_arguments_and_status_on(place):
    done = run(place, "--a b", "*", "")
    assert done.returncode == 0 and done.stdout.startswith("['--a b', '*', ''] None")
    assert f" {place}/.hf_home " in done.stdout
    assert run(place, "fail").returncode == 7


def test_wrapper_becomes_the_script(place):
    process = subprocess.Popen([place / "heft_exec.sh", "wait"], cwd=place, stdout=subprocess.PIPE, text=True, env={"PATH": PATH})
    assert process.stdout.readline().split()[-1] == str(process.pid)  # exec: no shell in between
    process.terminate()
    assert process.wait(10) == 85


def test_wrapper_reads_the_token_from_a_private_file_only(place):
    token = place / ".hf_token"
    token.write_text("hf_secret\n")
    token.chmod(0o644)
    done = run(place)
    assert done.returncode == 2 and done.stderr == "heft: error: .hf_token can be read by others: chmod 600 .hf_token\n" and not done.stdout
    token.chmod(0o600)
    assert "'hf_secret'" in run(place).stdout.replace(" hf_secret ", "'hf_secret'")
    assert " hf_other " in run(place, HF_TOKEN="hf_other").stdout
    token.write_text("")
    assert " None " in run(place).stdout  # an empty file is no token: a cluster job without one


def test_wrapper_says_what_is_missing(place):
    (place / "heft_finetuning.py").unlink()
    done = run(place)
    assert done.returncode == 2 and done.stderr.startswith("heft: error: heft_finetuning.py is neither") and done.stderr.count("\n") == 1
    shutil.copy(ROOT / "heft_finetuning.py", place)
    (place / "requirements.txt").unlink()
    done = run(place)
    assert done.returncode == 2 and "requirements.txt is neither" in done.stderr


def test_wrapper_installs_what_is_not_there(place):
    """A Python without the right packages: .venv is made, and pip's failure is one line."""
    (place / "requirements.txt").write_text("heft-no-such-package==1.0\n")
    done = run(place, PIP_NO_INDEX="1")
    assert done.returncode == 2 and "first run, installing" in done.stderr and "heft: error: pip could not install" in done.stderr


# --- heft.sub


SUB = ROOT / "heft.sub"


def submit(text=None, **macros):
    """The submit description as HTCondor's own parser reads it, with macros as on condor_submit's command line."""
    import htcondor2
    # condor_submit takes them before the file's first line: what the file defines itself would win
    return htcondor2.Submit("".join(f"{name} = {value}\n" for name, value in macros.items()) + (text if text is not None else SUB.read_text()))


def expanded(description, name, **row):
    for macro, value in row.items():
        description[macro] = value
    return description.expand(name)


def test_submit_file_runs_the_papers_main_run():
    assert expanded(submit(), "arguments").split() == "--epochs-lora 3 --epochs-reft 3".split()
    assert expanded(submit(epochs_lora="20", epochs_reft="0"), "arguments").split() == "--epochs-lora 20 --epochs-reft 0".split()
    assert expanded(submit(extra="--smoke"), "arguments").split() == "--epochs-lora 3 --epochs-reft 3 --smoke".split()


def test_submit_file_needs_what_the_run_needs():
    description = submit()
    for name, value in {"executable": "heft_exec.sh", "request_gpus": "1", "request_cpus": "1", "gpus_minimum_memory": "32000", "gpus_minimum_runtime": "12.4",
                        "checkpoint_exit_code": "85", "when_to_transfer_output": "ON_EXIT_OR_EVICT", "container_image": "container.sif"}.items():
        assert description.expand(name) == value, name
    for name in ("transfer_output_files", "transfer_checkpoint_files"):
        assert set(description.expand(name).replace(" ", "").split(",")) == {"results", "output"}, name
    inputs = set(description.expand("transfer_input_files").replace(" ", "").split(","))
    assert {"heft_finetuning.py", ".hf_token"} <= inputs
    for name in ("log", "output", "error"):
        assert expanded(submit(), name, Cluster="7", Process="2").startswith("condor_outs/7_2."), name
    assert (ROOT / "condor_outs").is_dir()


def test_every_row_of_the_sweep_is_one_of_table_1():
    """The rows behind comment signs parse once switched on, and are the paper's."""
    import json
    rows = re.search(r"# queue epochs_lora, epochs_reft from \(\n((?:#.*\n)+?)# \)", SUB.read_text())
    assert rows, "the sweep of Table 1 is there to be switched on"
    text = SUB.read_text().replace(rows.group(0), rows.group(0).replace("# ", "").replace("#", "")).replace("\nqueue\n", "\n")
    description = submit(text)
    items = [dict(item) if isinstance(item, dict) else dict(zip(("epochs_lora", "epochs_reft"), item)) for item in description.itemdata()]
    paper = json.loads((ROOT / "results/paper.json").read_text())["table_1"]
    assert {(int(item["epochs_lora"]), int(item["epochs_reft"])) for item in items} == {(row["lora_epochs"], row["reft_epochs"]) for row in paper.values()}
    for item in items:
        assert expanded(submit(text), "arguments", **item).split() == ["--epochs-lora", item["epochs_lora"], "--epochs-reft", item["epochs_reft"]]


def test_submit_file_has_no_line_twice_and_no_old_trap():
    text = SUB.read_text()
    names = [line.split("=")[0].strip().lower() for line in text.splitlines() if "=" in line and not line.lstrip().startswith("#")]
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
    for unwanted in ("conda", "token", "meta-llama", "hf_", "--index-url"):
        assert unwanted not in post.lower(), unwanted
    for package in ("torch", "transformers", "peft", "pyreft", "datasets", "huggingface_hub", "tqdm"):
        assert package in re.search(r"%test\n(.*?)\n%", text, re.S).group(1)


def test_requirements_are_exact():
    lines = [line for file in ("requirements.txt", "tests/requirements.txt") for line in (ROOT / file).read_text().splitlines() if line and line[0] != "#"]
    assert all(re.fullmatch(r"[A-Za-z0-9_-]+==[0-9.]+", line) for line in lines)
    from importlib.metadata import version
    for line in lines:
        name, wanted = line.split("==")
        assert version(name).split("+")[0] == wanted
