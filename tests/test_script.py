"""What a user sees of heft_finetuning.py: settings, names, logs, results, what earlier work is reused."""

import contextlib
import hashlib
import importlib.util
import itertools
import json
import math
import os
import pty
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import termios
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import httpx2
import huggingface_hub
import pytest
import torch
from conftest import ROOT, load, rows_of, start, tiny_settings
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError
from inside import result_of, run_inside, run_process
from statsmodels.stats.proportion import proportion_confint

import heft_finetuning as heft

SCRIPT = ROOT / "heft_finetuning.py"
SHORT = "--epochs-lora 1 --epochs-reft 1"
EPOCHS = ("EPOCHS_LORA", "EPOCHS_REFT")
DECIDING = [name for name, setting in heft.SETTINGS.items() if setting.decides and name not in EPOCHS]
PARTS = ("lora", "reft", "run")


def run(work, given, flags=SHORT):
    return run_inside(work, [*map(str, tiny_settings(given)), *flags.split()])


# --- importing it, settings, names


def test_importing_it_does_nothing_else():
    """No process, nothing on the screen; environment and signals as before, warnings as the libraries leave
    them."""
    program = """
import contextlib, os, signal, subprocess, sys, warnings
import datasets, huggingface_hub, peft, scipy.stats, torch, transformers
with contextlib.redirect_stdout(None):
    import pyreft, pyvene
def surroundings():
    kinds = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    streams = sys.stdout, sys.stderr
    return list(warnings.filters), dict(os.environ), [signal.getsignal(kind) for kind in kinds], streams
def started(*_, **__): raise AssertionError("a process was started")
before, subprocess.Popen, os.system = surroundings(), started, started
import heft_finetuning as heft
assert surroundings() == before
print(heft.format_boolq({"passage": "P", "question": "Q", "answer": False})["answer"])
"""
    shown = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (shown.stdout, shown.stderr) == ("No\n", "")


def test_prompt_is_the_papers():
    assert heft.BOOLQ_PROMPT_TMPL % ("P", "Q") == (
        '<s>[INST] <<SYS>>\nYou are a helpful assistant that answers questions with only "Yes" or\n'
        '"No" based on the provided passage.\n'
        "<</SYS>>\nPassage: P\nQuestion: Q\nAnswer: [/INST]"
    )
    row = heft.format_boolq({"passage": "100 %s", "question": "q", "answer": True})
    assert row == {"prompt": heft.BOOLQ_PROMPT_TMPL % ("100 %s", "q"), "answer": "Yes"}


def test_defaults_are_the_papers():
    settings = heft.read_settings([])
    assert {name: settings[name] for name in DECIDING} == {
        name: heft.SETTINGS[name].paper for name in DECIDING
    }
    assert (settings["EPOCHS_LORA"], settings["EPOCHS_REFT"]) == (3, 3)
    assert [heft.name_of(settings, part) for part in PARTS] == ["lora3", "lora3-reft3", "lora3-reft3"]


def first_screen():
    """[(name, comment)] of the constants at the top of the script."""
    text = SCRIPT.read_text().split("import argparse")[0]
    lines = re.findall(r"^([A-Z][A-Z_]*) = (.*)$", text, re.M)
    return [(name, line.partition("  # ")[2].strip()) for name, line in lines]


def test_every_constant_of_the_first_screen_is_a_setting():
    names = [name for name, _ in first_screen()]
    assert len(set(names)) == len(names) and set(names) == set(heft.SETTINGS)
    assert list(heft.read_settings([]).keys() - heft.SETTINGS.keys()) == ["SMOKE"]


def test_every_constant_has_a_comment():
    for name, comment in first_screen():
        assert len(comment) > 5, name


def help_text(capsys):
    wide = mock.patch.dict(os.environ, COLUMNS="999")  # no line is broken
    with wide, pytest.raises(SystemExit) as end:
        heft.read_settings(["--help"])
    assert end.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def test_help_shows_comments_legal_values_and_defaults(capsys):
    text = help_text(capsys)
    for name, comment in first_screen():
        flag, (_, setting) = "--" + name.lower().replace("_", "-"), (name, heft.SETTINGS[name])
        usual = getattr(heft, name)
        shown = f"{' '.join(comment.split())} [{setting.legal.words}; default: {usual!r}]"
        value = f"{flag}, --no-{flag[2:]}" if isinstance(usual, bool) else f"{flag} X"
        assert f"{value} {shown}" in text, name


@pytest.mark.parametrize(
    "words",
    [
        "--epochs-lora X epochs of stage 1; 0 skips the stage [a whole number from 0; default: 3]",
        "use only the first N training examples; 0 uses all [a whole number from 0; default: 0]",
        "on the input of the update [from 0 to below 1; default: 0.05]",
        "at the first step; falls linearly to 0 [above 0; default: 0.0002]",
        "of the model's weights [bfloat16 or float32; default: 'bfloat16']",
        "\"\" is Llama's q_proj, v_proj (the paper's code); all-linear (its text); or a,b [one line,",
        "--push-to-hub, --no-push-to-hub upload the merged model and the LoReFT intervention; reuse what",
    ],
)
def test_help_in_words(capsys, words):
    assert words in help_text(capsys)


