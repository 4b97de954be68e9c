"""Short training runs, as functions that a new process can import and run."""

import json
import signal
from pathlib import Path

from gemma_tuner.collators.multimodal import MultimodalCollator
from gemma_tuner.evaluation.samples import SampleGenerations
from gemma_tuner.models.lora import LoraConfig, add_lora
from gemma_tuner.storage.config import FetchConfig
from gemma_tuner.streaming.opening import stream_bigquery, stream_local
from gemma_tuner.testing import Fault, LocalCloud, Refuse, Truncate, sample_data, tiny_model
from gemma_tuner.training.config import TrainConfig
from gemma_tuner.training.trainer import Trainer


class StoppingTrainer(Trainer):
    """Sends its own process a signal after a number of steps, as an impatient user would."""

    stop_after: int | None = None
    stop_signal = signal.SIGTERM

    def train_step(self, step_input):
        result = super().train_step(step_input)
        if self.step == self.stop_after:
            signal.raise_signal(self.stop_signal)
        return result


def build_trainer(
    folder,
    *,
    modality="text",
    family="gemma4-e2b",
    targets=("language",),
    dropout=0.0,
    variant="lora",
    rows=10,
    stream=None,
    samples=None,
    device="cpu",
    **settings,
):
    """A trainer on the first bundled samples: 4 examples a step, an epoch of 2.5 steps."""
    model, processor = tiny_model(family)
    config = LoraConfig(rank=4, targets=targets, dropout=dropout, variant=variant)
    model = add_lora(model.to(device), config)
    if stream is None:
        stream = stream_local(sample_data(modality), cache_dir=Path(folder) / "cache").take(rows)
    settings = {
        "max_steps": 5,
        "batch_size": 2,
        "gradient_accumulation": 2,
        "learning_rate": 1e-2,
        "log_every_steps": 1,
        "progress": False,
        "output_dir": Path(folder) / "run",
        **settings,
    }
    collator = MultimodalCollator(processor)
    if samples is not None:
        samples = SampleGenerations(collator, [stream[0]], **samples)
    return StoppingTrainer(
        model, stream, collator, TrainConfig(**settings), eval_stream=stream, samples=samples
    )


def run(folder, *, stop_after=None, resume=False, **settings):
    """Train, or resume; save the adapter beside the run."""
    trainer = build_trainer(folder, **settings)
    trainer.stop_after = stop_after
    result = trainer.fit(resume=resume)
    trainer.save(Path(folder) / "adapter")
    return result


def run_in_cloud(folder, *, modality, kill_after=None, resume=False):
    """Train on rows in BigQuery and media in Cloud Storage; may be killed after a step."""
    with LocalCloud() as cloud:
        for effect in (Refuse(503), Truncate()):
            cloud.gcs.add_fault(Fault(effect, probability=0.1))
        stream = stream_bigquery(
            cloud.tables[modality],
            split="train",
            cache_dir=Path(folder) / "cache",
            fetch=FetchConfig(cache_bytes=20_000),
            **cloud.clients(),
        )
        trainer = build_trainer(
            folder, stream=stream.take(10), dropout=0.1, save_every_steps=1, eval_every_steps=2
        )
        trainer.stop_after, trainer.stop_signal = kill_after, signal.SIGKILL
        trainer.fit(resume=resume)
        trainer.save(Path(folder) / "adapter")


def read_trace(folder, kind="step"):
    """What was logged, without what depends on the clock and the machine."""
    timed = (
        "tokens_per_second",
        "target_tokens_per_second",
        "data_wait_seconds",
        "time",
        "memory_bytes",
        "device",
    )
    records = [
        json.loads(line) for line in (Path(folder) / "run/log.jsonl").read_text().splitlines()
    ]
    return [
        {name: value for name, value in record.items() if name not in timed}
        for record in records
        if record["kind"] == kind
    ]
