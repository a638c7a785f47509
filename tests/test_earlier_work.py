"""Earlier work is reused if the same settings, data and weights made it, else refused in one line."""

import gc
import hashlib
import json
import os
import shutil
import signal

import pytest
import torch
from conftest import ROOT, make_tiny, tiny_settings
from inside import refused, result_of, run_inside

import heft_finetuning as heft

SHORT = "--epochs-lora 1 --epochs-reft 1"
ADAPTER_FILES = "adapter_model.safetensors", "adapter_config.json"
INTERVENTION = "intkey_layer_2_comp_block_output_unit_pos_nunit_1#0.bin"
STAGE_1, STAGE_2 = "output/lora1-model-*", "output/lora1-reft1-*"


def run(work, given, flags=SHORT):
    gc.collect()  # closes the locks of an earlier run, as the end of its process would
    return run_inside(work, [*map(str, tiny_settings(given)), *flags.split()])


def take_away(folder, *patterns):
    for pattern in patterns:
        for path in list(folder.glob(pattern)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.fixture(scope="module")
def one_run(tiny, tmp_path_factory):
    """The folder of a finished run of both stages, one epoch each."""
    folder = tmp_path_factory.mktemp("one")
    assert run(folder, tiny).status == 0
    return folder


@pytest.fixture
def finished(one_run, tmp_path):
    """A private copy of it."""
    return shutil.copytree(one_run, tmp_path / "finished")


def test_records_say_what_made_them(finished):
    lora, reft = (
        json.loads(next(finished.glob(f"{stage}/heft.json")).read_text()) for stage in (STAGE_1, STAGE_2)
    )
    result, _ = result_of(finished)
    for stage, record, names in (
        (STAGE_1, lora, ADAPTER_FILES),
        (STAGE_2, reft, {"config.json", INTERVENTION}),
    ):
        (folder,) = finished.glob(stage)
        hashes = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest()[:16] for name in names}
        assert record["files"] == hashes
        own = {path.name for path in folder.iterdir() if path.is_file()} - {"heft.json", "lock"}
        assert own == set(names)
    weights = lora["files"]["adapter_model.safetensors"], reft["files"][INTERVENTION]
    assert (lora["below"], reft["below"]) == (None, weights[0])
    assert result["weights"] == {"lora": weights[0], "reft": weights[1]}
    code = {"CODE_OF_STAGES", "BASE_MODEL_FILES", "TRAIN_DATA"}
    assert code | {"EPOCHS_LORA", "LORA_RANK", "SEED", "TAG"} < lora["made_with"].keys()
    assert not {"EPOCHS_REFT", "REFT_RANK", "CODE_OF_EVALUATION", "MAX_NEW_TOKENS"} & lora["made_with"].keys()
    assert lora["made_with"].items() < reft["made_with"].items() < result["made_with"].items()
    assert result["made_with"].keys() - reft["made_with"].keys() == {
        "CODE_OF_EVALUATION",
        "VALIDATION_DATA",
        "MAX_NEW_TOKENS",
        "MAX_EVAL_SAMPLES",
    }
    for content in (lora, reft, result):
        script = (ROOT / "heft_finetuning.py").read_bytes()
        assert content["script_sha256"] == hashlib.sha256(script).hexdigest() and "commit" in content
    for part, record in (("lora", lora), ("reft", reft)):
        for key in "device versions tokens_per_microbatch seconds peak_memory_gb loss".split():
            assert record[key] == result[key][part], key
    for name in (*ADAPTER_FILES, "heft.json"):
        below, own = (next(finished.glob(f"{folder}/{name}")) for folder in (f"{STAGE_2}/adapter", STAGE_1))
        assert below.read_bytes() == own.read_bytes()


