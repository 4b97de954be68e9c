"""A checkpoint is whole or absent, and a resumed run is the run that never stopped."""

import copy
import json
import os
import shutil
import subprocess
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.utils import clip_grad_norm_
from transformers import LlamaConfig, LlamaForCausalLM

from gemma_tuner.errors import CheckpointError, ResumeError
from gemma_tuner.models.adapter_files import save_adapter
from gemma_tuner.testing import tiny_model
from gemma_tuner.training.checkpoint import (
    TrainerState,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from gemma_tuner.training.config import TrainConfig
from gemma_tuner.training.optim import build_optimizer
from gemma_tuner.training.step import guarded_step
from tests.limits import files_limited_to

CONFIG = TrainConfig(max_steps=100, learning_rate=1e-2, output_dir="/home/ada/secret/run")
FILES = [
    "adapter_config.json",
    "adapter_model.safetensors",
    "gemma_tuner.json",
    "optimizer.safetensors",
    "trainer_state.json",
]


class Run:
    """A small run whose data and dropout depend on its step."""

    def __init__(self, *, rank=4, seed=0, hidden_size=16, dora=False, name="ada/tiny"):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=32,
            hidden_size=hidden_size,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
        base = LlamaForCausalLM(config)
        base.name_or_path = base.config._name_or_path = name
        for parameter in base.parameters():  # norms are all ones in a fresh model
            parameter.data.add_(torch.randn_like(parameter) * 0.01)
        lora = peft.LoraConfig(
            r=rank, lora_dropout=0.2, target_modules=["q_proj", "down_proj"], use_dora=dora
        )
        self.model = peft.get_peft_model(base, lora).train()
        self.optimizer = build_optimizer(
            self.model.named_parameters(), CONFIG, torch.device("cpu")
        )
        self.step = 0

    def train(self, steps):
        losses = []
        for _ in range(steps):
            data = torch.Generator().manual_seed(self.step)
            torch.manual_seed(self.step)
            ids = torch.randint(0, 32, (2, 8), generator=data)
            loss = self.model(input_ids=ids, labels=ids).loss
            loss.backward()
            guarded_step(self.optimizer, clip_grad_norm_(list(self.model.parameters()), 1.0))
            self.optimizer.zero_grad()
            self.step += 1
            losses.append(loss.item())
        return losses

    @property
    def state(self):
        return TrainerState(
            step=self.step,
            stream={"epoch": 0, "position": 2 * self.step},
            config=CONFIG.to_dict(),
            totals={"tokens": 16 * self.step, "skipped_steps": 0},
        )

    def save(self, output_dir, keep=2):
        return save_checkpoint(output_dir, self.state, self.model, self.optimizer, keep=keep)

    def load(self, path):
        state = load_checkpoint(path, self.model, self.optimizer)
        self.step = state.step
        return state

    def snapshot(self):
        names: dict[torch.Tensor, str] = {p: name for name, p in self.model.named_parameters()}
        tensors = {name: p.detach().clone() for p, name in names.items()}
        for parameter, state in self.optimizer.state.items():
            tensors |= {f"{names[parameter]}.{k}": v.clone() for k, v in state.items()}
        return tensors


def assert_same_bits(left, right):
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def read_files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def names_in(output_dir):
    return sorted(path.name for path in (output_dir / "checkpoints").iterdir())


# --- resuming ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("stop", [0, 1, 5])
def test_a_resumed_run_is_the_run_that_never_stopped(tmp_path, stop, dora):
    whole = Run(dora=dora)
    losses = whole.train(8)
    end = whole.snapshot()

    first = Run(dora=dora)
    assert first.train(stop) == losses[:stop]
    path = first.save(tmp_path)
    assert path == tmp_path / "checkpoints" / f"step-{stop:08d}"
    assert sorted(read_files(path)) == FILES
    saved = first.snapshot()

    second = Run(dora=dora)
    second.train(3)  # weights and moments are anywhere but there
    state = second.load(latest_checkpoint(tmp_path))
    assert (state.step, state.stream, state.totals) == (
        first.step,
        first.state.stream,
        first.state.totals,
    )
    assert_same_bits(second.snapshot(), saved)
    shutil.rmtree(path)  # nothing may still read the files
    assert second.train(8 - stop) == losses[stop:]
    assert_same_bits(second.snapshot(), end)


def test_parameters_keep_their_identity(tmp_path):
    run = Run()
    run.train(1)
    before = [id(p) for p in run.model.parameters()]
    run.load(run.save(tmp_path))
    assert [id(p) for p in run.model.parameters()] == before
    assert run.optimizer.param_groups[0]["lr"] == 1e-2


def test_stock_peft_loads_a_checkpoint(tmp_path):
    run = Run()
    run.train(2)
    path = run.save(tmp_path)
    stock = peft.PeftModel.from_pretrained(copy.deepcopy(Run().model.unload()), str(path))
    ids = torch.arange(8)[None]
    assert torch.equal(stock(input_ids=ids).logits, run.model.eval()(input_ids=ids).logits)


@pytest.mark.parametrize("family", ["gemma4-e2b", "gemma3n"])
def test_gemma_resumes_too(tmp_path, family):
    """Also where a part of the adapter never gets a gradient, and so has no moments."""

    def start():
        model, _ = tiny_model(family)
        torch.manual_seed(0)
        lora = peft.LoraConfig(r=2, target_modules=r".*language_model.*\.(k_proj|down_proj)")
        model = peft.get_peft_model(model, lora).train()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_()
        optimizer = build_optimizer(model.named_parameters(), CONFIG, torch.device("cpu"))
        return model, optimizer

    def train(model, optimizer, steps):
        for step in steps:
            ids = torch.arange(step + 5, step + 13)[None]
            model(input_ids=ids, labels=ids).loss.backward()
            for name, parameter in model.named_parameters():
                if ".layers.1." in name:
                    parameter.grad = None
            guarded_step(optimizer, clip_grad_norm_(list(model.parameters()), 1.0))
            optimizer.zero_grad()
        return {name: p.detach().clone() for name, p in model.named_parameters()}

    end = train(*start(), range(4))
    model, optimizer = start()
    train(model, optimizer, range(2))
    state = TrainerState(step=2, stream={}, config=CONFIG.to_dict(), totals={})
    path = save_checkpoint(tmp_path, state, model, optimizer, keep=1)
    assert 0 < len(optimizer.state) < len(optimizer.param_groups[0]["params"])

    model, optimizer = start()
    assert load_checkpoint(path, model, optimizer).step == 2
    assert_same_bits(train(model, optimizer, range(2, 4)), end)


# --- what is in it ----------------------------------------------------------------------------


def test_the_state_is_plain_json_and_names_no_folder_of_the_user(tmp_path):
    run = Run(name=str(tmp_path / "ada" / "secret" / "my-gemma"))
    run.train(1)
    files = read_files(run.save(tmp_path / "secret"))
    document = json.loads(files["trainer_state.json"])
    assert document["step"] == 1
    assert document["stream"] == {"epoch": 0, "position": 2}
    assert document["config"] == {k: v for k, v in CONFIG.to_dict().items() if k != "output_dir"}
    assert document["versions"]["torch"].startswith("2.")
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "my-gemma"
    for name, content in files.items():
        assert b"secret" not in content, name
        assert str(tmp_path).encode() not in content, name


def test_tensors_carry_their_parameters_names(tmp_path):
    run = Run()
    run.train(1)
    moments = load_file(run.save(tmp_path) / "optimizer.safetensors")
    trainable = [name for name, p in run.model.named_parameters() if p.requires_grad]
    assert sorted(moments) == sorted(
        f"{name}.{key}" for name in trainable for key in ("exp_avg", "exp_avg_sq", "step")
    )


def test_a_state_that_json_cannot_hold_is_refused_before_writing(tmp_path):
    run = Run()
    state = TrainerState(step=1, stream={"at": float("nan")}, config={}, totals={})
    with pytest.raises(CheckpointError, match="step 1 cannot be written as JSON"):
        save_checkpoint(tmp_path, state, run.model, run.optimizer, keep=1)
    assert not list(tmp_path.iterdir())


# --- which are kept ---------------------------------------------------------------------------


def test_the_newest_are_kept(tmp_path):
    run = Run()
    for keep in (2, 2, 2, 1):
        run.train(1)
        run.save(tmp_path, keep)
    assert names_in(tmp_path) == ["step-00000004"]


def test_the_latest_ignores_what_is_unfinished_or_foreign(tmp_path):
    assert latest_checkpoint(tmp_path / "nowhere") is None
    folder = tmp_path / "checkpoints"
    for name in (".step-00000009.tmp", ".step-00000008.old", "step-7", "step-00000006.bak"):
        (folder / name).mkdir(parents=True)
    (folder / "step-00000005").write_text("a file")
    assert latest_checkpoint(tmp_path) is None
    for name in ("step-00000003", "step-00000010", "step-100000000"):
        (folder / name).mkdir()
    assert latest_checkpoint(tmp_path) == folder / "step-100000000"


def test_saving_a_step_again_replaces_it_and_clears_leftovers(tmp_path):
    run = Run()
    run.save(tmp_path)
    (tmp_path / "checkpoints" / ".step-00000009.tmp").mkdir()
    (tmp_path / "checkpoints" / ".step-00000009.tmp" / "half").write_text("x")
    run.train(1)
    run.step = 0
    path = run.save(tmp_path)
    assert names_in(tmp_path) == ["step-00000000"]
    saved = run.snapshot()
    run.train(1)
    run.load(path)
    assert_same_bits(run.snapshot(), saved)


# --- what does not continue -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        ({"rank": 8}, r"lora\.r: 4 → 8"),
        ({"hidden_size": 32}, r"base\.hidden_size: 16 → 32"),
        ({"seed": 1}, r"fingerprint of the base's weights: \w{8}… → \w{8}…"),
        ({"dora": True}, r"lora\.use_dora: False → True"),
    ],
)
def test_another_run_is_refused_and_left_alone(tmp_path, other, difference):
    run = Run()
    run.train(1)
    path = run.save(tmp_path)
    here = Run(**other)
    here.train(1)
    before = here.snapshot()
    with pytest.raises(ResumeError, match=difference):
        here.load(path)
    assert_same_bits(here.snapshot(), before)


