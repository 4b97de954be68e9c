"""Label masks: exactly the assistant's words, whatever stands around them."""

from hypothesis import given
from hypothesis import strategies as st

from gemma_tuner.collators.prompt import TurnMarkers, mark_removable, mark_targets

BOS, PAD, OPEN, CLOSE, NEWLINE, MODEL, USER, IMAGE = 2, 0, 105, 106, 107, 4368, 2364, 258880
CHANNEL, CHANNEL_END, THOUGHT, CALL, CALL_END, RESPONSE, RESPONSE_END = (
    100,
    101,
    45518,
    48,
    49,
    50,
    51,
)
MARKERS = TurnMarkers(
    header=(OPEN, MODEL, NEWLINE),
    close=CLOSE,
    empty_thought=(CHANNEL, THOUGHT, NEWLINE, CHANNEL_END),
    tool_call_close=CALL_END,
    tool_response_open=RESPONSE,
    tool_response_close=RESPONSE_END,
    special=frozenset(
        {
            BOS,
            PAD,
            OPEN,
            CLOSE,
            IMAGE,
            CHANNEL,
            CHANNEL_END,
            CALL,
            CALL_END,
            RESPONSE,
            RESPONSE_END,
        }
    ),
    untrained=frozenset({BOS, PAD, IMAGE}),
)

words = st.lists(
    st.sampled_from([NEWLINE, MODEL, USER, THOUGHT, 500, 501, 502]), min_size=1, max_size=6
)


@st.composite
def conversations(draw):
    """Token ids of a conversation with the mask that they must get."""
    ids, mask = [BOS], [False]

    def add(tokens, trained):
        ids.extend(tokens)
        mask.extend([trained] * len(tokens))

    for _ in range(draw(st.integers(1, 4))):
        add([OPEN, USER, NEWLINE], False)
        add([IMAGE] * draw(st.integers(0, 3)), False)
        add(draw(words), False)
        add([CLOSE, NEWLINE, OPEN, MODEL, NEWLINE], False)
        opening = draw(st.sampled_from(["plain", "stub", "reasoning", "tool"]))
        if opening == "stub":
            add(MARKERS.empty_thought, False)
        elif opening == "reasoning":
            add([CHANNEL, THOUGHT, NEWLINE, *draw(words), CHANNEL_END], True)
        elif opening == "tool":
            add([CALL, *draw(words), CALL_END, RESPONSE], True)
            add([*draw(words), RESPONSE_END], False)
            if draw(st.booleans()):
                add([RESPONSE, *draw(words), RESPONSE_END], False)
            if draw(st.booleans()):
                continue  # a template may open the next turn without closing this one
        add(draw(words), True)
        add([CLOSE], True)
        add([NEWLINE], False)
    return ids, mask


@given(conversations())
def test_every_assistant_word_and_nothing_else_is_trained(conversation):
    ids, expected = conversation
    assert mark_targets(ids, MARKERS, "assistant") == expected


@given(conversations())
def test_last_is_the_last_answer_of_assistant(conversation):
    ids, expected = conversation
    last_header = max(i for i in range(len(ids)) if ids[i : i + 3] == list(MARKERS.header))
    assert mark_targets(ids, MARKERS, "last") == [
        flag and position > last_header for position, flag in enumerate(expected)
    ]


@given(conversations())
def test_all_trains_everything_but_bos_pad_and_media(conversation):
    ids, _ = conversation
    targets = mark_targets([*ids, PAD, PAD], MARKERS, "all")
    assert targets == [token not in {BOS, PAD, IMAGE} for token in [*ids, PAD, PAD]]


@given(conversations())
def test_a_cut_takes_neither_targets_nor_structure_nor_media(conversation):
    ids, targets = conversation
    removable = mark_removable(ids, targets, MARKERS)
    rest = [token for token, gone in zip(ids, removable, strict=True) if not gone]
    kept_targets = [t for t, gone in zip(targets, removable, strict=True) if not gone]
    assert sum(kept_targets) == sum(targets)
    assert mark_targets(rest, MARKERS, "assistant") == kept_targets
    assert [t for t in rest if t in MARKERS.special] == [t for t in ids if t in MARKERS.special]


def test_an_unanswered_tool_call_trains_the_stop_token():
    ids = [BOS, *MARKERS.header, CALL, 500, CALL_END, RESPONSE]
    assert mark_targets(ids, MARKERS, "assistant") == [False] * 4 + [True] * 4
