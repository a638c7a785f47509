"""What a user sees of heft_finetuning.py: settings, names, messages, files, stages."""

import json
import math
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, load, run_script, start, tiny_settings

import heft_finetuning as heft

SCRIPT = ROOT / "heft_finetuning.py"


# --- settings


def test_prompt_is_the_papers():
    text = heft.BOOLQ_PROMPT_TMPL % ("P", "Q")
    assert text == ('<s>[INST] <<SYS>>\nYou are a helpful assistant that answers questions with only "Yes" or\n"No" based on the provided passage.\n'
                    "<</SYS>>\nPassage: P\nQuestion: Q\nAnswer: [/INST]")
    assert heft.format_boolq({"passage": "100 %s", "question": "q", "answer": True}) == {"prompt": heft.BOOLQ_PROMPT_TMPL % ("100 %s", "q"), "answer": "Yes"}


def test_defaults_are_the_papers():
    settings = heft.read_settings([])
    assert {name: settings[name] for name in heft.PAPER_VALUES} == heft.PAPER_VALUES
    assert (settings["EPOCHS_LORA"], settings["EPOCHS_REFT"], settings["TOKENS_PER_MICROBATCH"]) == (3, 3, 2048)
    assert heft.run_name(settings) == "lora3-reft3" and heft.run_name(settings, stage_1_only=True) == "lora3"


def test_every_setting_is_a_flag_with_its_meaning(capsys):
    with pytest.raises(SystemExit) as end:
        heft.read_settings(["--help"])
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name in heft.SETTINGS:
        flag = "--" + name.lower().replace("_", "-")
        assert flag in text, flag
    for meaning in ("passes over the data in stage 1", "memory knob", "the block, counted from 0", "Hub name or folder", "0 to below 1"):
        assert meaning in text, meaning


@pytest.mark.parametrize("flags, name, stage_1", [
    (["--epochs-lora", "20", "--epochs-reft", "0"], "lora20-reft0", "lora20"),
    (["--reft-layer", "10", "--seed", "7"], "lora3-reft3-reft_layer10-seed7", "lora3-seed7"),
    (["--base-model", "x/tiny llama", "--lora-targets", "all-linear"], "lora3-reft3-base_model_tiny_llama-lora_targets_all_linear", "lora3-base_model_tiny_llama-lora_targets_all_linear"),
    (["--epochs-lora", "0", "--lora-rank", "4"], "lora0-reft3", "lora0"),
    (["--epochs-reft", "0", "--reft-rank", "8"], "lora3-reft0", "lora3"),
    (["--tokens-per-microbatch", "64", "--output-dir", "o", "--no-push-to-hub", "--hf-user", "me"], "lora3-reft3", "lora3"),
    (["--learning-rate-lora", "1e-3"], "lora3-reft3-learning_rate_lora0.001", "lora3-learning_rate_lora0.001"),
    (["--smoke"], "lora3-reft3", "lora3"),
    (["--smoke", "--dtype", "bfloat16"], "lora3-reft3-dtype_bfloat16", "lora3-dtype_bfloat16"),
])
def test_name_says_what_differs_from_the_paper(flags, name, stage_1):
    settings = heft.read_settings(flags)
    assert heft.run_name(settings) == name
    assert heft.run_name(settings, stage_1_only=True) == stage_1


def test_every_setting_that_changes_the_experiment_changes_the_name():
    different = dict(BASE_MODEL="x", DATASET="x", LORA_RANK=4, LORA_ALPHA=4, LORA_DROPOUT=0.5, LORA_TARGETS="x", LEARNING_RATE_LORA=1.0, REFT_LAYER=1, REFT_RANK=1,
                     LEARNING_RATE_REFT=1.0, EXAMPLES_PER_STEP=4, MAX_LENGTH=9, MAX_NEW_TOKENS=9, DTYPE="float32", SEED=1)
    assert different.keys() == heft.PAPER_VALUES.keys()
    usual = heft.read_settings([])
    names = {heft.run_name(usual | {key: value}) for key, value in different.items()}
    assert len(names) == len(different) and heft.run_name(usual) not in names


