"""What a user sees of heft_finetuning.py: settings, names, messages, files, stages."""

import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys

import httpx2
import huggingface_hub
import pytest
import torch
from conftest import ROOT, load, make_tiny, rows_of, run_script, start, tiny_settings
from huggingface_hub.errors import HfHubHTTPError
from peft import get_peft_model
from statsmodels.stats.proportion import proportion_confint
from transformers import LlamaConfig, LlamaForCausalLM

import heft_finetuning as heft

SCRIPT = ROOT / "heft_finetuning.py"


# --- settings


def test_prompt_is_the_papers():
    text = heft.BOOLQ_PROMPT_TMPL % ("P", "Q")
    assert text == (
        '<s>[INST] <<SYS>>\nYou are a helpful assistant that answers questions with only "Yes" or\n'
        '"No" based on the provided passage.\n'
        "<</SYS>>\nPassage: P\nQuestion: Q\nAnswer: [/INST]"
    )
    assert heft.format_boolq({"passage": "100 %s", "question": "q", "answer": True}) == {
        "prompt": heft.BOOLQ_PROMPT_TMPL % ("100 %s", "q"),
        "answer": "Yes",
    }


def test_defaults_are_the_papers():
    settings = heft.read_settings([])
    assert {name: settings[name] for name in heft.PAPER_VALUES} == heft.PAPER_VALUES
    assert (settings["EPOCHS_LORA"], settings["EPOCHS_REFT"], settings["TOKENS_PER_MICROBATCH"]) == (
        3,
        3,
        2048,
    )
    assert (
        heft.identity(settings, "run")[0] == "lora3-reft3" and heft.identity(settings, "lora")[0] == "lora3"
    )


def test_every_setting_is_a_flag_with_its_meaning(capsys):
    with pytest.raises(SystemExit) as end:
        heft.read_settings(["--help"])
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name in heft.SETTINGS:
        flag = "--" + name.lower().replace("_", "-")
        assert flag in text, flag
    for meaning in (
        "passes over the data in stage 1",
        "memory knob",
        "the block, counted from 0",
        "Hub name or folder",
        "0 to below 1",
    ):
        assert meaning in text, meaning


@pytest.mark.parametrize(
    "flags, name, stage_1",
    [
        (["--epochs-lora", "20", "--epochs-reft", "0"], "lora20-reft0", "lora20"),
        (["--reft-layer", "10", "--seed", "7"], "lora3-reft3-reft_layer10-seed7", "lora3-seed7"),
        (
            ["--base-model", "x/tiny llama", "--lora-targets", "all-linear"],
            "lora3-reft3-tiny_llama-lora_targets_all_linear",
            "lora3-tiny_llama-lora_targets_all_linear",
        ),
        (
            ["--base-model", "me/Small-1B", "--dataset", "data/reviews/", "--max-train-samples", "640"],
            "lora3-reft3-Small_1B-on_reviews-train640",
            "lora3-Small_1B-on_reviews-train640",
        ),
        (["--max-eval-samples", "400"], "lora3-reft3-eval400", "lora3"),
        (["--epochs-lora", "0", "--lora-rank", "4"], "lora0-reft3", "lora0"),
        (["--epochs-reft", "0", "--reft-rank", "8"], "lora3-reft0", "lora3"),
        (
            ["--tokens-per-microbatch", "64", "--output-dir", "o", "--no-push-to-hub", "--hf-user", "me"],
            "lora3-reft3",
            "lora3",
        ),
        (
            ["--learning-rate-lora", "1e-3"],
            "lora3-reft3-lr_lora0.001",
            "lora3-lr_lora0.001",
        ),
        (["--smoke"], "lora3-reft3", "lora3"),
        (["--smoke", "--dtype", "bfloat16"], "lora3-reft3-dtype_bfloat16", "lora3-dtype_bfloat16"),
    ],
)
def test_name_says_what_differs_from_the_paper(flags, name, stage_1):
    settings = heft.read_settings(flags)
    assert heft.identity(settings, "run")[0] == name
    assert heft.identity(settings, "lora")[0] == stage_1