@pytest.mark.parametrize(
    "flags, hint",
    [
        ("--epoch-lora 5", "do you mean --epochs-lora?"),
        ("--max-eval-sample=400", "do you mean --max-eval-samples?"),
        ("--no-push-to-hb", "do you mean --no-push-to-hub?"),
        ("--lora_rank 16", "do you mean --lora-rank?"),
        ("--smok", "do you mean --smoke?"),
        ("--xyz", "--help lists the flags"),
    ],
)
def test_a_mistyped_flag_names_the_nearest(flags, hint):
    with pytest.raises(heft.Stop) as stop:
        heft.read_settings(flags.split())
    assert stop.value.status == 2 and flags in str(stop.value) and str(stop.value).endswith(hint)


@pytest.mark.parametrize(
    "flags, name, stage_1",
    [
        ("--epochs-lora 20 --epochs-reft 0", "lora20-reft0", "lora20"),
        ("--reft-layer 10 --seed 7", "lora3-reft3-reft_layer10-seed7", "lora3-seed7"),
        ("--max-eval-samples 400", "lora3-reft3-eval400", "lora3"),
        ("--epochs-lora 0 --lora-rank 4", "lora0-reft3", "lora0"),
        ("--epochs-reft 0 --reft-rank 8", "lora3-reft0", "lora3"),
        ("--tokens-per-microbatch 64 --output-dir o --no-push-to-hub --hf-user me", "lora3-reft3", "lora3"),
        ("--learning-rate-lora 1e-3", "lora3-reft3-lr_lora0.001", "lora3-lr_lora0.001"),
        ("--base-model=x/a*b --lora-targets all-linear",) + ("lora3{}-a_b-lora_targets_all_linear",) * 2,
        ("--base-model me/Small-1B --dataset data/reviews/ --max-train-samples 640",)
        + ("lora3{}-Small_1B-on_reviews-train640",) * 2,
        ("--tag clip0.1", "lora3-reft3-clip0.1", "lora3-clip0.1"),
        ("--seed 7 --tag a+b_c", "lora3-reft3-seed7-a+b_c", "lora3-seed7-a+b_c"),
        ("--base-revision v1.0", "lora3-reft3-revision_v1.0", "lora3-revision_v1.0"),
        ("--accept-other-code --private-repos", "lora3-reft3", "lora3"),
        ("--smoke", "lora3-reft3", "lora3"),
        ("--smoke --dtype bfloat16", "lora3-reft3-dtype_bfloat16", "lora3-dtype_bfloat16"),
    ],
)
def test_name_says_what_differs_from_the_paper(flags, name, stage_1):
    settings = heft.read_settings(flags.split())
    assert heft.name_of(settings, "run") == name.format("-reft3")
    assert heft.name_of(settings, "lora") == stage_1.format("")


def changed(settings, name):
    """The settings with another value of one of them."""
    value = settings[name]
    return settings | {name: f"{value}x" if isinstance(value, str) else value + 1}


def test_every_setting_that_changes_the_experiment_changes_the_name():
    usual = heft.read_settings([])
    names = {heft.name_of(changed(usual, name), "run") for name in DECIDING}
    assert len(names) == len(DECIDING) and heft.name_of(usual, "run") not in names


def test_names_show_what_decides():
    """What changes the name of a part is what decides it, and nothing else is in `made_with`."""
    usual = heft.read_settings([])
    expected = {
        "lora": {"lora", "stages"},
        "reft": {"lora", "reft", "stages"},
        "run": {"lora", "reft", "stages", "evaluation"},
    }
    for part in PARTS:
        names = {name for name in DECIDING if heft.SETTINGS[name].decides in expected[part]}
        epochs = {"EPOCHS_LORA"} | ({"EPOCHS_REFT"} if part != "lora" else set())
        assert set(heft.deciding_settings(usual, part)) == names | epochs
        for name in DECIDING:
            same = heft.name_of(changed(usual, name), part) == heft.name_of(usual, part)
            assert same == (name not in names), (part, name)
        # Of model and data the files count, not the names.
        made = heft.identity(usual, part, TRAIN_DATA="x")
        code = {"CODE_OF_STAGES"} | ({"CODE_OF_EVALUATION"} if part == "run" else set())
        assert made.keys() == (names | epochs | code | {"TRAIN_DATA"}) - {
            "BASE_MODEL",
            "BASE_REVISION",
            "DATASET",
        }


def test_a_long_name_is_shortened(tiny, tmp_path):
    """Seven targets and nine other settings: still a file's name, unique, and the same each time."""
    targets = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
    flags = f"--lora-targets {targets} --lora-rank 3 --lora-alpha 16 --lora-dropout 0.125 --reft-rank 3"
    flags += " --learning-rate-lora 0.00012345678 --learning-rate-reft 0.00087654321 --max-length 1024"
    flags += " --examples-per-step 16 --max-new-tokens 6"
    shown = run(tmp_path, tiny, f"{SHORT} {flags} --tag word")
    assert shown.status == 0 and not shown.err, shown
    (result,) = tmp_path.glob("results/*.json")
    assert len(result.stem) <= 200 and result.stem.startswith("lora1-reft1-model-on_data-lora_rank3-")
    assert len(list(tmp_path.glob("output/*/heft.json"))) == 2
    assert "already done" in run(tmp_path, tiny, f"{SHORT} {flags} --tag word").out
    usual = heft.read_settings([*map(str, tiny_settings(tiny)), *f"{SHORT} {flags}".split()])
    names = [heft.name_of(usual | {"TAG": tag}, part) for tag in ("word", "other") for part in PARTS]
    assert len(set(names)) == 6 and max(map(len, names)) <= 200


