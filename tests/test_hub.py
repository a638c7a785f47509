"""The Hub, spoken to over real HTTP on the loopback: what is pushed, what is reused, and how a Hub that fails is borne."""

import json

import pytest
from conftest import make_tiny, read_result, start, tiny_settings
from hub_server import Hub

TOKEN = "hf_RecognisableFakeToken0123456789"
LORA, REFT = "tester/lora-repo", "tester/reft-repo"
FLAGS = ["--epochs-lora", "1", "--epochs-reft", "1", "--push-to-hub", "--hf-repo-lora", "lora-repo", "--hf-repo-refit", "reft-repo"]


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("given"), train=20, validation=6)


@pytest.fixture
def hub():
    hub = Hub()
    hub.tokens.add(TOKEN)
    yield hub
    hub.close()


def run(hub, folder, given, *flags, token=TOKEN, timeout=300):
    """Returns (exit status, output, errors); the token must be in neither, nor in any file."""
    process = start(folder, [flag for flag in tiny_settings(given) if flag != "--no-push-to-hub"] + FLAGS + list(flags), HF_ENDPOINT=hub.url, HF_TOKEN=token, HF_HUB_OFFLINE="0",
                    HF_HUB_DISABLE_XET="1", NO_PROXY="127.0.0.1", no_proxy="127.0.0.1")
    out, err = process.communicate(timeout=timeout)
    assert "Traceback" not in err, err
    assert TOKEN not in out + err
    for path in folder.rglob("*"):
        if path.is_file():
            assert TOKEN.encode() not in path.read_bytes(), path
    for files in hub.files.values():
        assert all(TOKEN.encode() not in data for data in files.values())
    return process.returncode, out, err


@pytest.fixture(scope="module")
def filled(given, tmp_path_factory):
    """A server that a run has pushed to, and that run's folder."""
    hub, folder = Hub(), tmp_path_factory.mktemp("filled")
    hub.tokens.add(TOKEN)
    status, out, err = run(hub, folder, given)
    assert status == 0, out + err
    yield hub, folder
    hub.close()


