"""What does a stop lose? `datasets` streaming and our stream, resumed in a new process.

    python benchmarks/resume_comparison.py [--rows 1000] [--stops 200 500 777]

JSON lines in 4 and in 8 files, shuffled (`datasets` by a buffer of 100 and of 10 rows, ours over
all rows). Read to the stop, take `state_dict()`, load it in a new process, read the rest: against
the uninterrupted run, a row that never came is lost, and one that came twice is duplicated.
`datasets` warns of it: the state does not hold the buffer, which is filled anew.
"""

import argparse
import json
import multiprocessing
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import datasets

import gemma_tuner as gt

LAYOUTS = ((4, 100), (8, 10))  # files, and rows in the buffer of datasets


class Stop(NamedTuple):
    """What one library handed out up to a stop, and the state that it gave then."""

    keys: list[str]
    state: dict[str, Any]


def write_files(folder: Path, num_rows: int, num_files: int) -> list[str]:
    """Write rows with keys of their own, in files of one size."""
    files = []
    for index in range(num_files):
        rows = range(index * num_rows // num_files, (index + 1) * num_rows // num_files)
        path = folder / f"part-{index}.jsonl"
        lines = [json.dumps({"id": f"{row}", "prompt": "P", "response": "R"}) for row in rows]
        path.write_text("\n".join(lines))
        files.append(str(path))
    return files


def read_theirs(
    files: list[str], buffer: int, *, state: dict[str, Any] | None = None, stop: int | None = None
) -> Stop:
    """Read with `datasets`: from the beginning or a state, to the end or a stop."""
    datasets.logging.set_verbosity_error()
    rows = datasets.load_dataset("json", data_files=files, split="train", streaming=True)
    rows = rows.shuffle(seed=0, buffer_size=buffer)
    if state is not None:
        rows.load_state_dict(state)
    keys = [row["id"] for row in islice(rows, stop)]
    return Stop(keys, rows.state_dict())


def read_ours(
    files: list[str], cache: str, *, state: dict[str, Any] | None = None, stop: int | None = None
) -> Stop:
    """Read with our stream: from the beginning or a state, to the end or a stop."""
    stream = gt.stream_local(files, seed=0, cache_dir=cache)
    if state is not None:
        stream.load_state_dict(state)
    keys = [example.key for example in islice(stream, stop)]
    return Stop(keys, stream.state_dict())


def read_rest(
    files: list[str], buffer: int, cache: str, theirs: Stop, ours: Stop
) -> tuple[list[str], list[str]]:
    """Read what is left after two stops; runs in a process of its own."""
    return (
        theirs.keys + read_theirs(files, buffer, state=theirs.state).keys,
        ours.keys + read_ours(files, cache, state=ours.state).keys,
    )


def compare(resumed: list[str], uninterrupted: list[str]) -> tuple[int, int, str]:
    """Count lost and duplicated rows, and say whether the order is that of the whole run."""
    counts = Counter(resumed)
    lost = len(set(uninterrupted) - counts.keys())
    duplicated = sum(count - 1 for count in counts.values())
    return lost, duplicated, "yes" if resumed == uninterrupted else "no"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--stops", type=int, nargs="+", default=[200, 500, 777])
    options = parser.parse_args()
    if not all(0 < stop < options.rows for stop in options.stops):
        parser.error("--stops lie between 0 and --rows")
    print(f"{options.rows:,} rows; datasets {datasets.__version__}; in each cell:")
    print("rows lost / duplicated / same order as the uninterrupted run")
    print(f"{'files':>5} {'buffer':>6} {'stop':>6}  {'datasets':>18}  {'gemma_tuner':>18}")
    spawn = multiprocessing.get_context("spawn")
    for num_files, buffer in LAYOUTS:
        with tempfile.TemporaryDirectory() as folder:
            files = write_files(Path(folder), options.rows, num_files)
            theirs, ours = read_theirs(files, buffer).keys, read_ours(files, folder).keys
            for stop in options.stops:
                stops = (
                    read_theirs(files, buffer, stop=stop),
                    read_ours(files, folder, stop=stop),
                )
                with ProcessPoolExecutor(1, mp_context=spawn) as new_process:
                    rest = new_process.submit(read_rest, files, buffer, folder, *stops)
                cells = [
                    "{} / {} / {}".format(*compare(*pair))
                    for pair in zip(rest.result(), (theirs, ours), strict=True)
                ]
                print(f"{num_files:>5} {buffer:>6} {stop:>6}  {cells[0]:>18}  {cells[1]:>18}")


if __name__ == "__main__":
    main()