def test_editing_a_constant_equals_its_flag(tmp_path):
    text = SCRIPT.read_text().replace("EPOCHS_LORA = 3 ", "EPOCHS_LORA = 20 ")
    text = text.replace('LORA_TARGETS = ""', 'LORA_TARGETS = "all-linear"')
    (tmp_path / "edited.py").write_text(re.sub("(MAX_LENGTH = 2048) .*", r"\1", text))  # a comment lost
    spec = importlib.util.spec_from_file_location("edited", tmp_path / "edited.py")
    edited = importlib.util.module_from_spec(spec)
    sys.modules["edited"] = edited  # dataclasses look there
    spec.loader.exec_module(edited)
    by_edit = edited.read_settings([])
    by_flag = heft.read_settings("--epochs-lora 20 --lora-targets all-linear".split())
    assert by_edit == by_flag
    assert edited.name_of(by_edit, "run") == "lora20-reft3-lora_targets_all_linear"


# --- arithmetic


@pytest.mark.parametrize("tokens", [1, 10, 64, 1000])
def test_microbatches_hold_each_once_within_the_limit(tokens):
    lengths = torch.randint(1, 60, (50,), generator=torch.Generator().manual_seed(0)).tolist()
    groups = heft.microbatches(lengths, tokens)
    assert sorted(sum(groups, [])) == list(range(50))
    for group in groups:
        assert len(group) == 1 or len(group) * max(lengths[i] for i in group) <= tokens
    assert heft.microbatches([], 10) == []


def test_example_losses_are_transformers_own(tiny):
    model, tokenizer = load(tiny / "model")
    texts = ["Anna never keeps cats.", "does Anna", "Yes No Yes No Yes"]
    tokens = sorted([tokenizer(text)["input_ids"] for text in texts], key=len)
    examples = [{"input_ids": t, "labels": [heft.IGNORE] * 2 + t[2:]} for t in tokens]
    (batch,) = heft.collate(examples)
    losses = heft.example_losses(model(input_ids=batch["input_ids"]).logits, batch["labels"])
    for loss, example in zip(losses, examples):
        alone = {key: torch.tensor([value]) for key, value in example.items()}
        torch.testing.assert_close(loss, model(**alone).loss)


ANSWERS = {"Yes": "Yes", "No, Yes": "Yes", "No.": "No", "yes": "Unknown", "": "Unknown", "Nope": "No"}


@pytest.mark.parametrize("text, answer", ANSWERS.items())
def test_prediction_is_the_papers_rule(text, answer):
    assert heft.predict(text) == answer


@pytest.mark.parametrize(
    "answers, expected", [("YNN", "No 66.67%"), ("YYYN", "Yes 75.00%"), ("YN", "Yes 50.00%")]
)
def test_what_always_giving_the_more_frequent_answer_scores(answers, expected):
    answers = [{"Y": "Yes", "N": "No"}[letter] for letter in answers]
    result = heft.score(["Unknown"] * len(answers), answers)
    assert f"{result['majority_answer']} {result['majority_accuracy']}" == expected
    assert (result["accuracy"], result["unknown_answers"], result["yes_answers"]) == (
        "0.00%",
        len(answers),
        0,
    )


def test_a_tokenizer_that_joins_prompt_and_answer():
    def tokenizer(text):
        return {"input_ids": [len(text)]}

    tokenizer.eos_token, tokenizer.eos_token_id, tokenizer.pad_token_id = "</s>", 0, 0
    rows = [{"prompt": "p", "answer": "Yes", "tokens": [1]}]
    with pytest.raises(heft.Stop, match="joins prompt and answer: use --epochs-reft 0") as stop:
        heft.reft_training_examples(tokenizer, rows)
    assert stop.value.status == 2 and len(heft.lora_training_examples(tokenizer, rows)) == 1


# --- errors


def answer_of(status, kind=HfHubHTTPError):
    """The Hub's answer with this status."""
    return kind("no", response=httpx2.Response(status, request=httpx2.Request("GET", "http://hub")))


@pytest.mark.parametrize(
    "error, status",
    [
        (httpx2.ReadError("cut"), 1),  # in the middle of a download
        (httpx2.ConnectTimeout("late"), 1),
        (answer_of(503), 1),
        (answer_of(429), 1),
        (answer_of(404), 2),
        (answer_of(403), 2),
        (answer_of(403, GatedRepoError), 2),
        (OSError("no such file"), 2),
        (ValueError("first\nsecond"), 2),
    ],
)
def test_a_failing_network_is_no_mistake_of_the_user(monkeypatch, capsys, error, status):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(heft.Stop) as stop, heft.explained("cannot read it"):
        raise error
    assert stop.value.status == heft.report_error(stop.value) == status
    err = capsys.readouterr().err
    assert err.startswith("heft: error: ") and err.count("\n") == 1 and type(error).__name__ in err
    assert ("request access" if isinstance(error, GatedRepoError) else "cannot read it") in err


