"""Make the smoke run's model and data from nothing: `python smoke/make.py [folder]` (minutes on two cores).

The data is a toy in BoolQ's schema: invented people, six relations, and a question whose answer is the
polarity of one sentence of the passage ("Anna never keeps dogs." / "does Anna keep dogs" / no).
The model is an 18-layer Llama of width 64 that is taught, from random weights, to answer such questions in
formats other than the paper's prompt. Of the prompt it has seen the look, with answers that are mostly "Yes"
whatever the passage says: before fine-tuning it knows more than it says. See smoke/README.md.
"""

import json
import os
import random
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads cost tenfold where cores are shared
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the order of equal merges must not depend on threads
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from heft_finetuning import format_boolq

SEED = 2
TRAIN, VALIDATION = 1000, 500
STEPS_4_LAYERS, STEPS_18_LAYERS = 2400, 600
WIDTH, HEAD = 64, 32
BATCH = 16
PLACES = (3, 8, 13, 17)  # of the four trained layers among the eighteen
# In the paper's prompt the base model first sees true answers, then "Yes" with these chances where the answer
# is yes and where it is no: it ends up saying "Yes" always, while it knows better.
SAYS_YES = {True: 0.97, False: 0.62}

NAMES = """
    Anna Ben Clara David Emma Felix Grace Henry Iris Jack Kate Leo Mary Noah
    Olga Paul Quinn Rosa Sam Tina Uma Victor Wendy Xaver Yara Zoe Alan Bella
    Carl Dora Erik Fiona Gus Hanna Igor Julia Kurt Lily Max Nina
""".split()
RELATIONS = {  # question's verb: (sentence's verb, values)
    "keep": ("keeps", "cats dogs horses birds fish mice goats sheep ducks cows pigs frogs"),
    "play": ("plays", "piano violin flute drums harp guitar trumpet organ cello banjo horn tuba"),
    "like": ("likes", "bread cheese soup rice salad pasta honey cake fruit beans nuts eggs"),
    "speak": ("speaks", "French German Greek Latin Polish Danish Hindi Arabic Turkish Czech Welsh Irish"),
    "visit": ("visits", "Paris Rome Oslo London Berlin Vienna Madrid Cairo Tokyo Lima Delhi Prague"),
    "study": ("studies", "law music physics history art biology botany logic algebra poetry drama dance"),
}


def world(rng, facts):
    """`facts` facts (name, question's verb, value, polarity) about two or three people.

    Each verb comes once; 60 % are positive."""
    people = rng.sample(NAMES, min(facts, rng.randint(2, 3)))
    owners = people + rng.choices(people, k=facts - len(people))
    found = []
    for name, verb in zip(owners, rng.sample(list(RELATIONS), facts)):
        found.append((name, verb, rng.choice(RELATIONS[verb][1].split()), rng.random() < 0.6))
    rng.shuffle(found)
    return found


def passage(facts):
    never = {True: "", False: " never"}
    return " ".join(f"{name}{never[yes]} {RELATIONS[verb][0]} {value}." for name, verb, value, yes in facts)


def question(fact):
    return f"does {fact[0]} {fact[1]} {fact[2]}"


def boolq(rng):
    """One row in BoolQ's schema."""
    facts = world(rng, rng.randint(2, 5))
    fact = rng.choice(facts)
    return {"question": question(fact), "passage": passage(facts), "answer": fact[3]}


def document(rng, facts):
    """A pre-training text as a list of (text, loss weight): a passage, then its facts, asked about in one of
    three formats."""
    facts = world(rng, facts)
    parts, style = [("<s>" + passage(facts), 0.1)], rng.randrange(3)
    for fact in rng.sample(facts, len(facts)):
        claim = f"{fact[0]} {RELATIONS[fact[1]][0]} {fact[2]}"
        ask, words = [
            (f" q: {question(fact)} a:", ("yes", "no")),
            (f" claim: {claim} check:", ("true", "false")),
            (f" said: {claim} verdict:", ("right", "wrong")),
        ][style]
        parts += [(ask, 0.3), (" " + words[not fact[3]], 1.0)]
    return parts


def prompt_document(rng, seen, true):
    """The paper's prompt with an answer, true or biased, in both of the spellings that the stages teach."""
    while (row := boolq(rng))["passage"] in seen:
        pass
    answer = row["answer"] if true else rng.random() < SAYS_YES[row["answer"]]
    words = rng.choice(["", " "]) + ("Yes" if answer else "No")
    return [(format_boolq(row)["prompt"], 0.1), (words, 1.0), ("</s>", 1.0)]


