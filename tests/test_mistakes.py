"""Strangers' settings, data, models and machines: the right answer, or one line that says what to do.

Everything here is checked as a user sees it: exit status 2 (the user can fix it) or 1 (something outside
failed), exactly one line on stderr, no traceback, nothing written."""

import errno
import fcntl
import gc
import json
import os
import shutil
import signal
from pathlib import Path

import datasets
import huggingface_hub
import pytest
import torch
from conftest import ROOT, load, tiny_settings
from inside import outcome, refused, run_inside, run_process
from safetensors.torch import load_file, save_file

SHORT, EVALUATE = "--epochs-lora 1 --epochs-reft 1", "--epochs-lora 0 --epochs-reft 0"


@pytest.fixture
def given(tiny, tmp_path):
    """A private copy of the tiny model and data, to be spoilt."""
    return shutil.copytree(tiny, tmp_path / "given")


@pytest.fixture(scope="module")
def undisturbed(tiny, tmp_path_factory):
    """(folder, losses, texts) of a run of both stages on the tiny model and data as they are."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert run(folder, tiny).status == 0
    return folder, *outcome(folder)


def run(work, given, flags=SHORT):
    shown = run_inside(work, [*map(str, tiny_settings(given)), *flags.split()])
    gc.collect()  # closes the run's locks, as the end of a process does
    return shown


# --- ways to spoil what is given: functions from its folder


def edit_json(name, **changes):
    def spoil(given):
        path = given / name
        path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | changes))

    return spoil


def config(**changes):
    return edit_json("model/config.json", **changes)


def generation(**changes):
    return edit_json("model/generation_config.json", **changes)


def write(name, content):
    def spoil(given):
        path = given / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return spoil


def delete(*patterns):
    return lambda given: [file.unlink() for pattern in patterns for file in given.glob(pattern)]


def edit_bytes(name, change):
    return lambda given: (given / name).write_bytes(change((given / name).read_bytes()))


def edit_row(number, split="train", **changes):
    """Change a row; a value of `...` removes the key."""

    def change(content):
        rows = [json.loads(line) for line in content.splitlines()]
        rows[number - 1] |= changes
        rows[number - 1] = {key: value for key, value in rows[number - 1].items() if value is not ...}
        return "".join(json.dumps(row) + "\n" for row in rows).encode()

    return edit_bytes(f"data/{split}.jsonl", change)


def edit_rows(change, split="train"):
    def changed(content):
        rows = [change(json.loads(line)) for line in content.splitlines()]
        return "".join(json.dumps(row) + "\n" for row in rows).encode()

    return edit_bytes(f"data/{split}.jsonl", changed)


def edit_line(number, change, split="train"):
    """Change a line, given as bytes."""

    def changed(content):
        lines = content.split(b"\n")
        lines[number - 1] = change(lines[number - 1])
        return b"\n".join(lines)

    return edit_bytes(f"data/{split}.jsonl", changed)


def edit_data(change, split="train"):
    return edit_bytes(f"data/{split}.jsonl", change)


def in_form(ending):
    """The data in another form than JSON lines: parquet or csv."""

    def spoil(given):
        for path in (given / "data").glob("*.jsonl"):
            rows = datasets.Dataset.from_list([json.loads(line) for line in path.read_text().splitlines()])
            getattr(rows, f"to_{ending}")(path.with_suffix(f".{ending}"))
            path.unlink()

    return spoil


def dangle(name):
    def spoil(given):
        (given / name).unlink()
        (given / name).symlink_to("nowhere")

    return spoil


def drop_weights(prefix):
    def spoil(given):
        path = given / "model/model.safetensors"
        weights = {name: value for name, value in load_file(path).items() if not name.startswith(prefix)}
        save_file(weights, path, {"format": "pt"})

    return spoil


def add_weights(**shapes):
    """More weights in the file of the model's; dots in their names are written as __."""

    def spoil(given):
        path = given / "model/model.safetensors"
        more = {name.replace("__", "."): torch.ones(shape) for name, shape in shapes.items()}
        save_file(load_file(path) | more, path, {"format": "pt"})

    return spoil


def end_texts_with_eos(given):
    path = given / "model/tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["post_processor"]["single"].append({"SpecialToken": {"id": "</s>", "type_id": 0}})
    tokenizer["post_processor"]["special_tokens"]["</s>"] = {"id": "</s>", "ids": [2], "tokens": ["</s>"]}
    path.write_text(json.dumps(tokenizer))


def add_a_token(given):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(given / "model")
    tokenizer.add_tokens(["on the provided"])
    tokenizer.save_pretrained(given / "model")


def pad_beyond(more):
    """A padding token, and `more` other tokens before it, for which the model has no embeddings."""

    def spoil(given):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(given / "model")
        tokenizer.add_tokens([f"<more{i}>" for i in range(more)], special_tokens=True)
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
        tokenizer.save_pretrained(given / "model")

    return spoil


def normalizers(*kinds):
    """A normalizer in tokenizer.json, of which LlamaTokenizer takes no notice."""
    steps = [kind if isinstance(kind, dict) else {"type": kind} for kind in kinds]
    return edit_json("model/tokenizer.json", normalizer={"type": "Sequence", "normalizers": steps})


def accents(split="validation"):
    return edit_rows(lambda row: row | {"passage": f"Zoë likes ﬁsh. {row['passage']}"}, split)


def eos_as_a_word(given):
    """EOS is a special token only where no letter is beside it: not in `Yes</s>`."""
    path = given / "model/tokenizer.json"
    tokenizer = json.loads(path.read_text())
    (end,) = [token for token in tokenizer["added_tokens"] if token["content"] == "</s>"]
    end["single_word"] = True
    path.write_text(json.dumps(tokenizer))


def window(size):
    return config(model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=size)


def rope(kind, original, **more):
    if kind == "longrope":
        more |= dict(short_factor=[1.0] * 4, long_factor=[2.0] * 4)
    more |= dict(original_max_position_embeddings=original) if original else {}
    return config(rope_parameters={"rope_type": kind, "factor": 2.0, "rope_theta": 1e4, **more})


# --- settings

SETTINGS = [  # flags; what the line must say
    ("--epoch-lora 3", "--epoch-lora"),  # unknown
    ("--epochs 3", "--epochs"),  # abbreviated
    ("3", "unrecognized arguments: 3"),
    ("--seed", "argument --seed: expected one argument"),
    ("--epochs-lora three", "argument --epochs-lora: must be a whole number from 0"),
    ("--epochs-reft -1", "argument --epochs-reft: must be a whole number from 0"),
    ("--epochs-lora 2.5", "argument --epochs-lora: must be"),
    ("--lora-rank 0", "argument --lora-rank: must be a whole number from 1"),
    ("--reft-rank -4", "argument --reft-rank: must be"),
    ("--lora-dropout 1", "argument --lora-dropout: must be from 0 to below 1"),
    ("--lora-dropout nan", "argument --lora-dropout: must be"),
    ("--learning-rate-lora 0", "argument --learning-rate-lora: must be above 0"),
    ("--learning-rate-reft nan", "argument --learning-rate-reft: must be"),
    ("--learning-rate-reft inf", "argument --learning-rate-reft: must be"),
    ("--seed 4294967296", "argument --seed: must be a whole number from 0"),
    ("--examples-per-step 0", "argument --examples-per-step: must be"),
    ("--tokens-per-microbatch 0", "argument --tokens-per-microbatch: must be"),
    ("--max-new-tokens 0", "argument --max-new-tokens: must be"),
    ("--max-train-samples -5", "argument --max-train-samples: must be"),
    ("--max-length 1", "argument --max-length: must be a whole number from 2"),
    ("--dtype int8", "argument --dtype: must be bfloat16 or float32"),
    ("--reft-layer -1", "argument --reft-layer: must be"),
    ("--base-model=", "argument --base-model: must be a name, not empty"),
    ("--push-to-hub=no", "argument --push-to-hub"),
]