def test_a_bug_shows_its_traceback(capsys):
    with pytest.raises(AttributeError) as bug:
        heft.no_such_function()
    assert heft.report_error(bug.value) == 1
    assert "Traceback" in (err := capsys.readouterr().err) and "no_such_function" in err


def test_the_traceback_of_a_stop_on_request(monkeypatch, capsys):
    with pytest.raises(heft.Stop) as stop, heft.explained("cannot read it"):
        json.loads("{")
    monkeypatch.setenv("HEFT_TRACEBACK", "1")
    assert heft.report_error(stop.value) == 2
    err = capsys.readouterr().err
    assert "json.decoder" in err and err.splitlines()[-1].startswith(
        "heft: error: cannot read it (JSONDecodeE"
    )


# --- the screen

PLAN = r"""
run      (\S+) on CPU (.+), \d+ threads; (commit \S+, )?script [0-9a-f]{8}
model    \S+/model, [\d,]+ parameters in float32
data     \S+/data: 20 questions; seed 42
stage 1  LoRA, 1 epochs of 45 examples, rate 0.0002, rank 8 on q_proj, v_proj
stage 2  LoReFT, 1 epochs of 45 examples, rate 0.0002, block 2
files    results/(\S+).json, output/(\S+), output/(\S+)
uploads  none
""".lstrip()
STEP = r"step (\d+) of (\d+): loss (\d+\.\d+), rate (\S+), (\d+\.\d+) s per step, (\d+:\d\d:\d\d) left"
SECONDS = r"-?\d+\.\d+ s per step|seconds  .*|-?\d+:\d\d:\d\d left"


def test_the_loading_line_comes_at_once(tmp_path):
    """Before the libraries, which take seconds, and so also before a refusal."""
    process = start(tmp_path, ["--nonsense"])
    first = process.stdout.readline()
    assert first == "heft: loading the libraries\n" and process.poll() is None
    maps = Path(f"/proc/{process.pid}/maps")
    if maps.exists():
        assert "libtorch" not in maps.read_text(), "it should stand there before torch is imported"
    out, err = process.communicate(timeout=100)
    assert (process.returncode, out) == (2, "") and "unrecognized arguments: --nonsense" in err


def test_the_screen_of_a_run(tiny, tmp_path):
    """Plain lines: the plan, the first step, every 50 steps and the last of each stage, the result; nothing
    of any library."""
    flags = "--epochs-lora 2 --epochs-reft 1 --examples-per-step 1 --tokens-per-microbatch 100".split()
    shown = run_process(tmp_path, [*tiny_settings(tiny), *flags])
    assert (shown.status, shown.err) == (0, "") and "\r" not in shown.out
    plan = PLAN.replace("1 epochs", "2 epochs", 1)
    match = re.match(f"heft: loading the libraries\n{plan}\n", shown.out)
    assert match, shown.out
    name, _, _, *files = match.groups()
    assert name == "lora2-reft1-model-on_data-reft_layer2-examples_per_step1-dtype_float32"
    assert files == [name, "lora2-model-on_data-examples_per_step1-dtype_float32", name]
    steps = [match.groups() for match in re.finditer(f"^{STEP}$", shown.out, re.M)]
    assert [step[:2] for step in steps] == [
        ("1", "90"),
        ("50", "90"),
        ("90", "90"),
        ("1", "45"),
        ("45", "45"),
    ]
    losses = result_of(tmp_path)[0]["loss"]
    assert float(steps[1][2]) == pytest.approx(losses["lora"][49], abs=1e-3)
    rates = [2e-4, 2e-4 * 41 / 90, 2e-4 / 90, 2e-4, 2e-4 / 45]
    assert [float(step[3]) for step in steps] == pytest.approx(rates, rel=1e-2)
    assert [step[5] for step in (steps[2], steps[4])] == ["0:00:00"] * 2
    assert re.search(r"^micro-batch 1 of \d+: \d+ questions, ", shown.out, re.M)
    assert re.search(r"^micro-batch (\d+) of \1: 20 questions, ", shown.out, re.M)


def test_a_terminal_shows_the_same_lines(tiny, tmp_path):
    flags = [*tiny_settings(tiny), *"--epochs-lora 1 --epochs-reft 0 --examples-per-step 9".split()]
    plain = run_process(tmp_path / "plain", flags)
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, 120))
    command = [sys.executable, str(SCRIPT), *map(str, flags)]
    (tmp_path / "terminal").mkdir()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=tmp_path / "terminal", stdout=slave, stderr=slave, env=environment
    )
    os.close(slave)
    shown = b""
    while True:
        try:
            shown += (more := os.read(master, 65536))
        except OSError:  # Linux's end of a pseudo-terminal
            break
        if not more:
            break
    os.close(master)
    assert process.wait() == 0, shown
    text = shown.replace(b"\r\n", b"\n").decode()
    assert "step 5 of 5: loss" in text
    assert re.sub(SECONDS, "", text) == re.sub(SECONDS, "", plain.out)