def test_what_is_pushed(filled):
    hub, folder = filled
    assert set(hub.files) == {LORA, REFT} and hub.private == {LORA: True, REFT: True}
    assert {"model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "heft.json", "README.md"} <= hub.files[LORA].keys()
    assert {"config.json", "heft.json", "README.md"} < hub.files[REFT].keys() and any(name.startswith("intkey_") for name in hub.files[REFT])
    assert not [name for files in hub.files.values() for name in files if "answers" in name or name == "lock" or "checkpoint" in name]
    result, _ = read_result(folder)
    card = hub.files[REFT]["README.md"].decode()
    for expected in ("base_model: model", "LLAMA 2 Community License", "EPOCHS_LORA", "license:", result["accuracy"]):
        assert expected in card, expected
    assert "LLAMA 2 Community" in hub.files[LORA]["README.md"].decode()
    assert not list(folder.glob(".merged-*"))


def test_the_pushed_model_is_base_plus_adapter(filled, given, tmp_path):
    import torch
    from peft import PeftModel
    from conftest import load
    hub, folder = filled
    for name, data in hub.files[LORA].items():
        (tmp_path / name).write_bytes(data)
    pushed, tokenizer = load(tmp_path)
    base, base_tokenizer = load(given / "model")
    merged = PeftModel.from_pretrained(base, next((folder / "output").glob("*/adapter_config.json")).parent).merge_and_unload()
    for (name, a), (_, b) in zip(pushed.named_parameters(), merged.named_parameters()):
        assert torch.equal(a, b), name
    assert tokenizer("<s>does Anna")["input_ids"] == base_tokenizer("<s>does Anna")["input_ids"]


def test_a_second_run_finds_stage_1_on_the_hub(filled, given, tmp_path):
    hub, folder = filled
    status, out, err = run(hub, tmp_path, given)
    assert status == 0 and f"stage 1 is finished in {LORA}" in out, out + err
    assert not list((tmp_path / "output").glob("*/adapter_config.json"))
    first, second = read_result(folder), read_result(tmp_path)
    assert first[1] == second[1] and first[0]["loss"] == second[0]["loss"] and first[0]["accuracy"] == second[0]["accuracy"]


def test_other_settings_refuse_to_reuse_it(filled, given, tmp_path):
    hub, _ = filled
    before = json.dumps({repo: sorted(files) for repo, files in hub.files.items()})
    status, out, err = run(hub, tmp_path, given, "--seed", "7")
    assert status == 2 and LORA in err and "seed 42, not 7" in err and err.count("\n") == 1
    assert json.dumps({repo: sorted(files) for repo, files in hub.files.items()}) == before and not (tmp_path / "output").exists()


def test_names_come_from_the_tokens_owner_and_the_run(hub, given, tmp_path):
    status, out, err = run(hub, tmp_path, given, "--hf-repo-lora", "", "--hf-repo-refit", "")
    assert status == 0, out + err
    stem = "dataset_data-dtype_float32"
    assert set(hub.files) == {f"tester/heft-lora1-base_model_model-{stem}", "tester/heft-lora1-reft1-base_model_model-dataset_data-reft_layer2-dtype_float32"}


@pytest.mark.parametrize("refusal, kind", [(401, "whoami"), (403, "create"), (403, "auth")])
def test_a_token_that_may_not_is_told_before_training(hub, given, tmp_path, refusal, kind):
    hub.refuse[kind] = refusal
    status, out, err = run(hub, tmp_path, given)
    assert status == 2 and err.count("\n") == 1 and "HF_TOKEN" in err and "--no-push-to-hub" in err, err
    assert not (tmp_path / "output").exists()


def test_an_unknown_token_is_told_before_training(hub, given, tmp_path):
    hub.tokens.clear()
    status, _, err = run(hub, tmp_path, given)
    assert status == 2 and err.count("\n") == 1 and "HF_TOKEN" in err


def matrix(refusals, kinds, quick):
    """All pairs; those not in `quick` are slow: huggingface_hub repeats some calls for half a minute."""
    return pytest.mark.parametrize("refusal, kind", [pytest.param(r, k, marks=[] if (r, k) in quick else pytest.mark.slow) for r in refusals for k in kinds])


@matrix([401, 403, 404, 500, "cut"], ["preupload", "batch", "upload", "commit"], quick=[(403, "commit"), (404, "batch"), ("cut", "commit")])
def test_a_failing_upload_costs_nothing(hub, given, tmp_path, refusal, kind):
    """The run finishes, names the repositories and the command; the same command pushes later, without training again."""
    hub.refuse[kind] = refusal
    status, out, err = run(hub, tmp_path, given)
    assert status == 1, out + err
    lines = [line for line in err.splitlines() if line.startswith("heft: error: not pushed")]
    assert len(lines) == 2 and LORA in lines[0] and REFT in lines[1] and all("heft_finetuning.py --base-model" in line for line in lines)
    result, predictions = read_result(tmp_path)
    assert len(predictions) == 6 and "heft.json" not in hub.files[LORA] and "heft.json" not in hub.files[REFT]
    hub.refuse.clear()
    status, out, err = run(hub, tmp_path, given)
    assert status == 0 and "stage 1 is finished in output/" in out and "stage 2 is finished in output/" in out, out + err
    assert "heft.json" in hub.files[LORA] and "heft.json" in hub.files[REFT]
    assert read_result(tmp_path) == (result, predictions)
    status, out, err = run(hub, tmp_path, given)
    assert status == 0 and "already done" in out


@matrix([500, 404, "cut"], ["whoami", "create", "auth", "read"], quick=[(500, "whoami"), ("cut", "create")])
def test_a_hub_that_is_down_at_the_start_does_not_stop_training(hub, given, tmp_path, refusal, kind):
    if (refusal, kind) == (404, "read"):
        pytest.skip("that is how a repository without a finished stage 1 answers")
    hub.refuse[kind] = refusal
    status, out, err = run(hub, tmp_path, given)
    assert status in (0, 1) and ("does not answer now" in out), out + err
    assert len(read_result(tmp_path)[1]) == 6 and list((tmp_path / "output").glob("*/adapter_model.safetensors"))
    if status == 1:
        assert "not pushed" in err


def test_too_many_requests_are_waited_for(hub, given, tmp_path):
    hub.refuse["commit"] = "429"
    status, out, err = run(hub, tmp_path, given)
    assert status in (0, 1), out + err
    if status == 1:  # huggingface_hub does not repeat a commit: it must be told
        assert "not pushed" in err and "429" in err
    status, out, err = run(hub, tmp_path, given)
    assert status == 0 and "heft.json" in hub.files[LORA], out + err


@pytest.mark.slow
def test_a_stalled_hub_is_given_up(hub, given, tmp_path):
    hub.refuse["commit"], hub.stall = "stall", 200
    status, out, err = run(hub, tmp_path, given, timeout=500)
    assert status == 1 and err.count("not pushed") == 2, out + err
    assert len(read_result(tmp_path)[1]) == 6


def test_gated_model_without_access(hub, given, tmp_path):
    hub.files["meta-llama/Llama-2-7b-chat-hf"] = {"config.json": b"{}"}
    hub.refuse["read"] = 403
    status, _, err = run(hub, tmp_path, given, "--base-model", "meta-llama/Llama-2-7b-chat-hf")
    assert status == 2 and "ask for it at https://huggingface.co/meta-llama/Llama-2-7b-chat-hf" in err and err.count("\n") == 1


def test_a_base_model_on_the_hub_is_read_from_there(hub, given, tmp_path):
    hub.files["tester/base"] = {path.name: path.read_bytes() for path in (given / "model").iterdir()}
    status, out, err = run(hub, tmp_path, given, "--base-model", "tester/base", "--no-push-to-hub")
    assert status == 0, out + err
    assert read_result(tmp_path)[0]["settings"]["BASE_VERSION"] == "0" * 40


def test_no_token_is_needed_without_the_hub(given, tmp_path):
    process = start(tmp_path, tiny_settings(given) + ["--epochs-lora", "0", "--epochs-reft", "0"], HF_ENDPOINT="http://127.0.0.1:9", HF_TOKEN=TOKEN)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and TOKEN not in out + err
