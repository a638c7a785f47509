"""The Hub, spoken to over real HTTP on the loopback: what is pushed, what is reused, and how a Hub that fails
is borne."""

import fcntl
import hashlib
import json
import shutil
import signal
import threading

import pyreft
import pytest
import torch
import yaml
from conftest import ROOT, make_tiny, read_result, rows_of, start, tiny_settings
from hub_server import Hub
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

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


def begin(hub, folder, tiny_data, *flags, script=ROOT / "heft_finetuning.py"):
    """Start a run in `folder`. The last of equal flags counts."""
    return start(folder, [*tiny_settings(tiny_data), *FLAGS, *flags], script, **hub_environment(hub))


def end_of(hub, folder, process):
    """(exit status, output, errors); no traceback, and the token is in neither, nor in any file."""
    out, err = process.communicate(timeout=600)
    assert "Traceback" not in err, err
    assert TOKEN not in out + err
    files = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    files += [data for repo in hub.files.values() for data in repo.values()]
    assert not any(TOKEN.encode() in data for data in files)
    return process.returncode, out, err


def run(hub, folder, tiny_data, *flags, **options):
    return end_of(hub, folder, begin(hub, folder, tiny_data, *flags, **options))


def finish(*arguments, **options):
    """Run to the good end; returns the output."""
    status, out, err = run(*arguments, **options)
    assert status == 0, out + err
    return out


def refusal_of(hub, folder, tiny_data, *flags, status=2, **options):
    """The line of a run that ends with this status before it has written anything."""
    ended, out, err = run(hub, folder, tiny_data, *flags, **options)
    assert ended == status and err.startswith("heft: error: ") and err.count("\n") == 1, out + err
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


def metadata(card):
    """The YAML at the head of a card."""
    return yaml.safe_load(card.split("---\n")[1])


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
        assert read_result(folder)[0]["accuracy"] in card and metadata(card) == {"license": "other"}
        assert str(folder.parent) not in card and len(card.splitlines()) < 12
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


def test_owner_name_and_licence(hub, tiny_data, tmp_path):
    """An organisation owns the repository, whose name is the run's. The licence is that of the base model."""
    hub.organisations["someorg"] = "write"
    shutil.copytree(tiny_data / "model", tmp_path / "Llama-2-7b")
    flags = "--base-model Llama-2-7b --hf-user someorg --hf-repo-refit= --epochs-lora 0 --tag a+b"
    finish(hub, tmp_path, tiny_data, *flags.split(), "--learning-rate-reft", "2e-4")
    repo = "someorg/heft-lora0-reft1-Llama_2_7b-on_data-reft_layer2-a_b"
    assert hub.private == {repo: True} and ADAPTER not in hub.files[repo], "there is no stage 1"
    assert metadata(hub.files[repo]["README.md"].decode()) == {"license": "llama2"}


@pytest.mark.parametrize(
    "name", ["2024", slow_case("no"), slow_case("a: b"), slow_case("- #x"), slow_case("'")]
)
def test_folders_of_any_name_are_pushed(hub, tiny_data, tmp_path, name):
    """The card names only what the Hub knows."""
    shutil.copytree(tiny_data / "data", tmp_path / name)
    shutil.copytree(tiny_data / "model", tmp_path / f"model {name}")
    finish(hub, tmp_path, tiny_data, "--dataset", name, "--base-model", f"model {name}", "--epochs-reft", "0")
    assert metadata(hub.files[LORA]["README.md"].decode()) == {"license": "other"}


def test_long_names_are_shortened_to_something_stable():
    name = "heft-lora1-reft1-" + "-".join(f"a_setting{number}" for number in range(20))
    short = [heft.shortened(name, 96), heft.shortened(name + "1", 96), heft.shortened(name, 96)]
    assert short[0] == short[2] != short[1] and all(90 < len(name) <= 96 for name in short)


# ----- Several jobs, one repository


