"""Three pictures of README.md. Small models are trained for them first; an interrupted run resumes.

    python bench/pictures.py       results/leak.svg, results/triangles.png, results/switch.svg; a quarter of an hour

leak: four symbols, each drawn by itself. triangles: what a mixer's layers have learned, and where a GPT-2 of its shape
attends on average. switch: progressive.py and a GPT-2 of its final size on the same batches.
"""

import json
import math
import sys

import numpy as np
import torch
from runs import GREY, ROOT, curve, picture, side_by_side
from train import shell

sys.path.insert(0, str(ROOT))
import gpt2
import sample

IID = "--data data/iid --device cpu --block-size 1024 --batch-size 4 --micro-batch 4 --n-layer 1,1,1,1,1,1,1 "
IID += "--max-steps 300 --warmup-steps 50 --eval-interval 300 --log-interval 5 --learning-rate 3e-3"
TEXT = "--device cpu --block-size 256 --batch-size 8 --micro-batch 8 --n-head 4 --max-steps 1000 --eval-interval 1000 "
TEXT += "--log-interval 10 --learning-rate 4e-3"
RUNS = {
    "the source's expander": f"conv_attention.py {IID} --expander sequence",
    "ours, 64 ahead": f"conv_attention.py {IID}",
    "ours, 1 ahead": f"conv_attention.py {IID} --ahead 1",
    "gpt2, 12 blocks": f"gpt2.py {TEXT} --n-layer 12 --n-embd 72",
    "progressive": f"progressive.py {TEXT} --n-layer 12 --n-embd 72",
    "gpt2, 3 blocks": f"gpt2.py {TEXT} --n-layer 3 --n-embd 128",
    "mixer": f"mixer.py {TEXT} --n-layer 3 --n-embd 128 --n-head 1",
}


def write_independent_tokens():
    """data/iid: ids 0 to 3, equally often, in any order."""
    folder, splits = ROOT / "data/iid", {}
    folder.mkdir(parents=True, exist_ok=True)
    for name, n in (("train", 2_000_000), ("val", 20_000)):
        np.random.default_rng(n).integers(4, size=n, dtype="<u2").tofile(folder / f"{name}.bin")
        splits[name] = {"tokens": n, "bytes": n, "words": n, "documents": 1, "sha256": ""}
    meta = {"vocab_size": 257, "tokenizer": "bytes", "eot": 256, "splits": splits}
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")


def lines(figure, runs, names):
    """The training loss of some runs, over steps."""
    axis = figure.subplots()
    for name in names:
        curve(axis, [(row["step"], row["train_loss"]) for row in runs[name] if row["train_loss"]], name)
    axis.set_xlabel("optimizer steps")
    axis.set_ylabel("training loss, nats per token")
    return axis


def draw_leak(figure, runs):
    axis = lines(figure, runs, list(RUNS)[:3])
    axis.axhline(math.log(4), color=GREY, ls="--")
    axis.annotate("ln 4: no honest loss is below", (0, math.log(4)), color=GREY, va="top")
    axis.set_ylim(1.1, 1.6)


def draw_switch(figure, runs):
    axis, rows = lines(figure, runs, ["gpt2, 12 blocks", "progressive"]), runs["progressive"]
    for share, stage in ((0.33, "3 blocks become 6"), (0.67, "6 become 12")):
        axis.axvline(share * rows[-1]["step"], color=GREY, ls="--")
        axis.annotate(f" {stage}", (share * rows[-1]["step"], 7), color=GREY)
    before = next(row["train_loss"] for row in rows if row["step"] >= 0.67 * rows[-1]["step"])
    arrow = dict(arrowstyle="->", color="#d2691e")
    where = 0.67 * rows[-1]["step"], before
    axis.annotate("", (where[0], before + 3.19 - 1.92), where, arrowprops=arrow)
    axis.annotate(" in the source: 1.92 to 3.19", (where[0], before + 0.8), color="#d2691e")


@torch.no_grad()
def draw_triangles(figure):
    """Row t: the weights of positions 0 to t. Attention is the mean over heads and 64 texts of val.bin."""
    mixer, _ = sample.load(ROOT / "out/pictures/mixer/ckpt.pt")
    model, _ = sample.load(ROOT / "out/pictures/gpt2-3-blocks/ckpt.pt")
    maps = [[block.mix.maps[0].weight.squeeze().tril() for block in mixer.h], []]
    for block in model.h:  # the attention of the block, from what its Linear layer for q, k and v returns
        block.attn.c_attn.register_forward_hook(lambda layer, x, qkv: maps[1].append(attention(qkv, 4)))
    tokens = gpt2.open_data(ROOT / model.cfg.data)[2]["val"]
    model(torch.from_numpy(tokens[: 64 * 256].astype(np.int64)).view(64, 256))
    axes = figure.subplots(2, len(mixer.h))
    for row, name, images in zip(axes, ("mixer", "gpt2"), maps):
        for layer, (axis, image) in enumerate(zip(row, images)):
            image = image.sign() * image.abs().sqrt()
            most = image.abs().quantile(0.999).item()
            axis.imshow(image.where(image != 0, math.nan), cmap="RdBu", vmin=-most, vmax=most)
            axis.set_title(f"{name}, layer {layer + 1}")


def attention(qkv, n_head):
    """Mean weights (T, T) of causal attention."""
    B, T, _ = qkv.shape
    q, k, _ = qkv.float().view(B, T, 3, n_head, -1).permute(2, 0, 3, 1, 4)
    weights = q @ k.mT / math.sqrt(q.size(-1))
    return weights.masked_fill(~torch.ones(T, T).tril().bool(), -math.inf).softmax(-1).mean((0, 1))


def main():
    if not (ROOT / "data/stdlib/meta.json").exists():
        shell("prepare_data.py stdlib")
    write_independent_tokens()
    folders = {name: f"out/pictures/{name.replace(',', '').replace(' ', '-')}" for name in RUNS}
    futures = side_by_side(lambda submit: {n: run.result() for n, run in
                                           {n: submit(c, folders[n]) for n, c in RUNS.items()}.items()})  # fmt: skip
    runs = {name: rows for name, (_, rows) in futures.items()}
    picture("results/leak.svg", (8, 3.5), lambda figure: draw_leak(figure, runs))
    picture("results/switch.svg", (8, 3.5), lambda figure: draw_switch(figure, runs))
    picture("results/triangles.png", (9, 6), draw_triangles)


if __name__ == "__main__":
    main()
