"""Every mistake is told in one line, with exit status 2, before anything is written."""

import json
import shutil

import pytest
from conftest import ROOT, start, tiny_settings


@pytest.fixture
def place(tiny, tmp_path):
    """A private copy of the tiny model and data, to be spoilt."""
    shutil.copytree(tiny, tmp_path / "given")
    return tmp_path


def rewrite(path, change):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(change(i, row)) + "\n" for i, row in enumerate(rows)))


def without(key):
    return lambda i, row: {k: v for k, v in row.items() if k != key}


def edit_config(place, **changes):
    path = place / "given/model/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def result_of_another(place):
    (place / "work/results").mkdir(parents=True)
    (place / "work/results/mine.json").write_text(json.dumps({"settings": {"EPOCHS_LORA": 20}}))


def torn_model(place):
    path = place / "given/model/model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def other_version(place):
    """A stage 1 that another base model made."""
    import heft_finetuning as heft

    settings = heft.read_settings(
        tiny_settings(place / "given") + ["--epochs-lora", "1", "--epochs-reft", "1"]
    )
    folder = place / "work/output" / heft.identity(settings, "lora")[0]
    folder.mkdir(parents=True)
    (folder / "heft.json").write_text(
        json.dumps({"settings": {"BASE_VERSION": "another"}, "seconds": 0, "loss": []})
    )


def torn_checkpoint(place):
    import heft_finetuning as heft

    settings = heft.read_settings([*tiny_settings(place / "given"), "--epochs-lora", "1"])
    folder = place / "work/output" / heft.identity(settings, "lora")[0]
    folder.mkdir(parents=True)
    (folder / "checkpoint.pt").write_bytes(b"PK torn")


# what is wrong: flags; how the given files are spoilt; what the line must say
MISTAKES = {
    "unknown flag": (["--epoch-lora", "3"], None, "--epoch-lora"),
    "abbreviated flag": (["--epochs", "3"], None, "--epochs"),
    "stray word": (["3"], None, "unrecognized arguments: 3"),
    "flag without value": (["--seed"], None, "--seed"),
    "epochs not a number": (["--epochs-lora", "three"], None, "--epochs-lora"),
    "epochs negative": (["--epochs-reft", "-1"], None, "--epochs-reft must be a whole number from 0"),
    "epochs not whole": (["--epochs-lora", "2.5"], None, "--epochs-lora"),
    "rank 0": (["--lora-rank", "0"], None, "--lora-rank must be a whole number from 1"),
    "reft rank negative": (["--reft-rank", "-4"], None, "--reft-rank"),
    "dropout 1": (["--lora-dropout", "1"], None, "--lora-dropout must be from 0 to below 1"),
    "learning rate 0": (["--learning-rate-lora", "0"], None, "--learning-rate-lora must be above 0"),
    "learning rate nan": (["--learning-rate-reft", "nan"], None, "--learning-rate-reft"),
    "learning rate inf": (["--learning-rate-reft", "inf"], None, "--learning-rate-reft"),
    "seed too large": (["--seed", "4294967296"], None, "--seed must be a whole number from 0 to below"),
    "step of 0 examples": (["--examples-per-step", "0"], None, "--examples-per-step"),
    "micro-batch of 0 tokens": (["--tokens-per-microbatch", "0"], None, "--tokens-per-microbatch"),
    "no new tokens": (["--max-new-tokens", "0"], None, "--max-new-tokens"),
    "max length 1": (["--max-length", "1"], None, "--max-length must be a whole number from 2"),
    "max length below every prompt": (["--max-length", "8", "--epochs-lora", "0"], None, "--max-length 8"),
    "dtype": (["--dtype", "int8"], None, "--dtype must be bfloat16 or float32"),
    "reft layer": (["--reft-layer", "4"], None, "are 0 to 3"),
    "reft layer negative": (["--reft-layer", "-1"], None, "--reft-layer"),
    "targets": (["--lora-targets", "q_prog"], None, "q_prog"),
    "one of the targets": (["--lora-targets", "q_proj, v_prog"], None, "no layer is called v_prog"),
    "empty model": (["--base-model", ""], None, "--base-model must be a name, not empty"),
    "no such model": (["--base-model", "nobody/nothing"], None, "nobody/nothing"),
    "no such model folder": (["--base-model", "./model"], None, "./model"),
    "model is a file": (
        [],
        lambda p: (shutil.rmtree(p / "given/model"), (p / "given/model").write_text("x")),
        "given/model",
    ),
    "model without weights": (
        [],
        lambda p: (p / "given/model/model.safetensors").unlink(),
        "no weights in safetensors form",
    ),
    "model without config": ([], lambda p: (p / "given/model/config.json").unlink(), "cannot use the model"),
    "model without tokenizer": (
        [],
        lambda p: [f.unlink() for f in (p / "given/model").glob("token*")],
        "cannot use the model",
    ),
    "torn weights": ([], torn_model, "cannot load the model"),
    "weights of fewer layers": (
        [],
        lambda p: edit_config(p, num_hidden_layers=6, layer_types=None),
        "lacks weights",
    ),
    "not for text": ([], lambda p: edit_config(p, model_type="vit"), "cannot use the model"),
    "no such dataset": (["--dataset", "nobody/nothing"], None, "nobody/nothing"),
    "dataset folder empty": (
        [],
        lambda p: [f.unlink() for f in (p / "given/data").iterdir()],
        "cannot read the train split",
    ),
    "dataset without validation": (
        [],
        lambda p: (p / "given/data/validation.jsonl").unlink(),
        "validation split",
    ),
    "dataset without answers": (
        [],
        lambda p: rewrite(p / "given/data/train.jsonl", without("answer")),
        "question and passage (string), answer (bool)",
    ),
    "no answers anywhere": (
        [],
        lambda p: [
            rewrite(p / f"given/data/{split}.jsonl", without("answer")) for split in ("train", "validation")
        ],
        "answer (bool)",
    ),
    "dataset without passages": (
        [],
        lambda p: rewrite(p / "given/data/validation.jsonl", without("passage")),
        "lacks question, passage or answer in row 1",
    ),
    "answers are words": (
        [],
        lambda p: rewrite(p / "given/data/train.jsonl", lambda i, row: row | {"answer": "yes"}),
        "answer (bool)",
    ),
    "an answer is missing": (
        [],
        lambda p: rewrite(
            p / "given/data/train.jsonl", lambda i, row: row | {"answer": None if i == 4 else True}
        ),
        "row 5",
    ),
    "dataset is torn": (
        [],
        lambda p: (p / "given/data/train.jsonl").write_text('{"question": "is'),
        "cannot read the train split",
    ),
    "no rows": ([], lambda p: (p / "given/data/validation.jsonl").write_text(""), "validation split"),
    "push without token": (["--push-to-hub"], None, "set HF_TOKEN"),
    "output is a file": (
        ["--output-dir", "file"],
        lambda p: (p / "work/file").write_text("x"),
        "cannot read or write file:",
    ),
    "results below a file": (
        ["--results-dir", "file/x"],
        lambda p: (p / "work/file").write_text("x"),
        "cannot read or write file/x:",
    ),
    "merged into the base model": (["--merged-dir", "../given/model"], None, "which it would overwrite"),
    "torn checkpoint": ([], torn_checkpoint, "checkpoint.pt is no result of this program: move it away"),
    "results file with a folder": (["--results-file", "../x.json"], None, "--results-file"),
    "result of other settings": (["--results-file", "mine.json"], result_of_another, "epochs_lora 20, not 1"),
    "foreign result": (
        ["--results-file", "mine.json"],
        lambda p: ((p / "work/results").mkdir(), (p / "work/results/mine.json").write_text("[1]")),
        "no result of this program",
    ),
    "stage 1 of another base model": ([], other_version, "base_version 'another'"),
}


