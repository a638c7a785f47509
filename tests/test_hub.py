"""The Hub, spoken to over real HTTP on the loopback: what is pushed, what is reused, and how a Hub that fails
is borne."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import make_tiny, read_result, start, tiny_settings
from hub_server import Hub
from peft import PeftModel
from transformers import AutoModelForCausalLM

import heft_finetuning as heft

TOKEN = "hf_RecognisableFakeToken0123456789"
LORA, REFT = "tester/lora-repo", "tester/reft-repo"
ADAPTER = "adapter/adapter_model.safetensors"
INTERVENTION = "intkey_layer_2_comp_block_output_unit_pos_nunit_1#0.bin"
BASE_ON_HUB = "--no-push-to-hub --base-model tester/base"
# Rates with which one step changes the answers; the paper's dtype.
FLAGS = (
    "--dtype bfloat16 --epochs-lora 1 --epochs-reft 1 --learning-rate-lora 0.003 --learning-rate-reft 0.2 "
    "--push-to-hub --hf-repo-lora lora-repo --hf-repo-refit reft-repo"
).split()


def slow_case(*values):
    """Parameters of a test that is slow with them."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def tiny_data(tmp_path_factory):
    """A model and data."""
    return make_tiny(tmp_path_factory.mktemp("tiny_data"), train=20, validation=6)


def new_hub():
    hub = Hub()
    hub.tokens.add(TOKEN)
    return hub


@pytest.fixture
def hub():
    """An empty Hub."""
    hub = new_hub()
    yield hub
    hub.close()


