"""The spine: what one example passes from its row to the log is what docs/architecture.md says."""

import json
from pathlib import Path

import pytest

import gemma_tuner as gt
from gemma_tuner.models.target_only import target_only_of
from gemma_tuner.testing import GcsServer
from tests.spine import Walk, read_table

# These may only fall: a function more on the way of every example is a decision.
MOST_LOCAL = (36, 17)  # functions and files to the optimizer's step
MOST_FROM_A_BUCKET = (46, 22)
SAMPLES = Path(gt.testing.sample_data("image"))
ROW = json.loads((SAMPLES / "manifest.jsonl").read_text().splitlines()[0])
# Once to fetch and once to decode.
TWICE = ("threads.py DaemonPool.submit", "records.py Example.replace_media")


def walk_one_step(walk, stream, folder):
    model, processor = gt.testing.tiny_model("gemma4-e2b")
    model = gt.add_lora(model, gt.LoraConfig(rank=4))
    config = gt.TrainConfig(
        max_steps=1,
        batch_size=1,
        gradient_accumulation=1,
        log_every_steps=1,
        progress=False,
        output_dir=folder / "run",
    )
    trainer = gt.Trainer(model, stream, gt.ImageCollator(processor), config)
    # Once a run, and no part of the way; on another row, so that nothing is fetched yet.
    samples = gt.stream_local(SAMPLES, cache_dir=folder / "samples")
    trainer.stepper.make_plan([trainer.collator([samples[0]])])
    target_only_of(model.get_base_model())
    walk.begin()
    trainer.fit()


def open_local(folder):
    (folder / "a.png").write_bytes((SAMPLES / ROW["image"]).read_bytes())
    (folder / "rows.csv").write_text("id,prompt,response,image\n1,What is it?,A shape,a.png\n")
    return gt.stream_local(folder / "rows.csv", cache_dir=folder / "cache")


def open_bucket(folder, server):
    server.put("b", "a.png", (SAMPLES / ROW["image"]).read_bytes())
    line = {"id": "1", "prompt": "What is it?", "response": "A shape", "image": "gs://b/a.png"}
    server.put("b", "rows.jsonl", json.dumps(line).encode() + b"\n")
    return gt.stream_gcs(
        "gs://b/rows.jsonl", cache_dir=folder / "cache", gcs_client=server.client()
    )


def check_walk(walk: Walk, table: list[str], to_the_step: list[str], most: tuple[int, int]):
    missing = [name for name in table if name not in walk.order]
    assert not missing, f"the table names what no example passes: {missing}"
    new = [name for name in walk.list_passed() if name not in table]
    assert not new, f"an example passes these too; is there a way without them? {new}"
    for called in (walk.main, walk.other_threads):
        order = [name for name in called if name in to_the_step and name not in TWICE]
        assert order == [name for name in to_the_step if name in order], "it goes in another order"
    files = {name.split()[0] for name in to_the_step}
    assert len(to_the_step) <= most[0]
    assert len(files) <= most[1]


@pytest.fixture(scope="module")
def tables():
    local, stored = read_table("From a local file"), read_table("From a bucket, besides")
    logged = read_table("To the log")
    assert min(map(len, (local, stored, logged))) > 0
    return local, stored, logged


def test_what_an_image_in_a_local_file_passes(tables, tmp_path):
    local, _, logged = tables
    with Walk() as walk:
        walk_one_step(walk, open_local(tmp_path), tmp_path)
    check_walk(walk, local + logged, local, MOST_LOCAL)


def test_what_an_image_in_a_bucket_passes(tables, tmp_path):
    local, stored, logged = tables
    with GcsServer() as server, Walk() as walk:
        walk_one_step(walk, open_bucket(tmp_path, server), tmp_path)
    place = local.index("media/load.py load_media")
    way = local[:place] + stored + local[place:]
    check_walk(walk, way + logged, way, MOST_FROM_A_BUCKET)
