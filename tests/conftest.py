"""What the tests share: a tiny model with the rules of the real tokenizer, its data, and a way to run the
script."""

import json
import os
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
from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import heft_finetuning as heft


def make_tokenizer(texts):
    """Llama 2's rules on a small vocabulary: metaspace in front and for spaces, byte fallback, no
    pre-tokenizer, BOS added, no pad token."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    words = sorted(
        {piece for text in texts for word in text.split() for piece in (word, "▁" + word)}
        | set("[]/INST<>:.\n")
    )
    tokenizer.train_from_iterator(
        words,
        trainers.BpeTrainer(
            vocab_size=900,
            special_tokens=["<unk>", "<s>", "</s>", *bytes_],
            show_progress=False,
            initial_alphabet=["▁", *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ[]/<>:.\n"],
        ),
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def make_tiny(folder, layers=4, train=45, validation=20, seed=0):
    """A random Llama with layers 0 to `layers` - 1 in folder/model, and toy BoolQ rows in folder/data."""
    import random

    rng = random.Random(seed)
    (folder / "data").mkdir(parents=True)
    texts = []
    for split, n in (("train", train), ("validation", validation)):
        rows = [make.boolq(rng) for _ in range(n)]
        texts += [heft.format_boolq(row)["prompt"] for row in rows]
        (folder / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = make_tokenizer(texts + ["Yes No"] * 50)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        initializer_range=0.1,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    # As the real chat model's: an evaluation that followed it would sample.
    model.generation_config.update(do_sample=True, temperature=0.6, top_p=0.9)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny"))


def rows_of(folder, split):
    """The questions of a split as heft_finetuning.load_boolq gives them, without tokens."""
    rows = [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]
    return [heft.format_boolq(row) | {"question": row["question"]} for row in rows]


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(
        folder
    )


def tiny_settings(tiny):
    """Flags of a run on the tiny model, without the Hub."""
    return [
        "--base-model",
        str(tiny / "model"),
        "--dataset",
        str(tiny / "data"),
        "--dtype",
        "float32",
        "--reft-layer",
        "2",
        "--no-push-to-hub",
    ]


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
