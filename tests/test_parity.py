"""The script against tests/listing.py: losses, merged update, LoReFT weights and texts, in float32 with
dropout 0 (spec: 1e-5)."""

import shutil

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


@pytest.fixture(scope="module")
def reference(tiny, tmp_path_factory):
    """The listing's run on the tiny model: 45 examples, so that a step of 32 is followed by one of 13."""
    rows, questions = (
        rows_of(tiny / "data", "train"),
        rows_of(tiny / "data", "validation"),
    )
    model, tokenizer = load(tiny / "model")
    before = {name: p.clone() for name, p in model.named_parameters()}
    model, lora_losses = listing.stage_1(model, tokenizer, rows, 2, rate=2e-2, dropout=0.0, max_length=256)
    update = updates(model)
    model = model.merge_and_unload()
    merged = {
        name: p.detach().clone() for name, p in model.named_parameters() if not torch.equal(p, before[name])
    }
    zero = listing.evaluate(model, tokenizer, questions)
    reft, reft_losses = listing.stage_2(model, tokenizer, rows, 2, rate=2e-2, layer=2, max_length=256)
    texts = listing.evaluate(model, tokenizer, questions, reft)
    (intervention,) = reft.interventions.values()
    return dict(
        update=update,
        merged=merged,
        lora=lora_losses,
        reft=reft_losses,
        texts=texts,
        texts_lora_only=zero,
        R=intervention.rotate_layer.weight.detach(),
        W=intervention.learned_source.weight.detach(),
        b=intervention.learned_source.bias.detach(),
    )


@pytest.mark.parametrize("tokens", [2048, 300, 64])  # 64 is less than the longest example
def test_run_equals_the_listing(tiny, tmp_path, reference, tokens):
    flags = tiny_settings(tiny) + [
        "--epochs-lora",
        "2",
        "--epochs-reft",
        "2",
        "--lora-dropout",
        "0",
        "--learning-rate-lora",
        "2e-2",
        "--learning-rate-reft",
        "2e-2",
        "--tokens-per-microbatch",
        str(tokens),
    ]
    result, predictions = run_script(tmp_path, flags)
    assert len(result["loss"]["lora"]) == len(reference["lora"]) == 4
    torch.testing.assert_close(
        torch.tensor(result["loss"]["lora"]), torch.tensor(reference["lora"]), rtol=1e-5, atol=0
    )
    torch.testing.assert_close(
        torch.tensor(result["loss"]["reft"]), torch.tensor(reference["reft"]), rtol=1e-5, atol=0
    )

    (lora_dir,) = [path.parent for path in (tmp_path / "output").glob("*/adapter_config.json")]
    model, _ = load(tiny / "model")
    model = PeftModel.from_pretrained(model, lora_dir)
    update = updates(model)
    assert (
        update.keys() == reference["update"].keys() and len(update) == 8
    )  # q_proj and v_proj of four blocks
    for name in update:
        assert distance(update[name], reference["update"][name]) < 1e-5, name
    merged = dict(model.merge_and_unload().named_parameters())
    assert len(reference["merged"]) == 8
    for name, weight in reference["merged"].items():
        assert distance(merged[name].detach(), weight) < 1e-5, name
    (saved,) = (tmp_path / "output").glob("*/intkey_*.bin")
    state = torch.load(saved)
    for key, name in (("rotate_layer", "R"), ("weight", "W"), ("bias", "b")):
        assert distance(state[key], reference[name]) < 1e-5, name
    assert [row["text"] for row in predictions] == reference["texts"]
    assert reference["texts"] != reference["texts_lora_only"], "the intervention should matter in this test"


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