@pytest.mark.parametrize("flags, expected", SETTINGS)
def test_wrong_flag(tmp_path, flags, expected):
    refused(run_inside(tmp_path, flags.split()), expected)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name, wrong",
    [
        ("EPOCHS_LORA", '"three"'),
        ("LORA_DROPOUT", "1.5"),
        ("REFT_RANK", "0"),
        ("EPOCHS_REFT", "2.5"),
        ("LEARNING_RATE_REFT", "None"),
        ("PUSH_TO_HUB", '"no"'),
        ("OUTPUT_DIR", '"$NO_SUCH_VARIABLE/output"'),
    ],
)
def test_wrong_constant_reads_like_its_flag(tmp_path, name, wrong):
    text = (ROOT / "heft_finetuning.py").read_text()
    (line,) = [line for line in text.splitlines() if line.startswith(f"{name} = ")]
    (tmp_path / "edited.py").write_text(text.replace(line, f"{name} = {wrong}"))
    message = refused(run_inside(tmp_path, [], tmp_path / "edited.py"), "must be")
    assert name in message or "--" + name.lower().replace("_", "-") in message


def test_wrong_flag_of_a_real_process(tmp_path):
    shown = run_process(tmp_path, ["--lora-rank", "0"])
    refused(shown, "--lora-rank")
    assert shown.out == "heft: loading the libraries\n"


# --- folders with ~ and $VARIABLE, from an edited constant or a file of HTCondor: no shell has expanded them


@pytest.mark.parametrize("written", ["~", "$SCRATCH", "${SCRATCH}", "$HOME"])
def test_folders_are_expanded(given, undisturbed, monkeypatch, written):
    monkeypatch.setenv("HOME", str(given.parent))
    monkeypatch.setenv("SCRATCH", str(given.parent))
    work = given.parent / "work"
    places = dict(
        base_model="given/model", dataset="given/data", output_dir="my/output", results_dir="work/results"
    )
    flags = " ".join(f"--{name.replace('_', '-')} {written}/{path}" for name, path in places.items())
    shown = run(work, given, f"{SHORT} {flags}")
    assert shown.status == 0 and not shown.err, shown
    assert list(outcome(work)) == list(undisturbed[1:])
    assert [path.name for path in work.iterdir()] == ["results"]
    assert len(list((given.parent / "my/output").glob("lora1-*"))) == 2
    shown = run(work, given)  # the same settings, written out
    assert shown.status == 0 and "already done" in shown.out


def test_an_edited_constant_is_expanded(given, monkeypatch):
    monkeypatch.setenv("SCRATCH", str(given.parent / "scratch"))
    text, work = (ROOT / "heft_finetuning.py").read_text(), given.parent / "work"
    edited = given / "edited.py"
    edited.write_text(text.replace('\nOUTPUT_DIR = "output"', '\nOUTPUT_DIR = "$SCRATCH/output"'))
    flags = [*map(str, tiny_settings(given)), *"--epochs-lora 1 --epochs-reft 0".split()]
    shown = run_inside(work, flags, edited)
    assert shown.status == 0 and not shown.err, shown
    assert list(given.parent.glob("scratch/output/lora1-*/heft.json")) and not list(work.glob("*SCRATCH*"))


@pytest.mark.parametrize("flag", ["--output-dir", "--results-dir", "--base-model", "--dataset"])
@pytest.mark.parametrize("place", ["$NO_SUCH_VARIABLE/x", "x/${NO_SUCH_VARIABLE}", "~no_such_user/x"])
def test_a_variable_without_a_value(given, flag, place):
    work = given.parent / "work"
    refused(run(work, given, f"{SHORT} {flag} {place}"), f"argument {flag}", place)
    assert not list(work.iterdir())


# --- data, models, folders: what is refused

