"""The second day: something is edited and the same command typed again. What the old code made is not taken
for what the new code would make. Then what goes wrong in a run: signals, numbers that are not finite."""

import builtins
import errno
import gc
import hashlib
import importlib.metadata
import json
import math
import os
import re
import shutil
import signal
import subprocess
import time

import pytest
import torch
import transformers
from conftest import ROOT, start, tiny_settings
from inside import refused, result_of, run_inside

SHORT = "--epochs-lora 1 --epochs-reft 1"
STAGE_1, STAGE_2 = "output/lora1-model-*", "output/lora1-reft1-*"
SCRIPT = (ROOT / "heft_finetuning.py").read_text()  # as it was when the tests began
EDITS = {  # (text of the script, what a researcher makes of it)
    "training step": ("clip_grad_norm_(parameters, 1.0)", "clip_grad_norm_(parameters, 0.1)"),
    "weight decay": ("weight_decay=0.0", "weight_decay=0.9"),
    "main": ("    model.eval().requires_grad_(False)\n", "    model.eval()\n"),
    "prompt": ("Question: %s\nAnswer:", "Question: %s\n\nAnswer:"),
    "evaluation": ('"Yes" if "Yes" in text else', '"Yes" if "yes" in text.lower() else'),
    "comment": (
        "        optimizer.zero_grad()\n",
        "        optimizer.zero_grad() # of the last step\n",
    ),
    "line of comment": (
        "    return record\n\n\ndef accumulate",
        "    # done\n    return record\n\n\ndef accumulate",
    ),
    "blank lines": ("        optimizer.zero_grad()\n", "\n  \n        optimizer.zero_grad()   \n\n"),
    "comment in the evaluation": ("\ndef predict(", "\n\n# The paper's rule\ndef predict("),
    "bookkeeping": ("already done: ", "already done, as you see: "),
    "import": ("import argparse\n", "import argparse\nimport abc\n"),
}


@pytest.fixture(scope="module", autouse=True)
def signals_are_heeded():
    """A shell that starts the tests in the background has them ignore Ctrl-C; nohup, SIGHUP."""
    usual = [(kind, signal.getsignal(kind)) for kind in (signal.SIGINT, signal.SIGHUP)]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for kind, handler in usual:
        signal.signal(kind, handler)


def run(work, given, flags=SHORT):
    """Run the script that lies in `work`, there."""
    gc.collect()  # closes the locks of an earlier run, as the end of its process would
    return run_inside(
        work, [*map(str, tiny_settings(given)), *flags.split()], script=work / "heft_finetuning.py"
    )


def edit(work, *edits):
    """Edit the script in `work`."""
    script = work / "heft_finetuning.py"
    text = script.read_text()
    for name in edits:
        old, new = EDITS[name]
        assert text.count(old) == 1, name
        text = text.replace(old, new)
    script.write_text(text)


def version_of(work):
    """How a message names the script in `work`."""
    return "script " + hashlib.sha256((work / "heft_finetuning.py").read_bytes()).hexdigest()[:8]