def test_nothing_is_said_of_what_there_is_one_of_or_none(tiny, tmp_path):
    for flags in "--epochs-lora 0 --epochs-reft 0", "--epochs-lora 1 --epochs-reft 0 --examples-per-step 45":
        shown = run(tmp_path, tiny, flags)
        assert shown.status == 0 and not shown.err, shown
        for words in (" 0 examples", " of 1:", "micro-batch", "stage 2", "uploads  \n"):
            assert words not in shown.out, words
        assert ("45 examples" in shown.out) == ("stage 1" in shown.out) == ("--epochs-lora 1" in flags)


def test_the_plan_says_what_stage_2_leaves_out(tiny, tmp_path):
    lengths = sorted(len(row["tokens"]) for row in prompts_of(tiny))
    assert lengths[20] < lengths[21]
    shown = run(tmp_path, tiny, f"{SHORT} --max-length {lengths[20] + 2}")
    assert shown.status == 0, shown
    fitting = sum(length <= lengths[20] for length in lengths)
    assert "  LoRA, 1 epochs of 45 examples, " in shown.out
    assert f"  LoReFT, 1 epochs of {fitting} examples, " in shown.out and fitting < 45


def prompts_of(given):
    """The training rows with their tokens."""
    _, tokenizer = load(given / "model")
    return [
        row | {"tokens": tokenizer(row["prompt"])["input_ids"]} for row in rows_of(given / "data", "train")
    ]


def test_a_clock_that_is_set_back(tiny, tmp_path, monkeypatch):
    """Seconds are those that have passed, whatever the wall clock says meanwhile."""
    clock, calls = time.time, itertools.count()
    monkeypatch.setattr(time, "time", lambda: clock() - 3600 * next(calls))
    shown = run(tmp_path, tiny, f"{SHORT} --examples-per-step 9")
    assert shown.status == 0 and not shown.err, shown
    assert all(0 < value < 100 for value in result_of(tmp_path)[0]["seconds"].values())
    found = re.findall(SECONDS, shown.out)
    assert len(found) > 4 and not [words for words in found if "-" in words]


# --- a screen that nobody reads


def with_shell(folder, flags, line, **environment):
    """Run a line of bash in which "$@" is the script with its flags."""
    folder.mkdir(exist_ok=True)
    command = ["bash", "-c", line, "bash", sys.executable, str(SCRIPT), *map(str, flags)]
    environment = os.environ | {"HF_HOME": str(folder / ".hf_home"), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)


@pytest.mark.parametrize(
    "line, out",
    [
        ('"$@" | head -1; exit ${PIPESTATUS[0]}', "heft: loading the libraries\n"),
        ('"$@" >&-', ""),
        ('"$@" >&- 2>&-', ""),
        ('"$@" >/dev/full', ""),
    ],
)
def test_a_closed_screen_costs_no_training(tiny, tmp_path, four_runs, line, out):
    done = with_shell(tmp_path, [*tiny_settings(tiny), *SHORT.split()], line)
    assert (done.returncode, done.stdout, done.stderr) == (0, out, "")
    expected, found = result_of(four_runs[0], "lora1-reft1*"), result_of(tmp_path)
    assert found[1] == expected[1]
    for stage in ("lora", "reft"):  # rounding differs with the number of threads
        assert found[0]["loss"][stage] == pytest.approx(expected[0]["loss"][stage], rel=1e-5)


def test_a_refusal_without_a_screen(tmp_path):
    for line in '"$@" >&- 2>&-', '"$@" >/dev/full 2>/dev/full', '"$@" 2>&-':
        done = with_shell(tmp_path, ["--nonsense"], line)
        assert (done.returncode, done.stderr) == (2, ""), line
    done = with_shell(tmp_path, ["--nonsense"], '"$@" >&-')
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith("heft: error: unrecognized")
    assert done.stderr.count("\n") == 1


class NotebooksScreen:
    """A stream of the kind that notebooks put in the place of sys.stdout."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass


def test_a_stream_that_is_no_file(tiny, tmp_path, monkeypatch):
    screen, errors = NotebooksScreen(), NotebooksScreen()
    flags = [*tiny_settings(tiny), *SHORT.split(), "--max-eval-samples", 2]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, flags)])
    kinds = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    handlers = [signal.getsignal(kind) for kind in kinds]
    try:
        with (
            contextlib.chdir(tmp_path),
            contextlib.redirect_stdout(screen),
            contextlib.redirect_stderr(errors),
            pytest.raises(SystemExit) as end,
        ):
            runpy.run_path(str(SCRIPT), run_name="__main__")
    finally:
        for kind, handler in zip(kinds, handlers):
            signal.signal(kind, handler)
    assert not end.value.code and not errors.text, errors.text
    assert screen.text.startswith("heft: loading the libraries\nrun  ") and "2 correct" in screen.text


def test_a_screen_of_few_letters(tiny, tmp_path):
    """What the screen's encoding lacks is replaced; the predictions are UTF-8 all the same."""
    place = tmp_path / "modèle"
    shutil.copytree(tiny, place)
    flags = [*tiny_settings(place), *SHORT.split()]
    shown = run_process(tmp_path / "wörk", flags, PYTHONIOENCODING="ascii")
    assert (shown.status, shown.err) == (0, ""), shown
    assert re.search(r"^model    .*/mod\S+le/model, ", shown.out, re.M)


# --- a user without a name


