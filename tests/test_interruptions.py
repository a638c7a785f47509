"""Interrupted at any moment, the same command continues, and the result is that of an undisturbed run, bit
for bit."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time

import pytest
from conftest import ROOT, make_tiny, read_result, start, tiny_settings

import heft_finetuning as heft

FLAGS = "--epochs-lora 3 --epochs-reft 3 --tokens-per-microbatch 300".split()
SCRIPT = str(ROOT / "heft_finetuning.py")
STOPPED = {signal.SIGTERM: 85, signal.SIGINT: 130, signal.SIGHUP: 129}  # exit statuses
KINDS = pytest.mark.parametrize("kind", [*STOPPED, signal.SIGKILL], ids=lambda kind: kind.name)


@pytest.fixture(scope="module", autouse=True)
def signals_are_heeded():
    """A shell that starts the tests in the background has them, and so what they start, ignore Ctrl-C; nohup
    has them ignore SIGHUP."""
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    usual_hup = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGINT, usual)
    signal.signal(signal.SIGHUP, usual_hup)


@pytest.fixture(scope="module")
def tiny_data(tmp_path_factory):
    """A model and data: 2 steps per epoch, 6 questions."""
    return make_tiny(tmp_path_factory.mktemp("tiny_data"), train=40, validation=6)


# A program that runs the script with something changed.
DRIVER = """
import os, runpy, sys, torch, transformers
sys.argv[0] = {script!r}
sys.path.insert(0, os.path.dirname(sys.argv[0]))
{change}
runpy.run_path(sys.argv[0], run_name="__main__")
"""
# Sends itself a signal within a step of a stage: LoRA trains 4,096 parameters, LoReFT 260.
SIGNAL_IN_STEP = """
step, seen = torch.optim.AdamW.step, []
def step_and_signal(self, *arguments):
    step(self, *arguments)
    if sum(tensor.numel() for tensor in self.param_groups[0]["params"]) == {trainable}:
        if self.state[self.param_groups[0]["params"][0]]["step"] == {number}:
            os.kill(os.getpid(), {kind})
torch.optim.AdamW.step = step_and_signal
"""
SIGNAL_IN_EVALUATION = """
generate = transformers.GenerationMixin.generate
def signal_and_generate(*arguments, **options):
    os.kill(os.getpid(), {kind})
    return generate(*arguments, **options)
