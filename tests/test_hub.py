"""The Hub, spoken to over real HTTP on the loopback: what is pushed, what is reused, and how a Hub that
fails is borne."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import make_tiny, read_result, start, tiny_settings
from hub_server import Hub
from transformers import AutoModelForCausalLM, AutoTokenizer

import heft_finetuning as heft

TOKEN = "hf_RecognisableFakeToken0123456789"
LORA, REFT = "tester/lora-repo", "tester/reft-repo"
FLAGS = [
    "--epochs-lora",
    "1",
    "--epochs-reft",
    "1",
    "--push-to-hub",
    "--hf-repo-lora",
    "lora-repo",
    "--hf-repo-refit",
    "reft-repo",
]


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("given"), train=20, validation=6)


@pytest.fixture
def hub():
    hub = Hub()
    hub.tokens.add(TOKEN)
    yield hub
    hub.close()


def hub_environment(hub, token=TOKEN):
    """What makes huggingface_hub speak to the tests' server."""
    local = {"HF_ENDPOINT": hub.url, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    return local | {"HF_TOKEN": token, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}


def run(hub, folder, given, *flags, token=TOKEN, timeout=300):
    """Returns (exit status, output, errors); the token must be in neither, nor in any file."""
    process = start(
        folder,
        [flag for flag in tiny_settings(given) if flag != "--no-push-to-hub"] + FLAGS + list(flags),
        **hub_environment(hub, token),
    )
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


def download(hub, repo, folder):
    for name, data in hub.files[repo].items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def test_what_is_pushed(filled):
    hub, folder = filled
    assert set(hub.files) == {LORA, REFT} and hub.private == {LORA: True, REFT: True}
    assert {
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "heft.json",
        "README.md",
        "adapter/adapter_model.safetensors",
        "adapter/adapter_config.json",
    } <= hub.files[LORA].keys()
    assert {"config.json", "heft.json", "README.md"} < hub.files[REFT].keys() and any(
        name.startswith("intkey_") for name in hub.files[REFT]
    )
    assert not [
        name
        for files in hub.files.values()
        for name in files
        if "answers" in name or name == "lock" or "checkpoint" in name
    ]
    result, _ = read_result(folder)
    card = hub.files[REFT]["README.md"].decode()
    for expected in (
        "base_model: model",
        "LLAMA 2 Community License",
        "EPOCHS_LORA",
        "license:",
        result["accuracy"],
    ):
        assert expected in card, expected
    assert "LLAMA 2 Community" in hub.files[LORA]["README.md"].decode()
    assert not list(folder.glob(".merged-*"))


def test_the_pushed_model_is_base_plus_adapter(filled, given, tmp_path):
    import torch
    from conftest import load
    from peft import PeftModel

    hub, folder = filled
    download(hub, LORA, tmp_path)
    pushed, tokenizer = load(tmp_path)
    base, base_tokenizer = load(given / "model")
    merged = PeftModel.from_pretrained(
        base, next((folder / "output").glob("*/adapter_config.json")).parent
    ).merge_and_unload()
    for (name, a), (_, b) in zip(pushed.named_parameters(), merged.named_parameters()):
        assert torch.equal(a, b), name
    assert tokenizer("<s>does Anna")["input_ids"] == base_tokenizer("<s>does Anna")["input_ids"]


def test_the_pushed_model_keeps_the_base_models_files(filled, given):
    """Tokenizer files as they are, and a configuration that generates with a cache, as the base model's."""
    hub, _ = filled
    names = [path.name for path in (given / "model").glob("token*")]
    assert len(names) >= 2
    for name in names:
        assert hub.files[LORA][name] == (given / "model" / name).read_bytes(), name
    for name in ("config.json", "generation_config.json"):
        pushed, base = json.loads(hub.files[LORA][name]), json.loads((given / "model" / name).read_text())
        assert {k: v for k, v in pushed.items() if k != "transformers_version"} == {
            k: v for k, v in base.items() if k != "transformers_version"
        }, name
    assert json.loads(hub.files[LORA]["config.json"]).get("use_cache", True) is True


@pytest.mark.parametrize("repo", [LORA, REFT])
def test_the_snippet_on_the_card_runs_as_it_stands(filled, given, tmp_path, repo):
    hub, _ = filled
    card = hub.files[repo]["README.md"].decode()
    assert str(given) not in card and LORA in card and REFT in card
    (tmp_path / "snippet.py").write_text(re.search(r"```python\n(.*?)```", card, re.S).group(1))
    environment = hub_environment(hub) | {"HF_HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    command = [sys.executable, "snippet.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    expected = answer_of_the_pushed_model(hub, tmp_path)
    assert done.stdout.splitlines()[-1] == expected and expected


def answer_of_the_pushed_model(hub, folder):
    """What the snippet should print, computed without generate() and without pyvene: greedy, the edit by
    hand."""
    for repo in (LORA, REFT):
        download(hub, repo, folder / repo)
    model = AutoModelForCausalLM.from_pretrained(folder / LORA, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(folder / LORA)
    state = torch.load(next((folder / REFT).glob("intkey_*.bin")))
    rotation, weight, bias = state["rotate_layer"], state["weight"].bfloat16(), state["bias"].bfloat16()
    prompt = heft.BOOLQ_PROMPT_TMPL % ("Ice is frozen water, and floats.", "is ice made of water")
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    last = ids.shape[1] - 1

    def edit(module, arguments, output):
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        h = hidden[:, last]
        turned = (h.to(rotation.dtype) @ rotation).to(h.dtype)
        offset = (torch.nn.functional.linear(h, weight, bias) - turned).to(rotation.dtype) @ rotation.T
        hidden[:, last] = h + offset.to(h.dtype)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    model.model.layers[2].register_forward_hook(edit)
    for _ in range(5):
        with torch.no_grad():
            token = model(input_ids=ids, use_cache=False).logits[0, -1].argmax()
        ids = torch.cat([ids, token.view(1, 1)], 1)
        if token == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[0, last + 1 :], skip_special_tokens=True)


def test_a_repository_of_something_else_is_not_overwritten(hub, given, tmp_path):
    hub.files[LORA] = {"README.md": b"mine", "model.safetensors": b"mine"}
    status, _, err = run(hub, tmp_path, given)
    assert status == 2 and f"{LORA} holds something else" in err and err.count("\n") == 1, err
    assert hub.files[LORA] == {"README.md": b"mine", "model.safetensors": b"mine"}
    assert REFT not in hub.files and not (tmp_path / "output").exists()


@pytest.mark.parametrize("content", [b"{", b"[1]", b'{"settings": 1}', b'{"a": 1}'])
def test_a_foreign_record_is_told_before_training(hub, given, tmp_path, content):
    hub.files[LORA] = {"heft.json": content}
    status, _, err = run(hub, tmp_path, given)
    assert status == 2 and err.count("\n") == 1 and not (tmp_path / "output").exists(), err
    assert hub.files[LORA] == {"heft.json": content}


@pytest.mark.parametrize("name", ["me/bad name", "a" * 97, "me/you/it", "-x"])
def test_a_name_that_the_hub_does_not_allow(hub, given, tmp_path, name):
    status, _, err = run(hub, tmp_path, given, f"--hf-repo-lora={name}")
    assert status == 2 and err.count("\n") == 1 and name in err and not (tmp_path / "output").exists(), err


def test_one_repository_for_both_stages_is_a_mistake(hub, given, tmp_path):
    status, _, err = run(hub, tmp_path, given, "--hf-repo-refit", "lora-repo")
    assert status == 2 and "both stages" in err and err.count("\n") == 1 and not hub.files, err


def test_long_names_are_shortened_to_something_stable(hub, given, tmp_path):
    flags = [
        "--hf-repo-lora",
        "",
        "--hf-repo-refit",
        "",
        "--max-train-samples",
        "19",
        "--max-eval-samples",
        "5",
    ]
    flags += [
        "--learning-rate-lora",
        "0.00123456",
        "--learning-rate-reft",
        "0.00123456",
        "--max-new-tokens",
        "6",
    ]
    status, out, err = run(hub, tmp_path, given, *flags)
    assert status == 0, out + err
    names = {repo.split("/")[1] for repo in hub.files}
    assert len(names) == 2 and 90 < max(map(len, names)) <= 96
    status, out, err = run(hub, tmp_path, given, *flags)
    assert status == 0 and "already done" in out and {repo.split("/")[1] for repo in hub.files} == names


def test_stages_that_others_pushed_in_the_meantime_are_not_overwritten(hub, given, tmp_path):
    """Two rows of Table 1 share stage 1: the second to finish does not replace what the first has pushed."""
    for place in ("one", "two"):
        flags = ["--no-push-to-hub"] if place == "two" else []
        status, out, err = run(hub, tmp_path / place, given, *flags)
        assert status == 0, out + err
    (record,) = (tmp_path / "two/output").glob("lora1-model-*/heft.json")
    weights = record.with_name("adapter_model.safetensors")
    weights.write_bytes(weights.read_bytes() + b"0")  # as another GPU would have made it
    changed = json.loads(record.read_text())
    changed["settings"]["WEIGHTS"] = heft.digest(weights)
    record.write_text(json.dumps(changed))
    for path in (tmp_path / "two/results").iterdir():
        path.unlink()
    before = dict(hub.files[LORA])
    status, _, err = run(hub, tmp_path / "two", given)
    assert status == 2 and "weights" in err and hub.files[LORA] == before, err


def test_a_result_of_other_weights_than_the_hubs_is_not_called_done(hub, given, tmp_path):
    """As when two machines have trained the same, and one has pushed."""
    for flags in ([], ["--no-push-to-hub"]):
        status, out, err = run(hub, tmp_path / f"{len(flags)}", given, *flags)
        assert status == 0, out + err
    (file,) = (tmp_path / "1/results").glob("*.json")
    result = json.loads(file.read_text())
    result["settings"]["STAGE_2"] = "other"
    file.write_text(json.dumps(result))
    status, out, err = run(hub, tmp_path / "1", given)
    assert status == 2 and "stage_2 'other'" in err and "already done" not in out, out + err


def test_a_second_run_finds_stage_1_on_the_hub(filled, given, tmp_path):
    hub, folder = filled
    status, out, err = run(hub, tmp_path, given)
    assert status == 0 and f"stage 1 is finished in the Hub repository {LORA}" in out, out + err
    assert "stage 2 is finished" in out, "the intervention on the Hub is the one that is evaluated"
    assert "trainable parameters" not in out
    first, second = read_result(folder), read_result(tmp_path)
    assert (
        first[1] == second[1]
        and first[0]["loss"] == second[0]["loss"]
        and first[0]["accuracy"] == second[0]["accuracy"]
    )


@pytest.mark.parametrize("repo, name", [(LORA, "adapter/adapter_model.safetensors"), (REFT, "intkey")])
def test_weights_on_the_hub_that_are_not_those_of_their_record_are_refused(
    filled, given, tmp_path, repo, name
):
    hub, _ = filled
    (name,) = [file for file in hub.files[repo] if file.startswith(name)]
    data = hub.files[repo][name]
    hub.files[repo][name] = data + b"0"
    try:
        status, out, err = run(hub, tmp_path, given)
    finally:
        hub.files[repo][name] = data
    assert status == 2 and repo in err and "weights" in err and err.count("\n") == 1, (out, err)
    assert "trainable parameters" not in out


def test_other_settings_refuse_to_reuse_it(filled, given, tmp_path):
    hub, _ = filled
    before = json.dumps({repo: sorted(files) for repo, files in hub.files.items()})
    status, out, err = run(hub, tmp_path, given, "--seed", "7")
    assert status == 2 and LORA in err and "seed 42, not 7" in err and err.count("\n") == 1
    assert (
        json.dumps({repo: sorted(files) for repo, files in hub.files.items()}) == before
        and not (tmp_path / "output").exists()
    )


def test_names_come_from_the_tokens_owner_and_the_run(hub, given, tmp_path):
    status, out, err = run(hub, tmp_path, given, "--hf-repo-lora", "", "--hf-repo-refit", "")
    assert status == 0, out + err
    assert set(hub.files) == {
        "tester/heft-lora1-model-on_data-dtype_float32",
        "tester/heft-lora1-reft1-model-on_data-reft_layer2-dtype_float32",
    }


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
    return pytest.mark.parametrize(
        "refusal, kind",
        [
            pytest.param(r, k, marks=[] if (r, k) in quick else pytest.mark.slow)
            for r in refusals
            for k in kinds
        ],
    )


@matrix(
    [401, 403, 404, 500, "cut"],
    ["preupload", "batch", "upload", "commit"],
    quick=[(403, "commit"), (404, "batch"), ("cut", "commit")],
)
def test_a_failing_upload_costs_nothing(hub, given, tmp_path, refusal, kind):
    """The run finishes, names the repositories and the command; the same command pushes later, without
    training again."""
    hub.refuse[kind] = refusal
    status, out, err = run(hub, tmp_path, given)
    assert status == 1, out + err
    err = err.replace("\x1b[A", "")  # a cursor movement of the Hub's unfinished bars
    (line,) = [line for line in err.splitlines() if line.startswith("heft: error: not pushed")]
    assert LORA in line and REFT in line and "heft_finetuning.py --base-model" in line
    result, predictions = read_result(tmp_path)
    assert len(predictions) == 6 and "heft.json" not in hub.files[LORA] and "heft.json" not in hub.files[REFT]
    hub.refuse.clear()
    status, out, err = run(hub, tmp_path, given)
    assert (
        status == 0 and "stage 1 is finished in output/" in out and "stage 2 is finished in output/" in out
    ), out + err
    assert "heft.json" in hub.files[LORA] and "heft.json" in hub.files[REFT]
    assert read_result(tmp_path) == (result, predictions)
    status, out, err = run(hub, tmp_path, given)
    assert status == 0 and "already done" in out


@matrix([500, 404, "cut"], ["whoami", "create", "auth", "read"], quick=[(500, "whoami"), ("cut", "create")])
def test_a_hub_that_is_down_at_the_start_does_not_stop_training(hub, given, tmp_path, refusal, kind):
    if (refusal, kind) == (404, "read"):
        pytest.skip("that is how a repository without a finished stage 1 answers")
    if kind == "read":
        hub.files[LORA] = {"heft.json": b"{}"}
    hub.refuse[kind] = refusal
    status, out, err = run(hub, tmp_path, given)
    assert status in (0, 1) and ("does not answer now" in out), out + err
    assert len(read_result(tmp_path)[1]) == 6 and list(
        (tmp_path / "output").glob("*/adapter_model.safetensors")
    )
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
    assert status == 1 and err.count("not pushed") == 1 and LORA in err and REFT in err, out + err
    assert len(read_result(tmp_path)[1]) == 6


def test_gated_model_without_access(hub, given, tmp_path):
    hub.files["meta-llama/Llama-2-7b-chat-hf"] = {"config.json": b"{}"}
    hub.refuse["read"] = 403
    status, _, err = run(hub, tmp_path, given, "--base-model", "meta-llama/Llama-2-7b-chat-hf")
    assert (
        status == 2
        and "ask for it at https://huggingface.co/meta-llama/Llama-2-7b-chat-hf" in err
        and err.count("\n") == 1
    )


def test_a_base_model_on_the_hub_is_read_from_there(hub, given, tmp_path):
    hub.files["tester/base"] = {path.name: path.read_bytes() for path in (given / "model").iterdir()}
    status, out, err = run(hub, tmp_path, given, "--base-model", "tester/base", "--no-push-to-hub")
    assert status == 0, out + err
    assert read_result(tmp_path)[0]["settings"]["BASE_VERSION"] == "0" * 40


@pytest.mark.parametrize("kind", ["info", pytest.param("read", marks=pytest.mark.slow)])
def test_a_base_model_that_the_hub_cannot_give_now_is_no_mistake(hub, given, tmp_path, kind):
    hub.files["tester/base"] = {path.name: path.read_bytes() for path in (given / "model").iterdir()}
    hub.refuse[kind] = 500
    status, _, err = run(hub, tmp_path, given, "--base-model", "tester/base", "--no-push-to-hub")
    lines = [line for line in err.splitlines() if line.startswith("heft: error: ")]
    assert status == 1 and len(lines) == 1 and "tester/base" in lines[0], err


def test_a_base_model_that_does_not_exist_is_a_mistake(hub, given, tmp_path):
    status, _, err = run(hub, tmp_path, given, "--base-model", "tester/nothing", "--no-push-to-hub")
    assert status == 2 and "tester/nothing" in err and err.count("\n") == 1, err


def test_a_network_that_is_down_is_no_mistake(given, tmp_path):
    flags = [*tiny_settings(given), "--epochs-lora", "0", "--epochs-reft", "0"]
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    for flag in ("--base-model", "--dataset"):
        process = start(tmp_path, [*flags, flag, "tester/nothing"], **nowhere)
        _, err = process.communicate(timeout=300)
        assert process.returncode == 1 and "tester/nothing" in err and "Traceback" not in err, err


def test_no_token_is_needed_without_the_hub(given, tmp_path):
    process = start(
        tmp_path,
        tiny_settings(given) + ["--epochs-lora", "0", "--epochs-reft", "0"],
        HF_ENDPOINT="http://127.0.0.1:9",
        HF_TOKEN=TOKEN,
    )
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and TOKEN not in out + err