def without_name(folder, flags, *prefix):
    """Run the script without USER, LOGNAME and HOME, as in a container."""
    folder.mkdir(exist_ok=True)
    environment = {key: os.environ[key] for key in os.environ.keys() - {"USER", "LOGNAME", "HOME", "HF_HOME"}}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [*prefix, sys.executable, str(SCRIPT), *map(str, flags)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)


def test_no_user_and_no_home_in_the_environment(tiny, tmp_path):
    done = without_name(tmp_path / "work", [*tiny_settings(tiny), *SHORT.split()])
    assert (done.returncode, done.stderr) == (0, ""), done
    assert [path.name for path in sorted((tmp_path / "work").iterdir())] == ["output", "results"]


def test_a_user_without_an_entry(tmp_path):
    """A number alone, as `docker run --user` gives: no name, no home, no group."""
    if os.getuid():
        pytest.skip("needs root")
    # Of pytest's folders, only root may enter those above.
    with tempfile.TemporaryDirectory() as folder:
        os.chown(folder, 12345, 12345)
        identity = ["setpriv", "--reuid", "12345", "--regid", "12345", "--clear-groups"]
        readable = subprocess.run([*identity, sys.executable, "-c", f"open({str(SCRIPT)!r})"])
        if readable.returncode:
            pytest.skip("the repository is root's alone")
        flags = "--smoke --epochs-lora 1 --epochs-reft 1 --max-train-samples 32 --max-eval-samples 8".split()
        done = without_name(Path(folder), flags, *identity)
        assert (done.returncode, done.stderr) == (0, ""), done
        assert list(Path(folder).glob("results/smoke/lora1-*.json"))


# --- results


@pytest.fixture(scope="module")
def four_runs(tiny, tmp_path_factory):
    """(folder, {(LoRA epochs, LoReFT epochs): what was shown}) of four runs, two with the same stage 1."""
    folder, shown = tmp_path_factory.mktemp("runs"), {}
    for lora, reft in ((1, 1), (1, 0), (0, 1), (0, 0)):
        shown[lora, reft] = run(folder, tiny, f"--epochs-lora {lora} --epochs-reft {reft}")
        assert shown[lora, reft].status == 0 and not shown[lora, reft].err, shown
    return folder, shown


def test_result_has_all_that_is_needed_to_understand_it(four_runs, tiny):
    result, predictions = result_of(four_runs[0], "lora1-reft1*")
    keys = "lora_epochs reft_epochs num_validation_samples correct_predictions accuracy".split()
    assert list(result)[:5] == keys
    assert (result["lora_epochs"], result["reft_epochs"], result["num_validation_samples"]) == (1, 1, 20)
    correct = sum(row["prediction"] == row["answer"] for row in predictions)
    assert (result["correct_predictions"], result["accuracy"]) == (correct, f"{100 * correct / 20:.2f}%")
    for answer in ("Yes", "Unknown"):
        count = sum(row["prediction"] == answer for row in predictions)
        assert result[f"{answer.lower()}_answers"] == count
    wilson = [100 * end for end in proportion_confint(correct, 20, method="wilson")]
    assert result["confidence_interval_95"] == pytest.approx(wilson)
    majority = max(("Yes", "No"), key=[row["answer"] for row in predictions].count)
    share = sum(row["answer"] == majority for row in predictions) / 20
    assert (result["majority_answer"], result["majority_accuracy"]) == (majority, f"{100 * share:.2f}%")
    assert [len(result["loss"][stage]) for stage in ("lora", "reft")] == [2, 2]
    assert all(map(math.isfinite, result["loss"]["lora"] + result["loss"]["reft"]))
    seconds = dict(result["seconds"])
    assert seconds.pop("total") == pytest.approx(sum(seconds.values()))
    for key in ("device", "peak_memory_gb", "versions", "tokens_per_microbatch"):
        assert list(result[key]) == ["lora", "reft", "evaluation"], key
    assert all(device.startswith("CPU") for device in result["device"].values())
    assert all(0.1 < peak < 100 for peak in result["peak_memory_gb"].values())
    assert all(versions["torch"] == torch.__version__ for versions in result["versions"].values())
    assert set(result["tokens_per_microbatch"].values()) == {2048}
    assert result["script_sha256"] == hashlib.sha256(SCRIPT.read_bytes()).hexdigest()
    assert "commit" in result and "other_code" not in result and "resumed_with" not in result
    assert [row["question"] for row in predictions] == [
        r["question"] for r in rows_of(tiny / "data", "validation")
    ]


def test_result_says_what_it_was_made_with(four_runs, tiny):
    result, _ = result_of(four_runs[0], "lora1-reft1*")
    flags = [*map(str, tiny_settings(tiny)), *SHORT.split()]
    assert result["settings"] == heft.read_settings(flags)
    made = result["made_with"]
    hashes = "CODE_OF_STAGES CODE_OF_EVALUATION BASE_MODEL_FILES TRAIN_DATA VALIDATION_DATA".split()
    assert set(made) == {*hashes, *DECIDING, *EPOCHS} - {"BASE_MODEL", "BASE_REVISION", "DATASET"}
    assert all(re.fullmatch("[0-9a-f]{16}", made[name]) for name in hashes)
    assert all(made[name] == value for name, value in result["settings"].items() if name in made)


