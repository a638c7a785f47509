"""The script on a simulated GPU (see simulated_gpu.py): no tensor is left on the CPU, and too little memory
shows at once. Each run has a process of its own, forked from one that has imported the libraries."""

import json
import multiprocessing
import re

import pytest
import simulated_gpu
import torch
from conftest import ROOT, read_result

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["peft", "pyreft", "scipy.stats", "transformers.models.llama.modeling_llama"])
TEXT = simulated_gpu.SCRIPT.read_text()
# What --smoke stands for, which would take the CPU
TOY = f"--base-model {ROOT}/smoke/model --dataset {ROOT}/smoke/data --dtype float32 --no-push-to-hub"
STEP, GENERATE = "torch.optim:AdamW.step", "transformers:LlamaForCausalLM.generate"  # where to stop a run


def run(folder, flags, **options):
    """Exit status, stdout and stderr of the script in a process of its own. options: of simulated_gpu.run."""
    folder.mkdir(exist_ok=True)
    arguments = dict(args=(folder, flags.split()), kwargs=options)
    process = FORKS.Process(target=simulated_gpu.run, **arguments, daemon=True)
    process.start()
    process.join(300)
    return process.exitcode, (folder / "out").read_text(), (folder / "err").read_text()


def test_interrupted_run_equals_that_of_the_cpu(tmp_path):
    flags = f"{TOY} --epochs-lora 1 --epochs-reft 1 --examples-per-step 4 --max-train-samples 8"
    flags += " --max-eval-samples 12 --learning-rate-lora 9e-4 --learning-rate-reft 1e-3"
    status, out, err = run(tmp_path / "cpu", flags, device="cpu")
    assert status == 0, out + err
    result, answers = read_result(tmp_path / "cpu")

    simulated = tmp_path / "simulated"
    for steps in 1, 2:  # in stage 1, whose last step is the next run's first, and in stage 2
        status, out, err = run(simulated, flags, stop=(STEP, steps))
        assert status == 85 and "stopped by SIGTERM after step 1;" in out, out + err
    for steps in 2, 1:  # never reached: one step of stage 2 is left, then none, and both stages are read
        status, out, err = run(simulated, flags, stop=(STEP, steps))
        assert status == 0, out + err
        found, texts = read_result(simulated)
        assert texts == answers
        for stage in "lora", "reft":
            losses, expected = found["loss"][stage], result["loss"][stage]
            assert len(losses) == 2
            torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected))
        for file in simulated.glob("results/*"):  # the next run evaluates again
            file.unlink()
    (weights,) = simulated.glob("output/*/*.bin")
    assert all(x.device.type == "cpu" for x in torch.load(weights).values()), "it should load without a GPU"


def left_on_the_cpu():
    """The script's text with one tensor left on the CPU; id: the function in which it should be moved."""
    for place in re.finditer(r"(?<=\.to\()DEVICE|(?<=\bdevice=)DEVICE|(?<=device_map=)DEVICE", TEXT):
        function = re.findall(r"def (\w+)", TEXT[: place.start()])[-1]
        if function != "generate_answers":  # there, transformers' generate moves its inputs itself
            yield pytest.param(TEXT[: place.start()] + '"cpu"' + TEXT[place.end() :], id=function)
    yield pytest.param(re.sub(r"(map_location=|set_device\()DEVICE", r'\1"cpu"', TEXT), id="intervention")


@pytest.mark.parametrize("text", list(left_on_the_cpu()))
def test_a_tensor_left_on_the_cpu_is_an_error(text, tmp_path):
    assert text != TEXT
    flags = f"{TOY} --epochs-lora 0 --epochs-reft 1 --max-train-samples 2 --max-eval-samples 2"
    status, out, err = run(tmp_path, flags, text=text)
    assert status == 1 and re.search("RuntimeError: .* mixes devices", err), out + err


@pytest.mark.parametrize("lora, reft", [(1, 0), (0, 1), (0, 0)], ids=["stage 1", "stage 2", "evaluation"])
def test_out_of_memory_shows_at_once(lora, reft, tmp_path):
    """Only the last and longest row does not fit, and still no step is done and no question is answered."""
    (tmp_path / "data").mkdir()
    for split in "train", "validation":
        rows = (ROOT / f"smoke/data/{split}.jsonl").read_text().splitlines()[:7]
        last = json.loads(rows[-1])
        rows[-1] = json.dumps(last | {"passage": 100 * last["passage"]})
        (tmp_path / f"data/{split}.jsonl").write_text("\n".join(rows))
    flags = f"{TOY} --dataset data --epochs-lora {lora} --epochs-reft {reft}"
    flags += " --examples-per-step 1 --tokens-per-microbatch 1"
    stop = (STEP if lora or reft else GENERATE), 1
    status, out, err = run(tmp_path, flags, largest=10_000_000, stop=stop)
    assert status == 1, out + err  # not 85
    (message,) = [line for line in err.splitlines() if line.startswith("heft: error: ")]
    assert "GPU memory" in message and "--tokens-per-microbatch" in message and "Traceback" not in err
    assert not list(tmp_path.glob("output/*/*.*")) and not list(tmp_path.glob("results/*"))