def make_tokenizer(rng):
    """Byte-level BPE in which every name, value and word of the prompt is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = ["".join(text for text, _ in document(rng, 6)) for _ in range(3000)]
    texts = [text.replace("<s>", "").replace("</s>", "") for text in texts]
    for ending in ("Yes", "No", " Yes", " No"):
        texts += [format_boolq(boolq(rng))["prompt"].replace("<s>", "") + ending for _ in range(500)]
    special, alphabet = ["<s>", "</s>"], pre_tokenizers.ByteLevel.alphabet()
    options = dict(special_tokens=special, show_progress=False, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=1024, **options))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def batch(tokenizer, documents):
    """Token ids (rows, columns) and loss weights, 0 on padding."""
    ids, weights = [], []
    for parts in documents:
        pieces = [tokenizer(text, add_special_tokens=False)["input_ids"] for text, _ in parts]
        ids.append(torch.tensor(sum(pieces, [])))
        spread = ([weight] * len(piece) for piece, (_, weight) in zip(pieces, parts))
        weights.append(torch.tensor(sum(spread, [])))
    return pad_sequence(ids, batch_first=True), pad_sequence(weights, batch_first=True)


def seed_heads(model):
    """Give each layer heads that look one and two tokens back, and two that look at equal tokens.

    From random weights they would be found, too, in hours: one is of no use without the other."""
    half = HEAD // 2
    turn = 10000.0 ** (-torch.arange(half) / half)  # RoPE's angle per position
    with torch.no_grad():
        # A coordinate that all tokens share, so that a head can ignore which they are.
        model.model.embed_tokens.weight[:, 0] = 0.5
        for layer in model.model.layers:
            attention = layer.self_attn
            query = attention.q_proj.weight.view(-1, HEAD, WIDTH)
            key = attention.k_proj.weight.view(-1, HEAD, WIDTH)
            query[:2], key[:2] = 0, 0
            for head, back in ((0, 1), (1, 2)):
                key[head, :half, 0] = 1
                query[head, :half, 0], query[head, half:, 0] = torch.cos(turn * back), -torch.sin(turn * back)
            same = torch.randn(2, HEAD, WIDTH) * 0.4
            # No matter which tokens, nor how far apart.
            same[:, :, 0] = same[:, :6] = same[:, half : half + 6] = 0
            query[2:], key[2:] = same, same
            for head in range(4):  # each hands on half of what it finds as it is
                part = torch.linalg.qr(torch.randn(WIDTH, HEAD))[0]
                attention.v_proj.weight.view(-1, HEAD, WIDTH)[head] = part.T
                attention.o_proj.weight.view(WIDTH, -1, HEAD)[:, head] = part


def pretrain(model, tokenizer, documents, steps, rate, what):
    """Train on `documents(share of training done)`: AdamW, short warm-up, cosine decay."""

    def part_of_rate(i):
        return min(1, (i + 1) / 50) * (0.55 + 0.45 * torch.cos(torch.tensor(3.14159 * i / steps)).item())

    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, part_of_rate)
    model.train()
    for step in (bar := tqdm(range(steps), desc=what, dynamic_ncols=True)):
        ids, weights = batch(tokenizer, documents(step / steps))
        logits = model(input_ids=ids).logits[:, :-1]
        losses = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        loss = (losses.view(len(ids), -1) * weights[:, 1:]).sum() / weights[:, 1:].sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            sure = weights[:, 1:] == 1
            right = (logits.argmax(-1) == ids[:, 1:])[sure].float().mean().item()
            bar.set_postfix(loss=f"{loss.item():.3f}", answers=f"{right:.3f}")
    return model.eval()


def config(layers, words):
    sizes = dict(vocab_size=words, hidden_size=WIDTH, intermediate_size=192, num_hidden_layers=layers)
    sizes |= dict(num_attention_heads=4, num_key_value_heads=4, head_dim=HEAD, max_position_embeddings=2048)
    ends = dict(bos_token_id=0, eos_token_id=1, pad_token_id=None)
    return LlamaConfig(**sizes, **ends, initializer_range=0.1, tie_word_embeddings=True)


def main(folder):
    started = time.time()
    torch.set_num_threads(2)  # sums depend on it, and with them the bytes
    rng = random.Random(SEED)
    rows, seen = [], set()
    while len(rows) < TRAIN + VALIDATION:
        row = boolq(rng)
        if row["passage"] not in seen:
            rows.append(row)
            seen.add(row["passage"])
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for split, part in (("train", rows[:TRAIN]), ("validation", rows[TRAIN:])):
        (folder / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    rules = {
        "always yes": lambda text: True,
        "yes unless most sentences say never": lambda text: text.count("never") * 2 <= text.count("."),
        "yes unless any sentence says never": lambda text: "never" not in text,
    }
    for rule, guess in rules.items():
        right = 100 * sum(guess(row["passage"]) == row["answer"] for row in rows[TRAIN:]) / VALIDATION
        print(f"trivial rule on the validation questions, {rule}: {right:.1f} %")

    rng = random.Random(SEED)
    torch.manual_seed(SEED)
    tokenizer = make_tokenizer(rng)
    for word in NAMES + [value for _, values in RELATIONS.values() for value in values.split()]:
        tokens = tokenizer(" " + word, add_special_tokens=False)["input_ids"]
        assert len(tokens) == 1, f"{word} is not one token"

    # A net of four layers learns in a minute or two what eighteen layers take many to find ...
    # (Whether and when it does depends on the seed; this one does.)
    def easy_first(done):
        return [document(rng, 3 if done < 0.4 else rng.randint(2, 5)) for _ in range(BATCH)]

    small = LlamaForCausalLM(config(4, len(tokenizer)))
    seed_heads(small)
    pretrain(small, tokenizer, easy_first, STEPS_4_LAYERS, 1e-3, "4 layers")

    # ... and is then spread among fourteen that begin as the identity.
    model = LlamaForCausalLM(config(18, len(tokenizer)))
    model.model.embed_tokens.load_state_dict(small.model.embed_tokens.state_dict())
    model.model.norm.load_state_dict(small.model.norm.state_dict())
    for place, layer in enumerate(model.model.layers):
        if place in PLACES:
            layer.load_state_dict(small.model.layers[PLACES.index(place)].state_dict())
        else:
            torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
            torch.nn.init.zeros_(layer.mlp.down_proj.weight)

    def mixed(done):
        def one(prompt):
            return prompt_document(rng, seen, done < 0.4) if prompt else document(rng, rng.randint(2, 5))

        return [one(rng.random() < 0.7) for _ in range(BATCH)]

    pretrain(model, tokenizer, mixed, STEPS_18_LAYERS, 1e-3, "18 layers")
    model.generation_config.pad_token_id = None
    model = model.to(torch.bfloat16)  # half the size; the smoke run computes in float32
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    print(f"{model.num_parameters():,} parameters, made in {time.time() - started:.0f} s: {folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent)