REFUSED = {  # what is wrong: how the given files are spoilt; flags; what the line must say
    # Data that is not what it seems
    "number as question": (edit_row(5, question=7), "", "train.jsonl, line 5"),
    "number as passage": (edit_row(2, "validation", passage=1.5), "", "validation.jsonl, line 2"),
    "question null": (edit_row(1, question=None), "", "train.jsonl, line 1"),
    "question and passage lists": (edit_row(3, question=["a"], passage=["b"]), "", "train.jsonl, line 3"),
    "question an object": (edit_row(3, question={"text": "a"}), "", "train.jsonl, line 3"),
    "answer -1": (edit_row(5, answer=-1), "", "train.jsonl, line 5", "-1"),
    "answer 2": (edit_row(5, answer=2), "", "train.jsonl, line 5", "2"),
    "answer 0.5": (edit_row(5, answer=0.5), "", "train.jsonl, line 5", "0.5"),
    "answer 1.0": (edit_row(5, answer=1.0), "", "train.jsonl, line 5"),
    "answer a word": (edit_row(4, "validation", answer="yes"), "", "validation.jsonl, line 4", "yes"),
    "answer the text true": (edit_row(5, answer="true"), "", "train.jsonl, line 5"),
    "answer null": (edit_row(5, answer=None), "", "train.jsonl, line 5"),
    "answer a list": (edit_row(5, answer=[True]), "", "train.jsonl, line 5"),
    "answer missing": (edit_row(5, answer=...), "", "train.jsonl, line 5", "answer"),
    "answers -1, as in BoolQ's test split": (edit_rows(lambda row: row | {"answer": -1}), "", "line 1", "-1"),
    "no passages": (
        edit_rows(lambda row: {"question": "q", "answer": True}, "validation"),
        "",
        "validation.jsonl, line 1",
        "passage",
    ),
    "after the rows that are used": (edit_row(9, answer=2), "--max-train-samples 4", "train.jsonl, line 9"),
    "last line truncated": (edit_data(lambda content: content[:-20]), "", "train.jsonl, line 45"),
    "line truncated": (edit_line(3, lambda line: line[:40]), "", "train.jsonl, line 3"),
    "two rows in a line": (edit_line(3, lambda line: line + line), "", "train.jsonl, line 3"),
    "line is a list": (edit_line(3, lambda line: b"[1]"), "", "train.jsonl, line 3"),
    "line is text": (edit_line(3, lambda line: b'"abc"'), "", "train.jsonl, line 3"),
    "line is null": (edit_line(3, lambda line: b"null"), "", "train.jsonl, line 3"),
    "answer twice": (
        edit_line(3, lambda line: line.replace(b"{", b'{"answer": true, ', 1)),
        "",
        "train.jsonl, line 3",
        "twice",
    ),
    "answer twice, the same": (
        edit_line(3, lambda line: line[:-1] + b"," + line[line.index(b'"answer"') :]),
        "",
        "train.jsonl, line 3",
        "twice",
    ),
    "question twice": (
        edit_line(7, lambda line: line[:-1] + b', "question": "is it so"}', "validation"),
        EVALUATE,
        "validation.jsonl, line 7",
        "twice",
    ),
    "question twice, once escaped": (
        edit_line(7, lambda line: line[:-1] + b', "q\\u0075estion": "is it so"}', "validation"),
        EVALUATE,
        "validation.jsonl, line 7",
        "twice",
    ),
    "blank line": (edit_line(3, lambda line: b""), "", "train.jsonl, line 3"),
    "blank line at the end": (edit_data(lambda content: content + b"\n"), "", "train.jsonl, line 46"),
    "answers 0 and 1": (
        edit_rows(lambda row: row | {"answer": int(row["answer"])}),
        "",
        "train.jsonl, line 1",
        "true or false",
    ),
    "empty file": (edit_data(lambda content: b"", "validation"), "", "validation split", "empty"),
    "lone surrogate": (edit_row(3, passage="a \ud800 b"), "", "train.jsonl, line 3"),
    "UTF-16": (edit_data(lambda content: content.decode().encode("utf-16")), "", "train.jsonl, line "),
    "Latin-1": (
        edit_line(3, lambda line: line.replace(b"Passage", b"").replace(b"a", b"\xe9")),
        "",
        "line 3",
    ),
    "one JSON list": (
        edit_data(
            lambda content: json.dumps([json.loads(line) for line in content.splitlines()], indent=1).encode()
        ),
        "",
        "train.jsonl, line 1",
    ),
    "deeply nested": (edit_line(3, lambda line: b"[" * 100_000), "", "train.jsonl, line 3"),
    "parquet only": (in_form("parquet"), "", "train.jsonl", "to_json"),
    "csv only": (in_form("csv"), "", "train.jsonl", "to_json"),
    "no validation": (delete("data/validation.jsonl"), "", "validation.jsonl", "to_json"),
    "train.jsonl is a folder": (
        lambda given: (delete("data/train.jsonl")(given), (given / "data/train.jsonl").mkdir()),
        "",
        "train.jsonl",
    ),
    "dangling link as data": (dangle("data/train.jsonl"), "", "train.jsonl"),
    "data is a file": (None, "--dataset ../given/data/train.jsonl", "../given/data/train.jsonl"),
    "no such dataset": (None, "--dataset nobody/nothing", "nobody/nothing"),
    "dataset without its owner": (None, "--dataset boolq", "google/boolq"),
    # A model is more than its weights file
    "an adapter beside the weights": (write("model/adapter_config.json", "{}"), "", "adapter"),
    "an adapter with weights": (
        lambda given: [
            write("model/adapter_config.json", '{"peft_type": "LORA"}')(given),
            write("model/adapter_model.safetensors", "")(given),
        ],
        EVALUATE,
        "adapter",
    ),
    "lm_head, tied": (
        config(tie_word_embeddings=True),
        "--lora-targets lm_head",
        "--lora-targets",
        "lm_head",
    ),
    "embed_tokens, tied": (
        config(tie_word_embeddings=True),
        "--lora-targets q_proj,embed_tokens",
        "--lora-targets",
        "embed_tokens",
    ),
    "tokenizer ends texts with EOS": (end_texts_with_eos, EVALUATE, "tokenizer", "add_eos_token"),
    "sliding window": (window(8), "", " 8 ", "--epochs-reft 0"),
    "sliding window, stage 2 alone": (window(30), "--epochs-lora 0", " 30 ", "--epochs-reft 0"),
    "dynamic rotary embeddings": (rope("dynamic", 32), EVALUATE, "32"),
    "dynamic rotary embeddings, the old spelling": (
        config(
            rope_parameters=None, rope_scaling={"type": "dynamic", "factor": 2.0}, max_position_embeddings=32
        ),
        "",
        "32",
    ),
    "longrope": (rope("longrope", 16), "", "16"),
    "EOS outside the embedding": (config(vocab_size=2), EVALUATE, "tokens"),
    "a token outside the embedding": (add_a_token, EVALUATE, "tokens"),
    "prompts above the model's positions": (config(max_position_embeddings=16), EVALUATE, "16"),
    "answers above the model's positions": (
        config(max_position_embeddings=300),
        "--max-new-tokens 290",
        "300",
    ),
    "dangling link as weights": (dangle("model/model.safetensors"), "", "model.safetensors"),
    "dangling link as tokenizer": (dangle("model/tokenizer.json"), "", "given/model"),
    "dangling link as configuration": (dangle("model/config.json"), "", "given/model"),
    "multimodal": (
        write(
            "model/config.json",
            json.dumps({"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]}),
        ),
        "",
        "multimodal",
    ),
    "multimodal, another": (write("model/config.json", '{"model_type": "qwen2_vl"}'), EVALUATE, "multimodal"),
    "quantized": (config(quantization_config={"quant_method": "gptq", "bits": 4}), "", "quantized"),
    "quantized, by bitsandbytes": (
        config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        EVALUATE,
        "quantized",
    ),
    "configuration is not JSON": (write("model/config.json", "{"), "", "given/model"),
    "configuration is a list": (write("model/config.json", "[]"), "", "given/model"),
    "configuration of nothing": (write("model/config.json", "{}"), "", "given/model"),
    "configuration without sizes": (config(hidden_size="large"), "", "given/model"),
    "a program of its own": (
        config(model_type="own", auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}),
        "",
        "given/model",
    ),
    "encoder and decoder": (write("model/config.json", '{"model_type": "t5"}'), "", "given/model"),
    "no language model": (config(model_type="vit"), "", "given/model"),
    "tokenizer is not JSON": (write("model/tokenizer.json", "{"), "", "given/model"),
    "a tokenizer without capitals": (
        lambda given: (  # LlamaTokenizer would make a normalizer of its own
            edit_json("model/tokenizer.json", normalizer={"type": "Lowercase"})(given),
            edit_json("model/tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")(given),
        ),
        "",
        "tokenizer",
        "'Yes'",
    ),
    "EOS that the tokenizer lacks": (
        edit_json("model/tokenizer_config.json", eos_token="</end>"),
        EVALUATE,
        "tokens",
    ),
    "a tokenizer that splits special tokens": (
        edit_json("model/tokenizer_config.json", split_special_tokens=True),
        EVALUATE,
        "tokenizer",
        "split_special_tokens",
    ),
    "an EOS of several tokens": (
        lambda given: edit_json("model/tokenizer_config.json", split_special_tokens=True, eos_token="Yes No")(
            given
        ),
        EVALUATE,
        "tokenizer",
        "Yes No",
    ),
    "an EOS that is none after a word": (eos_as_a_word, "", "tokenizer"),
    "a pre-tokenizer that is ignored": (
        edit_json(
            "model/tokenizer.json",
            pre_tokenizer={
                "type": "Sequence",
                "pretokenizers": [
                    {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False},
                    {
                        "type": "Split",
                        "pattern": {"Regex": "[aeiou]"},
                        "behavior": "Isolated",
                        "invert": False,
                    },
                ],
            },
        ),
        "",
        "tokenizer.json",
        "use another model",
    ),
    "a normalizer that is ignored": (
        normalizers("Lowercase"),
        EVALUATE,
        "tokenizer.json",
        "use another model",
    ),
    "a normalizer that is ignored, and matters in one row": (
        lambda given: (normalizers("NFKD", "StripAccents")(given), accents()(given)),
        EVALUATE,
        "tokenizer.json",
        "use another model",
    ),
    "a normalizer that removes words": (
        normalizers({"type": "Replace", "pattern": {"String": "the"}, "content": ""}),
        "",
        "tokenizer.json",
        "use another model",
    ),
    "weights without the output layer": (
        drop_weights("lm_head"),
        "",
        "are not those",
        "missing",
        "lm_head.weight",
    ),
    "no EOS": (edit_json("model/tokenizer_config.json", eos_token=None), "", "end-of-sequence"),
    "no tokenizer": (delete("model/token*"), "", "given/model"),
    "no weights": (delete("model/model.safetensors"), "", "safetensors"),
    "weights of the old form": (
        lambda given: (given / "model/model.safetensors").rename(given / "model/pytorch_model.bin"),
        "",
        "safetensors",
    ),
    "no configuration": (delete("model/config.json"), "", "given/model"),
    "weights torn": (
        edit_bytes("model/model.safetensors", lambda content: content[:1000]),
        "",
        "given/model",
    ),
    "weights of more layers": (
        config(num_hidden_layers=3, layer_types=None),
        "",
        "unexpected",
        "model.layers.3.",
        "config.json",
    ),
    "attention biases that the configuration forgets": (
        add_weights(model__layers__0__self_attn__q_proj__bias=32),
        EVALUATE,
        "unexpected",
        "model.layers.0.self_attn.q_proj.bias",
    ),
    "scales of fp8 weights": (
        add_weights(model__layers__1__mlp__up_proj__weight_scale=1),
        "--epochs-reft 0",
        "unexpected",
        "model.layers.1.mlp.up_proj.weight_scale",
    ),
    "weights of fewer layers": (config(num_hidden_layers=6, layer_types=None), "", "missing", "layers.4."),
    "weights of another width": (config(hidden_size=64), "", "given/model"),
    "no such model": (None, "--base-model nobody/nothing", "nobody/nothing"),
    "no such folder": (None, "--base-model ./model", "./model"),
    "model is a file": (None, "--base-model ../given/model/config.json", "config.json"),
    "no such block": (None, "--reft-layer 4", "--reft-layer", "0 to 3"),
    "rank above the width": (None, "--reft-rank 33", "--reft-rank", "32"),
    "no such target": (None, "--lora-targets q_prog", "q_prog"),
    "one of the targets": (None, "--lora-targets q_proj,v_prog", "no layer", "v_prog"),
    "targets without a name": (None, "--lora-targets ,", "--lora-targets"),
    "a target that is no linear layer": (None, "--lora-targets input_layernorm", "input_layernorm"),
    "every example too long": (None, "--max-length 8 --epochs-lora 0", "--max-length 8"),
    # Surroundings
    "push without a token": (None, "--push-to-hub", "HF_TOKEN"),
    "output is a file": (write("../work/file", "x"), "--output-dir file", "'file'"),
    "results below a file": (write("../work/file", "x"), "--results-dir file/x", "file/x"),
    "output under too long a name": (None, f"--output-dir {'x' * 300}", "choose another"),
    "result of other settings": (
        write(
            "../work/results/lora1-reft1-model-on_data-reft_layer2-dtype_float32.json",
            '{"made_with": {"EPOCHS_LORA": 20}, "commit": null, "script_sha256": "0123456789"}',
        ),
        "",
        "results/lora1-reft1-",
        "epochs_lora 20, not 1",
    ),
    "result of an older edition": (
        write(
            "../work/results/lora1-reft1-model-on_data-reft_layer2-dtype_float32.json",
            '{"settings": {"EPOCHS_LORA": 1, "FORMAT": 3}}',
        ),
        "",
        "results/lora1-reft1-",
        "not of this version",
    ),
    "result of another program": (
        write("../work/results/lora1-reft1-model-on_data-reft_layer2-dtype_float32.json", "[1]"),
        "",
        "results/lora1-reft1-",
    ),
}


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(given, monkeypatch, what):
    spoil, flags, *expected = REFUSED[what]
    monkeypatch.setenv("HF_TOKEN", "")
    work = given.parent / "work"
    work.mkdir()
    if spoil:
        (work / "results").mkdir()
        spoil(given)
    before = files_of(work)
    refused(run(work, given, f"{SHORT} {flags}"), *expected)
    locks = {path: content for path, content in files_of(work).items() if path.name == "lock"}
    assert files_of(work) == before | locks, "something was written"
    assert not any(locks.values()) and (not locks or "weights" in what), "something was written"


# --- data, models, folders: what must not change the answers, and what is right


def beside(name, source="data/train.jsonl"):
    """A copy of the training data, answers flipped, under a name beside the data."""

    def spoil(given):
        rows = [json.loads(line) for line in (given / source).read_text().splitlines()]
        write(name, "".join(json.dumps(row | {"answer": not row["answer"]}) + "\n" for row in rows))(given)

    return spoil


def renamed(name):
    """The data in a folder of this name, other data in the folder `data1`."""

    def spoil(given):
        (given / "data").rename(given / name)
        for split in ("train", "validation"):
            beside(f"data1/{split}.jsonl", f"{name}/{split}.jsonl")(given)

    return spoil


SAME = {  # as in REFUSED: how the files are spoilt; flags. Losses and answers are those of files as they were
    "data[1] beside data1": (renamed("data[1]"), "--dataset ../given/data[1]"),
    "data? beside data1": (renamed("data?"), "--dataset ../given/data?"),
    "data* beside data1": (renamed("data*"), "--dataset ../given/data*/"),
    "link to the data": (lambda given: (given / "link").symlink_to("data"), "--dataset ../given/link"),
    "train_old.jsonl": (beside("data/train_old.jsonl"), ""),
    "train-00001.jsonl": (beside("data/train-00001.jsonl"), ""),
    "train.json and train.csv": (
        lambda given: [beside("data/train.json")(given), write("data/train.csv", "a,b")(given)],
        "",
    ),
    "a subfolder": (beside("data/train/train.jsonl"), ""),
    "a backup": (beside("data/train.jsonl~"), ""),
    "a hidden file": (beside("data/.train.jsonl"), ""),
    "a test split without answers": (write("data/test.jsonl", '{"question": "q"}'), ""),
    "unrelated files": (
        lambda given: [
            write("data/README.md", "---\nx: [")(given),
            write("data/dataset_infos.json", "{")(given),
        ],
        "",
    ),
    "more columns": (edit_rows(lambda row: {"id": None} | row | {"title": [1]}), ""),
    "lines end as on Windows": (edit_data(lambda content: content.replace(b"\n", b"\r\n")), ""),
    "no line end at the end": (edit_data(lambda content: content.rstrip()), ""),
    "JSON escapes": (edit_data(lambda content: content.replace(b"Anna", b"\\u0041nna")), ""),
    "suppress_tokens": (generation(suppress_tokens=list(range(3, 700))), ""),
    "suppress_tokens in config.json": (config(suppress_tokens=list(range(3, 700))), ""),
    "begin_suppress_tokens": (generation(begin_suppress_tokens=list(range(3, 700))), ""),
    "bad_words_ids": (generation(bad_words_ids=[[i] for i in range(3, 700)]), ""),
    "forced tokens": (generation(forced_bos_token_id=5, forced_eos_token_id=6), ""),
    "beams": (generation(num_beams=3, do_sample=False), ""),
    "beams in config.json": (config(num_beams=3, length_penalty=3.0), ""),
    "min_new_tokens": (generation(min_new_tokens=9, max_new_tokens=20), ""),
    "max_length": (generation(max_length=3), ""),
    "repetition": (generation(repetition_penalty=9.0, no_repeat_ngram_size=1), ""),
    "temperature without do_sample": (generation(do_sample=False, temperature=0.6, top_p=0.9), ""),
    "other ends": (generation(eos_token_id=list(range(300)), pad_token_id=7), ""),
    "stop_strings": (generation(stop_strings=["a", "e"]), ""),
    "several sequences": (generation(num_return_sequences=4), ""),
    "a dict as output": (generation(return_dict_in_generate=True, output_scores=True), ""),
    "use_cache": (generation(use_cache=False), ""),
    "cache_implementation": (generation(cache_implementation="static"), ""),
    "guidance": (generation(guidance_scale=3.0), ""),
    "prompt lookup": (generation(prompt_lookup_num_tokens=3), ""),
    "values of another type": (generation(num_beams="many", temperature=[]), ""),
    "generation configuration is not JSON": (write("model/generation_config.json", "{"), ""),
    "no generation configuration": (delete("model/generation_config.json"), ""),
    "longer window": (window(200), ""),
    "dynamic rotary embeddings, long enough": (rope("dynamic", 2048), ""),
    "longrope, long enough": (rope("longrope", 512, attention_factor=1.0), ""),
    "a tokenizer that pads and cuts": (
        edit_json(
            "model/tokenizer.json",
            truncation={"direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0},
            padding={
                "strategy": {"Fixed": 300},
                "direction": "Right",
                "pad_to_multiple_of": None,
                "pad_id": 2,
                "pad_type_id": 0,
                "pad_token": "</s>",
            },
        ),
        "",
    ),
    "a model_max_length": (edit_json("model/tokenizer_config.json", model_max_length=16), ""),
    "padding on the other side": (edit_json("model/tokenizer_config.json", padding_side="right"), ""),
    "no mask among the tokenizer's outputs": (
        edit_json("model/tokenizer_config.json", model_input_names=["input_ids"]),
        "",
    ),
    "token types among the tokenizer's outputs": (
        edit_json("model/tokenizer_config.json", model_input_names=["input_ids", "token_type_ids"]),
        "",
    ),
    "a padding token beyond the embedding": (pad_beyond(0), ""),
    "a padding token far beyond the embedding": (pad_beyond(7), ""),
    "a normalizer that is ignored, without consequence": (normalizers("NFKD", "StripAccents"), ""),
    "Llama 2's own tokenizer.json": (
        edit_json(
            "model/tokenizer.json",
            normalizer={
                "type": "Sequence",
                "normalizers": [
                    {"type": "Prepend", "prepend": "▁"},
                    {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
                ],
            },
            pre_tokenizer=None,
        ),
        "",
    ),
    "rotary frequencies among the weights, as in Llama 2's file": (
        add_weights(model__layers__0__self_attn__rotary_emb__inv_freq=4),
        "",
    ),
    "weights of another type": (config(dtype="float64"), ""),
}


@pytest.mark.parametrize("what", SAME)
def test_same_answers(given, undisturbed, what):
    spoil, flags = SAME[what]
    spoil(given)
    shown = run(given.parent / "work", given, f"{SHORT} {flags}")
    assert shown.status == 0 and not shown.err, shown
    assert list(outcome(given.parent / "work")) == list(undisturbed[1:])


def test_a_file_rewritten_under_its_old_time_stamp(given):
    """The rows count, not what a cache remembers of the file."""
    work, path, flags = given.parent / "work", given / "data/train.jsonl", "--epochs-lora 1 --epochs-reft 0"
    assert run(work, given, flags).status == 0
    before = path.stat()
    edit_row(1, question="is b")(given)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    refused(run(work, given, flags), "train_data")
    assert run(given.parent / "elsewhere", given, flags).status == 0
    assert outcome(work)[0]["lora"] != outcome(given.parent / "elsewhere")[0]["lora"]


def test_a_byte_order_mark(given, undisturbed):
    """Either it is not part of the data, or its line is named."""
    edit_data(lambda content: b"\xef\xbb\xbf" + content)(given)
    shown = run(given.parent / "work", given)
    if shown.status:
        return refused(shown, "train.jsonl, line 1")
    assert list(outcome(given.parent / "work")) == list(undisturbed[1:])


def test_numbers_as_questions_do_not_change_the_others(given):
    """The wrong row is named, and the file without it is read as it is."""
    edit_row(5, "validation", question=7)(given)
    refused(run(given.parent / "work", given, EVALUATE), "validation.jsonl, line 5")
    edit_row(5, "validation", question="7")(given)
    assert run(given.parent / "work", given, EVALUATE).status == 0
    (file,) = (given.parent / "work/results").glob("*.predictions.jsonl")
    questions = [json.loads(line)["question"] for line in file.read_text().splitlines()]
    rows = (given / "data/validation.jsonl").read_text().splitlines()
    assert questions == [json.loads(line)["question"] for line in rows] and questions[4] == "7"


# --- data of the Hub, by a stand-in for datasets.load_dataset


def hub_data(monkeypatch, change=lambda rows: rows, split="train"):
    """Let the Hub's dataset me/questions be the tiny data, one split changed (a datasets.Dataset)."""

    def load_dataset(name, *, split, data=None):
        assert name == "me/questions"
        lines = (load_dataset.folder / f"{split}.jsonl").read_text().splitlines()
        rows = datasets.Dataset.from_list([json.loads(line) for line in lines])
        return change(rows) if split == load_dataset.changed else rows

    load_dataset.changed = split
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return load_dataset


def with_answers(values, feature):
    """The rows with other answers, given as a function from a row's answer."""

    def change(rows):
        answers = [values(answer) for answer in rows["answer"]]
        return rows.remove_columns("answer").add_column("answer", answers, feature=datasets.Value(feature))

    return change


def with_row(number, **changes):
    def change(rows):
        found = rows.to_list()
        found[number - 1] |= changes
        return datasets.Dataset.from_list(found, features=rows.features)

    return change


def as_class_label(names):
    return lambda rows: rows.cast_column("answer", datasets.ClassLabel(names=names))


HUB_REFUSED = {  # how the rows are changed; what the line must say
    "class label no, yes": (as_class_label(["no", "yes"]), "row 1", "its answer is "),
    "class label yes, no": (as_class_label(["yes", "no"]), "row 1", "its answer is "),
    "whole numbers": (with_answers(int, "int64"), "row 1", "its answer is "),
    "unlabelled, as -1": (with_answers(lambda _: -1, "int8"), "row 1", "its answer is -1"),
    "fractions": (with_answers(float, "float32"), "row 1", "its answer is "),
    "words": (with_answers(str, "string"), "row 1", "its answer is "),
    "an answer is missing": (with_row(4, answer=None), "row 4", "train"),
    "a question is missing": (with_row(6, question=None), "row 6", "train"),
    "no answers": (lambda rows: rows.remove_columns("answer"), "row 1", "'answer'"),
    "another name": (lambda rows: rows.rename_column("passage", "context"), "row 1", "'passage'"),
    "lists as questions": (
        lambda rows: rows.map(lambda row: {"question": [row["question"]]}, load_from_cache_file=False),
        "row 1",
        "its question is [",
    ),
    "no rows": (lambda rows: rows.select([]), "train split", "empty"),
}


@pytest.mark.parametrize("what", HUB_REFUSED)
def test_refused_from_the_hub(given, monkeypatch, what):
    change, *expected = HUB_REFUSED[what]
    hub_data(monkeypatch, change).folder = given / "data"
    refused(run(given.parent / "work", given, f"{SHORT} --dataset me/questions"), "me/questions", *expected)


@pytest.mark.parametrize("columns", ["as in BoolQ", "more", "large passages", "large texts"])
def test_data_of_the_hub(given, undisturbed, monkeypatch, columns):
    """google/boolq has question (string), answer (bool), passage (string): the same as from a folder."""

    def change(rows):
        rows = rows.select_columns(["question", "answer", "passage"])
        large = {"large passages": ["passage"], "large texts": ["passage", "question"]}.get(columns, [])
        for name in large:  # as pandas and polars write texts
            rows = rows.cast_column(name, datasets.Value("large_string"))
        return rows.add_column("title", [None] * len(rows)) if columns == "more" else rows

    for split in ("train", "validation"):
        hub_data(monkeypatch, change, split).folder = given / "data"
    shown = run(given.parent / "work", given, f"{SHORT} --dataset me/questions")
    assert shown.status == 0 and not shown.err, shown
    assert list(outcome(given.parent / "work")) == list(undisturbed[1:])


@pytest.mark.parametrize(
    "error, status",
    [
        (datasets.exceptions.DatasetNotFoundError("no such dataset"), 2),
        (ValueError("Unknown split \"train\". Should be one of ['test']."), 2),
        (ConnectionError("cut"), 1),
        (TimeoutError("late"), 1),
    ],
)
def test_the_hub_fails(given, monkeypatch, error, status):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: (_ for _ in ()).throw(error))
    shown = run(given.parent / "work", given, f"{SHORT} --dataset me/questions")
    refused(shown, "me/questions", str(error)[:20], status=status)


@pytest.fixture
def uploaded(given, monkeypatch):
    """The folder that receives what --push-to-hub uploads, by stand-ins for huggingface_hub's functions."""
    folder, account = given.parent / "uploaded", {"name": "me", "auth": {"accessToken": {"role": "write"}}}
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    monkeypatch.setattr(huggingface_hub, "whoami", lambda cache: account)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda _: [])
    monkeypatch.setattr(huggingface_hub, "create_repo", lambda *_, **__: None)
    monkeypatch.setattr(
        huggingface_hub, "upload_folder", lambda folder_path, **_: shutil.copytree(folder_path, folder)
    )
    return folder


# --- greedy means greedy: what is saved keeps the model's generation configuration


@pytest.mark.parametrize(
    "content",
    ['{"suppress_tokens": [5],\n "do_sample": true,  "temperature": 0.6}', "{", '{"num_beams": "many"}'],
)
def test_the_merged_model_keeps_the_generation_configuration(given, uploaded, content):
    write("model/generation_config.json", content)(given)
    work, flags = given.parent / "work", "--epochs-lora 1 --epochs-reft 0 --push-to-hub"
    assert run(work, given, flags).status == 0
    assert (uploaded / "generation_config.json").read_text() == content
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (uploaded / name).read_bytes() == (given / "model" / name).read_bytes()
    delete("model/generation_config.json")(given)
    shutil.rmtree(uploaded)
    assert run(work, given, flags).status == 0
    assert not (uploaded / "generation_config.json").exists()


# --- a model is more than its weights file


@pytest.mark.parametrize(
    "spoil",
    [
        config(rope_parameters={"rope_type": "default", "rope_theta": 500.0}),
        config(rms_norm_eps=1e-2),
        edit_bytes("model/tokenizer.json", lambda content: content.replace(b"<0x41>", b"<0x4_>")),
        edit_json("model/tokenizer_config.json", add_prefix_space=False),
        write("model/special_tokens_map.json", '{"eos_token": "<s>"}'),
        edit_bytes("model/model.safetensors", lambda content: content[:-1] + bytes([content[-1] ^ 1])),
    ],
    ids="rope_theta rms_norm_eps tokenizer tokenizer_config special_tokens weights".split(),
)
def test_an_edited_model_is_another_model(given, undisturbed, spoil):
    work = shutil.copytree(undisturbed[0], given.parent / "work")
    shown = run(work, given)
    assert shown.status == 0 and "already done" in shown.out
    spoil(given)
    refused(run(work, given), "base_model_files")
    shutil.rmtree(work / "results")
    refused(run(work, given), "base_model_files")


def test_files_that_decide_nothing_may_change(given, undisturbed):
    work = shutil.copytree(undisturbed[0], given.parent / "work")
    generation(num_beams=5)(given)
    write("model/README.md", "a model")(given)
    shown = run(work, given)
    assert shown.status == 0 and "already done" in shown.out


@pytest.mark.parametrize(
    "targets, tied",
    [
        ("lm_head", False),
        ("embed_tokens", False),
        ("lm_head,v_proj,embed_tokens", False),
        ("all-linear", True),
    ],
)
def test_the_merged_model_is_the_trained_one(given, uploaded, targets, tied):
    """Where a target can be merged, the merged model's logits equal those of base and adapter."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    config(tie_word_embeddings=tied)(given)
    work, flags = given.parent / "work", "--epochs-lora 1 --epochs-reft 0 --push-to-hub"
    shown = run(work, given, f"{flags} --learning-rate-lora 1e-2 --lora-targets {targets}")
    assert shown.status == 0, shown
    model, tokenizer = load(given / "model")
    inputs = tokenizer("Anna never keeps cats.", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        base = model(inputs).logits
        (folder,) = (work / "output").glob("lora1-*")
        trained = PeftModel.from_pretrained(model, folder)(inputs).logits
        merged = AutoModelForCausalLM.from_pretrained(uploaded, dtype=torch.float32)(inputs).logits
    torch.testing.assert_close(merged, trained, atol=1e-4, rtol=1e-4)
    assert (base - trained).abs().max() > 0.05


@pytest.mark.parametrize("size", [8, 200])
def test_a_sliding_window_does_not_meet_the_padding(given, size):
    """Where such a model is accepted, the micro-batches change no loss and no answer."""
    window(size)(given)
    found, stages = [], "--epochs-lora 1 --epochs-reft 0" if size == 8 else SHORT
    for tokens in (1, 300, 4096):
        work = given.parent / f"work{tokens}"
        shown = run(work, given, f"{stages} --lora-dropout 0 --tokens-per-microbatch {tokens}")
        assert shown.status == 0, shown
        found.append(outcome(work))
    for losses, texts in found[1:]:
        assert texts == found[0][1]
        for stage in ("lora", "reft"):
            assert losses[stage] == pytest.approx(found[0][0][stage], abs=1e-5)


@pytest.mark.parametrize("part", ["config", "tokenizer_config"])
def test_a_program_in_the_folder_is_not_run(given, monkeypatch, part):
    """Not even asked for: transformers would, and wait for an answer."""
    own = {"config": {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}}
    own["tokenizer_config"] = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    edit_json(f"model/{part}.json", **own[part])(given)
    ran = given / "ran"
    write("model/own.py", f"open({str(ran)!r}, 'w')\n")(given)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    shown = run(given.parent / "work", given, EVALUATE)
    assert not ran.exists() and "custom code" not in shown.out
    refused(shown, "given/model") if shown.status else outcome(given.parent / "work")


def model_of_kind(given, kind, **more):
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    size = len(AutoTokenizer.from_pretrained(given / "model"))
    shape = dict(vocab_size=size + 10, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, head_dim=8)
    shape |= dict(intermediate_size=64, ffn_dim=64, word_embed_proj_dim=32, num_key_value_heads=4)
    shape |= dict(pad_token_id=None, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(shape | more)))
    model.save_pretrained(given / "model")


@pytest.mark.parametrize("kind", ["gpt2", "gptj", "opt", "openai-gpt"])
def test_positions_under_any_name(given, kind):
    model_of_kind(given, kind, max_position_embeddings=32, n_positions=32, rotary_dim=4)
    refused(run(given.parent / "work", given, EVALUATE), "takes 32 tokens")


@pytest.mark.parametrize("kind", ["gpt2", "opt", "bloom", "gemma3_text", "qwen2"])
def test_models_of_other_kinds(given, kind):
    """Without rotary embeddings, positions or a window: evaluated and adapted, or refused in one line."""
    model_of_kind(given, kind)
    shown = run(given.parent / "work", given, "--epochs-lora 1 --epochs-reft 0")
    if kind == "qwen2":  # transformers takes the model's own class of tokenizer, not that of the file
        return refused(shown, "tokenizer.json")
    assert shown.status == 0 and not shown.err, shown
    shown = run(given.parent / "work", given, "--epochs-lora 0 --epochs-reft 1 --reft-layer 1")
    assert shown.status == 0 or refused(shown, "--epochs-reft 0")


# --- surroundings

CERTIFICATE, SOCKS = {"SSL_CERT_FILE": "/missing.pem"}, {"ALL_PROXY": "socks5://127.0.0.1:9"}


def test_smoke_needs_no_network(tmp_path):
    flags = f"--smoke {EVALUATE} --max-eval-samples 4".split()
    shown = run_process(tmp_path, flags, HF_HUB_OFFLINE="0", **CERTIFICATE, **SOCKS)
    assert shown.status == 0 and not shown.err, shown


@pytest.mark.parametrize(
    "variables",
    [CERTIFICATE, SOCKS, {"SSL_CERT_DIR": "/dev/null/x"} | CERTIFICATE, {"HTTPS_PROXY": "ftp://127.0.0.1:9"}],
    ids="certificate socks both scheme".split(),
)
@pytest.mark.parametrize("what", ["--base-model", "--dataset", "--push-to-hub"])
def test_no_way_to_the_hub(given, monkeypatch, variables, what):
    """A variable of the host that leads nowhere, inside a container: one line that names it."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    for name in "ALL_PROXY HTTPS_PROXY HTTP_PROXY all_proxy https_proxy http_proxy".split():
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    huggingface_hub.close_session()
    flags = what if what == "--push-to-hub" else f"{what} nobody/nothing"
    shown = run(given.parent / "work", given, f"{SHORT} {flags}")
    huggingface_hub.close_session()
    refused(shown, "SSL_CERT_FILE" if "SSL_CERT_FILE" in variables else "PROXY")


def test_two_runs_that_look_for_downloads_do_not_stop_each_other(given, monkeypatch):
    """Runs of a sweep start at the same moment, and none of them downloads."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(given.parent / "cache"))
    hub_data(monkeypatch).folder = given / "data"
    lock = given.parent / "cache/.locks/datasets--me--questions/0123abcd.lock"
    lock.parent.mkdir(parents=True)
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # as the other run tries the lock
        shown = run(given.parent / "work", given, f"{EVALUATE} --dataset me/questions")
    assert shown.status == 0, shown


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(given, undisturbed, monkeypatch, code):
    def flock(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    shown = run(given.parent / "work", given)
    assert shown.status == 0 and not shown.err, shown
    assert list(outcome(given.parent / "work")) == list(undisturbed[1:])


@pytest.mark.parametrize("pattern", ["lora1-model-*", "lora1-reft1-*"])
def test_a_stage_that_another_run_trains(given, undisturbed, pattern):
    """The second run does not wait: the training of the first may take hours."""
    work = shutil.copytree(undisturbed[0], given.parent / "work")
    shutil.rmtree(work / "results")
    (folder,) = (work / "output").glob(pattern)
    (folder / "heft.json").unlink()
    if "reft" in pattern:
        shutil.rmtree(folder / "adapter")
    else:
        shutil.rmtree(next((work / "output").glob("lora1-reft1-*")))
    before = files_of(work)
    with open(folder / "lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        shown = run(work, given)
    refused(shown, f"another run is training in {folder.relative_to(work)}", "same command", status=1)
    assert {path: content for path, content in files_of(work).items() if path.name != "lock"} == {
        path: content for path, content in before.items() if path.name != "lock"
    }
    assert run(work, given).status == 0
    assert list(outcome(work)) == list(undisturbed[1:])


@pytest.mark.parametrize(
    "kind, name", [("models", "me/model"), ("models", "gpt2"), ("datasets", "me/questions")]
)
def test_a_download_that_another_process_has_begun(given, monkeypatch, kind, name):
    """huggingface_hub would wait for its lock without a word."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(given.parent / "cache"))
    if kind == "datasets":
        hub_data(monkeypatch).folder = given / "data"
    lock = given.parent / "cache/.locks" / f"{kind}--{name.replace('/', '--')}" / "0123abcd.lock"
    lock.parent.mkdir(parents=True)
    flags = {"models": f"--base-model {name}", "datasets": f"--dataset {name}"}[kind]
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        shown = run(given.parent / "work", given, f"{SHORT} {flags}")
    refused(shown, name, str(lock), "try again", status=1)
    assert not files_of(given.parent / "work")
    shown = run(given.parent / "work", given, f"{SHORT} {flags}")  # the file alone is no lock
    assert shown.status == 0 if kind == "datasets" else refused(shown, f"cannot use {name!r}")


def fail_half_way(monkeypatch, name, fail):
    """Let the write of a file whose name begins so stop half-way, by calling `fail`."""
    write_bytes = Path.write_bytes

    def half(path, content):
        if not path.name.startswith(name):
            return write_bytes(path, content)
        write_bytes(path, content[: len(content) // 2])
        fail()
        write_bytes(path, content)

    monkeypatch.setattr(Path, "write_bytes", half)


def disk_full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # without a file's name, as write(2) gives it


WRITTEN = ["checkpoint.pt", "heft.json", "lora1-reft1"]


def left_behind(folder):
    return [path for path in folder.rglob("*") if ".tmp" in path.name or path.name.startswith("tmp")]


@pytest.mark.parametrize("name", WRITTEN)
def test_a_full_disk(given, undisturbed, monkeypatch, name):
    """One line that names the place, nothing left behind; with room again, the same command continues."""
    work = given.parent / "work"
    with monkeypatch.context() as context:
        fail_half_way(context, name, disk_full)
        line = refused(run(work, given), "No space left on device", "same command", status=1)
    assert not left_behind(work)
    assert f"/{name}" in line and ("output/lora1-" in line or "results/lora1-" in line), "which disk?"
    shown = run(work, given)
    assert shown.status == 0, shown
    assert list(outcome(work)) == list(undisturbed[1:])


@pytest.mark.parametrize("library", ["peft.peft_model.safe_save_file", "torch.save"])
def test_a_full_disk_in_the_words_of_a_library(given, monkeypatch, library):
    """safetensors and torch raise errors of their own."""
    from safetensors import SafetensorError

    def full(*_, **__):
        if library == "torch.save":
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    if library == "torch.save":  # as pyvene calls it: with the name of a file
        save = torch.save

        def full_file(content, file, *rest):
            full() if isinstance(file, str) else save(content, file, *rest)

        monkeypatch.setattr(library, full_file)
    else:
        monkeypatch.setattr(library, full)
    refused(run(given.parent / "work", given), "is the disk full?", "output/lora1-", status=1)
    assert not left_behind(given.parent / "work")


@pytest.mark.parametrize("name", WRITTEN)
def test_sigterm_in_the_middle_of_a_write(given, undisturbed, monkeypatch, name):
    work = given.parent / "work"
    with monkeypatch.context() as context:
        fail_half_way(context, name, lambda: os.kill(os.getpid(), signal.SIGTERM))
        shown = run(work, given)
    assert shown.status == 85 and "Traceback" not in shown.err, shown
    assert not left_behind(work)
    assert run(work, given).status == 0
    assert list(outcome(work)) == list(undisturbed[1:])


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("call", ["copy", "mkdir"])
def test_a_full_disk_elsewhere(given, undisturbed, monkeypatch, call, code):
    """When stage 1 is copied into stage 2's folder, and when a stage's folder is made."""
    work, mkdir = given.parent / "work", Path.mkdir

    def full(*places):
        raise OSError(code, os.strerror(code), str(places[-1]))

    def full_for_a_stage(path, *rest, **options):
        return full(path) if path.name.startswith("lora1-") else mkdir(path, *rest, **options)

    with monkeypatch.context() as context:
        if call == "copy":
            context.setattr(shutil, "copy", full)
        else:
            context.setattr(Path, "mkdir", full_for_a_stage)
        shown = run(work, given)
    refused(shown, os.strerror(code), "output/lora1-", status=1)
    assert run(work, given).status == 0
    assert list(outcome(work)) == list(undisturbed[1:])


def test_a_bug_in_a_library_that_writes_shows_its_words(given, monkeypatch):
    """HEFT_TRACEBACK=1 shows the rest."""

    def bug(*_, **__):
        raise TypeError("a bug")

    monkeypatch.setattr("peft.peft_model.safe_save_file", bug)
    refused(run(given.parent / "work", given), "output/lora1-", "TypeError: a bug", status=1)
    monkeypatch.setenv("HEFT_TRACEBACK", "1")
    assert "Traceback" in run(given.parent / "work", given).err


@pytest.mark.parametrize("broken", ["torch.nn.utils.clip_grad_norm_", "torch.nn.functional.pad"])
def test_a_bug_is_no_full_disk(given, monkeypatch, broken):
    """An error that has nothing to do with the disk shows its traceback."""

    def bug(*_, **__):
        raise TypeError("a bug")

    monkeypatch.setattr(broken, bug)
    shown = run(given.parent / "work", given)
    assert shown.status == 1 and "Traceback" in shown.err and "a bug" in shown.err, shown
    assert "disk" not in shown.err


# --- what lies in the folders of a run


def damage(*pattern_and_change):
    def spoil(work):
        pattern, change = pattern_and_change
        (path,) = work.glob(pattern)
        path.write_bytes(change(path.read_bytes()))

    return spoil


def changed_record(**changes):
    def change(content):
        record = json.loads(content)
        record["made_with"] |= changes
        return json.dumps(record).encode()

    return change


def of_format_3(content):
    """The record as an edition wrote it that had FORMAT among the settings, and no made_with."""
    record = json.loads(content)
    return json.dumps(record | {"settings": record.pop("made_with") | {"FORMAT": 3}}).encode()


LORA, REFT = "output/lora1-model-*/", "output/lora1-reft1-*/"
DAMAGED = {  # a finished run whose result was deleted: how else it is spoilt; what the line must say
    "record of another base model": (
        damage(LORA + "heft.json", changed_record(BASE_MODEL_FILES="x")),
        "base_model_files 'x'",
    ),
    "record of an older edition": (
        damage(REFT + "heft.json", of_format_3),
        "heft.json",
        "not of this version",
    ),
    "record of an older edition, of LORA": (
        damage(LORA + "heft.json", of_format_3),
        "heft.json",
        "not of this version",
    ),
    "record torn": (damage(REFT + "heft.json", lambda content: content[:50]), "heft.json"),
    "record of another program": (damage(REFT + "heft.json", lambda _: b"[]"), "heft.json"),
    "intervention changed": (
        damage(REFT + "intkey*", lambda content: content + b"0"),
        "heft.json",
        "move them away",
    ),
    "adapter changed": (
        damage(REFT + "adapter/adapter_model.safetensors", lambda content: content + b"0"),
        "adapter",
    ),
    "intervention missing": (lambda work: next(work.glob(REFT + "intkey*")).unlink(), "heft.json"),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_folder_is_not_used(given, undisturbed, what):
    work = shutil.copytree(undisturbed[0], given.parent / "work")
    shutil.rmtree(work / "results")
    spoil, *expected = DAMAGED[what]
    if "LORA" in what or "base model" in what:
        shutil.rmtree(next(work.glob(REFT)))
    spoil(work)
    before = files_of(work)
    refused(run(work, given), *expected)
    found = {path: content for path, content in files_of(work).items() if path.name != "lock"}
    assert found == {path: content for path, content in before.items() if path.name != "lock"}


@pytest.mark.parametrize("content", [b"PK torn", b""])
def test_a_torn_checkpoint(given, undisturbed, content):
    work = shutil.copytree(undisturbed[0], given.parent / "work")
    shutil.rmtree(work / "results")
    for path in work.glob(REFT + "*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (next(work.glob(REFT)) / "checkpoint.pt").write_bytes(content)
    refused(run(work, given), "checkpoint.pt", "move it away")


def test_a_checkpoint_of_an_older_edition(given, undisturbed):
    work = shutil.copytree(undisturbed[0], given.parent / "work")
    shutil.rmtree(work / "results")
    for path in work.glob(REFT + "*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    state = {"settings": {"EPOCHS_LORA": 1, "FORMAT": 3}, "loss": [1.0], "tensors": [torch.ones(2)]}
    torch.save(state, next(work.glob(REFT)) / "checkpoint.pt")
    before = files_of(work)
    refused(run(work, given), "checkpoint.pt", "not of this version", "move it away")
    assert files_of(work) == before


def test_no_gpu_for_a_model_that_needs_one(given):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    shape = dict(hidden_size=4096, num_hidden_layers=32, intermediate_size=11008, num_attention_heads=32)
    config(**shape, num_key_value_heads=32, head_dim=128, vocab_size=32000, layer_types=None)(given)
    shown = run(given.parent / "work", given, "--reft-layer 15")
    refused(shown, "no GPU found", "6.7 billion", "condor_submit", "--smoke")
