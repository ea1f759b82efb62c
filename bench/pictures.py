"""Five pictures in results/, for which small models are trained first: an hour on two cores, and it resumes.

leak: four symbols, each drawn by itself. ahead: nats by position in a block of 64 predicted at once. switch: three
seeds of progressive.py and of a GPT-2 of its final size. recall: names whose values each text draws anew, so that where
to copy from depends on the text. triangles: what a mixer's layers learn, and GPT-2's mean attention.
"""

import json
import math

import numpy as np
import torch
from compare import MODELS
from leak import NETWORKS
from leak import train as train_on_random_tokens
from runs import GREY, ROOT, curve, final, log, mean_and_error, picture, side_by_side, train
from train import shell

import gpt2
import sample

RECALL = "--device cpu --block-size 128 --batch-size 32 --micro-batch 32 --max-steps 1000 "
RECALL += "--warmup-steps 100 --eval-interval 1000 --learning-rate 2e-3"
TEXT = "--device cpu --max-steps 1000 --eval-interval 1000 --log-interval 2 --learning-rate"
AHEAD = "--n-layer 0,0,0,2,0,0,0 --n-embd 256 --widths 1,1,1 --n-head 4 --batch-size 8 --micro-batch 8 --device cpu "
AHEAD += "--max-steps 1200 --warmup-steps 50 --learning-rate 2e-3 --eval-interval 60"
RUNS = {
    "64 ahead": f"conv_attention.py {AHEAD}",
    "gpt2, 3 blocks": f"gpt2.py {TEXT} 4e-3 --n-layer 3 --n-head 4 --n-embd 128",
    "mixer": f"mixer.py {TEXT} 4e-3 --n-layer 3 --n-embd 128 --block-size 256 --batch-size 8 --micro-batch 8",
}
SEEDS = {name: [f"{name}, seed {seed}" for seed in (1337, 1, 2)] for name in ("gpt2", "progressive")}  # 12 layers
RUNS |= {run: f"{name}.py {TEXT} 2e-3 --{run.split(', ')[1]}" for name, runs in SEEDS.items() for run in runs}
RECALLING = [name for name in MODELS if "64" not in name]  # 64 ahead is no next token
RUNS |= {f"named {name}": f"{MODELS[name][0]} --data data/named {RECALL}" for name in RECALLING}
BACK = [4, 8, 16, 32, 64]