def snapshot(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and ".hf_home" not in path.parts and path.name != "lock"
    }


IN_SETTINGS = list(MISTAKES)[: list(MISTAKES).index("max length below every prompt")] + [
    "dtype",
    "reft layer negative",
    "empty model",
    "results file with a folder",
]


@pytest.mark.parametrize("name", IN_SETTINGS)
def test_mistake_in_the_settings(capsys, name):
    """Told by read_settings itself, before anything is read; that the script ends the same way is
    test_mistake's, slow for these."""
    import heft_finetuning as heft

    flags, _, expected = MISTAKES[name]
    with pytest.raises(SystemExit) as end:
        heft.read_settings(flags)
    out, err = capsys.readouterr()
    assert (
        end.value.code == 2
        and not out
        and err.startswith("heft: error: ")
        and err.count("\n") == 1
        and expected in err
    ), err


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if name in IN_SETTINGS[1:] else []) for name in MISTAKES],
)
def test_mistake(place, name):
    flags, spoil, expected = MISTAKES[name]
    work = place / "work"
    work.mkdir()
    if spoil:
        spoil(place)
    before = snapshot(work)
    process = start(
        work,
        tiny_settings(place / "given") + ["--epochs-lora", "1", "--epochs-reft", "1"] + flags,
        HF_TOKEN="",
    )
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2, (out, err)
    err = (
        "\n".join(line for line in err.splitlines() if "Loading weights:" not in line).lstrip() + "\n"
    )  # its bar, where it got so far
    assert err.startswith("heft: error: ") and err.count("\n") == 1 and expected in err, err
    assert "Traceback" not in out + err and len(err) < 900
    assert snapshot(work) == before, "something was written"


@pytest.mark.parametrize(
    "line, wrong",
    [
        ("EPOCHS_LORA = 3 ", 'EPOCHS_LORA = "three" '),
        ("LORA_DROPOUT = 0.05 ", "LORA_DROPOUT = 1.5 "),
        ("REFT_RANK = 4 ", "REFT_RANK = 0 "),
        ("EPOCHS_REFT = 3 ", "EPOCHS_REFT = 2.5 "),
        ("PUSH_TO_HUB = True ", 'PUSH_TO_HUB = "no" '),
        ('MERGED_DIR = "" ', "MERGED_DIR = None "),
    ],
)
def test_a_wrong_constant_is_told_as_its_flag(tmp_path, line, wrong):
    text = (ROOT / "heft_finetuning.py").read_text()
    assert text.count(line) == 1
    (tmp_path / "edited.py").write_text(text.replace(line, wrong))
    process = start(tmp_path, [], script=tmp_path / "edited.py")
    _, err = process.communicate(timeout=120)
    assert (
        process.returncode == 2
        and err.count("\n") == 1
        and "--" + wrong.split(" =")[0].lower().replace("_", "-") in err
    ), err


def test_no_gpu_for_a_model_that_needs_one(place):
    edit_config(
        place,
        hidden_size=4096,
        num_hidden_layers=32,
        intermediate_size=11008,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=128,
        vocab_size=32000,
        layer_types=None,
    )
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    process = start(place / "work", tiny_settings(place / "given") + ["--reft-layer", "15"])
    _, err = process.communicate(timeout=120)
    assert (
        process.returncode == 2
        and "no GPU found" in err
        and "condor_submit" in err
        and "--smoke" in err
        and err.count("\n") == 1
    )