def texts_of_repository(hub, repo, tiny_data, folder):
    """The answers to the validation questions by what a repository holds, as the README says to use it."""
    for name, data in hub.files[repo].items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    source = folder if repo == LORA else tiny_data / "model"
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    if repo == REFT:
        model = PeftModel.from_pretrained(model, folder / "adapter").merge_and_unload()
        model = pyreft.ReftModel.load(str(folder), model)
    tokenizer, texts = AutoTokenizer.from_pretrained(tiny_data / "model"), []
    for row in rows_of(tiny_data / "data", "validation"):
        inputs = dict(tokenizer(row["prompt"], return_tensors="pt"))
        last = inputs["input_ids"].shape[1] - 1
        greedy = dict(max_new_tokens=5, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        if repo == REFT:
            edited = dict(unit_locations={"base": last}, intervene_on_prompt=True)
            output = model.generate(inputs, **edited, **greedy)[1]
        else:
            output = model.generate(**inputs, **greedy)
        texts.append(tokenizer.decode(output[0, last + 1 :], skip_special_tokens=True).strip())
    return texts


def other_bits(data):
    """Weights as another GPU would have made them."""
    return data[:-1] + bytes([data[-1] ^ 1])


def check_usable(hub, tiny_data, tmp_path, runs):
    """Both repositories can be used, and the same commands again have nothing to do; they say if a repository
    holds another run's stage.

    runs: flags by folder. Returns the names of the folders whose run gave the answers of a repository."""
    makers = []
    for repo in (LORA, REFT):
        part = "lora" if repo == LORA else "reft"
        texts = texts_of_repository(hub, repo, tiny_data, tmp_path / repo)
        weights = heft.weights_hash(json.loads(hub.files[repo]["heft.json"]))
        for folder in runs:
            result, predictions = read_result(tmp_path / folder)
            if weights == result["weights"][part] and not (part == "lora" and result["weights"]["reft"]):
                same = sum(text == row["text"] for text, row in zip(texts, predictions))
                assert same >= 4, "of 6: in bfloat16, a question rounds otherwise in a batch than alone"
                makers.append(folder)
    for folder, flags in runs.items():
        out = finish(hub, tmp_path / folder, tiny_data, *flags)
        assert "already done" in out
        own = read_result(tmp_path / folder)[0]["weights"]
        for part, repo in (("lora", LORA), ("reft", REFT)):
            other = own[part] not in (None, heft.weights_hash(json.loads(hub.files[repo]["heft.json"])))
            assert (f"note: {repo} holds stage {1 if part == 'lora' else 2}, " in out) == other
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
    weights = [read_result(tmp_path / folder)[0]["weights"]["lora"] for folder in runs]
    assert weights[0] != weights[1], "the same adapter: the test tests nothing"
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
    record = json.loads(twin["heft.json"])
    record["files"]["adapter_model.safetensors"] = hashlib.sha256(twin[ADAPTER]).hexdigest()[:16]
    twin["heft.json"] = twin["adapter/heft.json"] = json.dumps(record).encode()
    files = {"emptied": {".gitattributes": b""}, "another twin": twin, "there": hub.files.pop(LORA)}
    hub.files |= {LORA: dict(files[stage_1])} if stage_1 in files else {}
    out = finish(hub, tmp_path / "new", tiny_data)
    assert f"copying stage 2, LoReFT from {REFT}" in out
    assert "stage 1, LoRA is finished in output/" in out and "stage 2, LoReFT is finished in output/" in out
    assert "trainable parameters" not in out
    (result, predictions), (expected, same) = read_result(tmp_path / "new"), read_result(folder)
    assert predictions == same and result["loss"] == expected["loss"]
    assert result["weights"] == expected["weights"] and result["made_with"] == expected["made_with"]
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
    "one existing repository for both": (FOREIGN, "--hf-repo-refit lora-repo", "both stages"),
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


def test_the_hubs_copies_of_other_code(copied, tiny_data, tmp_path):
    """Nothing is here, and the Hub has what the script made before a training step was edited: refused. It is
    used on request, and the result says so; a tag alone keeps both, if it is in the repositories' names."""
    hub, _ = copied
    script = tmp_path / "heft_finetuning.py"
    text = (ROOT / "heft_finetuning.py").read_text()
    assert text.count("clip_grad_norm_(parameters, 1.0)") == 1
    script.write_text(text.replace("clip_grad_norm_(parameters, 1.0)", "clip_grad_norm_(parameters, 0.1)"))
    before = {repo: dict(files) for repo, files in hub.files.items()}
    line = refusal_of(hub, tmp_path / "new", tiny_data, script=script)
    assert f"{LORA} was made by other code, " in line and "--accept-other-code" in line and "--tag" in line
    out = finish(hub, tmp_path / "new", tiny_data, "--accept-other-code", script=script)
    assert "trainable parameters" not in out and "reused what other code made" in out
    result = read_result(tmp_path / "new")[0]
    assert result["other_code"].keys() == {"lora", "reft"} and hub.files == before
    flags = "--tag clip --hf-repo-lora= --hf-repo-refit= --epochs-reft 0".split()
    out = finish(hub, tmp_path / "new", tiny_data, *flags, script=script)
    assert out.count("trainable parameters") == 1
    assert {repo: hub.files[repo] for repo in before} == before and len(hub.files) == 3
    assert any(repo.endswith("-clip") for repo in hub.files)


def test_a_token_that_is_not_valid(hub, tiny_data, tmp_path):
    hub.tokens = {"hf_another"}
    line = refusal_of(hub, tmp_path, tiny_data)
    assert "set HF_TOKEN to a valid token" in line and "--no-push-to-hub" in line


def fine_grained(*permissions):
    """What whoami says of a fine-grained token with these permissions on the user's repositories."""
    scoped = [{"entity": {"_id": "1", "type": "user", "name": "tester"}, "permissions": list(permissions)}]
    about = {"canReadGatedRepos": True, "global": [], "scoped": scoped}
    return {"displayName": "tests", "role": "fineGrained", "fineGrained": about}


RIGHTS = {  # (what whoami says of the token, --hf-user, whether the run may push)
    "read": ({"role": "read"}, "", False),
    "fine-grained, may read": (fine_grained("repo.content.read"), "", False),
    "fine-grained, may write": (fine_grained("repo.content.read", "repo.write"), "", True),
    "unknown organisation": ({"role": "write"}, "nobody", False),
    "organisation, may read": ({"role": "write"}, "readers", False),
    "organisation, may contribute": ({"role": "write"}, "contributors", True),
}


@pytest.mark.parametrize("case", ["read", *map(slow_case, [case for case in RIGHTS if case != "read"])])
def test_a_token_that_may_not_write(hub, tiny_data, tmp_path, case):
    """It is refused at the start, not after hours."""
    hub.access_token, owner, may = RIGHTS[case]
    hub.organisations = {"readers": "read", "contributors": "contributor"}
    flags = ["--hf-user", owner] if owner else []
    if may:
        finish(hub, tmp_path, tiny_data, *flags)
        assert len(hub.files) == 2
    else:
        status, out, err = run(hub, tmp_path, tiny_data, *flags)
        line = error_line(err)
        assert status == 2 and not hub.files and "trainable parameters" not in out, out + err
        assert f"may not write {owner or 'tester'}/lora-repo" in line and "--no-push-to-hub" in line
        assert not hub.files


def test_a_token_that_may_only_read_suffices_where_nothing_is_pushed(copied, tiny_data, tmp_path):
    hub, folder = copied
    hub.access_token = {"role": "read"}
    assert "already done" in finish(hub, folder, tiny_data)
    assert f"copying stage 1, LoRA from {LORA}" in finish(hub, tmp_path / "new", tiny_data)


@pytest.mark.parametrize(
    "repo, name, epochs_reft",
    [(REFT, ADAPTER, "1"), slow_case(LORA, ADAPTER, "0"), slow_case(REFT, INTERVENTION, "1")],
)
def test_weights_of_another_record(copied, tiny_data, tmp_path, repo, name, epochs_reft):
    """The weights on the Hub are not those that heft.json beside them describes."""
    hub, _ = copied
    hub.files[repo][name] = other_bits(hub.files[repo][name])
    status, out, err = run(hub, tmp_path / "new", tiny_data, "--epochs-reft", epochs_reft)
    assert status == 2 and repo.split("/")[1] in error_line(err) and err.count("\n") == 1, out + err
    broken = "lora1-model-*" if repo == LORA else "lora1-reft1-*"
    assert "trainable parameters" not in out and not list(tmp_path.glob(f"new/output/{broken}/heft.json"))


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
    elif kind == "create":  # tried before anything is trained or evaluated
        assert status == (2 if refusal in (401, 403, 404) else 1)
        assert f"may not write {LORA}" in error_line(err) and "pushing" not in out and not hub.files
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
    "another adapter": (changed("adapter_model.safetensors"), "have changed", []),
    "another intervention": (changed("intkey_*"), "have changed", [LORA]),
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


@pytest.mark.parametrize("part, stage", [slow_case("lora", "stage 1, LoRA"), ("reft", "stage 2, LoReFT")])
def test_a_result_of_other_weights_is_not_pushed_with_these(finished, tiny_data, part, stage):
    hub, folder = finished
    (file,) = (folder / "results").glob("*[0-9].json")
    result = json.loads(file.read_text())
    result["weights"][part] = "other"
    file.write_text(json.dumps(result))
    status, out, err = run(hub, folder, tiny_data)
    line = error_line(err)
    assert status == 2 and f"{file.relative_to(folder)} was not measured on the {stage} in output/" in line
    assert not hub.files


@pytest.mark.parametrize("lost", ["output", slow_case("output/*reft*")])
def test_a_result_whose_stages_are_gone_is_not_pushed(finished, tiny_data, lost):
    """Nothing is trained for it."""
    hub, folder = finished
    for path in folder.glob(lost):
        shutil.rmtree(path)
    status, out, err = run(hub, folder, tiny_data)
    (file,) = (folder / "results").glob("*[0-9].json")
    line = error_line(err)
    assert status == 2 and str(file.relative_to(folder)) in line and "--no-push-to-hub" in line
    assert "stage 1, LoRA" in line if lost == "output" else "stage 2, LoReFT" in line
    assert not hub.files and "trainable parameters" not in out


def test_what_a_killed_push_left_is_removed(finished, tiny_data):
    """The folder .merged-... has 13.5 GB with the 7B model, and no name that changes."""
    hub, folder = finished
    job = begin(hub, folder, tiny_data)
    hub.before = lambda kind: job.kill() if kind == "batch" else None
    job.communicate(timeout=300)
    assert job.returncode == -signal.SIGKILL
    (left,) = folder.glob(".merged-*")
    assert left.name != ".merged-adapter", "two runs in one folder, each with its adapter/, would share it"
    (left / "old").write_text("of the killed process")
    hub.before = lambda kind: None
    finish(hub, folder, tiny_data)
    assert not list(folder.glob(".merged-*"))
    assert all("heft.json" in hub.files[repo] and "old" not in hub.files[repo] for repo in (LORA, REFT))


# ----- A Hub that cannot be reached


@times_out([429, 500, "cut"], ["whoami", "tree"], quick=[("cut", "tree")])
def test_a_hub_that_is_down_at_the_start_stops_the_run(hub, tiny_data, tmp_path, refusal, kind):
    """At once, and not as a mistake: a cluster tries again. Without it, the run is possible."""
    hub.refuse[kind] = refusal
    refusal_of(hub, tmp_path, tiny_data, status=1)
    hub.refuse.clear()
    finish(hub, tmp_path, tiny_data)
    assert all("heft.json" in hub.files[repo] for repo in (LORA, REFT))


def test_a_hub_that_is_down_when_the_result_is_finished(finished, tiny_data):
    hub, folder = finished
    hub.refuse["whoami"] = 500
    status, out, err = run(hub, folder, tiny_data)
    assert status == 1 and "500" in error_line(err) and "already done" not in out


# ----- Models and data on the Hub


def test_gated_model_without_access(hub, tiny_data, tmp_path):
    name = "meta-llama/Llama-2-7b-chat-hf"
    hub.files[name], hub.refuse["read"] = {"config.json": b"{}"}, 403
    line = refusal_of(hub, tmp_path, tiny_data, "--base-model", name)
    assert f"request access at https://huggingface.co/{name}" in line


def put_base(hub, tiny_data):
    """Put the tiny model on the Hub. Returns its files, which may be changed."""
    files = {path.name: path.read_bytes() for path in (tiny_data / "model").iterdir()}
    return hub.files.setdefault("tester/base", files)


@pytest.mark.parametrize("down", [slow_case("info"), "read"])
def test_a_base_model_that_the_hub_cannot_give_now(hub, tiny_data, tmp_path, down):
    """That is no mistake of the user."""
    put_base(hub, tiny_data)
    hub.refuse[down] = 500
    assert "tester/base" in refusal_of(hub, tmp_path, tiny_data, *BASE_ON_HUB.split(), status=1)


@pytest.fixture(scope="module")
def from_the_hub(tiny_data, tmp_path_factory):
    """(files of the base model, folder) of a run with a base model on a Hub."""
    hub, folder = new_hub(), tmp_path_factory.mktemp("from_the_hub")
    files = dict(put_base(hub, tiny_data))
    finish(hub, folder, tiny_data, *BASE_ON_HUB.split())
    hub.close()
    return files, folder


def change_weights(files):
    files["model.safetensors"] = other_bits(files["model.safetensors"])


def change_config(files):
    files["config.json"] = json.dumps(json.loads(files["config.json"]) | {"rms_norm_eps": 1e-3}).encode()


NEWER = {  # (what is committed to the base model's repository, whether it is another model)
    "README": (lambda files: files.update({"README.md": b"A typo is fixed.\n"}), False),
    "weights": (change_weights, True),
    "config": (change_config, True),
}


@pytest.mark.parametrize("change", ["README", "weights", slow_case("config")])
def test_a_base_model_on_the_hub_is_what_its_files_are(hub, tiny_data, tmp_path, from_the_hub, change):
    """Not the commit. A result is as good as its model."""
    files, folder = from_the_hub
    folder = shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns(".hf_home"))
    commit, is_another = NEWER[change]
    hub.files["tester/base"] = dict(files)
    before = hub.commit(files)
    commit(hub.files["tester/base"])
    assert hub.commit(hub.files["tester/base"]) != before
    status, out, err = run(hub, folder, tiny_data, *BASE_ON_HUB.split())
    if is_another:
        assert status == 2 and "base_model_files" in error_line(err) and "results/" in err
    else:
        assert status == 0 and "already done" in out
    # And so are stages, without the result.
    shutil.rmtree(folder / "results")
    status, out, err = run(hub, folder, tiny_data, *BASE_ON_HUB.split())
    if is_another:
        assert status == 2 and "base_model_files" in error_line(err) and "output/" in err
    else:
        assert status == 0 and "stage 2, LoReFT is finished" in out and "trainable" not in out