@pytest.mark.parametrize("lost", ["", "output/*", STAGE_1, STAGE_2, f"{STAGE_2}/adapter"])
def test_a_finished_result_is_finished(finished, tiny, lost):
    """Whatever became of its stages: nothing is done, nothing is written."""
    take_away(finished, lost) if lost else None
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    shown = run(finished, tiny)
    assert shown.status == 0 and "already done" in shown.out and "move it away to evaluate again" in shown.out
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def another_stage_1(finished, tiny):
    """As when another job trained stage 1 on another machine: the same settings, other last bits."""
    (record,) = finished.glob(f"{STAGE_1}/heft.json")
    weights = record.with_name("adapter_model.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    written = json.loads(record.read_text())
    written["files"][weights.name] = heft.digest(weights)
    record.write_text(json.dumps(written))


@pytest.mark.parametrize("become", ["unchanged", "lost", "another"])
def test_a_result_that_was_moved_away_is_made_again(finished, tiny, become):
    """By evaluation alone, with the stage 1 in stage 2's folder, whatever became of the other one."""
    result, predictions = result_of(finished)
    take_away(finished, "results/*")
    if become == "lost":
        take_away(finished, STAGE_1)
    if become == "another":
        another_stage_1(finished, tiny)
    shown = run(finished, tiny)
    assert shown.status == 0 and "stage 2, LoReFT is finished" in shown.out, shown
    assert "trainable parameters" not in shown.out and "/adapter" in shown.out
    again, same = result_of(finished)
    assert same == predictions
    assert all(again[key] == result[key] for key in ("loss", "settings", "made_with", "weights"))


@pytest.mark.parametrize("become", ["lost", "another"])
def test_an_intervention_is_not_paired_with_another_stage_1(finished, tiny, become):
    """Without its own: refused at once, before stage 1 is trained."""
    take_away(finished, "results/*", f"{STAGE_2}/adapter")
    take_away(finished, STAGE_1) if become == "lost" else another_stage_1(finished, tiny)
    shown = run(finished, tiny)
    refused(shown, "output/lora1-reft1-", "another stage 1", "move it away")
    assert "trainable parameters" not in shown.out
    take_away(finished, STAGE_2)
    assert run(finished, tiny).status == 0


def test_starting_weights_depend_on_the_seed_alone(finished, tiny):
    """Stage 2's losses are the same whether stage 1 was trained in this process or found finished."""
    result, _ = result_of(finished)
    take_away(finished, STAGE_2, "results/*")
    shown = run(finished, tiny)
    assert shown.status == 0 and "stage 1, LoRA is finished" in shown.out, shown
    assert result_of(finished)[0]["loss"] == result["loss"]


def test_content_counts_and_not_spelling(finished, tiny, tmp_path):
    """A slash more, and a copy elsewhere, are the same model and data; another model of the name is not."""
    take_away(finished, "results/*")
    shown = run(finished, tiny, f"{SHORT} --base-model {tiny}/model/ --dataset {tiny}/data/")
    assert shown.status == 0 and "stage 2, LoReFT is finished" in shown.out, shown
    shown = run(finished, shutil.copytree(tiny, tmp_path / "copy"))
    assert shown.status == 0 and "already done" in shown.out, shown
    refused(run(finished, make_tiny(tmp_path / "other", seed=1)), "base_model_files")


def test_a_checkpoint_keeps_its_microbatches(tiny, tmp_path, one_run):
    """With others, dropout would draw other masks: refused, until the command has the first value again."""
    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def clip_and_stop(*arguments):
        calls.append(os.kill(os.getpid(), signal.SIGTERM))
        return clip(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", clip_and_stop)
        shown = run(tmp_path, tiny)
    assert shown.status == 85 and len(calls) == 1 and "stopped by SIGTERM after step 1;" in shown.out, shown
    assert list(tmp_path.glob(f"{STAGE_1}/checkpoint.pt"))
    refused(
        run(tmp_path, tiny, f"{SHORT} --tokens-per-microbatch 512"), "tokens_per_microbatch 2048, not 512"
    )
    shown = run(tmp_path, tiny)
    assert shown.status == 0 and "after step 1" in shown.out, shown
    assert result_of(tmp_path)[0]["loss"] == result_of(one_run)[0]["loss"]
    # A finished stage is used with any: it says itself how it was made.
    take_away(tmp_path, STAGE_2, "results/*")
    assert run(tmp_path, tiny, f"{SHORT} --tokens-per-microbatch 512").status == 0
    assert result_of(tmp_path)[0]["tokens_per_microbatch"] == {"lora": 2048, "reft": 512, "evaluation": 512}