transformers.GenerationMixin.generate = signal_and_generate
"""
LORA, LOREFT = 4096, 260


def begin(folder, tiny_data, *flags, change=None, **values):
    """Start the run in `folder`, perhaps with a change of the program. Of equal flags, the last counts."""
    script = SCRIPT
    if change:
        script = folder / "driver.py"
        script.write_text(DRIVER.format(script=SCRIPT, change=change.format(**values)))
    return start(folder, [*tiny_settings(tiny_data), *FLAGS, *flags], script=script)


def end_of(process):
    """(exit status, output, errors) of a process; there is never a traceback."""
    out, err = process.communicate(timeout=600)
    assert "Traceback" not in err, err
    return process.returncode, out, err


def finish(*arguments, **options):
    """Run to the good end; returns the output."""
    status, out, err = end_of(begin(*arguments, **options))
    assert status == 0, out + err
    return out


def is_refused(process, expected=2):
    """The one line of a process that ends with this status."""
    status, out, err = end_of(process)
    assert status == expected and err.startswith("heft: error: ") and err.count("\n") == 1, out + err
    return err


def outcome(folder):
    """All that a run is for: weights, losses, answers."""
    result, predictions = read_result(folder)
    adapters = "lora3-model-*/adapter_model.safetensors", "*/adapter/adapter_model.safetensors"
    files = [path for name in (*adapters, "*/intkey_*.bin") for path in (folder / "output").glob(name)]
    weights = [path.read_bytes() for path in files]
    assert len(weights) == 3 and weights[0] == weights[1], "stage 2 lies beside the adapter it was trained on"
    keys = ("accuracy", "settings", "made_with", "weights", "confidence_interval_95", "loss")
    return weights, predictions, {key: result[key] for key in keys}


@pytest.fixture(scope="module")
def undisturbed(tiny_data, tmp_path_factory):
    """(outcome, seconds) of a run that nothing disturbs."""
    folder, started = tmp_path_factory.mktemp("undisturbed"), time.time()
    finish(folder, tiny_data)
    return outcome(folder), time.time() - started


@pytest.fixture(scope="module")
def stopped(tiny_data, tmp_path_factory):
    """The folder of a run that SIGTERM stopped in stage 2, after step 3. Tests use a copy."""
    folder = tmp_path_factory.mktemp("stopped")
    signalled = dict(kind=int(signal.SIGTERM), trainable=LOREFT, number=3)
    status, out, err = end_of(begin(folder, tiny_data, change=SIGNAL_IN_STEP, **signalled))
    assert status == 85, out + err
    return folder


@pytest.fixture
def stopped_copy(stopped, tmp_path):
    """Its copy."""
    return shutil.copytree(stopped, tmp_path / "stopped")


def checkpoint_of(folder):
    """The path of the checkpoint of stage 2."""
    (checkpoint,) = (folder / "output").glob("lora3-reft3-*/checkpoint.pt")
    return checkpoint


@KINDS
def test_interrupted_in_both_stages_and_in_the_evaluation(kind, tiny_data, undisturbed, tmp_path):
    """One run, interrupted three times; SIGTERM and Ctrl-C come in the last of a stage's 6 steps, too. After
    SIGKILL, it goes on from the end of the epoch, and what it was writing is removed."""
    steps = {signal.SIGTERM: (3, 6), signal.SIGINT: (6, 3)}.get(kind, (3, 3))
    saved = [2 if kind == signal.SIGKILL else step for step in steps]
    moments = [
        (SIGNAL_IN_STEP, LORA, steps[0]),
        (SIGNAL_IN_STEP, LOREFT, steps[1]),
        (SIGNAL_IN_EVALUATION, 0, 0),
    ]
    expected = STOPPED.get(kind, -kind)
    for part, (change, trainable, step) in enumerate(moments):
        signalled = dict(kind=int(kind), trainable=trainable, number=step)
        status, out, err = end_of(begin(tmp_path, tiny_data, change=change, **signalled))
        assert status == expected, out + err
        if kind in STOPPED:
            line = (
                f"stopped by {kind.name}{f' after step {step}' if step else ''}; the same command continues"
            )
            assert line in (out if step else err).splitlines(), "no step is lost"
        if part:
            assert f"checkpoint.pt after step {saved[part - 1]}" in out
        for checkpoint in tmp_path.glob("output/*/checkpoint.pt"):
            assert not (checkpoint.parent / "heft.json").exists(), "that stage is not finished"
            if step < 6:  # as a process that is killed while it writes the next one
                checkpoint.with_name("checkpoint.pt.tmp").write_bytes(checkpoint.read_bytes()[:100])
                checkpoint.with_name("adapter_model.safetensors").write_bytes(b"half of the weights")
    out = finish(tmp_path, tiny_data)
    assert "stage 1, LoRA is finished" in out and "stage 2, LoReFT is finished" in out
    assert outcome(tmp_path) == undisturbed[0] and not list(tmp_path.glob("output/**/*.tmp"))


DRAW_ANOTHER_ROTATION = """
draw = torch.nn.init.orthogonal_
torch.nn.init.orthogonal_ = lambda tensor, *gain: draw(tensor, *gain).data.neg_()
"""


def test_a_checkpoint_holds_the_base_of_the_rotation(tiny_data, undisturbed, stopped_copy):
    """LoReFT's R is relative to its first value, a buffer. Elsewhere, the seed may draw another one."""
    out = finish(stopped_copy, tiny_data, change=DRAW_ANOTHER_ROTATION)
    assert "checkpoint.pt after step 3" in out and outcome(stopped_copy) == undisturbed[0]


def test_a_checkpoint_of_stage_2_goes_on_with_its_own_adapter(tiny_data, undisturbed, stopped_copy):
    """As when another job that trained the same stage 1 has sent home its folder, with other last bits."""
    (record,) = (stopped_copy / "output").glob("lora3-model-*/heft.json")
    weights = record.with_name("adapter_model.safetensors")
    own = weights.read_bytes()
    other = own[:-1] + bytes([own[-1] ^ 1])
    weights.write_bytes(other)
    written = json.loads(record.read_text())
    written["files"][weights.name] = heft.digest(weights)
    record.write_text(json.dumps(written))
    out = finish(stopped_copy, tiny_data)
    assert "checkpoint.pt after step 3" in out and "stage 1, LoRA is finished" in out
    assert weights.read_bytes() == other, "the other job's stage 1 is left as it is"
    weights.write_bytes(own)
    assert outcome(stopped_copy) == undisturbed[0]


def test_a_checkpoint_of_other_micro_batches_is_refused(tiny_data, stopped_copy):
    """Dropout would draw other masks."""
    line = is_refused(begin(stopped_copy, tiny_data, "--tokens-per-microbatch", "2048"))
    assert "checkpoint.pt was made with tokens_per_microbatch 300, not 2048" in line


@pytest.mark.slow
def test_a_checkpoint_of_other_settings_is_refused(tiny_data, stopped_copy):
    folder = checkpoint_of(stopped_copy).parent
    folder.rename(folder.with_name(folder.name + "-seed7"))
    assert "seed 42, not 7" in is_refused(begin(stopped_copy, tiny_data, "--seed", "7"))


