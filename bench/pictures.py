"""Five pictures in results/, of small networks that are trained first. It resumes.

    python bench/pictures.py switch recall    these two
Without names, it draws all of them.
"""

import json
import math
import sys

import compare  # before torch, because train.py sets GOMP_SPINCOUNT first
import leak
import numpy as np
import torch
from runs import COLORS, GREY, best_rates, curve, final, level, picture, slug, train_all
from train import ROOT, prepare

import gpt2
import sample

FOLDER = "out/pictures"
TEXT = "--device cpu --max-steps 1000 --eval-interval 1000 --log-interval 2 --learning-rate"
SMALL = "--n-layer 3 --n-embd 128 --block-size 256 --batch-size 8 --micro-batch 8"
RUNS = {
    "64 ahead": "conv_attention.py --ahead 64 --n-layer 0,0,0,2,0,0,0 --n-embd 256 --widths 1,1,1 "
    "--n-head 4 --batch-size 8 --micro-batch 8 --max-steps 1200 --warmup-steps 50 "
    "--eval-interval 60 --device cpu --learning-rate 2e-3",
    "gpt2, 3 layers": f"gpt2.py {SMALL} --n-head 4 {TEXT} 4e-3",
    "mixer, 3 layers": f"mixer.py {SMALL} {TEXT} 4e-3",
}
RECALL = "--data data/named --device cpu --block-size 128 --batch-size 32 --micro-batch 32"
RECALL_STEPS = (1000, 4000)
RECALL_RATES = (1e-3, 2e-3, 4e-3)
BACK = [4, 8, 16, 32, 64]