def test_every_setting_that_changes_the_experiment_changes_the_name():
    different = dict(
        BASE_MODEL="x",
        DATASET="x",
        LORA_RANK=4,
        LORA_ALPHA=4,
        LORA_DROPOUT=0.5,
        LORA_TARGETS="x",
        LEARNING_RATE_LORA=1.0,
        REFT_LAYER=1,
        REFT_RANK=1,
        LEARNING_RATE_REFT=1.0,
        EXAMPLES_PER_STEP=4,
        MAX_LENGTH=9,
        MAX_NEW_TOKENS=9,
        DTYPE="float32",
        SEED=1,
        MAX_TRAIN_SAMPLES=9,
        MAX_EVAL_SAMPLES=9,
    )
    assert different.keys() == heft.PAPER_VALUES.keys()
    usual = heft.read_settings([])
    names = {heft.identity(usual | {key: value}, "run")[0] for key, value in different.items()}
    assert len(names) == len(different) and heft.identity(usual, "run")[0] not in names


def test_editing_a_constant_equals_its_flag(tmp_path):
    edited = (
        SCRIPT.read_text()
        .replace("EPOCHS_LORA = 3 ", "EPOCHS_LORA = 20 ")
        .replace('LORA_TARGETS = ""', 'LORA_TARGETS = "all-linear"')
    )
    edited = re.sub("(MAX_LENGTH = 2048) .*", r"\1", edited)  # the comment lost
    (tmp_path / "edited.py").write_text(edited)
    code = "import json, {0} as h; s = h.read_settings({1}); print(json.dumps([s, *h.identity(s, 'run')]))"
    by_edit = subprocess.run(
        [sys.executable, "-c", code.format("edited", "[]")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    by_flag = subprocess.run(
        [
            sys.executable,
            "-c",
            code.format("heft_finetuning", "['--epochs-lora', '20', '--lora-targets', 'all-linear']"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert json.loads(by_edit) == json.loads(by_flag)
    assert json.loads(by_edit)[1] == "lora20-reft3-lora_targets_all_linear"


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
    texts = [
        tokenizer(text)["input_ids"] for text in ("Anna never keeps cats.", "does Anna", "Yes No Yes No Yes")
    ]
    rows = heft.collate(
        [{"input_ids": text, "labels": [heft.IGNORE, heft.IGNORE] + text[2:]} for text in texts]
    )
    assert len(rows) == 1
    losses = heft.example_losses(model(input_ids=rows[0]["input_ids"]).logits, rows[0]["labels"])
    for loss, text in zip(losses, sorted(texts, key=len)):
        ids = torch.tensor([text])
        torch.testing.assert_close(
            loss, model(input_ids=ids, labels=torch.cat([torch.full((1, 2), -100), ids[:, 2:]], 1)).loss
        )


@pytest.mark.parametrize(
    "text, answer",
    [
        ("Yes", "Yes"),
        ("No, Yes", "Yes"),
        ("No.", "No"),
        ("yes", "Unknown"),
        ("", "Unknown"),
        ("Nope", "No"),
        ("NoYes", "Yes"),
    ],
)
def test_prediction_is_the_papers_rule(text, answer):
    assert heft.predict(text) == answer


def test_a_tokenizer_that_joins_prompt_and_answer_is_told(monkeypatch, capsys):
    def tokenizer(text):
        return {"input_ids": [len(text)]}

    tokenizer.eos_token, tokenizer.eos_token_id = "</s>", 0
    rows = [{"prompt": "p", "answer": "Yes", "tokens": [1]}]
    with pytest.raises(SystemExit) as end:
        heft.training_examples(tokenizer, rows)
    assert end.value.code == 2 and "joins prompt and answer" in capsys.readouterr().err
    monkeypatch.setattr(heft, "EPOCHS_REFT", 0)
    assert len(heft.training_examples(tokenizer, rows)[0]) == 1


def raised(error, cause=None):
    """The error as `except` gets it, raised from the cause."""
    error.__cause__ = cause
    return error


def answer_of(status):
    """The Hub's answer with this status."""
    return HfHubHTTPError("no", response=httpx2.Response(status, request=httpx2.Request("GET", "http://hub")))


@pytest.mark.parametrize(
    "error, status",
    [
        (httpx2.ReadError("cut"), 1),  # in the middle of a download
        (raised(OSError("wrapped"), httpx2.ConnectTimeout("late")), 1),
        (answer_of(503), 1),
        (raised(OSError("wrapped"), answer_of(503)), 1),
        (answer_of(429), 1),
        (answer_of(404), 2),
        (raised(OSError("wrapped"), answer_of(403)), 2),
        (OSError("no such file"), 2),
    ],
)
def test_a_failing_network_is_no_mistake_of_the_user(monkeypatch, capsys, error, status):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(SystemExit) as end:
        heft.stop("cannot read", error)
    assert end.value.code == status
    assert capsys.readouterr().err.startswith(f"heft: error: cannot read ({type(error).__name__}: ")


# --- runs


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """Results of the four kinds of run, all in one folder so that two share stage 1: {(lora, reft):
    (result, predictions)}."""
    folder, found = tmp_path_factory.mktemp("runs"), {}
    for lora, reft in ((1, 1), (1, 0), (0, 1), (0, 0)):
        process = start(folder, tiny_settings(tiny) + ["--epochs-lora", lora, "--epochs-reft", reft])
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, out + err
        found[lora, reft] = out
    return folder, found


def result_of(folder, lora, reft):
    (file,) = (folder / "results").glob(f"lora{lora}-reft{reft}*.json")
    return json.loads(file.read_text()), [
        json.loads(line) for line in file.with_suffix(".predictions.jsonl").read_text().splitlines()
    ]


def test_result_file_has_all_that_is_needed_to_understand_it(runs, tiny):
    result, predictions = result_of(runs[0], 1, 1)
    assert list(result)[:5] == [
        "lora_epochs",
        "reft_epochs",
        "num_validation_samples",
        "correct_predictions",
        "accuracy",
    ]
    assert (result["lora_epochs"], result["reft_epochs"], result["num_validation_samples"]) == (1, 1, 20)
    correct = sum(row["prediction"] == row["answer"] for row in predictions)
    assert result["correct_predictions"] == correct and result["accuracy"] == f"{100 * correct / 20:.2f}%"
    assert result["unknown_answers"] == sum(row["prediction"] == "Unknown" for row in predictions)
    wilson = [100 * end for end in proportion_confint(correct, 20, method="wilson")]
    assert result["confidence_interval_95"] == pytest.approx(wilson)
    assert set(heft.SETTINGS) <= result["settings"].keys()
    assert len(result["loss"]["lora"]) == len(result["loss"]["reft"]) == 2 and all(
        map(math.isfinite, result["loss"]["lora"] + result["loss"]["reft"])
    )
    assert result["seconds"]["total"] == pytest.approx(
        sum(value for stage, value in result["seconds"].items() if stage != "total")
    )
    assert (
        result["peak_memory_gb"] > 0.1
        and result["versions"]["torch"] == torch.__version__
        and result["device"].startswith("CPU")
    )
    questions = [
        json.loads(line)["question"] for line in (tiny / "data/validation.jsonl").read_text().splitlines()
    ]
    assert [row["question"] for row in predictions] == questions


def test_last_screen_says_what_was_done(runs):
    for expected in (
        "LoRA 1 epochs + LoReFT 1 epochs",
        "95 % interval",
        "seconds",
        "of 20 correct",
        "results/lora1-reft1",
        "output/lora1-",
    ):
        assert expected in runs[1][1, 1], expected
    assert "the base model, untrained" in runs[1][0, 0]
    assert "stage 1 is finished in output/lora1-" in runs[1][1, 0]  # shared with the run before


def test_a_stage_with_no_epochs_is_absent(runs, tiny):
    """Answers of (0, 0) are the base model's, of (1, 0) those of base + adapter, without an intervention."""
    import listing
    from peft import PeftModel

    questions = rows_of(tiny / "data", "validation")
    model, tokenizer = load(tiny / "model")
    result, predictions = result_of(runs[0], 0, 0)
    assert (
        result["loss"] == {"lora": [], "reft": []}
        and result["seconds"]["lora"] == result["seconds"]["reft"] == 0
    )
    assert [row["text"] for row in predictions] == listing.evaluate(model, tokenizer, questions)
    (lora_dir,) = [path.parent for path in (runs[0] / "output").glob("*/adapter_config.json")]
    merged = PeftModel.from_pretrained(model, lora_dir).merge_and_unload()
    result, predictions = result_of(runs[0], 1, 0)
    assert result["loss"]["reft"] == [] and [row["text"] for row in predictions] == listing.evaluate(
        merged, tokenizer, questions
    )
    assert not list((runs[0] / "output").glob("lora1-reft0*/intkey*")) and not list(
        (runs[0] / "output").glob("lora0-reft1*/adapter*")
    )


def test_the_saved_intervention_is_what_reftmodel_reads(runs, tiny):
    import pyreft

    model, _ = load(tiny / "model")
    (folder,) = (runs[0] / "output").glob("lora0-reft1*")
    (intervention,) = pyreft.ReftModel.load(str(folder), model).interventions.values()
    state = torch.load(next(folder.glob("intkey_*.bin")))
    assert (
        torch.equal(intervention.rotate_layer.weight, state["rotate_layer"])
        and state["weight"].dtype == torch.float32
    )


def test_output_is_small_and_holds_no_model(runs):
    sizes = {path.name: path.stat().st_size for path in (runs[0] / "output").rglob("*") if path.is_file()}
    assert not [name for name in sizes if name == "model.safetensors"] and sum(sizes.values()) < 1e6
    assert not list((runs[0] / "output").rglob("checkpoint-*")), (
        "checkpoints of finished stages are not needed"
    )
    assert not list(runs[0].glob(".merged-*"))


def test_the_same_command_gives_the_same_result_and_another_seed_another(runs, tiny, tmp_path):
    def without_times(result):
        return {
            key: value for key, value in result.items() if key not in ("seconds", "peak_memory_gb", "commit")
        }

    again, predictions = run_script(
        tmp_path / "again", tiny_settings(tiny) + ["--epochs-lora", "1", "--epochs-reft", "1"]
    )
    first, first_predictions = result_of(runs[0], 1, 1)
    assert without_times(again) == without_times(first) and predictions == first_predictions
    other, _ = run_script(
        tmp_path / "other", tiny_settings(tiny) + ["--epochs-lora", "1", "--epochs-reft", "1", "--seed", "7"]
    )
    assert other["loss"] != first["loss"]
    assert list((tmp_path / "other/results").glob("*-seed7.json"))


def test_starting_weights_depend_on_the_seed_alone(runs, tiny):
    """The first stage-2 loss after a trained stage 1 in one go equals that of a run that found stage 1
    finished."""
    folder = runs[0]
    result, _ = result_of(folder, 1, 1)
    for path in list((folder / "output").glob("lora1-reft1*")) + list(
        (folder / "results").glob("lora1-reft1*")
    ):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    process = start(folder, tiny_settings(tiny) + ["--epochs-lora", 1, "--epochs-reft", 1])
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and "stage 1 is finished" in out, out + err
    assert result_of(folder, 1, 1)[0]["loss"] == result["loss"]


def test_a_finished_run_says_so_and_keeps_its_result(runs, tiny):
    (file,) = (runs[0] / "results").glob("lora0-reft0*.json")
    before = file.read_bytes(), file.stat().st_mtime_ns
    process = start(runs[0], tiny_settings(tiny) + ["--epochs-lora", 0, "--epochs-reft", 0])
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and "already done" in out, out + err
    assert (file.read_bytes(), file.stat().st_mtime_ns) == before


# --- provenance: weights are never paired with others


def run_once(folder, given, *flags):
    process = start(folder, tiny_settings(given) + ["--epochs-lora", "1", "--epochs-reft", "1", *flags])
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


@pytest.fixture
def done(runs, tmp_path):
    """A private copy of the finished run with one epoch of each stage."""
    shutil.copytree(runs[0], tmp_path / "done")
    for pattern in ("output/lora1-reft0*", "output/lora0*", "results/lora0*", "results/lora1-reft0*"):
        for path in (tmp_path / "done").glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return tmp_path / "done"


def take_away(folder, *patterns):
    for pattern in patterns:
        for path in folder.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def test_records_name_their_parents(done):
    lora, reft = (
        json.loads(next(done.glob(f"output/{stage}-*/heft.json")).read_text())
        for stage in ("lora1-model", "lora1-reft1")
    )
    result, _ = result_of(done, 1, 1)
    weights = next(done.glob("output/lora1-model-*/adapter_model.safetensors"))
    assert lora["settings"]["WEIGHTS"] == heft.digest(weights) == reft["settings"]["STAGE_1"]
    assert result["settings"]["STAGE_1"] == lora["settings"]["WEIGHTS"]
    assert result["settings"]["STAGE_2"] == reft["settings"]["WEIGHTS"]
    assert result["script_sha256"] == hashlib.sha256(SCRIPT.read_bytes()).hexdigest()
    assert result["settings"]["TOKENS_PER_MICROBATCH"] == 2048


def test_an_intervention_is_not_paired_with_a_retrained_stage_1(done, tiny):
    """Stage 1 and the result deleted: told at once, before stage 1 is trained."""
    take_away(done, "output/lora1-model-*", "results/*")
    status, out, err = run_once(done, tiny)
    assert status == 2 and "stage_1" in err and "not trained yet" in err and err.count("\n") == 1, err
    assert "stage 1, LoRA" not in out
    take_away(done, "output/lora1-reft1-*")
    assert run_once(done, tiny)[0] == 0


def test_an_intervention_is_not_paired_with_another_runs_stage_1(done, tiny):
    """As when two cluster jobs have trained the same stage 1 on different GPUs and the later has
    overwritten it."""
    record = next(done.glob("output/lora1-model-*/heft.json"))
    weights = record.with_name("adapter_model.safetensors")
    weights.write_bytes(weights.read_bytes() + b"0")
    status, _, err = run_once(done, tiny)
    assert status == 0, "the result is there, and nothing of stage 1 is used"
    take_away(done, "results/*")
    status, _, err = run_once(done, tiny)
    assert status == 2 and "weights" in err and err.count("\n") == 1, "a record and weights that do not match"
    changed = json.loads(record.read_text())
    changed["settings"]["WEIGHTS"] = heft.digest(weights)
    record.write_text(json.dumps(changed))
    status, _, err = run_once(done, tiny)
    assert status == 2 and "stage_1" in err and err.count("\n") == 1, err


def test_records_of_an_older_format_are_told_apart(done, tiny):
    record = next(done.glob("output/lora1-model-*/heft.json"))
    old = json.loads(record.read_text())
    del old["settings"]["FORMAT"]
    record.write_text(json.dumps(old))
    take_away(done, "results/*")
    status, _, err = run_once(done, tiny)
    assert status == 2 and "format None, not 2" in err and err.count("\n") == 1, err


def test_content_counts_and_not_spelling(done, tiny, tmp_path):
    """The same folder with a slash, and a copy of it elsewhere, are the same model; another of its name is
    not."""
    take_away(done, "results/*")
    status, out, err = run_once(
        done, tiny, "--base-model", f"{tiny / 'model'}/", "--dataset", f"{tiny / 'data'}/"
    )
    assert status == 0 and "stage 1 is finished" in out and "stage 2 is finished" in out, out + err
    shutil.copytree(tiny, tmp_path / "copy")
    status, out, err = run_once(done, tmp_path / "copy")
    assert status == 0 and "already done" in out, out + err
    other = make_tiny(tmp_path / "other", seed=1)
    status, out, err = run_once(done, other)
    assert status == 2 and "base_version" in err, out + err


def test_a_result_that_was_moved_away_is_made_again(done, tiny):
    """What the message of a finished run promises: evaluation alone, and the same answers."""
    result, predictions = result_of(done, 1, 1)
    _, out, _ = run_once(done, tiny)
    assert "already done" in out and "move it away to evaluate again" in out
    next(done.glob("results/*.json")).rename(done / "away.json")
    status, out, err = run_once(done, tiny)
    assert status == 0 and "stage 2 is finished" in out and "evaluation of 20 questions" in out, out + err
    again, same = result_of(done, 1, 1)
    assert same == predictions and again["loss"] == result["loss"]


def test_fewer_examples_and_questions(tiny, tmp_path):
    flags = [
        "--epochs-lora",
        "1",
        "--epochs-reft",
        "1",
        "--max-train-samples",
        "33",
        "--max-eval-samples",
        "7",
    ]
    result, predictions = run_script(tmp_path, tiny_settings(tiny) + flags)
    questions = [row["question"] for row in rows_of(tiny / "data", "validation")]
    assert [row["question"] for row in predictions] == questions[:7] and len(result["loss"]["lora"]) == 2
    # More questions about the same weights: nothing is trained again.
    process = start(tmp_path, tiny_settings(tiny) + flags[:-1] + ["9"])
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and "stage 2 is finished" in out, out + err


def test_the_papers_accuracies_are_those_of_the_report():
    table = json.loads((ROOT / "results/paper.json").read_text())["table_1"]
    assert {name: row["accuracy"] for name, row in table.items()} == heft.PAPER_ACCURACY


# --- the machine


@pytest.fixture
def seven(monkeypatch):
    """A function from LORA_TARGETS to the 7B shape with its adapter, without weights."""

    def make(targets="", **settings):
        for name, value in heft.read_settings([]).items():
            monkeypatch.setattr(heft, name, value, raising=False)
        monkeypatch.setattr(heft, "LORA_TARGETS", targets)
        for name, value in settings.items():
            monkeypatch.setattr(heft, name, value)
        with torch.device("meta"):
            shape = dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, vocab_size=32000)
            config = LlamaConfig(**shape, num_attention_heads=32)
            return get_peft_model(LlamaForCausalLM(config).to(torch.bfloat16), heft.lora_config())

    return make


@pytest.mark.parametrize(
    "targets, adapted", [("", 2), ("q_proj", 1), ("q_proj,k_proj,o_proj", 3), ("all-linear", 7)]
)
def test_lora_targets_name_the_adapted_layers(seven, targets, adapted):
    names = [name for name, _ in seven(targets).named_modules() if name.endswith("lora_A.default")]
    assert len(names) == 32 * adapted


def test_trainable_parameters_of_the_7b_model(seven):
    """Known numbers: LoRA's of PEFT's default, and LoReFT's R, W and b."""
    assert sum(p.numel() for p in seven().parameters() if p.requires_grad) == 4_194_304
    loreft = heft.LoreftIntervention(embed_dim=4096, low_rank_dimension=4)
    assert sum(p.numel() for p in loreft.parameters()) == 32_772


@pytest.mark.parametrize(
    "epochs, targets, simulated",
    [(3, "", 25.6), (3, "q_proj,v_proj", 25.6), (3, "all-linear", 34.8), (0, "", 18.7)],
)
def test_the_memory_estimate_is_near_the_simulation(seven, monkeypatch, capsys, epochs, targets, simulated):
    """Gigabytes at the default micro-batch; without stage 1, the evaluation needs the most."""
    skeleton = seven(targets, EPOCHS_LORA=epochs)
    skeleton = skeleton if epochs else skeleton.unload()
    fake_gpu(monkeypatch, 15)
    with pytest.raises(SystemExit):
        heft.check_device(skeleton, 1000)
    estimate = re.search(r"needs about ([\d.]+) GB", said(capsys)).group(1)
    assert float(estimate) == pytest.approx(simulated, rel=0.02)


def fake_gpu(monkeypatch, gigabytes, capability=(9, 0)):
    monkeypatch.setattr(heft, "DEVICE", "cuda")
    monkeypatch.setattr(heft, "DEVICE_NAME", "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(gigabytes * 1e9), int(gigabytes * 1e9)))


def said(capsys, status=2):
    err = capsys.readouterr().err
    assert err.startswith("heft: error: ") and err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    "gigabytes, settings, fits",
    [
        (33, {}, True),
        (33, {"LORA_TARGETS": "all-linear"}, False),
        (24.5, {}, False),
        (24.5, {"EPOCHS_LORA": 0}, True),
    ],
)
def test_a_gpu_with_too_little_memory_is_told_what_fits(
    seven, monkeypatch, capsys, gigabytes, settings, fits
):
    skeleton = seven(settings.get("LORA_TARGETS", ""), **settings)
    skeleton = skeleton.unload() if settings.get("EPOCHS_LORA") == 0 else skeleton
    fake_gpu(monkeypatch, gigabytes)
    if fits:
        return heft.check_device(skeleton, 1000)
    with pytest.raises(SystemExit) as end:
        heft.check_device(skeleton, 1000)
    advice = re.search(r"--tokens-per-microbatch (\d+) fits", said(capsys))
    assert end.value.code == 2 and 1000 < int(advice.group(1)) < 2048
    monkeypatch.setattr(heft, "TOKENS_PER_MICROBATCH", int(advice.group(1)))
    heft.check_device(skeleton, 1000)  # what was advised does fit


def test_a_gpu_without_bfloat16_is_told(seven, monkeypatch, capsys):
    skeleton = seven()
    fake_gpu(monkeypatch, 80, capability=(7, 0))
    with pytest.raises(SystemExit):
        heft.check_device(skeleton, 1000)
    assert "no bfloat16 in hardware" in said(capsys)


@pytest.mark.parametrize(
    "sentence",
    [
        "The NVIDIA driver on your system is too old (found version 12040). Please update your GPU driver",
        "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU",
    ],
)
def test_no_gpu_and_an_old_driver_are_told_apart(seven, monkeypatch, capsys, sentence):
    def init():
        raise RuntimeError(sentence)

    skeleton = seven()
    monkeypatch.setattr(heft, "DEVICE", "cpu")
    monkeypatch.setattr(torch.cuda, "init", init)
    with pytest.raises(SystemExit):
        heft.check_device(skeleton, 1000)
    assert sentence in said(capsys)


def test_memory_is_not_cut_into_pieces():
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