@pytest.mark.slow
def test_a_damaged_checkpoint_is_refused(tiny_data, stopped_copy):
    checkpoint = checkpoint_of(stopped_copy)
    checkpoint.write_bytes(checkpoint.read_bytes()[:100])
    assert "checkpoint.pt is damaged" in is_refused(begin(stopped_copy, tiny_data))


@pytest.mark.slow
@KINDS
@pytest.mark.parametrize("moment", range(20))
def test_interrupted_at_a_random_moment(moment, kind, tiny_data, undisturbed, tmp_path):
    """20 moments spread over the whole run, set-up and result writing among them."""
    delay = undisturbed[1] * (moment + random.Random(moment).random()) / 20
    process = begin(tmp_path, tiny_data)
    try:
        process.wait(timeout=delay)
    except subprocess.TimeoutExpired:
        process.send_signal(kind)
    out, err = process.communicate(timeout=120)
    expected = {0, STOPPED.get(kind, -kind)}
    if not out:  # killed by the signal itself, before the script has begun
        expected.add(-kind)
    assert process.returncode in expected, out + err
    out = finish(tmp_path, tiny_data)
    assert outcome(tmp_path) == undisturbed[0]
    if kind == signal.SIGKILL:  # a checkpoint at each epoch's end, so that at most one epoch is done twice
        assert all(int(step) % 2 == 0 for step in re.findall(r"after step (\d+)", out))


@pytest.mark.parametrize("kind", STOPPED, ids=lambda kind: kind.name)
def test_stopped_while_the_libraries_load(kind, tiny_data, tmp_path):
    """With the usual status, and without a traceback."""
    process = begin(tmp_path, tiny_data)
    assert "loading the libraries" in process.stdout.readline()
    time.sleep(0.1)
    process.send_signal(kind)
    status, out, err = end_of(process)
    assert (status, out, err) == (STOPPED[kind], "", "") and not (tmp_path / "output").exists()


def paused_in(stage, tiny_data, folder):
    """A run that has stopped to run within a step of a stage."""
    paused = dict(kind=int(signal.SIGSTOP), trainable=stage, number=3)
    process = begin(folder, tiny_data, change=SIGNAL_IN_STEP, **paused)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    return process


def test_a_stage_is_trained_by_one_run_at_a_time(tiny_data, undisturbed, tmp_path):
    """While one trains stage 1, others that need it end at once, of which one shares only that stage."""
    first = paused_in(LORA, tiny_data, tmp_path)
    for flags in ([], ["--epochs-reft", "0"]):
        line = is_refused(begin(tmp_path, tiny_data, *flags), expected=1)
        assert "another run is training in output/lora3-" in line and "the same command" in line
    first.send_signal(signal.SIGCONT)
    status, out, err = end_of(first)
    assert status == 0 and outcome(tmp_path) == undisturbed[0], out + err
    assert "already done" in finish(tmp_path, tiny_data)


def test_a_finished_stage_is_used_while_the_next_one_is_trained(tiny_data, undisturbed, tmp_path):
    """By a run that needs no other; one that needs stage 2 ends at once. After SIGKILL, nothing is locked."""
    first = paused_in(LOREFT, tiny_data, tmp_path)
    out = finish(tmp_path, tiny_data, "--epochs-reft", "0")
    assert "stage 1, LoRA is finished" in out and "trainable parameters" not in out
    line = is_refused(begin(tmp_path, tiny_data), expected=1)
    assert "another run is training in output/lora3-reft3-" in line
    first.kill()
    first.communicate()
    for path in (tmp_path / "results").glob("lora3-reft0*"):
        path.unlink()
    assert "checkpoint.pt after step 2" in finish(tmp_path, tiny_data)
    assert outcome(tmp_path) == undisturbed[0]


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
@pytest.mark.parametrize("full", ["output", "results"])
def test_a_full_disk(full, tiny_data, undisturbed, tmp_path):
    """The disk fills up in stage 1, or before results are written: one clear line; with room, the same
    command continues."""
    mount = tmp_path / full
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "none", mount], check=True)
    try:
        change = SIGNAL_IN_STEP if full == "output" else SIGNAL_IN_EVALUATION
        paused = dict(kind=int(signal.SIGSTOP), trainable=LORA, number=3)
        process = begin(tmp_path, tiny_data, change=change, **paused)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        ballast = mount / "ballast"
        with open(ballast, "wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(b"x" * 4096):
                pass
        process.send_signal(signal.SIGCONT)
        status, out, err = end_of(process)
        (line,) = [line for line in err.splitlines() if line.startswith("heft: error: ")]
        assert status == 1 and f"{full}/" in line, out + err
        assert "disk full" in line or "No space left" in line, line
        ballast.unlink()
        assert not list(mount.glob("**/*.tmp")), "half a file would keep the disk full"
        assert ("after step 2" if full == "output" else "LoReFT is finished") in finish(tmp_path, tiny_data)
        assert outcome(tmp_path) == undisturbed[0]
    finally:
        subprocess.run(["umount", mount], check=True)