def test_the_same_base_under_another_name_continues(tmp_path):
    run = Run(name="ada/tiny")
    path = run.save(tmp_path)
    assert Run(name="/elsewhere/copy-of-tiny").load(path).step == 0


def test_random_states_of_an_older_checkpoint_are_passed_over(tmp_path):
    run = Run()
    run.train(1)
    path = run.save(tmp_path)
    saved = run.snapshot()
    save_file({"cpu": torch.get_rng_state()}, path / "rng.safetensors")
    run.train(1)
    assert run.load(path).step == 1
    assert_same_bits(run.snapshot(), saved)


def test_a_long_list_of_differences_is_shortened(tmp_path):
    run = Run()
    path = run.save(tmp_path)
    document = json.loads((path / "trainer_state.json").read_text())
    document["identity"]["base"]["layer_types"] = ["sliding_attention"] * 100
    document["identity"]["trainable"] |= {f"strange.{i}": [1] for i in range(50)}
    (path / "trainer_state.json").write_text(json.dumps(document))
    with pytest.raises(ResumeError, match=r"layer_types: .*… \(\d+ characters\)") as caught:
        run.load(path)
    assert "; and 48 more. Load the model" in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize("change", ["missing", "unexpected", "shape", "dtype"])
def test_tensors_that_do_not_match_are_named(tmp_path, file, change):
    run = Run()
    run.train(1)
    path = run.save(tmp_path)
    tensors = load_file(path / file)
    name = next(name for name in sorted(tensors) if "lora_A" in name and "step" not in name)
    if change == "missing":
        del tensors[name]
    elif change == "unexpected":
        name = tensors_name = "stranger.lora_A.exp_avg"
        tensors[tensors_name] = torch.zeros(1)
    elif change == "shape":
        tensors[name] = tensors[name][:1].contiguous()
    else:
        tensors[name] = tensors[name].to(torch.bfloat16)
    shutil.copy(path / file, tmp_path / "kept")
    (path / file).unlink()
    save_file(tensors, path / file)
    before = run.snapshot()
    with pytest.raises(ResumeError) as caught:
        run.load(path)
    assert name in str(caught.value)
    assert_same_bits(run.snapshot(), before)


