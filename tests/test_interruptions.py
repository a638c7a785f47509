"""Killed at any moment, the same command continues, and the result is that of an undisturbed run, bit for
bit."""

import os
import random
import signal
import subprocess
import time

import pytest
import torch
from conftest import ROOT, make_tiny, read_result, start, tiny_settings

FLAGS = ["--epochs-lora", "3", "--epochs-reft", "3", "--tokens-per-microbatch", "300"]


@pytest.fixture(scope="module")
def longer(tmp_path_factory):
    """A model and data whose run is long enough to be met in every part: 5 steps per epoch, 60 questions."""
    return make_tiny(tmp_path_factory.mktemp("longer"), train=150, validation=60)


def finish(folder, given, *flags):
    process = start(folder, tiny_settings(given) + FLAGS + list(flags))
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    return out


def outcome(folder):
    """All that a run is for: weights, losses, answers."""
    result, predictions = read_result(folder)
    weights = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for pattern in ("*/adapter_model.safetensors", "*/intkey_*.bin")
        for path in (folder / "output").glob(pattern)
    }
    assert len(weights) == 2
    return (
        weights,
        result["loss"],
        predictions,
        {key: result[key] for key in ("accuracy", "settings", "confidence_interval_95")},
    )


@pytest.fixture(scope="module")
def undisturbed(longer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    started = time.time()
    out = finish(folder, longer)
    return outcome(folder), time.time() - started, out


def interrupt(process, kind):
    process.send_signal(kind)
    out, err = process.communicate(timeout=120)
    return out, err


def wait_for(process, condition, timeout=120):
    started = time.time()
    while not condition():
        assert process.poll() is None and time.time() - started < timeout, process.communicate()
        time.sleep(0.02)


def steps_saved(checkpoint):
    """How many steps a checkpoint holds."""
    return len(torch.load(checkpoint, weights_only=True)["loss"])


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
@pytest.mark.parametrize("part", ["stage 1", "stage 2", "evaluation"])
def test_interrupted_in(part, kind, longer, undisturbed, tmp_path):
    output = tmp_path / "output"
    file = {
        "stage 1": "lora3-model-*/checkpoint.pt",
        "stage 2": "lora3-reft3-*/checkpoint.pt",
        "evaluation": "lora3-reft3-*/heft.json",
    }[part]
    process = start(tmp_path, tiny_settings(longer) + FLAGS)
    wait_for(process, lambda: list(output.glob(file)))
    out, err = interrupt(process, kind)
    if kind == signal.SIGTERM:
        assert process.returncode == 85, out + err
        assert "Traceback" not in err
        if part != "evaluation":
            (checkpoint,) = output.glob(file)
            assert f"stopped by SIGTERM at step {steps_saved(checkpoint)} of 15" in out, "no step is lost"
    else:
        assert process.returncode == -signal.SIGKILL
    out = finish(tmp_path, longer)
    assert ("stage 2 is finished" if part == "evaluation" else "resuming from output/") in out
    assert outcome(tmp_path) == undisturbed[0]


AT_THE_LAST_STEP = """
import os, signal, sys
sys.path.insert(0, {root!r})
import heft_finetuning as heft
save = heft.save

def save_and_be_told_to_stop(path, content):
    save(path, content)
    if path.name == "checkpoint.pt" and len(content["loss"]) == 15:
        os.kill(os.getpid(), signal.SIGTERM)

heft.save = save_and_be_told_to_stop
heft.main()
"""


def test_stopped_in_the_last_step_of_a_stage(longer, undisturbed, tmp_path):
    """Not swallowed: the run ends with 85 at the end of stage 1, and then at the end of stage 2."""
    (tmp_path / "driver.py").write_text(AT_THE_LAST_STEP.format(root=str(ROOT)))
    for stage in ("lora3-model-", "lora3-reft3-"):
        process = start(tmp_path, tiny_settings(longer) + FLAGS, script=tmp_path / "driver.py")
        out, err = process.communicate(timeout=120)
        assert process.returncode == 85 and "at step 15 of 15" in out, out + err
        (checkpoint,) = (tmp_path / "output").glob(f"{stage}*/checkpoint.pt")
        assert steps_saved(checkpoint) == 15 and not (checkpoint.parent / "heft.json").exists()
    finish(tmp_path, longer)
    assert outcome(tmp_path) == undisturbed[0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
@pytest.mark.parametrize("moment", range(20))
def test_interrupted_at_a_random_moment(moment, kind, longer, undisturbed, tmp_path):
    """20 moments spread over the whole run, set-up and result writing among them."""
    delay = undisturbed[1] * (moment + random.Random(moment).random()) / 20
    process = start(tmp_path, tiny_settings(longer) + FLAGS)
    try:
        process.communicate(timeout=delay)
    except subprocess.TimeoutExpired:
        out, err = interrupt(process, kind)
        assert process.returncode in (
            {85, 0, -signal.SIGTERM} if kind == signal.SIGTERM else {-signal.SIGKILL, 0}
        ), out + err
        # -SIGTERM: in the first moments, before Python has read the line that says otherwise; nothing is
        # there to be lost
        assert process.returncode != -signal.SIGTERM or delay < 2
    done = [steps_saved(path) for path in (tmp_path / "output").glob("*/checkpoint.pt")]
    finish(tmp_path, longer)
    assert outcome(tmp_path) == undisturbed[0]
    if kind == signal.SIGKILL:  # a checkpoint at each epoch's end, so that at most one epoch is done twice
        assert all(steps % 5 == 0 for steps in done)


def test_a_torn_checkpoint_is_not_used(longer, undisturbed, tmp_path):
    process = start(tmp_path, tiny_settings(longer) + FLAGS)
    wait_for(process, lambda: list((tmp_path / "output").glob("lora3-model-*/checkpoint.pt")))
    interrupt(process, signal.SIGKILL)
    (checkpoint,) = (tmp_path / "output").glob("lora3-model-*/checkpoint.pt")
    checkpoint.with_name(".checkpoint.pt.tmp").write_bytes(
        b"torn"
    )  # as if it had died while writing the next
    assert f"after step {steps_saved(checkpoint)} of 15" in finish(tmp_path, longer)
    assert outcome(tmp_path) == undisturbed[0]


def test_a_checkpoint_of_other_settings_is_refused(longer, tmp_path):
    process = start(tmp_path, tiny_settings(longer) + FLAGS)
    wait_for(process, lambda: list((tmp_path / "output").glob("lora3-model-*/checkpoint.pt")))
    interrupt(process, signal.SIGKILL)
    (folder,) = (path.parent for path in (tmp_path / "output").glob("lora3-model-*/checkpoint.pt"))
    folder.rename(folder.with_name(folder.name + "-seed7"))
    process = start(tmp_path, tiny_settings(longer) + FLAGS + ["--seed", "7"])
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2 and "seed 42, not 7" in err and err.count("heft: error") == 1, err


def test_two_runs_of_one_name_take_turns(longer, undisturbed, tmp_path):
    """Started together, the second waits and then finds everything done; two that share stage 1 train it
    once."""
    twins = [start(tmp_path, tiny_settings(longer) + FLAGS) for _ in range(2)]
    wait_for(twins[0], lambda: list((tmp_path / "output").glob("lora3-model-*/lock")))  # a twin has stage 1
    sibling = start(tmp_path, tiny_settings(longer) + FLAGS + ["--epochs-reft", "0"])
    outputs = []
    for process in (*twins, sibling):
        outputs.append(process.communicate(timeout=300))
        assert process.returncode == 0, outputs[-1]
    assert sum("stage 1, LoRA" in out for out, _ in outputs) == 1, "stage 1 is trained once"
    assert sum("stage 2, LoReFT" in out for out, _ in outputs) == 1, "and so is stage 2"
    assert sum("waiting for another run" in out or "already done" in out for out, _ in outputs[:2]) == 1
    for path in (tmp_path / "results").glob("lora3-reft0*"):
        path.unlink()
    assert outcome(tmp_path) == undisturbed[0]


def test_a_loss_that_is_not_finite_stops_the_run(longer, tmp_path):
    process = start(tmp_path, tiny_settings(longer) + FLAGS + ["--learning-rate-lora", "1e30"])
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1 and "Traceback" not in err
    line = [line for line in err.splitlines() if line.startswith("heft: error: ")]
    assert len(line) == 1 and "at step " in line[0] and "nan" in line[0]


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
@pytest.mark.parametrize("full", ["output", "results"])
def test_a_full_disk(full, longer, undisturbed, tmp_path):
    """The disk fills up during a checkpoint, or while results are written: one clear line; with room, it
    continues."""
    mount = tmp_path / full
    mount.mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=12m" if full == "output" else "size=11m", "none", mount],
        check=True,
    )
    try:
        process = start(tmp_path, tiny_settings(longer) + FLAGS)
        if full == "output":
            wait_for(process, lambda: list(mount.glob("lora3-model-*/checkpoint.pt")))
        else:
            wait_for(process, lambda: list((tmp_path / "output").glob("lora3-reft3-*/heft.json")))
        ballast = mount / "ballast"
        with open(ballast, "wb", buffering=0) as file:
            try:
                while file.write(b"x" * 4096):
                    pass
            except OSError:
                pass
        out, err = process.communicate(timeout=300)
        assert process.returncode == 1, out + err
        lines = [line for line in err.splitlines() if line.startswith("heft: error: ")]
        assert len(lines) == 1 and "the disk is full" in lines[0] and "Traceback" not in err, err
        ballast.unlink()
        assert ("resuming" if full == "output" else "stage 2 is finished") in finish(tmp_path, longer)
        assert outcome(tmp_path) == undisturbed[0]
    finally:
        subprocess.run(["umount", mount], check=True)
