"""What the tests share: a tiny model with the rules of the real tokenizer, its data, and a way to run the
script."""

import json
import os
import random
import re
import string
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "smoke"), str(ROOT / "results")]
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ["HF_HUB_OFFLINE"] = "1"  # here and in the runs that do not talk to the tests' own server

import make
import torch
from tokenizers import Tokenizer, models, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, LlamaTokenizer

import heft_finetuning as heft

# Tests of half a minute whose kind another, quicker test covers: tests/run --all runs them, too.
SLOW = """
    at_once[1-float32] a_typo_in_the_base_models_readme stops_the_run[cut-tree] test_a_fixed_revision
    that_the_hub_cannot_give_now costs_nothing[403-commit] suffices_where_nothing_is_pushed
    evaluation[SIGHUP] evaluation[SIGINT] while_the_next_one_is_trained the_base_of_the_rotation
    test_a_refusal_without_a_screen test_folders_of_any_name_are_pushed test_a_closed_screen
    a_folder_of_the_hubs_files test_no_user_and_no_home test_memory_grows_with is_pushed_with_these[reft
""".split()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        quick = "head -1" in item.nodeid
        if any(name in item.nodeid for name in SLOW) and not quick:
            item.add_marker(pytest.mark.slow)


def make_tokenizer(texts):
    """Llama 2's tokenizer (▁ for spaces and at the start, but not after a special token; other characters as
    bytes; BOS added; no padding token) with a small vocabulary, made from these texts."""
    # Pieces as the real vocabulary has them: words, <<, other signs, all with and without a space before.
    pieces = [piece for text in texts for piece in re.findall(r"\w+|<<|>>|\S", text)]
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    alphabet = ["▁", *string.ascii_letters]
    sizes = dict(vocab_size=900, special_tokens=special, initial_alphabet=alphabet)
    tokenizer = Tokenizer(models.BPE())
    pieces += ["▁" + piece for piece in pieces]
    tokenizer.train_from_iterator(pieces, trainers.BpeTrainer(**sizes, show_progress=False))
    trained = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(merge) for merge in trained["merges"]]
    return LlamaTokenizer(trained["vocab"], merges, legacy=False, add_bos_token=True, padding_side="right")


def make_tiny(folder, layers=4, train=45, validation=20, seed=0):
    """A random Llama with layers 0 to `layers` - 1 in folder/model, and toy BoolQ rows in folder/data."""
    rng, prompts = random.Random(seed), []
    (folder / "data").mkdir(parents=True)
    for split, n in ("train", train), ("validation", validation):
        rows = [make.boolq(rng) for _ in range(n)]
        prompts += [heft.format_boolq(row)["prompt"] for row in rows]
        (folder / f"data/{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = make_tokenizer([*prompts, "Yes No"])
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4)
    words = dict(vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**sizes, **words, initializer_range=0.1))
    # As the real chat model's: an evaluation that followed it would sample.
    model.generation_config.update(do_sample=True, temperature=0.6, top_p=0.9)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with a tiny model and its data, as make_tiny writes them."""
    return make_tiny(tmp_path_factory.mktemp("tiny"))


def rows_of(folder, split):
    """The questions of a split as heft_finetuning.load_boolq gives them, without tokens."""
    rows = [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]
    return [heft.format_boolq(row) | {"question": row["question"]} for row in rows]


def load(folder):
    """(model in float32, tokenizer)"""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder)


def tiny_settings(tiny):
    """Flags of a run on the model and data in the folder `tiny`, without the Hub."""
    flags = "--dtype float32 --reft-layer 2 --no-push-to-hub".split()
    return ["--base-model", str(tiny / "model"), "--dataset", str(tiny / "data"), *flags]


def start(folder, flags, script=ROOT / "heft_finetuning.py", **environment):
    """Start the script as a user would, in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    return subprocess.Popen(
        [sys.executable, str(script), *map(str, flags)],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"HF_HOME": str(folder / ".hf_home"), "OMP_NUM_THREADS": "1"} | environment,
    )


def run_script(folder, flags, **environment):
    """Run the script to its good end. Returns (result, predictions)."""
    process = start(folder, flags, **environment)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, out + err
    return read_result(folder)


def read_result(folder):
    (file,) = (folder / "results").glob("**/*.json")
    predictions = file.with_suffix(".predictions.jsonl").read_text().splitlines()
    return json.loads(file.read_text()), [json.loads(line) for line in predictions]
