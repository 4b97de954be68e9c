"""Files of rows that hold or claim far more than a row should, and what reading each takes.

    python -m tests.hostile_rows CASE

prints the peak above what the process held before, in MB, and how it ended.
"""

import gzip
import io
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet

from tests.hostile_media import read_status

GOOD = '{"prompt": "a", "response": "b"}\n'


def _parquet(value, num_rows, **options):
    stream = io.BytesIO()
    column = pyarrow.array([value] * num_rows)
    table = pyarrow.table({"prompt": column, "response": pyarrow.array(["b"] * num_rows)})
    pyarrow.parquet.write_table(table, stream, compression="zstd", **options)
    return stream.getvalue()


CASES = {
    "a line of a gigabyte": ("x.jsonl.gz", lambda: gzip.compress(b"x" * 10**9, 1)),
    "a line of 30 MB": (
        "x.jsonl",
        lambda: json.dumps({"prompt": "a" * 30_000_000, "response": "b"}).encode(),
    ),
    "a million empty lists in a line": (
        "x.jsonl",
        lambda: (GOOD[:-2] + ', "x": [' + ",".join(["[]"] * 10**6) + "]}").encode(),
    ),
    "an array of 100,000 rows": (
        "x.json",
        lambda: ("[" + ",".join([GOOD[:-1]] * 100_000) + "]").encode(),
    ),
    "an object of 130 MB": (
        "x.json",
        lambda: ('{"data": [' + ",".join([GOOD[:-1]] * 4_000_000) + "]}").encode(),
    ),
    "100,000 columns": (
        "x.jsonl",
        lambda: json.dumps({f"c{i}": "a" for i in range(100_000)}).encode(),
    ),
    "a quote that is never closed": (
        "x.csv",
        lambda: b'prompt,response\n"' + b"a,b\n" * 30_000_000,
    ),
    "a million delimiters": ("x.csv", lambda: b"prompt,response\n" + b"," * 3_000_000),
    "one text in 300 rows": (
        "x.parquet",
        lambda: _parquet("a" * 1_000_000, 300, use_dictionary=True),
    ),
    "a text of 200 MB": ("x.parquet", lambda: _parquet("a" * 200_000_000, 1)),
}


def measure(case):
    """Read a case in a child: MB at the peak above the base, and how it ended."""
    command = [sys.executable, "-m", "tests.hostile_rows", case]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=170)
    peak, ended = said.stdout.splitlines()[-1].split(" ", 1)
    return float(peak), ended


def main():
    from gemma_tuner.errors import GemmaTunerError
    from gemma_tuner.streaming.opening import stream_local

    name, make = CASES[sys.argv[1]]
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        for each in ("good.jsonl", name):  # the first imports what is imported late
            path = home / each
            path.write_bytes(GOOD.encode() if each == "good.jsonl" else make())
            Path("/proc/self/clear_refs").write_text("5")
            base, began = read_status("VmRSS"), time.monotonic()
            try:
                stream = stream_local(path, cache_dir=home / "cache")
                ended = f"{len(stream):,} read"
            except GemmaTunerError as error:
                ended = str(error)
            seconds = time.monotonic() - began
    sys.stdout.write(f"{read_status('VmHWM') - base:.0f} {ended} in {seconds:.1f} s\n")


if __name__ == "__main__":
    main()