def test_record_says_what_it_was_made_with(four_runs):
    folder, result = four_runs[0] / "output", result_of(four_runs[0], "lora1-reft1*")[0]
    (reft,), (lora,) = folder.glob("lora1-reft1-*/heft.json"), folder.glob("lora1-model*/heft.json")
    assert (reft.parent / "adapter/heft.json").read_bytes() == lora.read_bytes()
    parts = {"lora": (lora, "adapter_model.safetensors"), "reft": (reft, "intkey_*.bin")}
    for part, (file, pattern) in parts.items():
        record, (weights,) = json.loads(file.read_text()), file.parent.glob(pattern)
        names = {path.name for path in file.parent.iterdir()} - {"heft.json", "lock", "adapter"}
        assert record["files"].keys() == names
        for name, said in record["files"].items():
            assert said == hashlib.sha256((file.parent / name).read_bytes()).hexdigest()[:16]
        assert result["weights"][part] == record["files"][weights.name]
        same = {key: value for key, value in result["made_with"].items() if key in record["made_with"]}
        assert record["made_with"] == same and "CODE_OF_STAGES" in same and "MAX_NEW_TOKENS" not in same
        assert record["script_sha256"] == result["script_sha256"] and record["commit"] == result["commit"]
        for key in ("device", "versions", "loss", "tokens_per_microbatch", "peak_memory_gb", "seconds"):
            assert record[key] == result[key][part], key
    reft, lora = json.loads(reft.read_text()), json.loads(lora.read_text())
    assert reft["below"] == result["weights"]["lora"] and lora["below"] is None
    assert "EPOCHS_REFT" in reft["made_with"] and "EPOCHS_REFT" not in lora["made_with"]


def test_parts_that_a_run_does_not_have(four_runs):
    result, _ = result_of(four_runs[0], "lora0-reft0*")
    assert result["loss"] == {"lora": [], "reft": []}
    assert result["seconds"]["lora"] == result["seconds"]["reft"] == 0
    assert list(result["device"]) == list(result["versions"]) == ["evaluation"]
    assert result["weights"] == {"lora": None, "reft": None}


def test_the_report_reads_it(four_runs):
    import report

    for file in (four_runs[0] / "results").glob("*.json"):
        assert report.read_run(file)


def test_the_papers_accuracies_are_those_of_the_report():
    table = json.loads((ROOT / "results/paper.json").read_text())["table_1"]
    assert {name: row["accuracy"] for name, row in table.items()} == heft.PAPER_ACCURACY


def test_last_screen(four_runs):
    _, shown = four_runs
    words = "lora1-reft1-|95 % interval|seconds|of 20 correct| Yes, | Unknown|GB"
    for expected in f"{words}|results/lora1-reft1|output/lora1-".split("|"):
        assert expected in shown[1, 1].out, expected
    result, _ = result_of(four_runs[0], "lora1-reft1*")
    always = f"; always {result['majority_answer']} would score {result['majority_accuracy']}\n"
    assert always in shown[1, 1].out
    *_, last = shown[1, 1].out.splitlines()
    assert re.fullmatch(
        r"compare  \S*python\S* \S*results/report.py results/lora1-reft1\S*.json ANOTHER.json", last
    )
    assert "\nlora0-reft0-" in shown[0, 0].out
    assert "stage 1, LoRA is finished in output/lora1-" in shown[1, 0].out  # shared with the run before


def test_the_command_that_compares_runs(four_runs):
    folder, shown = four_runs
    for flags in (1, 1), (1, 0):
        command = shown[flags].out.splitlines()[-1].removeprefix("compare").split()
        (another,) = folder.glob("results/lora0-reft0*.json")
        command[-1] = str(another)
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0 and not done.stderr, done
        assert result_of(folder, "lora0-reft0*")[0]["accuracy"].rstrip("%") in done.stdout


def test_a_stage_with_no_epochs_is_absent(four_runs, tiny):
    """Answers of (0, 0) are the base model's, of (1, 0) those of base + adapter, without an intervention."""
    import listing
    from peft import PeftModel

    folder, questions = four_runs[0], rows_of(tiny / "data", "validation")
    model, tokenizer = load(tiny / "model")
    texts = [row["text"] for row in result_of(folder, "lora0-reft0*")[1]]
    assert texts == listing.evaluate(model, tokenizer, questions)
    (adapter,) = [path.parent for path in (folder / "output").glob("lora1-model*/adapter_config.json")]
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    texts = [row["text"] for row in result_of(folder, "lora1-reft0*")[1]]
    assert texts == listing.evaluate(merged, tokenizer, questions)
    assert not list(folder.glob("output/lora1-reft0*/intkey*")) and not list(
        folder.glob("output/lora0-reft1*/adapter*")
    )


def test_the_saved_intervention_is_what_reftmodel_reads(four_runs, tiny):
    import pyreft

    model, _ = load(tiny / "model")
    (folder,) = (four_runs[0] / "output").glob("lora0-reft1*")
    (intervention,) = pyreft.ReftModel.load(str(folder), model).interventions.values()
    state = torch.load(next(folder.glob("intkey_*.bin")))
    assert torch.equal(intervention.rotate_layer.weight, state["rotate_layer"])
    assert state["weight"].dtype == torch.float32


