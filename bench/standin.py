"""A stand-in for WikiText-2 where only its validation and test texts are at hand: nine tenths of the one to train on.

    python bench/standin.py wikitext2_valid.txt wikitext2_test.txt

Writes standin.zip, which looks like the published file: the validation text is cut at the first article after nine
tenths of its characters. prepare_data.py takes it from a web server:

    python -m http.server 8123 --bind 127.0.0.1 &
    python prepare_data.py wikitext2 --url http://127.0.0.1:8123/standin.zip
"""

import argparse
import re
import zipfile
from pathlib import Path


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("valid", type=Path)
    parser.add_argument("test", type=Path)
    args = parser.parse_args()
    text, test = (path.read_bytes().decode() for path in (args.valid, args.test))
    articles = [match.start() for match in re.finditer(r"(?m)^ = [^=].* = \s*?$", text)]
    cut = next(start for start in articles if start > 0.9 * len(text))
    with zipfile.ZipFile("standin.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for split, part in (("train", text[:cut]), ("valid", text[cut:]), ("test", test)):
            archive.writestr(f"wikitext-2-raw/wiki.{split}.raw", part)
    print(__doc__.partition("server:")[2])


if __name__ == "__main__":
    main()
