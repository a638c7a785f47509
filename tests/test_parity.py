"""The script against tests/listing.py: losses, merged update, LoReFT weights and texts, in float32 with
dropout 0 (spec: 1e-5)."""

import os
import shutil
from pathlib import Path

import benchmark
import listing
import pytest
import torch
from conftest import load, rows_of, run_script, tiny_settings
from peft import PeftModel

import heft_finetuning as heft


def distance(a, b):
    """Relative difference of two tensors, in the Frobenius norm."""
    return ((a - b).norm() / b.norm()).item()


def updates(peft_model):
    """What each LoRA adapter adds to its weight: B A alpha / r, (out, in)."""
    return {
        name: module.get_delta_weight("default").detach()
        for name, module in peft_model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def procedure(folder, data, epochs, rate, layer, max_length, examples=None, questions=None):
    """The paper's procedure on the model in `folder`: losses, weights and texts."""
    rows, questions = rows_of(data, "train")[:examples], rows_of(data, "validation")[:questions]
    model, tokenizer = load(folder)
    before = {name: p.clone() for name, p in model.named_parameters()}
    model, lora = listing.stage_1(
        model, tokenizer, rows, epochs, rate=rate, dropout=0.0, max_length=max_length
    )
    update = updates(model)
    model = model.merge_and_unload()
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    merged = {name: p for name, p in parameters.items() if not torch.equal(p, before[name])}
    zero = listing.evaluate(model, tokenizer, questions)
    reft, losses = listing.stage_2(
        model, tokenizer, rows, epochs, rate=rate, layer=layer, max_length=max_length
    )
    texts = listing.evaluate(model, tokenizer, questions, reft)
    (intervention,) = reft.interventions.values()
    linear = intervention.learned_source
    weights = {"rotate_layer": intervention.rotate_layer.weight, "weight": linear.weight, "bias": linear.bias}
    found = dict(update=update, merged=merged, lora=lora, reft=losses, texts=texts, texts_lora_only=zero)
    return found | {"weights": {key: value.detach() for key, value in weights.items()}}


def check(place, folder, reference, flags):
    """Run the script with `flags` in `place`: its losses, weights and texts must be the procedure's."""
    result, predictions = run_script(place, flags)
    for stage in ("lora", "reft"):
        losses, expected = torch.tensor(result["loss"][stage]), torch.tensor(reference[stage])
        torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0)
    (lora_dir,) = [path.parent for path in (place / "output").glob("*/adapter_config.json")]
    model = PeftModel.from_pretrained(load(folder)[0], lora_dir)
    update = updates(model)
    blocks = model.config.num_hidden_layers
    assert update.keys() == reference["update"].keys() and len(update) == 2 * blocks  # q_proj and v_proj
    for name in update:
        assert distance(update[name], reference["update"][name]) < 1e-5, name
    merged = dict(model.merge_and_unload().named_parameters())
    assert len(reference["merged"]) == 2 * blocks
    for name, weight in reference["merged"].items():
        assert distance(merged[name].detach(), weight) < 1e-5, name
    (saved,) = (place / "output").glob("*/intkey_*.bin")
    state = torch.load(saved)
    for key, weight in reference["weights"].items():
        assert distance(state[key], weight) < 1e-5, key
    assert [row["text"] for row in predictions] == reference["texts"]
    assert reference["texts"] != reference["texts_lora_only"], "the intervention should matter in this test"


@pytest.fixture(scope="module")
def reference(tiny):
    """The paper's procedure on the tiny model: 45 examples, so that a step of 32 is followed by one of 13."""
    return procedure(tiny / "model", tiny / "data", 2, rate=2e-2, layer=2, max_length=256)


@pytest.mark.parametrize("tokens", [2048, 300, 64])  # 64 is less than the longest example
def test_run_equals_the_listing(tiny, tmp_path, reference, tokens):
    flags = (
        "--epochs-lora 2 --epochs-reft 2 --lora-dropout 0 --learning-rate-lora 2e-2 --learning-rate-reft 2e-2"
    )
    flags = tiny_settings(tiny) + flags.split() + ["--tokens-per-microbatch", str(tokens)]
    assert len(reference["lora"]) == 4
    check(tmp_path, tiny / "model", reference, flags)


