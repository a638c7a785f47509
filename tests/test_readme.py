"""The README's program runs as it stands, its links go somewhere, its numbers are those of the results."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, read_result, start

import heft_finetuning as heft

README = (ROOT / "README.md").read_text()
PAGES = ["README.md", "tests/README.md", "condor_outs/README.md", "smoke/README.md"]
PAGES += ["results/README.md", "results/fidelity.md", "results/smoke/README.md"]


def test_the_program_gives_the_runs_own_answer(tmp_path):
    """The toy stands in for Llama 2 and BoolQ under their names: even the folders are those of the README."""
    shutil.copytree(ROOT / "smoke/model", tmp_path / "meta-llama/Llama-2-7b-chat-hf")
    (tmp_path / "google/boolq").mkdir(parents=True)
    train = (ROOT / "smoke/data/train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "google/boolq/train.jsonl").write_text("".join(train[:32]))
    asked = {
        "passage": "Ice is frozen water, and floats.",
        "question": "is ice made of water",
        "answer": True,
    }
    (tmp_path / "google/boolq/validation.jsonl").write_text(json.dumps(asked | {"answer": True}))
    process = start(tmp_path, ["--no-push-to-hub"])
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and "\nlora3-reft3: accuracy " in out, out + err
    (program,) = re.findall(r"```python\n(.*?)```", README, re.S)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    _, ((prediction),) = read_result(tmp_path)
    assert done.stdout.splitlines()[-1] == prediction["text"] and prediction["text"]


@pytest.mark.parametrize("page", PAGES)
def test_every_link_goes_somewhere(page):
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        linked = (ROOT / page).parent / file if file else ROOT / page
        assert linked.exists(), target
        lines = linked.read_text().splitlines() if anchor else []
        headings = [line.lstrip("# ").lower() for line in lines if line.startswith("#")]
        headings = [re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in headings]
        assert not anchor or anchor in headings, target


@pytest.mark.parametrize("page", PAGES)
def test_every_flag_and_setting_exists(page):
    text = (ROOT / page).read_text()
    flags = {"--" + name.lower().replace("_", "-") for name in heft.SETTINGS}
    flags |= {"--smoke", "--no-push-to-hub"}
    other = {"--all", "--gres", "--cpus-per-task", "--mem", "--time", "--signal", "--requeue", "--open-mode"}
    other |= {"--output", "--partition", "--account", "--answers", "--count", "--trainer"}
    other |= {"--ours-only", "--examples", "--tokens", "--dependency", "--publish", "--help", "--write"}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) <= flags | other
    names = set(re.findall(r"`([A-Z]+(?:_[A-Z]+)+)`", text)) - {
        "CUDA_VISIBLE_DEVICES",
        "BOOLQ_PROMPT_TMPL",
        "CAUSAL_LM",
        "HF_TOKEN",
    }
    assert names <= set(heft.SETTINGS), names - set(heft.SETTINGS)


def test_what_the_readme_says_was_found_is_what_the_results_say():
    """The table is that of the results page, and every difference in the text stands there."""
    results = (ROOT / "results/README.md").read_text()
    finding = README.partition("## What we found")[2].partition("\n## ")[0]
    table = [line for line in finding.splitlines() if line.startswith("|")]
    assert len(table) == 7 and "\n".join(table) in results
    differences = re.findall(r"[+-]\d+\.\d\d", finding)
    assert len(differences) >= 10 and all(difference in results for difference in differences)


def test_the_papers_numbers_in_the_table():
    for name, row in json.loads((ROOT / "results/paper.json").read_text())["table_1"].items():
        lora, reft = (int(part[4:]) for part in name.split("-"))
        flags = "" if name == "lora3-reft3" else f" --epochs-lora {lora} --epochs-reft {reft}"
        time = f"{row['minutes'] // 60}:{row['minutes'] % 60:02d}"
        assert f"| `./heft_exec.sh{flags}` | {row['accuracy']:.2f} %, {time} |" in README, name
