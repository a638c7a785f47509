"""What a user sees of heft_finetuning.py: settings, names, logs, results, what earlier work is reused."""

import hashlib
import importlib.util
import json
import math
import os
import pty
import re
import subprocess
import sys
import termios
from types import SimpleNamespace

import httpx2
import huggingface_hub
import pytest
import torch
from conftest import ROOT, load, rows_of, tiny_settings
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError
from inside import result_of, run_inside, run_process
from statsmodels.stats.proportion import proportion_confint

import heft_finetuning as heft

SCRIPT = ROOT / "heft_finetuning.py"
SHORT = "--epochs-lora 1 --epochs-reft 1"


def run(work, given, flags=SHORT):
    return run_inside(work, [*map(str, tiny_settings(given)), *flags.split()])


# --- importing it, settings, names


def test_importing_it_does_nothing_else():
    """No process, none of the large packages but those of transformers; warnings and signals as before."""
    program = """
import os, signal, subprocess, sys, warnings
import huggingface_hub, torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, set_seed
def surroundings():
    heavy = {"peft", "pyreft", "pyvene", "datasets", "accelerate"} & sys.modules.keys()
    return list(warnings.filters), dict(os.environ), signal.getsignal(signal.SIGTERM), heavy
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
    assert {name: settings[name] for name in heft.PAPER} == heft.PAPER
    assert (settings["EPOCHS_LORA"], settings["EPOCHS_REFT"]) == (3, 3)
    assert [heft.identity(settings, part)[0] for part in ("run", "lora")] == ["lora3-reft3", "lora3"]


def test_help_shows_legal_values_and_defaults(capsys):
    with pytest.raises(SystemExit) as end:
        heft.read_settings(["--help"])
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name in heft.SETTINGS:
        assert "--" + name.lower().replace("_", "-") in text, name
    for words in (
        "a whole number from 0 (default: 3)",
        "from 0 to below 1 (default: 0.05)",
        "above 0 (default: 0.0002)",
        "bfloat16 or float32 (default: 'bfloat16')",
        "a name, not empty (default: 'google/boolq')",
        "The constants at the top of heft_finetuning.py say what each setting means.",
    ):
        assert words in text, words


def test_every_constant_has_a_comment():
    lines = SCRIPT.read_text().splitlines()
    for name in heft.SETTINGS:
        (line,) = [line for line in lines if line.startswith(f"{name} = ")]
        assert re.search(r"  # \S", line), line


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
        ("--smoke", "lora3-reft3", "lora3"),
        ("--smoke --dtype bfloat16", "lora3-reft3-dtype_bfloat16", "lora3-dtype_bfloat16"),
    ],
)
def test_name_says_what_differs_from_the_paper(flags, name, stage_1):
    settings = heft.read_settings(flags.split())
    assert heft.identity(settings, "run")[0] == name.format("-reft3")
    assert heft.identity(settings, "lora")[0] == stage_1.format("")


def test_every_setting_that_changes_the_experiment_changes_the_name():
    usual = heft.read_settings([])
    other = {name: f"{value}x" if isinstance(value, str) else value + 1 for name, value in heft.PAPER.items()}
    names = {heft.identity(usual | {name: value}, "run")[0] for name, value in other.items()}
    assert len(names) == len(other) and heft.identity(usual, "run")[0] not in names


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
    assert edited.identity(by_edit, "run")[0] == "lora20-reft3-lora_targets_all_linear"


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


# --- a job's log


def test_progress_without_a_terminal(tiny, tmp_path):
    """Plain lines, every 50 steps and at the end of each stage; nothing of any library."""
    flags = "--epochs-lora 2 --epochs-reft 1 --examples-per-step 1 --tokens-per-microbatch 100".split()
    shown = run_process(tmp_path, [*tiny_settings(tiny), *flags])
    assert (shown.status, shown.err) == (0, "") and "\r" not in shown.out
    line = r"step (\d+) of (\d+): loss (\d+\.\d+), rate (\S+), (\d+\.\d+) s per step, (\d+:\d\d:\d\d) left"
    steps = [match.groups() for match in re.finditer(f"^{line}$", shown.out, re.M)]
    assert [step[:2] for step in steps] == [("50", "90"), ("90", "90"), ("45", "45")]
    losses = result_of(tmp_path)[0]["loss"]
    assert float(steps[0][2]) == pytest.approx(losses["lora"][49], abs=1e-3)
    assert [float(step[3]) for step in steps] == pytest.approx(
        [2e-4 * 41 / 90, 2e-4 / 90, 2e-4 / 45], rel=1e-2
    )
    assert [step[5] for step in steps[1:]] == ["0:00:00"] * 2
    assert re.search(r"^micro-batch \d+ of \d+: 20 questions, ", shown.out, re.M)


def test_progress_in_a_terminal(tiny, tmp_path):
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, 120))
    flags = [*tiny_settings(tiny), *"--epochs-lora 1 --epochs-reft 0 --examples-per-step 9".split()]
    command = [sys.executable, str(SCRIPT), *map(str, flags)]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=slave, stderr=slave)
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
    assert b"\r" in shown.replace(b"\r\n", b"") and b"%|" in shown and b"5/5" in shown and b"loss" in shown
    assert b"step 5 of 5:" not in shown, "the bar says it"


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
    assert set(heft.SETTINGS) <= result["settings"].keys() and result["settings"]["FORMAT"] == 3
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
    assert [row["question"] for row in predictions] == [
        r["question"] for r in rows_of(tiny / "data", "validation")
    ]


def test_parts_that_a_run_does_not_have(four_runs):
    result, _ = result_of(four_runs[0], "lora0-reft0*")
    assert result["loss"] == {"lora": [], "reft": []}
    assert result["seconds"]["lora"] == result["seconds"]["reft"] == 0
    assert list(result["device"]) == list(result["versions"]) == ["evaluation"]


def test_the_report_reads_it(four_runs):
    import report

    for file in (four_runs[0] / "results").glob("*.json"):
        assert report.read_run(file)


def test_the_papers_accuracies_are_those_of_the_report():
    table = json.loads((ROOT / "results/paper.json").read_text())["table_1"]
    assert {name: row["accuracy"] for name, row in table.items()} == heft.PAPER_ACCURACY


def test_last_screen(four_runs):
    _, shown = four_runs
    words = "LoRA 1 epochs + LoReFT 1 epochs|95 % interval|seconds|of 20 correct| Yes, | Unknown|GB"
    for expected in f"{words}|results/lora1-reft1|output/lora1-".split("|"):
        assert expected in shown[1, 1].out, expected
    assert "the base model, untrained" in shown[0, 0].out
    assert "stage 1, LoRA is finished in output/lora1-" in shown[1, 0].out  # shared with the run before


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


def test_a_stage_2_has_its_own_peak_memory(tiny, tmp_path, monkeypatch):
    """Stage 1 is given half a gigabyte more than it needs, which stage 2 does not show."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("here, the peak of a process cannot be reset")
    clip = torch.nn.utils.clip_grad_norm_

    def clip_with_ballast(parameters, *rest):
        if len(parameters) > 3:  # LoRA's; LoReFT has R, W and b
            torch.ones(150_000_000)
        return clip(parameters, *rest)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip_with_ballast)
    assert run(tmp_path, tiny).status == 0
    peaks = result_of(tmp_path)[0]["peak_memory_gb"]
    assert peaks["lora"] > peaks["reft"] + 0.3 and peaks["lora"] > peaks["evaluation"] + 0.3
    (record,) = tmp_path.glob("output/lora1-reft1-*/heft.json")
    assert json.loads(record.read_text())["peak_memory_gb"] == peaks["reft"]


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
    with pytest.raises(heft.Stop, match="no bfloat16 in hardware.*--dtype float32"):
        heft.check_device(base)
    monkeypatch.setattr(heft, "DTYPE", "float32")
    heft.check_device(base)


@pytest.mark.parametrize(
    "sentence",
    [
        "The NVIDIA driver on your system is too old (found version 12040). Please update your GPU driver",
        "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU",
    ],
)
def test_no_gpu_and_an_old_driver_are_told_apart(paper_model, monkeypatch, sentence):
    def init():
        raise RuntimeError(sentence)

    base = SimpleNamespace(meta_model=paper_model())
    monkeypatch.setattr(heft, "DEVICE", "cpu")
    monkeypatch.setattr(torch.cuda, "init", init)
    with pytest.raises(heft.Stop, match=re.escape(sentence)):
        heft.check_device(base)


def test_memory_is_measured_before_the_first_step(paper_model, monkeypatch):
    """Forward and backward on the longest example and on the most tokens that a micro-batch can have."""
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
    assert {(1, 70), (4, 25)} <= set(shapes) and weight.grad is not None


def test_memory_that_does_not_suffice(capsys):
    assert heft.report_error(torch.OutOfMemoryError("CUDA out of memory. Tried ...\nand more")) == 1
    err = capsys.readouterr().err
    assert err.startswith("heft: error: ") and err.count("\n") == 1 and "--tokens-per-microbatch" in err