@pytest.mark.parametrize("file", [FILES[1], *FILES[3:]])
@pytest.mark.parametrize("damage", ["truncated", "emptied", "removed"])
def test_a_damaged_file_is_named_and_the_one_before_serves(tmp_path, file, damage):
    run = Run()
    run.train(1)
    run.save(tmp_path)
    earlier = run.snapshot()
    run.train(1)
    path = run.save(tmp_path)
    content = (path / file).read_bytes()
    (path / file).unlink()
    if damage != "removed":
        (path / file).write_bytes(content[: len(content) // 2] if damage == "truncated" else b"")
    before = run.snapshot()
    with pytest.raises(CheckpointError) as caught:
        run.load(latest_checkpoint(tmp_path))
    assert str(caught.value).startswith(f"{file} is missing or damaged")
    assert f"delete the folder {path.name};" in str(caught.value)
    assert str(tmp_path) not in str(caught.value)
    assert_same_bits(run.snapshot(), before)

    shutil.rmtree(path)
    run.load(latest_checkpoint(tmp_path))
    assert_same_bits(run.snapshot(), earlier)


@pytest.mark.parametrize("text", ["[]", "{}", '{"format": 1}', '{"format": 1, "step": 1}', "1"])
def test_a_state_without_its_parts_is_damaged(tmp_path, text):
    run = Run()
    path = run.save(tmp_path)
    (path / "trainer_state.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"trainer_state\.json is missing or damaged"):
        run.load(path)


def test_a_newer_format_is_refused(tmp_path):
    run = Run()
    path = run.save(tmp_path)
    document = json.loads((path / "trainer_state.json").read_text())
    (path / "trainer_state.json").write_text(json.dumps(document | {"format": 2}))
    with pytest.raises(CheckpointError, match="format 2, this version of gemma_tuner reads 1"):
        run.load(path)


# --- save_adapter -----------------------------------------------------------------------------


def test_an_adapter_is_a_stock_peft_folder(tmp_path):
    run = Run()
    run.train(2)
    path = save_adapter(run.model, tmp_path / "deep" / "adapter")
    assert sorted(read_files(path)) == FILES[:3]
    stock = peft.PeftModel.from_pretrained(Run().model.unload(), str(path))
    ids = torch.arange(8)[None]
    assert torch.equal(stock(input_ids=ids).logits, run.model.eval()(input_ids=ids).logits)
    assert json.loads((path / "adapter_config.json").read_text())["base_model_name_or_path"] == (
        "ada/tiny"
    )


def test_an_existing_folder_keeps_its_other_files(tmp_path):
    run = Run()
    run.save(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    save_adapter(run.model, tmp_path)
    before = read_files(tmp_path / "checkpoints" / "step-00000000")
    run.train(1)
    save_adapter(run.model, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        [*FILES[:3], "checkpoints", "notes.txt"]
    )
    assert read_files(tmp_path / "checkpoints" / "step-00000000") == before
    assert (tmp_path / FILES[1]).read_bytes() != before[FILES[1]]


def test_an_adapter_takes_the_place_of_another_in_one_moment(tmp_path, monkeypatch):
    """New weights under old settings would be scaled by what they were not trained with."""
    run = Run()
    before = read_files(save_adapter(run.model, tmp_path / "adapter"))
    run.train(1)
    monkeypatch.setattr(Path, "rename", None)
    monkeypatch.setattr(Path, "replace", None)
    after = read_files(save_adapter(run.model, tmp_path / "adapter"))
    assert sorted(after) == sorted(before)
    assert after[FILES[1]] != before[FILES[1]]
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize("where", ["among other files", "where one works"])
def test_where_it_cannot_the_settings_go_first_and_come_last(tmp_path, monkeypatch, where):
    run, replace = Run(), Path.replace
    save_adapter(run.model, tmp_path)
    if where == "where one works":
        monkeypatch.chdir(tmp_path)
    else:
        (tmp_path / "notes.txt").write_text("mine")
    run.train(1)
    for count in range(3):
        moves = iter(range(count))

        def move(path, target, moves=moves):
            if next(moves, None) is None:
                raise KeyboardInterrupt
            return replace(path, target)

        monkeypatch.setattr(Path, "replace", move)
        with pytest.raises(KeyboardInterrupt):
            save_adapter(run.model, tmp_path)
        assert not (tmp_path / FILES[0]).exists()
    monkeypatch.setattr(Path, "replace", replace)
    save_adapter(run.model, tmp_path)
    assert {*FILES[:3]} <= {path.name for path in tmp_path.iterdir()}


# --- full ---------------------------------------------------------------------------------


def test_a_full_disk_keeps_what_was_saved(tmp_path):
    """A limit on files stands in for the disk and cuts each of the five files short in turn."""
    run = Run()
    run.train(1)
    first = read_files(run.save(tmp_path))
    run.train(1)
    adapter = read_files(save_adapter(run.model, tmp_path / "adapter"))
    says = r"File too large.*What was saved before is untouched\. Free disk space"

    def check(save, size):
        with files_limited_to(size - 1), pytest.raises(CheckpointError, match=says) as caught:
            save()
        assert str(tmp_path) not in str(caught.value)

    for size in sorted(map(len, first.values())):
        check(lambda: run.save(tmp_path), size)
        assert names_in(tmp_path) == ["step-00000001"]
        assert read_files(tmp_path / "checkpoints" / "step-00000001") == first
    for size in sorted(map(len, adapter.values())):
        check(lambda: save_adapter(run.model, tmp_path / "adapter"), size)
        assert read_files(tmp_path / "adapter") == adapter
    assert (len(first), len(adapter)) == (len(FILES), 3)
    run.save(tmp_path)
    assert Run().load(latest_checkpoint(tmp_path)).step == 2


def test_a_small_file_system_is_measured_before_writing(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a full file system needs root and mount: NOT TESTED HERE")
    try:
        run = Run()
        with pytest.raises(CheckpointError, match=r"\d\d MB are needed and \d MB are free"):
            run.save(disk)
        with pytest.raises(CheckpointError, match="Free disk space there, or choose another"):
            save_adapter(run.model, disk / "adapter")
        assert names_in(disk) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_place_that_cannot_be_written_is_explained(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(CheckpointError, match=r"cannot save a checkpoint in .*file"):
        Run().save(tmp_path / "file")
    with pytest.raises(CheckpointError, match=r"cannot save an adapter in .*file"):
        save_adapter(Run().model, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "not a folder"