def named(rng, n, length):
    """Texts (n, length) of 32 names, each followed by one of its 8 values, the same in a text; and
    how far back each token was read before, in tokens: 0, nowhere."""
    names = rng.integers(32, size=(n, length // 2))
    value_of = rng.integers(8, size=(n, 32))  # in each text
    values = 32 + 8 * names + np.take_along_axis(value_of, names, axis=1)
    back = np.zeros((n, length), dtype=int)
    latest = np.full((n, 32), -length)
    for i, name in enumerate(names.T):
        back[:, 2 * i + 1] = 2 * (i - latest[range(n), name])
        latest[range(n), name] = i
    texts = np.stack([names, values], -1).reshape(n, length)
    return texts, np.where(back < length, back, 0)


def write_tokens(name, vocab_size, draw):
    """Token files data/NAME of texts that draw(generator, number, length) gives first."""
    path = ROOT / "data" / name
    path.mkdir(parents=True, exist_ok=True)
    splits = {}
    for split, n in (("train", 2048), ("val", 32)):
        tokens = draw(np.random.default_rng(n), n, 1024)[0]
        tokens.astype("<u2").tofile(path / f"{split}.bin")
        splits[split] = dict.fromkeys(("tokens", "bytes", "words"), tokens.size)
    meta = {"vocab_size": vocab_size, "tokenizer": "bytes", "eot": 0, "splits": splits}
    (path / "meta.json").write_text(json.dumps(meta), encoding="utf-8")


def load(*setting):
    """The network that was trained with a setting of train_all."""
    return sample.load(ROOT / FOLDER / slug(*setting) / "ckpt.pt")[0]


def draw_leak(figure):
    """Draws the training losses of bench/leak.py, each the mean of the last 20 steps."""
    axis = figure.subplots()
    for (name, (ahead, source)), style in zip(leak.NETWORKS.items(), ("-", "--", ":")):
        losses = leak.train(ahead, source)[0]
        means = np.convolve(losses, np.full(20, 1 / 20), "valid")
        curve(axis, [*enumerate(means, 20)], name, color=COLORS["conv_attention"], ls=style)
    level(axis, math.log(4), "ln 4: no honest loss is below", x=0.55)
    label = "training loss, nats per token\n(lower is better, down to ln 4)"
    axis.set(xlabel="optimizer steps", ylabel=label, ylim=(1.1, 1.45))


def draw_switch(figure):
    """Draws the losses of progressive.py and of a GPT-2 of its final size around both switches, as
    means of five rows of the log."""
    command = "{}.py " + TEXT + " 2e-3"  # 12 layers
    trained = train_all(FOLDER, [("gpt2",), ("progressive",)], command.format)
    axis = figure.subplots()
    for (model,), (_, rows) in trained.items():
        means = np.convolve([row["train_loss"] for row in rows[:200]], np.full(5, 1 / 5), "valid")
        points = [*zip((row["step"] for row in rows[4:200]), means)]
        curve(axis, points, model)
    for step, blocks in ((50, 6), (150, 12)):
        axis.axvline(step, color=GREY, ls="--")
        axis.annotate(f" {blocks} blocks", (step, 7.8), color=GREY)
    loss = np.interp(150, *zip(*points))
    arrow = {"arrowprops": {"arrowstyle": "<-", "color": GREY}, "color": GREY, "ha": "center"}
    axis.annotate("the source's jump, 1.92 to 3.19", (150, loss), (150, loss + 1.27), **arrow)
    axis.set(xlabel="optimizer steps", ylabel="training loss, nats per token\n(lower is better)")


@torch.no_grad()
def draw_ahead(figure):
    """Prints and draws nats by position in a block of 64, for all blocks of val.bin that have 960
    tokens before them."""
    train_all(FOLDER, [("64 ahead",)], RUNS.get)
    model = load("64 ahead")
    splits = gpt2.open_data(ROOT / model.cfg.data)[2]
    counts = np.bincount(splits["train"], minlength=model.cfg.vocab_size) + 1.0
    p = torch.from_numpy(counts / counts.sum())  # (V)
    windows = torch.from_numpy(splits["val"].astype(np.int64)).unfold(0, 1024, 64)
    styles = {
        "token frequencies": dict(color=GREY, ls="--"),
        "mixed with those of 960 tokens": dict(color=GREY, ls=":"),
        "conv_attention, 64 ahead": {},
    }
    nats = dict.fromkeys(styles, 0)
    for rows in windows.split(16):
        text, block = rows.split([960, 64], dim=1)
        counts = torch.stack([row.bincount(minlength=len(p)) for row in text])[:, None]  # (B, 1, V)
        log_p = model(text, cache=model.new_cache(len(text))).log_softmax(-1)  # (B, 64, V)
        guesses = p.log(), (0.6 * counts / 960 + 0.4 * p).log(), log_p
        for name, guess in zip(nats, guesses):
            guess = guess.expand_as(log_p).gather(2, block[..., None])[..., 0]  # (B, 64)
            nats[name] -= guess.sum(0) / len(windows)

    print("| position | 1 | 2 | 3 to 4 | 5 to 8 | 9 to 16 | 17 to 32 | 33 to 64 | all |")
    print("| --- " * 9 + "|")
    axis = figure.subplots()
    for name, row in nats.items():
        parts = [*row.split([1, 1, 2, 4, 8, 16, 32]), row]
        print(f"| {name} |", *(f"{part.mean():.3f} |" for part in parts))
        curve(axis, [*enumerate(row.tolist(), 1)], name, **styles[name])
    axis.set(xlabel="position in the block of 64", ylabel="nats per token (lower is better)")


@torch.no_grad()
def draw_recall(figure):
    """Prints and draws the share of values read before that each model names, which depend on the
    name and on the text. Each model has the best of three learning rates after 1,000 steps."""
    models = {name: options for name, (options, _) in compare.MODELS.items() if "," not in name}

    def command(_, name, steps, rate):
        options = f"{models[name]} {RECALL} --warmup-steps 100 --eval-interval {steps}"
        return f"{options} --max-steps {steps} --learning-rate {rate:g}"

    def measure(pairs):
        settings = {pair: ("recall", pair[0], RECALL_STEPS[0], pair[1]) for pair in pairs}
        trained = train_all(FOLDER, [*settings.values()], command)
        return {pair: final(trained[settings[pair]], "nats per token") for pair in pairs}

    write_tokens("named", 288, named)
    best = best_rates(dict.fromkeys(models, RECALL_RATES), measure, widen=False)
    train_all(FOLDER, [("recall", name, RECALL_STEPS[1], best[name]) for name in models], command)
    tokens, back = map(torch.from_numpy, named(np.random.default_rng(0), 512, 128))
    back = back[:, 1:]
    print("| | rate |", " | ".join(f"{n} to {2 * n - 1}" for n in BACK), "|")
    print("| --- " * 7 + "|")
    for axis, steps in zip(figure.subplots(1, 2, sharey=True), RECALL_STEPS):
        for name in models:
            model = load("recall", name, steps, best[name])
            right = model(tokens[:, :-1]).argmax(-1) == tokens[:, 1:]
            shares = [right[(n <= back) & (back < 2 * n)].float().mean().item() for n in BACK]
            cells = [f"{name}, {steps:,} steps", f"{best[name]:g}", *(f"{x:.0%}" for x in shares)]
            print(f"| {' | '.join(cells)} |")
            curve(axis, [*zip(BACK, shares)], name)
        level(axis, 1 / 8, "chance")
        axis.set_xscale("log", base=2)
        axis.set_xticks(BACK, BACK)
        axis.set(title=f"after {steps:,} steps", ylim=(0, 1.05))
        axis.set_xlabel("tokens back to where the value was read")
        axis.set_ylabel("share of values named (higher is better)")


@torch.no_grad()
def draw_triangles(figure):
    """Draws what a mixer's layers learn, and where GPT-2 attends, as a mean over heads and 64 texts
    of val.bin. Row t: the weights of positions 0 to t."""
    train_all(FOLDER, [("mixer, 3 layers",), ("gpt2, 3 layers",)], RUNS.get)
    mixer, model = load("mixer, 3 layers"), load("gpt2, 3 layers")
    attention = []

    def attend(layer, x, qkv):  # from queries, keys and values, (B, T, 3 C), of 4 heads
        q, k, _ = qkv.unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        mask = torch.full(2 * [q.size(2)], -math.inf).triu(1)
        scores = q @ k.mT / math.sqrt(q.size(-1)) + mask
        attention.append(scores.softmax(-1).mean((0, 1)))

    for block in model.h:
        block.attn.c_attn.register_forward_hook(attend)
    tokens = gpt2.open_data(ROOT / model.cfg.data)[2]["val"][: 64 * 256]
    model(torch.from_numpy(tokens.astype(np.int64)).view(64, 256))
    maps = {"mixer": [block.mix.W.tril() for block in mixer.h], "gpt2": attention}
    for axes, (name, images) in zip(figure.subplots(2, 3), maps.items()):
        for i, (axis, image) in enumerate(zip(axes, images), 1):
            image = image.sign() * image.abs().sqrt()  # so that small weights are seen
            most = image.abs().quantile(0.999).item()
            image = image.where(image != 0, math.nan)
            axis.imshow(image, cmap="RdBu", vmin=-most, vmax=most, zorder=2)
            axis.set_title(f"{name}, layer {i}", color=COLORS[name])
            axis.set(xlabel="position that is read", ylabel="position that reads")


PICTURES = {
    "leak": ("results/leak.svg", (9, 3.5), draw_leak),
    "ahead": ("results/ahead.svg", (9, 3.5), draw_ahead),
    "switch": ("results/switch.svg", (8, 3.5), draw_switch),
    "recall": ("results/recall.svg", (12, 4), draw_recall),
    "triangles": ("results/triangles.png", (9, 6), draw_triangles),
}

if __name__ == "__main__":
    prepare("prepare_data.py stdlib --out data/stdlib")
    for name in sys.argv[1:] or PICTURES:
        picture(*PICTURES[name])
