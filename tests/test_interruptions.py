"""Killed at any moment, the same command continues, and the result is that of an undisturbed run, bit for bit."""

import os
import random
import shutil
import signal
import subprocess
import time

import pytest
from conftest import make_tiny, read_result, start, tiny_settings


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
    weights = {path.relative_to(folder).as_posix(): path.read_bytes() for pattern in ("*/adapter_model.safetensors", "*/intkey_*.bin") for path in (folder / "output").glob(pattern)}
    assert len(weights) == 2
    return weights, result["loss"], predictions, {key: result[key] for key in ("accuracy", "settings", "confidence_interval_95")}


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


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
@pytest.mark.parametrize("part", ["stage 1", "stage 2", "evaluation"])
def test_interrupted_in(part, kind, longer, undisturbed, tmp_path):
    output = tmp_path / "output"
    reached = {"stage 1": lambda: list(output.glob("lora3-*/checkpoint-5/heft.json")), "stage 2": lambda: list(output.glob("lora3-reft3*/checkpoint-5/heft.json")),
               "evaluation": lambda: any(path.read_text().count("\n") > 3 for path in output.glob("lora3-reft3*/answers.jsonl"))}[part]
    process = start(tmp_path, tiny_settings(longer) + FLAGS)
    wait_for(process, reached)
    out, err = interrupt(process, kind)
    if kind == signal.SIGTERM:
        assert process.returncode == 85, out + err
        assert "Traceback" not in err
        if part != "evaluation":
            (folder,) = {path.parent.parent for path in output.glob("*/checkpoint-*/heft.json")}
            steps = max(int(path.parent.name.split("-")[1]) for path in folder.glob("checkpoint-*/heft.json"))
            assert f"stopped by SIGTERM at step {steps} of 15" in out, "no step is lost"
    else:
        assert process.returncode == -signal.SIGKILL
    out = finish(tmp_path, longer)
    assert ("resuming after" if part == "evaluation" else "resuming from output/") in out
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
        assert process.returncode in ({85, 0, -signal.SIGTERM} if kind == signal.SIGTERM else {-signal.SIGKILL, 0}), out + err
        # -SIGTERM: in the first moments, before Python has read the line that says otherwise; nothing is there to be lost
        assert process.returncode != -signal.SIGTERM or delay < 2
    done = {path.parent.parent.name: int(path.parent.name.split("-")[1]) for path in (tmp_path / "output").glob("*/checkpoint-*/heft.json")}
    out = finish(tmp_path, longer)
    assert outcome(tmp_path) == undisturbed[0]
    if kind == signal.SIGKILL:
        for name, step in done.items():
            assert step % 5 == 0, "a checkpoint at each epoch's end, so that at most one epoch is done twice"


def test_a_torn_checkpoint_is_not_used(longer, undisturbed, tmp_path):
    process = start(tmp_path, tiny_settings(longer) + FLAGS)
    wait_for(process, lambda: list((tmp_path / "output").glob("lora3-*/checkpoint-10/heft.json")))
    interrupt(process, signal.SIGKILL)
    (newest,) = (tmp_path / "output").glob("lora3-*/checkpoint-10")
    (newest / "heft.json").unlink()  # as if the process had died before the marker
    (newest / "adapter_model.safetensors").write_bytes(b"torn")
    out = finish(tmp_path, longer)
    assert "checkpoint-5" in out.split("resuming from")[1].splitlines()[0]
    assert outcome(tmp_path) == undisturbed[0]


def test_a_checkpoint_of_other_settings_is_refused(longer, tmp_path):
    process = start(tmp_path, tiny_settings(longer) + FLAGS)
    wait_for(process, lambda: list((tmp_path / "output").glob("lora3-*/checkpoint-5/heft.json")))
    interrupt(process, signal.SIGKILL)
    (folder,) = (path.parent.parent for path in (tmp_path / "output").glob("lora3-*/checkpoint-5/heft.json"))
    folder.rename(folder.with_name(folder.name + "-seed7"))
    process = start(tmp_path, tiny_settings(longer) + FLAGS + ["--seed", "7"])
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2 and "seed 42, not 7" in err and err.count("heft: error") == 1, err


def test_two_runs_of_one_name_take_turns(longer, undisturbed, tmp_path):
    """Started together, the second waits and then finds everything done; two that share stage 1 train it once."""
    twins = [start(tmp_path, tiny_settings(longer) + FLAGS) for _ in range(2)]
    sibling = start(tmp_path, tiny_settings(longer) + FLAGS + ["--epochs-reft", "0"])
    outputs = []
    for process in (*twins, sibling):
        outputs.append(process.communicate(timeout=300))
        assert process.returncode == 0, outputs[-1]
    assert sum("stage 1, LoRA" in out for out, _ in outputs) == 1, "stage 1 is trained once"
    assert sum("stage 2, LoReFT" in out for out, _ in outputs) == 1, "and so is stage 2"
    assert sum("waiting for another run" in out or "already done" in out for out, _ in outputs[:2]) == 1
    shutil.rmtree(tmp_path / "output" / next((tmp_path / "output").glob("lora3-reft0*")).name)
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
    """The disk fills up during a checkpoint, or while results are written: one clear line, and the run continues when there is room."""
    mount = tmp_path / full
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m" if full == "output" else "size=11m", "none", mount], check=True)
    try:
        process = start(tmp_path, tiny_settings(longer) + FLAGS)
        if full == "output":
            wait_for(process, lambda: list(mount.glob("lora3-*/checkpoint-5/heft.json")))
        else:
            wait_for(process, lambda: list((tmp_path / "output").glob("*/answers.jsonl")))
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
        assert "resuming" in finish(tmp_path, longer)
        assert outcome(tmp_path) == undisturbed[0]
    finally:
        subprocess.run(["umount", mount], check=True)