def hub_environment(hub):
    """What makes huggingface_hub speak to the tests' server."""
    local = {"HF_ENDPOINT": hub.url, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    return local | {"HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}


def begin(hub, folder, tiny_data, *flags):
    """Start a run in `folder`. The last of equal flags counts."""
    return start(folder, [*tiny_settings(tiny_data), *FLAGS, *flags], **hub_environment(hub))


def end_of(hub, folder, process):
    """(exit status, output, errors); no traceback, and the token is in neither, nor in any file."""
    out, err = process.communicate(timeout=600)
    assert "Traceback" not in err, err
    assert TOKEN not in out + err
    files = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    files += [data for repo in hub.files.values() for data in repo.values()]
    assert not any(TOKEN.encode() in data for data in files)
    return process.returncode, out, err


def run(hub, folder, tiny_data, *flags):
    return end_of(hub, folder, begin(hub, folder, tiny_data, *flags))


def finish(*arguments):
    """Run to the good end; returns the output."""
    status, out, err = run(*arguments)
    assert status == 0, out + err
    return out


def refusal_of(hub, folder, tiny_data, *flags):
    """The line of a run that ends with status 2 before it has written anything."""
    status, out, err = run(hub, folder, tiny_data, *flags)
    assert status == 2 and err.startswith("heft: error: ") and err.count("\n") == 1, out + err
    assert not (folder / "output").exists()
    return err


def error_line(err):
    """The one line of an error."""
    lines = err.replace("\x1b[A", "").splitlines()  # without cursor movements of the Hub's unfinished bars
    (line,) = [line for line in lines if line.startswith("heft: error: ")]
    return line


def not_pushed(status, err):
    """The one line that says what was not pushed, and with which command it is."""
    line = error_line(err)
    assert status == 1 and "heft: error: not pushed: " in line and "heft_finetuning.py --base-model" in line
    return line


@pytest.fixture(scope="module")
def pushed(tiny_data, tmp_path_factory):
    """(a Hub that a run has pushed to, that run's folder). Tests leave both as they are."""
    hub, folder = new_hub(), tmp_path_factory.mktemp("pushed")
    finish(hub, folder, tiny_data)
    yield hub, folder
    hub.close()


@pytest.fixture
def copied(pushed, hub, tmp_path):
    """(a Hub, a folder): copies of them."""
    hub.files = {repo: dict(files) for repo, files in pushed[0].files.items()}
    return hub, shutil.copytree(pushed[1], tmp_path / "copied", ignore=shutil.ignore_patterns(".hf_home"))


@pytest.fixture
def finished(copied):
    """(an empty Hub, the folder of a finished run)."""
    copied[0].files.clear()
    return copied


# ----- What is pushed


def test_what_is_pushed(pushed, tiny_data, tmp_path):
    hub, folder = pushed
    adapter = {ADAPTER, "adapter/adapter_config.json", "adapter/heft.json"}
    own = {"config.json", "heft.json", "README.md"}
    merged = {"model.safetensors", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert set(hub.files[LORA]) == adapter | own | merged
    assert set(hub.files[REFT]) == adapter | own | {INTERVENTION}
    assert hub.private == {LORA: True, REFT: True} and not list(folder.glob(".merged-*"))
    for repo in (LORA, REFT):
        card = hub.files[repo]["README.md"].decode()
        assert read_result(folder)[0]["accuracy"] in card and "\nbase_model: model\n" in card
        assert str(folder.parent) not in card and len(card.splitlines()) < 25
        for name, data in hub.files[repo].items():
            (tmp_path / repo / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / repo / name).write_bytes(data)
    model, base = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        for folder in (tmp_path / LORA, tiny_data / "model")
    )
    base = PeftModel.from_pretrained(base, tmp_path / REFT / "adapter").merge_and_unload()
    for (name, a), (_, b) in zip(model.named_parameters(), base.named_parameters()):
        assert torch.equal(a, b), name
    # The base model's own files, and a configuration that generates with a cache, as its does
    for name in merged - {"model.safetensors"} | {"config.json"}:
        ours, theirs = json.loads(hub.files[LORA][name]), json.loads((tiny_data / "model" / name).read_text())
        may_differ = {"transformers_version": "", "dtype": ""}
        assert ours | may_differ == theirs | may_differ, name


def test_owner_name_and_licence(pushed, hub, tiny_data, tmp_path):
    """An organisation owns the repository, whose name is the run's. The licence is that of the base model."""
    for files in pushed[0].files.values():
        card = files["README.md"].decode()
        assert "\nlicense: other\n" in card and "llama" not in card.lower()
    hub.organisations.append("someorg")
    shutil.copytree(tiny_data / "model", tmp_path / "Llama-2-7b")
    flags = "--base-model Llama-2-7b --hf-user someorg --hf-repo-refit= --epochs-lora 0"
    finish(hub, tmp_path, tiny_data, *flags.split(), "--learning-rate-reft", "2e-4")
    repo = "someorg/heft-lora0-reft1-Llama_2_7b-on_data-reft_layer2"
    assert hub.private == {repo: True} and "\nlicense: llama2\n" in hub.files[repo]["README.md"].decode()
    assert ADAPTER not in hub.files[repo], "there is no stage 1"


def test_long_names_are_shortened_to_something_stable():
    name = "lora1-reft1-" + "-".join(f"a_setting{number}" for number in range(20))
    short = [heft.hub_name(name), heft.hub_name(name + "1"), heft.hub_name(name)]
    assert short[0] == short[2] != short[1] and all(90 < len(name) <= 96 for name in short)


# ----- Several jobs, one repository

CHECK = """
import json
from pathlib import Path
from transformers import AutoTokenizer
tokenizer, texts = AutoTokenizer.from_pretrained("model"), []
for prompt in json.loads(Path("prompts.json").read_text()):
    ids = tokenizer(prompt, return_tensors="pt")
    greedy = dict(max_new_tokens=5, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    if "reft_model" in globals():
        last = {"base": ids["input_ids"].shape[1] - 1}
        output = reft_model.generate(dict(ids), unit_locations=last, intervene_on_prompt=True, **greedy)[1]
    else:
        output = model.generate(**ids, **greedy)
    texts.append(tokenizer.decode(output[0, ids["input_ids"].shape[1]:], skip_special_tokens=True).strip())
print(json.dumps(texts))
"""


def texts_by_the_card(hub, repo, tiny_data, folder):
    """The answers to the validation questions by the program on the card, run as it stands in `folder`, where
    the base model is a folder of its name."""
    folder.mkdir(parents=True)
    (folder / "model").symlink_to(tiny_data / "model")
    rows = map(json.loads, (tiny_data / "data/validation.jsonl").read_text().splitlines())
    (folder / "prompts.json").write_text(json.dumps([heft.format_boolq(row)["prompt"] for row in rows]))
    program = re.search(r"```python\n(.*?)```", hub.files[repo]["README.md"].decode(), re.S).group(1)
    (folder / "card.py").write_text(program + CHECK)
    environment = os.environ | hub_environment(hub) | {"HF_HOME": str(folder / ".hf_home")}
    command = [sys.executable, "card.py"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def other_bits(data):
    """Weights as another GPU would have made them."""
    return data[:-1] + bytes([data[-1] ^ 1])


def check_usable(hub, tiny_data, tmp_path, runs):
    """Both repositories can be used as their cards say, and the same commands again have nothing to do.

    runs: flags by folder. Returns the names of the folders whose run gave the answers of a repository."""
    makers = []
    for repo in (LORA, REFT):
        texts = texts_by_the_card(hub, repo, tiny_data, tmp_path / repo)
        weights = json.loads(hub.files[repo]["heft.json"])["weights"]
        for folder in runs:
            result, predictions = read_result(tmp_path / folder)
            if weights == (result["settings"]["STAGE_2"] or result["settings"]["STAGE_1"]):
                same = sum(text == row["text"] for text, row in zip(texts, predictions))
                assert same >= 4, "of 6: in bfloat16, a question rounds otherwise in a batch than alone"
                makers.append(folder)
    for folder, flags in runs.items():
        assert "already done" in finish(hub, tmp_path / folder, tiny_data, *flags)
    return makers


@pytest.mark.parametrize("epochs_reft, dtype", [("0", "bfloat16"), ("1", "float32")])
def test_two_jobs_train_the_same_stage_1_at_once(hub, tiny_data, tmp_path, epochs_reft, dtype):
    """Rows 1 + 0 or 1 + 1 of a sweep beside 1 + 1, on machines whose last bits differ, as other micro-batches
    make them. Both find the Hub empty. The one that comes second pushes what the first has not."""
    runs = {"one": f"--epochs-reft {epochs_reft}".split(), "two": "--tokens-per-microbatch 300".split()}
    runs = {folder: ["--dtype", dtype, *flags] for folder, flags in runs.items()}
    both_asked = threading.Event()

    def pause_two(kind):
        if kind == "tree" and hub.calls.count(("GET", "tree")) == 2:
            two.send_signal(signal.SIGSTOP)
            both_asked.set()

    hub.before = pause_two
    two = begin(hub, tmp_path / "two", tiny_data, *runs["two"])
    assert both_asked.wait(timeout=300)
    out = finish(hub, tmp_path / "one", tiny_data, *runs["one"])
    assert "left as it is" not in out
    before = {repo: dict(files) for repo, files in hub.files.items()}
    two.send_signal(signal.SIGCONT)
    status, out, err = end_of(hub, tmp_path / "two", two)
    assert status == 0 and "stage 1, LoRA: 4,096 trainable parameters" in out, out + err
    settings = [read_result(tmp_path / folder)[0]["settings"] for folder in runs]
    assert settings[0]["STAGE_1"] != settings[1]["STAGE_1"], "the same adapter: the test tests nothing"
    assert f"{LORA} has stage 1, LoRA of the same settings from another run: left as it is" in out
    assert out.count("left as it is") == len(before) and out.count("pushing ") == 2 - len(before)
    assert before == {repo: hub.files[repo] for repo in before}
    makers = ["one", "two"] if epochs_reft == "0" else ["one"]
    assert check_usable(hub, tiny_data, tmp_path, runs) == makers


@pytest.mark.slow
def test_two_jobs_push_at_the_same_moment(hub, tiny_data, tmp_path):
    runs = {"one": [], "two": ["--tokens-per-microbatch", "300"]}
    both = threading.Barrier(2, timeout=300)
    hub.before = lambda kind: both.wait() if kind == "create" and not hub.files else None
    jobs = {folder: begin(hub, tmp_path / folder, tiny_data, *flags) for folder, flags in runs.items()}
    for folder, job in jobs.items():
        status, out, err = end_of(hub, tmp_path / folder, job)
        assert status == 0, out + err
    assert len(check_usable(hub, tiny_data, tmp_path, runs)) == 1


@pytest.mark.parametrize("stage_1", ["gone", "another twin", slow_case("emptied"), slow_case("there")])
def test_a_stage_2_on_the_hub_is_used_with_its_own_adapter(copied, tiny_data, tmp_path, stage_1):
    """Whatever became of the repository of stage 1."""
    hub, folder = copied
    twin = dict(hub.files[LORA])
    twin[ADAPTER] = other_bits(twin[ADAPTER])
    record = json.loads(twin["heft.json"]) | {"weights": hashlib.sha256(twin[ADAPTER]).hexdigest()[:16]}
    twin["heft.json"] = twin["adapter/heft.json"] = json.dumps(record).encode()
    files = {"emptied": {".gitattributes": b""}, "another twin": twin, "there": hub.files.pop(LORA)}
    hub.files |= {LORA: dict(files[stage_1])} if stage_1 in files else {}
    out = finish(hub, tmp_path / "new", tiny_data)
    assert "stage 1, LoRA is finished" in out and "stage 2, LoReFT is finished" in out
    assert "trainable parameters" not in out
    (result, predictions), (expected, same) = read_result(tmp_path / "new"), read_result(folder)
    assert predictions == same and result["loss"] == expected["loss"]
    assert all(result["settings"][key] == expected["settings"][key] for key in ("STAGE_1", "STAGE_2"))
    if stage_1 == "another twin":
        assert hub.files[LORA] == twin
    else:
        assert hub.files[LORA][ADAPTER] == hub.files[REFT][ADAPTER]


# ----- What is refused before training

FOREIGN = {"README.md": b"mine", "model.safetensors": b"mine"}
REFUSED = {  # (what stage 1's repository holds, flags, words of the one line)
    "something else": (FOREIGN, "", f"{LORA} holds something else"),
    "a record of another program": ({"heft.json": b'{"settings": 1}'}, "", f"{LORA} is damaged or not"),
    "a damaged record": ({"heft.json": b"{"}, "", f"{LORA} is damaged or not"),
    "a name of three parts": (None, "--hf-repo-lora me/you/it", "me/you/it"),
    "a long name": (None, "--hf-repo-lora " + "a" * 97, "a" * 97),
    "a name with a dash in front": (None, "--hf-repo-lora=-x", "-x"),
    "one repository for both stages": (None, "--hf-repo-refit lora-repo", "both stages"),
    "a base model that does not exist": (None, BASE_ON_HUB, "tester/base"),
}


@pytest.mark.parametrize("case", [case if case == "something else" else slow_case(case) for case in REFUSED])
def test_refused(hub, tiny_data, tmp_path, case):
    files, flags, words = REFUSED[case]
    hub.files = {LORA: files} if files else {}
    assert words in refusal_of(hub, tmp_path, tiny_data, *flags.split())
    assert hub.files == ({LORA: files} if files else {})


def test_a_repository_of_other_settings_is_refused(copied, tiny_data, tmp_path):
    line = refusal_of(copied[0], tmp_path / "new", tiny_data, "--seed", "7")
    assert LORA in line and "seed 42, not 7" in line


def test_a_token_that_is_not_valid(hub, tiny_data, tmp_path):
    hub.tokens = {"hf_another"}
    line = refusal_of(hub, tmp_path, tiny_data)
    assert "set HF_TOKEN to a valid token" in line and "--no-push-to-hub" in line


@pytest.mark.parametrize(
    "repo, name, epochs_reft",
    [(REFT, ADAPTER, "1"), slow_case(LORA, ADAPTER, "0"), slow_case(REFT, INTERVENTION, "1")],
)
def test_weights_of_another_record(copied, tiny_data, tmp_path, repo, name, epochs_reft):
    """The weights on the Hub are not those that heft.json beside them describes."""
    hub, _ = copied
    hub.files[repo][name] = other_bits(hub.files[repo][name])
    status, out, err = run(hub, tmp_path / "new", tiny_data, "--epochs-reft", epochs_reft)
    assert status == 2 and Path(name).name in err and err.count("\n") == 1, out + err
    assert "trainable parameters" not in out


# ----- What fails at the end


def times_out(refusals, kinds, quick):
    """All pairs; those not in `quick` are slow: huggingface_hub repeats some calls for half a minute."""
    pairs = [(refusal, kind) for refusal in refusals for kind in kinds]
    return pytest.mark.parametrize("refusal, kind", [p if p in quick else slow_case(*p) for p in pairs])


@times_out(
    [401, 403, 404, 500, "429", "cut", "stall"],
    ["create", "preupload", "batch", "upload", "commit"],
    quick=[(403, "create"), (403, "commit")],
)
def test_a_refusal_at_the_end_costs_nothing(finished, tiny_data, refusal, kind):
    """One line with the repositories and the command, which pushes later, without training again."""
    hub, folder = finished
    before = read_result(folder)
    hub.refuse[kind], hub.stall = refusal, 200
    status, out, err = run(hub, folder, tiny_data)
    if refusal == "429":  # only once: huggingface_hub repeats some calls, not all
        assert status in (0, 1)
    else:
        line = not_pushed(status, err)
        assert LORA in line and REFT in line
        assert not any("heft.json" in files for files in hub.files.values())
    hub.refuse.clear()
    finish(hub, folder, tiny_data)
    assert all("heft.json" in hub.files[repo] for repo in (LORA, REFT)) and read_result(folder) == before


def changed(pattern):
    """A function that changes such files of a run, as when another job's files come home to its folders."""

    def change(hub, folder):
        for path in (folder / "output").rglob(pattern):
            path.write_bytes(other_bits(path.read_bytes()))

    return change


BEFORE_THE_PUSH = {  # (what happens when the run is about to push, words of the one line, what is pushed)
    "something else": (
        lambda hub, _: hub.files.update({LORA: FOREIGN}),
        f"{LORA} holds something else",
        [REFT],
    ),
    "another adapter": (changed("adapter_model.safetensors"), "has changed", []),
    "another intervention": (changed("intkey_*"), "has changed", [LORA]),
}


@pytest.mark.parametrize("case", BEFORE_THE_PUSH)
def test_a_push_checks_what_is_there(finished, tiny_data, case):
    """A foreign repository is left as it is. Weights are those of their record, or they are not pushed."""
    (hub, folder), (action, words, pushed) = finished, BEFORE_THE_PUSH[case]
    tree = ("GET", "tree")  # asked for twice at the start, then before each push
    hub.before = lambda kind: action(hub, folder) if kind == "tree" and hub.calls.count(tree) == 3 else None
    status, out, err = run(hub, folder, tiny_data)
    assert words in not_pushed(status, err), out + err
    assert [repo for repo in (LORA, REFT) if "heft.json" in hub.files.get(repo, ())] == pushed
    assert hub.files.get(LORA) == FOREIGN or case != "something else"


@pytest.mark.parametrize("stage", [slow_case("STAGE_1"), "STAGE_2"])
def test_a_result_of_other_weights_is_not_pushed_with_these(finished, tiny_data, stage):
    hub, folder = finished
    (file,) = (folder / "results").glob("*[0-9].json")
    result = json.loads(file.read_text())
    result["settings"][stage] = "other"
    file.write_text(json.dumps(result))
    status, out, err = run(hub, folder, tiny_data)
    assert status == 2 and f"{file.relative_to(folder)} was made with {stage.lower()} 'other'" in error_line(
        err
    )
    assert not hub.files


# ----- A Hub that cannot be reached


@times_out([429, 500, "cut"], ["whoami", "tree"], quick=[("cut", "tree")])
def test_a_hub_that_is_down_at_the_start_does_not_stop_training(hub, tiny_data, tmp_path, refusal, kind):
    """Back at the end, it gets what there is to push."""
    hub.refuse[kind] = refusal
    hub.before = lambda _: hub.refuse.clear() if list(tmp_path.glob("results/*.json")) else None
    out = finish(hub, tmp_path, tiny_data)
    assert out.count("the Hub is unreachable") == 1 and out.count("trainable parameters") == 2
    assert all("heft.json" in hub.files[repo] for repo in (LORA, REFT))


def test_a_hub_that_is_down_when_the_result_is_finished(finished, tiny_data):
    hub, folder = finished
    hub.refuse["whoami"] = 500
    status, out, err = run(hub, folder, tiny_data)
    line = error_line(err)
    assert status == 1 and "the Hub is unreachable" in line and "the same command pushes later" in line


# ----- Models and data on the Hub


def test_gated_model_without_access(hub, tiny_data, tmp_path):
    name = "meta-llama/Llama-2-7b-chat-hf"
    hub.files[name], hub.refuse["read"] = {"config.json": b"{}"}, 403
    line = refusal_of(hub, tmp_path, tiny_data, "--base-model", name)
    assert f"request access at https://huggingface.co/{name}" in line


@pytest.mark.parametrize("down", [None, slow_case("info"), slow_case("read")])
def test_a_base_model_on_the_hub(hub, tiny_data, tmp_path, down):
    """It is read from there. A Hub that cannot give it now is no mistake of the user."""
    hub.files["tester/base"] = {path.name: path.read_bytes() for path in (tiny_data / "model").iterdir()}
    hub.refuse[down] = 500
    status, out, err = run(hub, tmp_path, tiny_data, *BASE_ON_HUB.split())
    if down:
        assert status == 1 and "tester/base" in error_line(err)
    else:
        assert status == 0, out + err
        assert read_result(tmp_path)[0]["settings"]["BASE_VERSION"] == hub.commit("tester/base")


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["", "--base-model", "--dataset"])
def test_a_network_that_is_down_is_no_mistake(tiny_data, tmp_path, flag):
    """And what is in folders needs no network."""
    flags = [*tiny_settings(tiny_data), *"--epochs-lora 0 --epochs-reft 0".split()]
    flags += [flag, "tester/nothing"] if flag else []
    process = start(tmp_path, flags, HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="0", HF_TOKEN=TOKEN)
    out, err = process.communicate(timeout=300)
    assert TOKEN not in out + err and "Traceback" not in err
    assert process.returncode == (1 if flag else 0) and ("tester/nothing" in err) == bool(flag), err