def take_away(folder, *patterns):
    for pattern in patterns:
        for path in list(folder.glob(pattern)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def state_of(work):
    """All files of a run with their times, except the locks."""
    found = [*work.glob("output/**/*"), *work.glob("results/**/*")]
    return {path: path.stat().st_mtime_ns for path in found if path.is_file() and path.name != "lock"}


@pytest.fixture(scope="module")
def one_run(tiny, tmp_path_factory):
    """The folder of the script and its finished run of both stages, one epoch each."""
    folder = tmp_path_factory.mktemp("one")
    (folder / "heft_finetuning.py").write_text(SCRIPT)
    assert run(folder, tiny).status == 0
    return folder


@pytest.fixture
def work(one_run, tmp_path):
    """A private copy of it."""
    return shutil.copytree(one_run, tmp_path / "work")


@pytest.fixture
def new(tmp_path):
    """A folder with the script and nothing else."""
    (tmp_path / "new").mkdir()
    (tmp_path / "new/heft_finetuning.py").write_text(SCRIPT)
    return tmp_path / "new"


# ----- Edited code


@pytest.mark.parametrize("what", ["training step", "weight decay", "main"])
@pytest.mark.parametrize(
    "lost, found",
    [
        ("", "results/lora1-reft1-"),
        ("results/*", "output/lora1-reft1-"),
        ("r*/*,*/*-reft1-*", "output/lora1-model-"),
    ],
)
def test_an_edited_training_step(work, tiny, what, lost, found):
    """What the old code made is refused: the result, stage 2, stage 1. The line names the ways on."""
    take_away(work, *lost.split(",")) if lost else None
    before, old = state_of(work), version_of(work)
    edit(work, what)
    shown = run(work, tiny)
    ways = (
        "--tag WORD",
        "another --output-dir and --results-dir",
        "--accept-other-code",
        "go back to that version",
    )
    refused(
        shown, f"heft: error: {found}", f"was made by other code, {old}; this is {version_of(work)}", *ways
    )
    assert "trainable parameters" not in shown.out and state_of(work) == before


def test_an_edited_prompt(work, tiny):
    """It is code, and it changes the data: the line names what it is sure of."""
    edit(work, "prompt")
    refused(run(work, tiny), "results/lora1-reft1-", "train_data", "validation_data")


def test_an_edited_evaluation(work, tiny):
    """The result is refused, with the ways on; stages are kept. In another folder it is evaluated anew."""
    old, (result, _) = version_of(work), result_of(work)
    edit(work, "evaluation")
    before = state_of(work)
    line = refused(run(work, tiny), "heft: error: results/lora1-reft1-", f"by other code, {old}; this is")
    assert "move it away or choose another --results-dir" in line and "--accept-other-code" in line
    assert "--tag" not in line and "--output-dir" not in line and state_of(work) == before
    shown = run(work, tiny, f"{SHORT} --results-dir results/new")
    assert shown.status == 0 and "stage 2, LoReFT is finished" in shown.out, shown
    assert "trainable parameters" not in shown.out and "evaluation of " in shown.out
    (file,) = (work / "results/new").glob("*.json")
    again = json.loads(file.read_text())
    assert again["weights"] == result["weights"] and "other_code" not in again
    other = [key for key, value in again["made_with"].items() if result["made_with"][key] != value]
    assert other == ["CODE_OF_EVALUATION"]


def test_an_edited_evaluation_keeps_a_checkpoint(new, tiny, monkeypatch):
    with monkeypatch.context() as patch:
        at_call(patch, torch.nn.utils, "clip_grad_norm_", 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert run(new, tiny).status == 85
    edit(new, "evaluation")
    shown = run(new, tiny)
    assert shown.status == 0 and "checkpoint.pt after step 1" in shown.out
    assert "other_code" not in result_of(new)[0]


@pytest.mark.parametrize(
    "what",
    ["comment", "line of comment", "blank lines", "comment in the evaluation", "bookkeeping", "import"],
)
def test_what_does_not_count(work, tiny, what):
    """The result is finished, and so, without it, are the stages."""
    edit(work, what)
    shown = run(work, tiny)
    assert shown.status == 0 and "already done" in shown.out, shown
    take_away(work, "results/*")
    shown = run(work, tiny)
    assert shown.status == 0 and "stage 2, LoReFT is finished" in shown.out, shown
    assert "trainable" not in shown.out and "other_code" not in result_of(work)[0]


def test_a_sign_of_a_comment_in_a_text_is_no_comment(new, tiny):
    """Two programs that differ after it."""
    text = SCRIPT.replace("# done", "")
    line = "    return record\n\n\ndef accumulate"
    (new / "heft_finetuning.py").write_text(text.replace(line, f'    "a # b"\n{line}'))
    assert run(new, tiny).status == 0
    (new / "heft_finetuning.py").write_text(text.replace(line, f'    "a # c"\n{line}'))
    refused(run(new, tiny), "by other code")


def test_code_is_accepted_on_request(work, tiny):
    """A renamed variable does not cost a night. The result says so."""
    old, (result, predictions) = version_of(work), result_of(work)
    edit(work, "training step")
    shown = run(work, tiny, f"{SHORT} --accept-other-code")
    assert shown.status == 0 and "already done" in shown.out, shown
    take_away(work, "results/*")
    shown = run(work, tiny, f"{SHORT} --accept-other-code")
    assert shown.status == 0 and "trainable parameters" not in shown.out and "other code" in shown.out, shown
    again, same = result_of(work)
    assert again["weights"] == result["weights"] and same == predictions
    assert again["other_code"].keys() == {"lora", "reft"} and all(
        old in text for text in again["other_code"].values()
    )
    assert again["script_sha256"] != result["script_sha256"]


def test_a_checkpoint_of_other_code(new, tiny, monkeypatch):
    """Refused; on request it is continued. The record, then the new code's, and the result say so."""
    with monkeypatch.context() as patch:
        at_call(patch, torch.nn.utils, "clip_grad_norm_", 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert run(new, tiny).status == 85
    old = version_of(new)
    edit(new, "training step")
    shown = run(new, tiny)
    refused(
        shown, "output/lora1-model-", f"checkpoint.pt was made by other code, {old}", "--accept-other-code"
    )
    shown = run(new, tiny, f"{SHORT} --accept-other-code")
    assert shown.status == 0 and "checkpoint.pt after step 1" in shown.out, shown
    result, _ = result_of(new)
    assert result["other_code"].keys() == {"lora"} and old in result["other_code"]["lora"]
    # What it has made is the new code's from now on, with its note.
    take_away(new, "results/*", STAGE_2)
    assert run(new, tiny).status == 0
    assert result_of(new)[0]["other_code"].keys() == {"lora"}
    take_away(new, "results/*", STAGE_2)
    now = version_of(new)
    edit(new, "weight decay")
    refused(run(new, tiny), f"by other code, {now}; this is {version_of(new)}")


def test_a_tag_keeps_both(work, tiny):
    """The edited code trains under its own name, and the old command still finds the old result."""
    (name,) = (path.stem for path in (work / "results").glob("*[0-9].json"))
    before = state_of(work)
    edit(work, "training step")
    shown = run(work, tiny, f"{SHORT} --tag clip01")
    assert shown.status == 0 and shown.out.count("trainable parameters") == 2, shown
    result, _ = result_of(work, f"{name}-clip01")
    assert result["made_with"]["TAG"] == "clip01" and "other_code" not in result
    assert {path: time for path, time in state_of(work).items() if path in before} == before
    assert len(list(work.glob("output/*-clip01"))) == 2
    assert "already done" in run(work, tiny, f"{SHORT} --tag clip01").out
    refused(run(work, tiny), "by other code")
    (work / "heft_finetuning.py").write_text(SCRIPT)
    assert "already done" in run(work, tiny).out
    refused(run(work, tiny, f"{SHORT} --tag clip01"), "by other code")
    refused(run(work, tiny, f"{SHORT} --tag a/b"), "--tag")


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_the_line_names_both_commits(new, tiny):
    def commit():
        for command in ("init -q", "add heft_finetuning.py", "commit -q -m x"):
            who = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]
            subprocess.run(["git", "-C", new, *who, *command.split()], check=True)
        describe = ["git", "-C", new, "rev-parse", "--short", "HEAD"]
        return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()

    first = commit()
    assert run(new, tiny, "--epochs-lora 0 --epochs-reft 1").status == 0
    edit(new, "training step")
    old, now = f"commit {first}, script ", f"this is commit {first}-dirty, script "
    refused(run(new, tiny, "--epochs-lora 0 --epochs-reft 1"), f"other code, {old}", now)
    second = commit()
    assert first != second
    refused(run(new, tiny, "--epochs-lora 0 --epochs-reft 1"), old, f"this is commit {second}, script ")


def test_the_code_is_the_one_that_runs(new, tiny, monkeypatch):
    """Not one that is edited while the libraries load, which takes ten seconds, or later."""
    script, importing = new / "heft_finetuning.py", builtins.__import__

    def edit_and_import(name, *arguments, **options):
        if name == "torch" and script.read_text() == SCRIPT:
            edit(new, "training step")
        return importing(name, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "__import__", edit_and_import)
        assert run(new, tiny).status == 0
    assert result_of(new)[0]["script_sha256"] == hashlib.sha256(SCRIPT.encode()).hexdigest()
    refused(run(new, tiny), "by other code")


# ----- Checkpoints


def at_call(patch, owner, name, number, action):
    """Have the call number `number` of a library's function begin with action()."""
    function, calls = getattr(owner, name), []

    def with_action(*arguments, **options):
        calls.append(name)
        if len(calls) == number:
            action()
        return function(*arguments, **options)

    patch.setattr(owner, name, with_action)


def signals(*kinds):
    """A function that sends them to this process."""

    def send():
        for kind in kinds:
            os.kill(os.getpid(), kind)

    return send


def stopped(work, given, monkeypatch, step, kind=signal.SIGTERM, flags=SHORT):
    """Stop a run in its step number `step`, counted over both stages. Returns what it shows."""
    with monkeypatch.context() as patch:
        at_call(patch, torch.nn.utils, "clip_grad_norm_", step, signals(kind))
        return run(work, given, flags)


def test_a_resumed_run_records_what_has_changed(new, tiny, one_run, monkeypatch):
    """Versions and device, for the stage that was resumed."""
    assert stopped(new, tiny, monkeypatch, 1).status == 85
    version = importlib.metadata.version
    with monkeypatch.context() as patch:
        patch.setattr(importlib.metadata, "version", lambda name: "9.9" if name == "peft" else version(name))
        patch.setattr(torch, "get_num_threads", lambda: 77)
        assert run(new, tiny).status == 0
    result, _ = result_of(new)
    assert result["resumed_with"].keys() == {"lora"}
    changed = result["resumed_with"]["lora"]
    assert changed.keys() == {"versions", "device"} and changed["versions"]["peft"] == "9.9"
    assert "77" in changed["device"] and "77" not in result["device"]["lora"]
    assert result["versions"]["lora"]["peft"] == version("peft") != result["versions"]["reft"]["peft"]
    take_away(new, "results/*", "output/*")
    assert stopped(new, tiny, monkeypatch, 1).status == 85 and run(new, tiny).status == 0
    assert "resumed_with" not in result_of(new)[0] and "resumed_with" not in result_of(one_run)[0]


@pytest.mark.parametrize("stage_1", ["there", "lost"])
def test_a_checkpoint_that_has_lost_its_adapter(new, tiny, one_run, monkeypatch, stage_1):
    """It is refused at the start, unless the adapter is found elsewhere."""
    assert stopped(new, tiny, monkeypatch, 3).status == 85
    take_away(new, f"{STAGE_2}/adapter", *([STAGE_1] if stage_1 == "lost" else []))
    shown = run(new, tiny)
    if stage_1 == "lost":
        refused(shown, "output/lora1-reft1-", "another stage 1")
        assert "trainable parameters" not in shown.out
    else:
        assert shown.status == 0 and "checkpoint.pt after step 1" in shown.out, shown
        assert result_of(new)[0]["loss"] == result_of(one_run)[0]["loss"]


# ----- Signals

STATUS = {signal.SIGTERM: 85, signal.SIGINT: 130, signal.SIGHUP: 129}
KINDS = pytest.mark.parametrize("kind", STATUS, ids=lambda kind: kind.name)


@KINDS
def test_a_signal_ends_with_a_checkpoint(new, tiny, one_run, monkeypatch, kind):
    shown = stopped(new, tiny, monkeypatch, 1, kind)
    assert shown.status == STATUS[kind], shown
    line = f"stopped by {kind.name} after step 1; the same command continues"
    assert line in shown.out.splitlines() and list(new.glob(f"{STAGE_1}/checkpoint.pt"))
    shown = run(new, tiny)
    assert shown.status == 0 and "checkpoint.pt after step 1" in shown.out
    assert result_of(new)[0]["loss"] == result_of(one_run)[0]["loss"]


@KINDS
def test_an_ignored_signal_stays_ignored(new, tiny, monkeypatch, kind):
    """nohup has SIGHUP ignored, a shell's & has Ctrl-C."""
    usual = signal.signal(kind, signal.SIG_IGN)
    try:
        shown = stopped(new, tiny, monkeypatch, 1, kind)
    finally:
        signal.signal(kind, usual)
    assert shown.status == 0 and "accuracy" in shown.out and "stopped" not in shown.out


@pytest.mark.parametrize("epoch, step", [(1, 3), (2, 4)])
def test_a_signal_after_it_was_looked_for(new, tiny, monkeypatch, epoch, step):
    """While the checkpoint of an epoch is written: the next step ends with one. The last step has one."""
    flags = "--epochs-lora 2 --epochs-reft 0"
    with monkeypatch.context() as patch:
        at_call(patch, torch, "save", epoch, signals(signal.SIGTERM))
        shown = run(new, tiny, flags)
    assert shown.status == 85, shown
    (checkpoint,) = new.glob("output/*/checkpoint.pt")
    assert len(torch.load(checkpoint)["loss"]) == step and not list(new.glob("output/**/heft.json"))
    shown = run(new, tiny, flags)
    assert shown.status == 0 and f"checkpoint.pt after step {step}" in shown.out
    loss = result_of(new)[0]["loss"]
    take_away(new, "output/*", "results/*")
    assert run(new, tiny, flags).status == 0 and result_of(new)[0]["loss"] == loss


SIGNALLED_TWICE = {  # kinds: whether the second ends the run at once
    (signal.SIGINT, signal.SIGINT): True,
    (signal.SIGTERM, signal.SIGINT): True,
    (signal.SIGTERM, signal.SIGTERM): False,  # schedulers and dying shells repeat themselves
    (signal.SIGHUP, signal.SIGTERM): False,
}


@pytest.mark.parametrize("kinds", SIGNALLED_TWICE, ids=lambda kinds: " ".join(kind.name for kind in kinds))
def test_a_second_signal(new, tiny, one_run, monkeypatch, capfd, kinds):
    """A second Ctrl-C does not wait for the end of the step, which may take minutes. Others do."""
    steps, at_once = [], SIGNALLED_TWICE[kinds]
    with monkeypatch.context() as patch:
        at_call(patch, torch.nn.utils, "clip_grad_norm_", 1, signals(*kinds))
        at_call(patch, torch.optim.AdamW, "step", 1, lambda: steps.append(1))
        shown = run(new, tiny)
    assert shown.status == STATUS[kinds[at_once]] and "Traceback" not in shown.err, shown
    assert f"stopped by {kinds[at_once].name}" in capfd.readouterr().err + shown.err + shown.out
    assert len(list(new.glob("output/*/checkpoint.pt"))) == len(steps) == (0 if at_once else 1)
    shown = run(new, tiny)
    assert shown.status == 0 and ("after step 1" in shown.out) != at_once
    assert result_of(new)[0]["loss"] == result_of(one_run)[0]["loss"]


def test_a_lost_terminal(new, tiny, monkeypatch):
    """SIGHUP in the evaluation. Nothing can be written to the terminal; the status is as usual."""
    write = os.write

    def write_or_fail(descriptor, data):
        if descriptor == 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return write(descriptor, data)

    with monkeypatch.context() as patch:
        at_call(patch, transformers.GenerationMixin, "generate", 1, signals(signal.SIGHUP))
        patch.setattr(os, "write", write_or_fail)
        shown = run(new, tiny)
    assert shown.status == 129 and "Traceback" not in shown.err, shown


# ----- What goes wrong in a run


def infinite_loss(losses):
    """Its gradient is finite."""
    return losses + math.inf


def not_a_number_as_gradient(losses):
    """The loss is finite."""
    losses.register_hook(lambda gradient: gradient * math.nan)
    return losses


def infinite_gradient(losses):
    losses.register_hook(lambda gradient: gradient + math.inf)
    return losses


@pytest.mark.parametrize("stage", ["lora", "reft"])
@pytest.mark.parametrize("spoil", [infinite_loss, not_a_number_as_gradient, infinite_gradient])
def test_a_number_that_is_not_finite_stops_the_run(new, tiny, monkeypatch, stage, spoil):
    """Before the weights are changed by it. Nothing is saved."""
    cross_entropy, calls = torch.nn.functional.cross_entropy, []

    def spoiled(*arguments, **options):
        calls.append(1)
        losses = cross_entropy(*arguments, **options)
        return losses if len(calls) <= 1 else spoil(losses)

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", spoiled)
    flags = (
        f"--epochs-lora {int(stage == 'lora')} --epochs-reft {int(stage == 'reft')} --examples-per-step 20"
    )
    shown = run(new, tiny, f"{flags} --tokens-per-microbatch 100000")
    line = refused(shown, "at step 2", "--dtype float32", status=1)
    assert re.search("loss (inf|nan)|gradient (inf|nan)", line)
    assert not list(new.glob("output/**/checkpoint.pt")) and not list(new.glob("output/**/heft.json"))
    assert not list(new.glob("results/*"))


@pytest.mark.parametrize(
    "package", ["scipy", *(pytest.param(name, marks=pytest.mark.slow) for name in ("peft", "pyreft"))]
)
def test_a_broken_package_shows_before_training(tiny, tmp_path, package):
    """As after an upgrade under a running job. Nothing has been done yet."""
    (tmp_path / "broken" / package).mkdir(parents=True)
    (tmp_path / "broken" / package / "__init__.py").write_text("raise ImportError('broken by the test')\n")
    work = tmp_path / "work"
    process = start(work, [*tiny_settings(tiny), *SHORT.split()], PYTHONPATH=str(tmp_path / "broken"))
    out, err = process.communicate(timeout=300)
    assert process.returncode == 1 and "broken by the test" in err
    assert "trainable" not in out and not (work / "output").exists() and not (work / "results").exists()


def test_a_clock_that_is_set_back(new, tiny, monkeypatch):
    """Seconds are those that have passed."""
    clock, calls = time.time, []
    monkeypatch.setattr(time, "time", lambda: clock() - 1800 * (calls.append(1) or len(calls)))
    shown = run(new, tiny)
    assert shown.status == 0, shown
    assert "step 1 of 2" in shown.out and not re.search(r"-\d[\d.]* s per|-\d+ day", shown.out)
    assert all(0 < seconds < 60 for seconds in result_of(new)[0]["seconds"].values())