def test_a_folder_of_the_hubs_files_is_the_same_model(tiny_data, tmp_path, from_the_hub):
    """The same identity, and the same outcome."""
    process = start(tmp_path, [*tiny_settings(tiny_data), *FLAGS, "--no-push-to-hub"])
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, out + err
    (here, answers), (there, same) = read_result(tmp_path), read_result(from_the_hub[1])
    assert here["made_with"] == there["made_with"] and answers == same
    assert here["weights"] == there["weights"] and here["loss"] == there["loss"]


def test_a_fixed_revision_of_the_base_model(hub, tiny_data, tmp_path, from_the_hub):
    """The newest one is not looked at. A revision that does not exist is refused."""
    put_base(hub, tiny_data)
    hub.tags["tester/base"] = {"v1": dict(hub.files["tester/base"])}
    change_weights(hub.files["tester/base"])
    commit = hub.commit(hub.tags["tester/base"]["v1"])
    for revision in ("v1", commit):
        folder = tmp_path / revision
        finish(hub, folder, tiny_data, *BASE_ON_HUB.split(), "--base-revision", revision)
        result, predictions = read_result(folder)
        expected, same = read_result(from_the_hub[1])
        assert result["made_with"] == expected["made_with"] and predictions == same
        assert list((folder / "output").glob(f"*-revision_{revision}-*")), "the name says it"
    line = refusal_of(hub, tmp_path / "v2", tiny_data, *BASE_ON_HUB.split(), "--base-revision", "v2")
    assert "tester/base" in line and "RevisionNotFound" in line


