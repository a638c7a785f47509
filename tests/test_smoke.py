"""The smoke run is the real script, and it learns: the only proof here that training does anything.

What each assertion is for was tried by breaking the script on purpose (`test_breaking_it_is_seen`, slow).
"""

import json
import shutil
import subprocess
import sys

import make
import pytest
from conftest import ROOT, start

import heft_finetuning as heft

# Fewer epochs and larger steps. (That HEFT is at least as good as LoRA-only is shown by five full seeds,
# in results/smoke.)
REDUCED = "--smoke --learning-rate-lora 2e-3"


def smoke(folder, script, lora, reft):
    """The result of a reduced smoke run with so many epochs of the two stages."""
    flags = f"{REDUCED} --epochs-lora {lora} --epochs-reft {reft}".split()
    process = start(folder, flags, script=script, OMP_NUM_THREADS="2")
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, out + err
    (file,) = (folder / "results/smoke").glob(f"lora{lora}-reft{reft}*.json")
    return json.loads(file.read_text())


def check(folder, script=ROOT / "heft_finetuning.py"):
    """Zero-shot, LoRA-only and HEFT, as the real script gives them, must stand apart."""

    def score(result):
        return 100 * result["correct_predictions"] / result["num_validation_samples"]

    zero = smoke(folder, script, lora=0, reft=0)
    lora = smoke(folder, script, lora=2, reft=0)
    both = smoke(folder, script, lora=2, reft=1)
    reft = smoke(folder, script, lora=0, reft=1)
    assert score(zero) < 65, "the base model should not know the answers"
    assert score(lora) > score(zero) + 10, "stage 1 teaches nothing, or the adapter is not merged"
    assert score(reft) > score(zero) + 20, (
        "stage 2 teaches nothing, or the intervention is not applied at evaluation"
    )
    assert score(both) > score(zero) + 30, "both stages together should be far above zero-shot"
    assert zero["unknown_answers"] == 0 and both["unknown_answers"] == 0
    # The first loss of stage 1 is the base model's over whole texts, that of stage 2 the trained model's
    # on answers:
    # swapped, stage 1 would not begin as it does without a stage 2.
    assert (
        both["loss"]["lora"] == lora["loss"]["lora"] and both["loss"]["reft"][0] != reft["loss"]["reft"][0]
    ), "stage 2 does not build on stage 1"
    return {"zero": score(zero), "lora": score(lora), "reft": score(reft), "both": score(both)}


def test_training_beats_zero_shot(tmp_path):
    print(check(tmp_path))
    assert (tmp_path / "output/smoke").is_dir(), "a smoke run keeps to folders of its own"


BREAKS = {
    "training does nothing": (
        "        microbatch_loss.backward()\n",
        "        (microbatch_loss * 0).backward()\n",
    ),
    "intervention not applied": ("        if reft_model:\n", "        if False:\n"),
    "adapter not merged": ("        model = model.merge_and_unload()", "        model = model.unload()"),
    "stage 2 on the base model": (
        "    reft_model = stage_2_loreft(model,",
        "    reft_model = stage_2_loreft(load_base_model(base),",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", BREAKS)
def test_breaking_it_is_seen(tmp_path, what):
    """The check above fails when the script is broken in any of the ways that it is there to see."""
    right, wrong = BREAKS[what]
    text = (ROOT / "heft_finetuning.py").read_text()
    assert text.count(right) == 1
    (tmp_path / "heft").mkdir()
    (tmp_path / "heft/heft_finetuning.py").write_text(text.replace(right, wrong))
    shutil.copytree(ROOT / "smoke", tmp_path / "heft/smoke")
    with pytest.raises(AssertionError, match="teaches nothing|far above zero-shot|does not build"):
        check(tmp_path / "work", tmp_path / "heft/heft_finetuning.py")


def test_no_validation_passage_is_in_training():
    rows = {
        split: [json.loads(line) for line in (ROOT / f"smoke/data/{split}.jsonl").read_text().splitlines()]
        for split in ("train", "validation")
    }
    assert (len(rows["train"]), len(rows["validation"])) == (1000, 500)
    assert not {row["passage"] for row in rows["train"]} & {row["passage"] for row in rows["validation"]}
    assert all(set(row) == {"question", "passage", "answer"} for part in rows.values() for row in part)
    assert 0.5 < sum(row["answer"] for row in rows["validation"]) / 500 < 0.7


def test_every_answer_follows_from_its_passage():
    for line in (ROOT / "smoke/data/validation.jsonl").read_text().splitlines():
        row = json.loads(line)
        _, name, *asked = row["question"].split()
        verb, value = " ".join(asked[:-1]), asked[-1]
        says = f"{make.RELATIONS[verb][0]} {value}."
        assert (f"{name} {says}" in row["passage"], f"{name} never {says}" in row["passage"]) == (
            row["answer"],
            not row["answer"],
        )


def test_the_model_is_small_and_has_a_layer_15_that_is_not_the_last():
    assert (ROOT / "smoke/model/model.safetensors").stat().st_size < 3e6 and (
        ROOT / "smoke/model/tokenizer.json"
    ).exists()
    config = json.loads((ROOT / "smoke/model/config.json").read_text())
    assert config["num_hidden_layers"] == 18 > heft.REFT_LAYER + 1


@pytest.mark.slow
def test_make_gives_the_same_bytes_twice(tmp_path):
    """And the bytes of the repository, on a machine like the one that made them; elsewhere the weights'
    last bits may differ."""
    for name in ("one", "two"):
        subprocess.run(
            [sys.executable, ROOT / "smoke/make.py", tmp_path / name], check=True, capture_output=True
        )
    for file in (
        "data/train.jsonl",
        "data/validation.jsonl",
        "model/tokenizer.json",
        "model/config.json",
        "model/model.safetensors",
    ):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file
    for file in ("data/train.jsonl", "data/validation.jsonl", "model/tokenizer.json"):
        assert (tmp_path / "one" / file).read_bytes() == (ROOT / "smoke" / file).read_bytes(), file