def named(rng, n, length):
    """Texts (n, length) of 32 names, each followed by one of its 8 values, the same in a text; and how far back each
    token was read before, in tokens: 0, nowhere."""
    names, values = rng.integers(32, size=(n, length // 2)), rng.integers(8, size=(n, 32))
    values = 32 + 8 * names + np.take_along_axis(values, names, axis=1)
    back, latest = np.zeros((n, length), dtype=int), np.full((n, 32), -length)
    for i, name in enumerate(names.T):
        back[:, 2 * i + 1] = 2 * (i - latest[range(n), name])
        latest[range(n), name] = i
    return np.stack([names, values], -1).reshape(n, length), np.where(back < length, back, 0)


def write_tokens(name, vocab_size, draw):
    """Token files data/NAME of texts that draw(generator, number, length) gives first."""
    path, splits = ROOT / "data" / name, {}
    path.mkdir(parents=True, exist_ok=True)
    for split, n in (("train", 2048), ("val", 32)):
        draw(np.random.default_rng(n), n, 1024)[0].astype("<u2").tofile(path / f"{split}.bin")
        splits[split] = dict.fromkeys(("tokens", "bytes", "words"), 1024 * n) | {"documents": 1, "sha256": ""}
    meta = {"vocab_size": vocab_size, "tokenizer": "bytes", "eot": 0, "splits": splits}
    (path / "meta.json").write_text(json.dumps(meta), encoding="utf-8")


def lines(figure, names, rows=None):
    """Training losses over steps, each the mean of five rows of the log, of which there are `rows` or all."""
    axis = figure.subplots()
    for name in names:
        steps, losses = zip(*((row["step"], row["train_loss"]) for row in log(f"out/pictures/{name}")[:rows]))
        curve(axis, [*zip(steps[4:], np.convolve(losses, np.full(5, 0.2), "valid"))], name)
    axis.set(xlabel="optimizer steps", ylabel="training loss, nats per token")
    return axis


def draw_leak(figure):
    """Draws the training losses of bench/leak.py, each the mean of the last 20 steps."""
    axis = figure.subplots()
    for name, (ahead, source) in NETWORKS.items():
        losses = train_on_random_tokens(ahead, source)[0]
        means = np.convolve(losses, np.full(20, 1 / 20), "valid")
        curve(axis, [*enumerate(means, 20)], name)
    axis.axhline(math.log(4), color=GREY, ls="--")
    axis.annotate("ln 4: no honest loss is below", (100, 1.4), color=GREY)
    axis.set(xlabel="optimizer steps", ylabel="training loss, nats per token", ylim=(1.1, 1.45))


def draw_switch(figure):
    """Draws the losses around both switches, and prints how far all of val is after three seeds."""
    axis = lines(figure, [runs[0] for runs in SEEDS.values()], rows=200)
    for name, runs in SEEDS.items():
        nats = [final(train(RUNS[run], f"out/pictures/{run}"), "nats") for run in runs]
        print("{}: {:.4f} ± {:.4f} nats, {}".format(name, *mean_and_error(nats), nats))
    for step, blocks in ((50, 6), (150, 12)):
        axis.axvline(step, color=GREY, ls="--")
        axis.annotate(f" {blocks} blocks", (step, 7.8), color=GREY)
    loss = np.interp(step, *axis.lines[1].get_data())
    arrow = {"color": "#d2691e", "arrowprops": {"arrowstyle": "<-", "color": "#d2691e"}, "ha": "center"}
    axis.annotate("the source's jump, 1.92 to 3.19", (step, loss), (step, loss + 3.19 - 1.92), **arrow)


@torch.no_grad()
def draw_ahead(figure):
    """Prints and draws nats by position in a block of 64, for all blocks of val.bin that have 960
    tokens before them."""
    model = sample.load(ROOT / "out/pictures/64 ahead/ckpt.pt")[0]
    splits = gpt2.open_data(ROOT / model.cfg.data)[2]
    counts = np.bincount(splits["train"], minlength=model.cfg.vocab_size) + 1.0
    p = torch.from_numpy(counts / counts.sum())  # (V)
    windows = torch.from_numpy(splits["val"].astype(np.int64)).unfold(0, 1024, 64)

    nats = {"token frequencies": 0, "mixed with those of 960 tokens": 0, "64 ahead": 0}
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
        curve(axis, [*enumerate(row.tolist(), 1)], name)
    axis.set(xlabel="position in the block of 64", ylabel="nats per token")


@torch.no_grad()
def draw_recall(figure):
    """Prints and draws the share of values read before that each model names."""
    axis, (tokens, back) = figure.subplots(), map(torch.from_numpy, named(np.random.default_rng(0), 512, 128))
    print("| tokens back |", " | ".join(f"{n} to {2 * n - 1}" for n in BACK), "|\n" + "| --- " * 6 + "|")
    for name in RECALLING:
        right = sample.load(ROOT / f"out/pictures/named {name}/ckpt.pt")[0](tokens[:, :-1]).argmax(-1) == tokens[:, 1:]
        share = [right[(n <= back[:, 1:]) & (back[:, 1:] < 2 * n)].float().mean().item() for n in BACK]
        print(f"| {name} |", " | ".join(f"{x:.0%}" for x in share), "|")
        curve(axis, [*zip(BACK, share)], name)
    axis.axhline(1 / 8, color=GREY, ls="--")
    axis.set_xscale("log", base=2)
    axis.set_xticks(BACK, BACK)
    axis.set(xlabel="tokens back to where the value was read", ylabel="share named", ylim=(0, 1.05))


@torch.no_grad()
def draw_triangles(figure):
    """Row t: the weights of positions 0 to t. Attention is the mean over heads and 64 texts of val.bin."""
    mixer, model = (sample.load(ROOT / f"out/pictures/{name}/ckpt.pt")[0] for name in ("mixer", "gpt2, 3 blocks"))
    attention = []

    def attend(layer, x, qkv):  # from what a block's Linear layer for queries, keys and values returns
        q, k, _ = qkv.unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT / math.sqrt(q.size(-1)) + torch.full(2 * [q.size(2)], -math.inf).triu(1)
        attention.append(scores.softmax(-1).mean((0, 1)))

    for block in model.h:
        block.attn.c_attn.register_forward_hook(attend)
    tokens = gpt2.open_data(ROOT / model.cfg.data)[2]["val"][: 64 * 256]
    model(torch.from_numpy(tokens.astype(np.int64)).view(64, 256))
    maps = {"mixer": [block.mix.maps[0].weight.squeeze().tril() for block in mixer.h], "gpt2": attention}
    for axes, (name, images) in zip(figure.subplots(2, 3), maps.items()):
        for layer, (axis, image) in enumerate(zip(axes, images), 1):
            image = image.sign() * image.abs().sqrt()  # so that small weights are seen
            most = image.abs().quantile(0.999).item()
            axis.imshow(image.where(image != 0, math.nan), cmap="RdBu", vmin=-most, vmax=most, zorder=2)
            axis.set_title(f"{name}, layer {layer}")


def main():
    if not (ROOT / "data/stdlib/meta.json").exists():
        shell("prepare_data.py stdlib")
    write_tokens("named", 288, named)
    side_by_side(lambda submit: [run.result() for run in [submit(c, f"out/pictures/{n}") for n, c in RUNS.items()]])
    for draw in (draw_leak, draw_ahead, draw_switch, draw_recall):
        picture(f"results/{draw.__name__[5:]}.svg", (8, 3.5), draw)
    picture("results/triangles.png", (9, 6), draw_triangles)


if __name__ == "__main__":
    main()