def test_editing_a_constant_equals_its_flag(tmp_path):
    edited = SCRIPT.read_text().replace("EPOCHS_LORA = 3 ", "EPOCHS_LORA = 20 ").replace('LORA_TARGETS = ""', 'LORA_TARGETS = "all-linear"')
    (tmp_path / "edited.py").write_text(edited)
    code = "import json, {0} as h; s = h.read_settings({1}); print(json.dumps([s, h.run_name(s), h.made_by(s)]))"
    by_edit = subprocess.run([sys.executable, "-c", code.format("edited", "[]")], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    by_flag = subprocess.run([sys.executable, "-c", code.format("heft_finetuning", "['--epochs-lora', '20', '--lora-targets', 'all-linear']")],
                             cwd=ROOT, capture_output=True, text=True, check=True).stdout
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
    texts = [tokenizer(text)["input_ids"] for text in ("Anna never keeps cats.", "does Anna", "Yes No Yes No Yes")]
    rows = heft.collate([{"input_ids": text, "labels": [heft.IGNORE, heft.IGNORE] + text[2:]} for text in texts])
    assert len(rows) == 1
    losses = heft.example_losses(model(input_ids=rows[0]["input_ids"]).logits, rows[0]["labels"])
    for loss, text in zip(losses, sorted(texts, key=len)):
        ids = torch.tensor([text])
        torch.testing.assert_close(loss, model(input_ids=ids, labels=torch.cat([torch.full((1, 2), -100), ids[:, 2:]], 1)).loss)


def test_wilson_is_statsmodels():
    from statsmodels.stats.proportion import proportion_confint
    for correct, n in ((0, 10), (10, 10), (2785, 3270), (1, 2), (150, 302)):
        assert heft.wilson(correct, n) == pytest.approx([100 * x for x in proportion_confint(correct, n, method="wilson")])


@pytest.mark.parametrize("text, answer", [("Yes", "Yes"), ("No, Yes", "Yes"), ("No.", "No"), ("yes", "Unknown"), ("", "Unknown"), ("Nope", "No"), ("NoYes", "Yes")])
def test_prediction_is_the_papers_rule(text, answer):
    assert heft.predict(text) == answer


# --- runs


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """Results of the four kinds of run, all in one folder so that two share stage 1: {(lora, reft): (result, predictions)}."""
    folder, found = tmp_path_factory.mktemp("runs"), {}
    for lora, reft in ((1, 1), (1, 0), (0, 1), (0, 0)):
        process = start(folder, tiny_settings(tiny) + ["--epochs-lora", lora, "--epochs-reft", reft])
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, out + err
        found[lora, reft] = out
    return folder, found


def result_of(folder, lora, reft):
    (file,) = (folder / "results").glob(f"lora{lora}-reft{reft}*.json")
    return json.loads(file.read_text()), [json.loads(line) for line in file.with_suffix(".predictions.jsonl").read_text().splitlines()]


def test_result_file_has_all_that_is_needed_to_understand_it(runs, tiny):
    result, predictions = result_of(runs[0], 1, 1)
    assert list(result)[:5] == ["lora_epochs", "reft_epochs", "num_validation_samples", "correct_predictions", "accuracy"]
    assert (result["lora_epochs"], result["reft_epochs"], result["num_validation_samples"]) == (1, 1, 20)
    correct = sum(row["prediction"] == row["answer"] for row in predictions)
    assert result["correct_predictions"] == correct and result["accuracy"] == f"{100 * correct / 20:.2f}%"
    assert result["unknown_answers"] == sum(row["prediction"] == "Unknown" for row in predictions)
    assert result["confidence_interval_95"] == pytest.approx(heft.wilson(correct, 20))
    assert set(heft.SETTINGS) <= result["settings"].keys()
    assert len(result["loss"]["lora"]) == len(result["loss"]["reft"]) == 2 and all(map(math.isfinite, result["loss"]["lora"] + result["loss"]["reft"]))
    assert result["seconds"]["total"] == pytest.approx(sum(value for stage, value in result["seconds"].items() if stage != "total"))
    assert result["peak_memory_gb"] > 0.1 and result["versions"]["torch"] == torch.__version__ and result["device"].startswith("CPU")
    questions = [json.loads(line)["question"] for line in (tiny / "data/validation.jsonl").read_text().splitlines()]
    assert [row["question"] for row in predictions] == questions


def test_last_screen_says_what_was_done(runs):
    for expected in ("LoRA 1 epochs + LoReFT 1 epochs", "95 % interval", "seconds", "of 20 correct", "results/lora1-reft1", "output/lora1-"):
        assert expected in runs[1][1, 1], expected
    assert "the base model, untrained" in runs[1][0, 0]
    assert "stage 1 is finished in output/lora1-" in runs[1][1, 0]  # shared with the run before


def test_a_stage_with_no_epochs_is_absent(runs, tiny):
    """Answers of (0, 0) are the base model's, of (1, 0) those of base + adapter, without an intervention."""
    import listing
    from peft import PeftModel
    questions = heft.load_boolq(str(tiny / "data"), "validation")
    model, tokenizer = load(tiny / "model")
    result, predictions = result_of(runs[0], 0, 0)
    assert result["loss"] == {"lora": [], "reft": []} and result["seconds"]["lora"] == result["seconds"]["reft"] == 0
    assert [row["text"] for row in predictions] == listing.evaluate(model, tokenizer, questions)
    (lora_dir,) = [path.parent for path in (runs[0] / "output").glob("*/adapter_config.json")]
    merged = PeftModel.from_pretrained(model, lora_dir).merge_and_unload()
    result, predictions = result_of(runs[0], 1, 0)
    assert result["loss"]["reft"] == [] and [row["text"] for row in predictions] == listing.evaluate(merged, tokenizer, questions)
    assert not list((runs[0] / "output").glob("lora1-reft0*/intkey*")) and not list((runs[0] / "output").glob("lora0-reft1*/adapter*"))


def test_the_saved_intervention_is_what_reftmodel_reads(runs, tiny):
    import pyreft
    model, _ = load(tiny / "model")
    (folder,) = (runs[0] / "output").glob("lora0-reft1*")
    (intervention,) = pyreft.ReftModel.load(str(folder), model).interventions.values()
    state = torch.load(next(folder.glob("intkey_*.bin")))
    assert torch.equal(intervention.rotate_layer.weight, state["rotate_layer"]) and state["weight"].dtype == torch.float32


def test_output_is_small_and_holds_no_model(runs):
    sizes = {path.name: path.stat().st_size for path in (runs[0] / "output").rglob("*") if path.is_file()}
    assert not [name for name in sizes if name == "model.safetensors"] and sum(sizes.values()) < 1e6
    assert not list((runs[0] / "output").rglob("checkpoint-*")), "checkpoints of finished stages are not needed"
    assert not list(runs[0].glob(".merged-*"))


def test_the_same_command_gives_the_same_result_and_another_seed_another(runs, tiny, tmp_path):
    def without_times(result):
        return {key: value for key, value in result.items() if key not in ("seconds", "peak_memory_gb", "commit")}
    again, predictions = run_script(tmp_path / "again", tiny_settings(tiny) + ["--epochs-lora", "1", "--epochs-reft", "1"])
    first, first_predictions = result_of(runs[0], 1, 1)
    assert without_times(again) == without_times(first) and predictions == first_predictions
    other, _ = run_script(tmp_path / "other", tiny_settings(tiny) + ["--epochs-lora", "1", "--epochs-reft", "1", "--seed", "7"])
    assert other["loss"] != first["loss"]
    assert list((tmp_path / "other/results").glob("*-seed7.json"))


def test_starting_weights_depend_on_the_seed_alone(runs, tiny):
    """The first stage-2 loss after a trained stage 1 in one go equals that of a run that found stage 1 finished."""
    folder = runs[0]
    result, _ = result_of(folder, 1, 1)
    for path in list((folder / "output").glob("lora1-reft1*")) + list((folder / "results").glob("lora1-reft1*")):
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
