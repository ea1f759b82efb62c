"""What xz makes of a validation split, in bits a byte: a yardstick for the bits a byte of a model.

python bench/compress.py data/stdlib
"""

import json
import lzma
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from prepare_data import load_tokenizer


def text(folder, split, tokenizer):
    ids = np.fromfile(folder / f"{split}.bin", dtype="<u2")
    return tokenizer.decode_bytes(ids[ids != tokenizer.eot_token].tolist())


def size(data):
    return 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))  # bits


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "data/stdlib")
    name, ranks = json.loads((folder / "meta.json").read_text(encoding="utf-8"))["tokenizer"], ""
    if name.startswith("bpe:"):
        ranks = (folder / "tokenizer.tiktoken").read_text(encoding="utf-8")
    train, val = (text(folder, split, load_tokenizer(name, ranks)) for split in ("train", "val"))
    print(f"xz -9e: {size(val) / len(val):.3f} bits a byte for val alone")
    print(f"        {(size(train + val) - size(train)) / len(val):.3f} when it comes after train")