def test_output_is_small_and_holds_no_model(four_runs):
    files = [path for path in (four_runs[0] / "output").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 1e6
    names = {path.name for path in files}
    assert not names & {"model.safetensors", "checkpoint.pt"} and not [
        name for name in names if "tmp" in name
    ]
    assert not list(four_runs[0].glob(".merged-*"))


def test_the_same_command_gives_the_same_result_and_another_seed_another(four_runs, tiny, tmp_path):
    first = result_of(four_runs[0], "lora1-reft1*")
    assert (
        run(tmp_path / "again", tiny).status == run(tmp_path / "other", tiny, f"{SHORT} --seed 7").status == 0
    )
    again, other = result_of(tmp_path / "again"), result_of(tmp_path / "other", "*-seed7")
    for result in (first[0], again[0]):
        del result["seconds"], result["peak_memory_gb"]
    assert again[0] == first[0]
    assert again[1] == first[1] and other[0]["loss"] != first[0]["loss"]


def test_fewer_examples_and_questions(tiny, tmp_path):
    flags = f"{SHORT} --max-train-samples 33 --max-eval-samples"
    assert run(tmp_path, tiny, f"{flags} 7").status == 0
    result, predictions = result_of(tmp_path)
    questions = [row["question"] for row in rows_of(tiny / "data", "validation")]
    assert [row["question"] for row in predictions] == questions[:7] and len(result["loss"]["lora"]) == 2
    # More questions about the same weights: nothing is trained again.
    shown = run(tmp_path, tiny, f"{flags} 9")
    assert shown.status == 0 and "stage 2, LoReFT is finished" in shown.out, shown


# --- the machine


@pytest.fixture
def paper_model(monkeypatch):
    """A function from LORA_TARGETS to the 7B model with its adapter, without numbers."""
    from peft import get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(targets=""):
        for name, value in heft.read_settings([]).items():
            monkeypatch.setattr(heft, name, value, raising=False)
        monkeypatch.setattr(heft, "LORA_TARGETS", targets)
        with torch.device("meta"):
            shape = dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, vocab_size=32000)
            model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=32)).to(torch.bfloat16)
            return get_peft_model(model, heft.lora_config())

    return make


@pytest.mark.parametrize(
    "targets, adapted", [("", 2), ("q_proj", 1), ("q_proj,k_proj, o_proj", 3), ("all-linear", 7)]
)
def test_lora_targets_name_the_adapted_layers(paper_model, targets, adapted):
    names = [name for name, _ in paper_model(targets).named_modules() if name.endswith("lora_A.default")]
    assert len(names) == 32 * adapted


def test_trainable_parameters_of_the_7b_model(paper_model):
    """Known numbers: LoRA's of PEFT's default, and LoReFT's R, W and b."""
    from pyreft import LoreftIntervention

    assert sum(p.numel() for p in paper_model().parameters() if p.requires_grad) == 4_194_304
    loreft = LoreftIntervention(embed_dim=4096, low_rank_dimension=4)
    assert sum(p.numel() for p in loreft.parameters()) == 32_772


def test_a_gpu_without_bfloat16(paper_model, monkeypatch):
    base = SimpleNamespace(meta_model=paper_model())
    monkeypatch.setattr(heft, "DEVICE", "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla V100")
    with pytest.raises(heft.Stop, match="Tesla V100 has no bfloat16 in hardware.*--dtype float32"):
        heft.check_device(base)
    monkeypatch.setattr(heft, "DTYPE", "float32")
    heft.check_device(base)


def test_no_gpu(paper_model, monkeypatch):
    base = SimpleNamespace(meta_model=paper_model())
    monkeypatch.setattr(heft, "DEVICE", "cpu")
    with pytest.raises(heft.Stop, match="no GPU found, .* has 6.7 billion .*heft.sub.*--smoke") as stop:
        heft.check_device(base)
    assert stop.value.status == 2


def test_the_device_of_a_cpu_is_its_processor(monkeypatch):
    monkeypatch.setattr(heft, "DEVICE", "cpu")
    (name,) = set(re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())) or {
        os.uname().machine
    }
    assert heft.device_name() == f"CPU {name}, {torch.get_num_threads()} threads"


def test_memory_is_measured_before_the_first_step(paper_model, monkeypatch):
    """Forward and backward on the most tokens that a micro-batch can have."""
    paper_model()  # the settings
    monkeypatch.setattr(heft, "TOKENS_PER_MICROBATCH", 100)
    examples = [{"input_ids": [1] * n, "labels": [1] * n} for n in (3, 25, 70, 10)]
    shapes, weight = [], torch.ones(1, requires_grad=True)

    def forward(input_ids):
        shapes.append(tuple(input_ids.shape))
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 5) * weight)

    monkeypatch.setattr(heft, "DEVICE", "cpu")
    heft.check_memory(forward, examples)
    assert not shapes
    monkeypatch.setattr(heft, "DEVICE", "cpu:0")  # stands for a GPU
    heft.check_memory(forward, examples)
    assert shapes == [(4, 25)] and weight.grad is not None


def test_memory_that_does_not_suffice(capsys):
    assert heft.report_error(torch.OutOfMemoryError("CUDA out of memory. Tried ...\nand more")) == 1
    err = capsys.readouterr().err
    assert err.startswith("heft: error: ") and err.count("\n") == 1 and "--tokens-per-microbatch" in err
