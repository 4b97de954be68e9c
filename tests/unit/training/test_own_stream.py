"""A stream of one's own needs what the protocol names, and nothing else."""

import pytest
from typing_extensions import get_protocol_members

import gemma_tuner as gt
from gemma_tuner.training.feed import STREAM_MEMBERS, check_stream
from tests.runs import build_trainer, read_trace

EXAMPLES = [
    gt.Example(f"mine/{n}", (gt.Turn("user", (gt.Text(q),)), gt.Turn("assistant", (gt.Text(a),))))
    for n, (q, a) in enumerate(
        zip("abcdefg", ("one", "two", "three", "four", "five", "six", "seven"), strict=True)
    )
]


class Five(gt.Stream):
    """The five that a class writes that inherits."""

    def __init__(self):
        self.num_read = 0

    def __len__(self):
        return len(EXAMPLES)

    def __getitem__(self, index):
        return EXAMPLES[index]

    def read_slots(self):
        end = (self.num_read // len(self) + 1) * len(self)
        while self.num_read < end:
            self.num_read += 1
            yield EXAMPLES[(self.num_read - 1) % len(self)]

    def state_dict(self):
        return {"num_read": self.num_read}

    def load_state_dict(self, state):
        self.num_read = state["num_read"]


# One that inherits nothing and has what the protocol names, no more.
Whole = type(
    "Whole",
    (),
    {"__init__": Five.__init__, **{name: getattr(Five, name) for name in STREAM_MEMBERS}},
)


def test_what_is_asked_for_is_the_protocol():
    assert set(STREAM_MEMBERS) == get_protocol_members(gt.Stream)


@pytest.mark.parametrize("lacking", STREAM_MEMBERS)
def test_each_member_that_lacks_is_named_before_anything_runs(lacking):
    members = {name: value for name, value in vars(Whole).items() if name in STREAM_MEMBERS}
    del members[lacking]
    with pytest.raises(gt.ConfigError, match=f"has no {lacking};") as caught:
        check_stream("stream", type("Mine", (), members)())
    assert "stream is a Mine" in str(caught.value)


@pytest.mark.parametrize("argument", ["stream", "eval_stream"])
def test_rows_given_to_a_trainer_or_an_evaluation_are_answered(trained, argument):
    trainer = trained[0]
    given = {"stream": Five(), "eval_stream": None, argument: [{"prompt": "a secret"}]}
    with pytest.raises(
        gt.ConfigError, match=rf"^{argument} is a list.*stream_rows\(rows\)"
    ) as caught:
        gt.Trainer(
            trainer.model, given["stream"], trainer.collator, trainer.config, given["eval_stream"]
        )
    assert "secret" not in str(caught.value)
    with pytest.raises(gt.ConfigError, match=r"stream_rows\(rows\)"):
        gt.evaluate(trainer.model, [{"prompt": "a secret"}], trainer.collator, scores=())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("five")
    trainer = build_trainer(folder, stream=Five(), max_steps=4, eval_every_steps=2)
    trainer.fit()
    return trainer, folder


def test_it_trains_resumes_and_is_evaluated(tmp_path, trained):
    whole, folder = trained
    stopped = build_trainer(tmp_path, stream=Whole(), max_steps=4, eval_every_steps=2)
    stopped.stop_after = 2
    assert stopped.fit().step == 2
    resumed = build_trainer(tmp_path, stream=Whole(), max_steps=4, eval_every_steps=2)
    assert resumed.fit(resume=True).step == 4
    assert read_trace(tmp_path) == read_trace(folder)
    assert read_trace(tmp_path, "eval") == read_trace(folder, "eval")
    report = gt.evaluate(whole.model, Whole(), whole.collator, scores=(), compare_base=False)
    assert report.held_out["adapter"].examples == len(EXAMPLES)


def test_rows_in_memory_train_resume_and_are_held_out(tmp_path, trained):
    def open_rows():
        return gt.stream_rows(EXAMPLES, cache_dir=tmp_path / "cache", shuffle=False)

    stopped = build_trainer(tmp_path, stream=open_rows(), max_steps=4, eval_every_steps=2)
    stopped.stop_after = 3
    stopped.fit()
    resumed = build_trainer(tmp_path, stream=open_rows(), max_steps=4, eval_every_steps=2)
    resumed.fit(resume=True)
    _, folder = trained
    assert read_trace(tmp_path) == read_trace(folder)  # the same rows in the same order
    assert read_trace(tmp_path, "eval") == read_trace(folder, "eval")


def test_what_an_inheriting_class_leaves_out_is_named_as_it_is_made():
    with pytest.raises(TypeError, match="read_slots"):
        type("Mine", (gt.Stream,), {"__len__": len})()