@pytest.mark.slow
@pytest.mark.skipif("HEFT_PARITY" not in os.environ, reason="HEFT_PARITY=MODEL_FOLDER:DATA_FOLDER names none")
def test_another_model_equals_the_listing(tmp_path):
    """On a pre-trained model, such as SmolLM2-135M-Instruct, 64 examples and 16 questions of its data."""
    model, data = map(Path, os.environ["HEFT_PARITY"].split(":"))
    reference = procedure(model, data, 1, rate=1e-3, layer=15, max_length=128, examples=64, questions=16)
    assert len(reference["lora"]) == 2
    flags = (
        "--no-push-to-hub --dtype float32 --epochs-lora 1 --epochs-reft 1 --lora-dropout 0 --max-length 128"
    )
    flags += (
        " --learning-rate-lora 1e-3 --learning-rate-reft 1e-3 --max-train-samples 64 --max-eval-samples 16"
    )
    check(tmp_path, model, reference, ["--base-model", model, "--dataset", data, *flags.split()])


def test_first_bfloat16_losses_are_near(tiny, tmp_path):
    """bfloat16, the paper's precision, runs and stays near float32: rounding, not another procedure."""
    flags = [flag for flag in tiny_settings(tiny) if flag not in ("--dtype", "float32")] + [
        "--epochs-lora",
        "1",
        "--epochs-reft",
        "1",
    ]
    half, _ = run_script(tmp_path / "half", flags)
    full, _ = run_script(tmp_path / "full", flags + ["--dtype", "float32"])
    for stage in ("lora", "reft"):
        torch.testing.assert_close(
            torch.tensor(half["loss"][stage]), torch.tensor(full["loss"][stage]), rtol=2e-2, atol=0
        )


def test_what_the_tokens_are(tiny):
    """Two BOS; " Yes" in stage 1 and "Yes" in stage 2; and each prompt's tokens do not depend on what
    follows."""
    _, tokenizer = load(tiny / "model")
    rows = rows_of(tiny / "data", "train")
    endings = {
        text: heft.tokens_after_prompt(tokenizer, text + "</s>") for text in (" Yes", " No", "Yes", "No")
    }
    assert tokenizer.convert_ids_to_tokens(endings[" Yes"]) == ["▁Yes", "</s>"]
    assert tokenizer.convert_ids_to_tokens(endings["No"]) == ["No", "</s>"]
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        assert (
            tokenizer.convert_ids_to_tokens(prompt[:3])[:2] == ["<s>", "<s>"]
            and prompt[2] != tokenizer.bos_token_id
        )
        for answer, ending in endings.items():
            assert tokenizer(row["prompt"] + answer + "</s>")["input_ids"] == prompt + ending


def test_memory_grows_with_the_microbatch_and_not_with_the_data(tmp_path):
    def peak(copies, tokens):
        place = tmp_path / f"{copies}-{tokens}"
        shutil.copytree(tmp_path / "data", place / "data")
        (place / "data/train.jsonl").write_text(
            (tmp_path / "data/train.jsonl").read_text() * copies
        )  # copies: the longest example stays the same
        flags = [
            "--base-model",
            str(tmp_path / "model"),
            "--dataset",
            str(place / "data"),
            "--no-push-to-hub",
            "--dtype",
            "float32",
            "--epochs-lora",
            "1",
            "--epochs-reft",
            "1",
            "--reft-layer",
            "1",
            "--tokens-per-microbatch",
            str(tokens),
        ]
        return run_script(place, flags)[0]["peak_memory_gb"]

    benchmark.make_model(
        tmp_path / "model", None, 2, 64, "float32"
    )  # 32,000 words: the logits are what takes memory
    benchmark.make_data(tmp_path / "data", None, 32, 8, load(tmp_path / "model")[1])
    small, wide, long = peak(1, 512), peak(1, 2048), peak(3, 512)
    assert wide > small + 0.3 and long < small + 0.1, (small, wide, long)