def test_a_checkpoint_survives_a_typo_in_the_base_models_readme(hub, tiny_data, tmp_path):
    """An evicted job continues. With other weights, it is refused."""
    files = put_base(hub, tiny_data)
    flags = [*BASE_ON_HUB.split(), "--epochs-lora", "40", "--epochs-reft", "0"]
    job = begin(hub, tmp_path, tiny_data, *flags)
    for line in job.stdout:
        if line.startswith("step 1 of"):
            break
    job.send_signal(signal.SIGTERM)
    status, out, err = end_of(hub, tmp_path, job)
    assert status == 85 and "stopped by SIGTERM after step" in out, out + err
    own = files["model.safetensors"]
    change_weights(files)
    status, out, err = run(hub, tmp_path, tiny_data, *flags)
    line = error_line(err)
    assert status == 2 and "checkpoint.pt was made with base_model_files" in line
    files |= {"model.safetensors": own, "README.md": b"A typo is fixed.\n"}
    assert "resuming from output/" in finish(hub, tmp_path, tiny_data, *flags)


@pytest.mark.slow
def test_a_download_that_another_process_holds(hub, tiny_data, tmp_path):
    """huggingface_hub would wait for its lock for ever, without a word."""
    put_base(hub, tiny_data)
    lock = tmp_path / ".hf_home/hub/.locks/models--tester--base/abc.lock"
    lock.parent.mkdir(parents=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        line = refusal_of(hub, tmp_path, tiny_data, *BASE_ON_HUB.split(), status=1)
    assert "tester/base" in line and str(lock) in line
    finish(hub, tmp_path, tiny_data, *BASE_ON_HUB.split())


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
