"""analyses/specialisation.py: shares, information and guesses by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moe_lab.analyses import specialisation
from moe_lab.analyses.guesses import GUESSES
from moe_lab.analyses.routes import routes_of, view_of
from moe_lab.analyses.specialisation import conclude, of_layer, text_information
from moe_lab.records.trace import Layer, Trace, TraceWriter, tokens_of
from tests.analyses import traces


def write(path: Path, texts: list[tuple[list[int], list[int], list[int]]]) -> Path:
    """A sequence of each text: token ids, the expert of each token in layer 0 and in layer 1, of four."""
    with TraceWriter(path, [Layer(0, 4, 1), Layer(1, 4, 1)], domains=[str(i) for i in range(len(texts))]) as writer:
        for index, (ids, first, second) in enumerate(texts):
            tokens = tokens_of(np.full(len(ids), index), np.arange(len(ids)), token=np.array(ids), domain=index)
            writer.add(tokens, [np.array(first)[:, None], np.array(second)[:, None]])
    return path


def test_guesses_by_hand(tmp_path: Path) -> None:
    """Each text is guessed from what the other one did."""
    path = write(
        tmp_path / "x.trace",
        [
            ([5, 6, 5, 7], [0, 1, 0, 2], [3, 2, 3, 3]),
            ([5, 5, 6, 5], [0, 0, 1, 3], [3, 3, 2, 0]),
        ],
    )
    cfg = {"guess": list(GUESSES)}
    with Trace(path) as trace:
        view = view_of(trace)
        parts = [of_layer(routes_of(trace, i, view, with_before=True), cfg, trace.layers) for i in range(2)]
        findings = conclude(parts, view, cfg, trace.layers)
    first, second = findings.tables["specialisation"].to_dict("records")
    # Layer 0. Popular elsewhere: 0 for both texts (2 of 4 each). By id: 5 -> 0, 6 -> 1 in both; 7 was not seen, so 0.
    assert (first["popular"], first["token_id"]) == (4 / 8, 6 / 8)
    assert first["previous_token"] == 1 / 8  # the second 0 of the second text
    assert np.isnan(first["layer_before"])
    # Layer 1. From the layer before: 0 -> 3 and 1 -> 2 in both texts; 2 and 3 were not seen there, so expert 0.
    assert second["layer_before"] == (3 + 4) / 8
    assert second["popular"] == (3 + 2) / 8 and second["previous_token"] == 2 / 8
    table = findings.tables["specialisation_texts"].set_index(["layer", "expert", "part"])
    assert table["share"][0, 0, "0"] == 2 / 4 and table["lift"][0, 0, "0"] == 2
    assert "are among those that its token id used elsewhere" in findings.sentences[0]


def test_vocabulary_by_hand(tmp_path: Path) -> None:
    """By the token's own id, by the one that follows, by the predicted one; layer 0, an expert a token."""
    path, texts = tmp_path / "x.trace", [([5, 6, 5, 7], [0, 1, 0, 3]), ([5, 5, 6, 5], [0, 0, 1, 3])]
    predicted = [[1, 2, 1, -1], [2, 1, 2, 2]]
    with TraceWriter(path, [Layer(0, 4, 1)], domains=["a", "b"], token_columns={"predicted": 1}) as writer:
        for index, (ids, experts) in enumerate(texts):
            tokens = tokens_of(np.full(4, index), np.arange(4), token=np.array(ids), domain=index)
            writer.add(tokens, [np.array(experts)[:, None]], {"predicted": np.array(predicted[index])})
    findings = traces.found(path, specialisation, {"guess": ["popular", "token_id", "target_id", "predicted_id"]})
    (row,) = findings.tables["specialisation"].to_dict("records")
    # Input: 5 -> 0 and 6 -> 1 in both texts; 7 was not seen, so 0. Right: 3 of 4, and 3 of 4.
    assert row["vocabulary_input"] == row["token_id"] == 6 / 8
    # Target of a: 6 5 7 -, experts 0 1 0 (3); of b: 5 6 5 -, experts 0 0 1 (3). Of b: 5 -> 0 (not 1: a tie), 6 -> 0.
    # Of a: 5 -> 1, 6 -> 0, 7 -> 0. So a: 6 right, 5 wrong, 7 (not seen: 0) right; b: 5 wrong, 6 right, 5 right.
    assert row["vocabulary_target"] == pytest.approx(4 / 6)
    assert row["target_id"] == 4 / 8  # the last tokens are guessed by popularity, 0, though both use 3
    # Predicted: a 1 2 1 -; b 2 1 2 2, experts 0 0 1 3. Of b: 1 -> 0, 2 -> 0; of a: 1 -> 0, 2 -> 1.
    assert row["vocabulary_predicted"] == pytest.approx((2 + 2) / 7) and row["predicted_id"] == 4 / 8
    assert row["vocabulary_any"] == 4 / 8
    assert "(guessed from what is not known before its router runs), 50.0 % [" in findings.sentences[1]
    assert "75.0 % [75.0, 75.0] (input), 66.7 % [" in findings.sentences[2]
    assert "; the layer's most used expert serves 50.0 % [" in findings.sentences[2]
    assert "specialisation_ids" not in findings.tables  # no id has so many tokens


def test_tokens_whose_id_is_not_known_do_not_count(tmp_path: Path) -> None:
    """Of a vocabulary: all use one expert, so its share is 1, whichever tokens have no target."""
    path = write(tmp_path / "x.trace", [([5, 6, 7], [0] * 3, [1] * 3), ([5, 5], [0] * 2, [1] * 2)])
    table = traces.found(path, specialisation, {"guess": ["target_id"]}).tables["specialisation"]
    assert table["vocabulary_target"].tolist() == [1, 1] and table["target_id"].tolist() == [1, 1]


def test_the_most_special_id_of_each_expert(tmp_path: Path) -> None:
    """18 tokens of id 3 and 16 of id 9; of id 4 there are too few. Expert 2 is used by none of them."""
    ids = np.array([3] * 18 + [9] * 16 + [4] * 5)
    experts = np.array([0] * 18 + [0] * 4 + [1] * 12 + [2] * 5)
    with TraceWriter(tmp_path / "x.trace", [Layer(7, 4, 1)]) as writer:
        writer.add(tokens_of(np.arange(39) // 13, np.arange(39) % 13, token=ids), [experts[:, None]])
    table = traces.found(tmp_path / "x.trace", specialisation, {"guess": ["token_id"]}).tables["specialisation_ids"]
    assert table.to_dict("records") == [
        {"layer": 7, "of": "input", "expert": 0, "id": 3, "share": 1.0, "tokens": 18},
        {"layer": 7, "of": "input", "expert": 1, "id": 9, "share": 12 / 16, "tokens": 16},
    ]


def test_what_the_gate_guessed_by_hand(tmp_path: Path) -> None:
    """Layer 1, two experts of six a token: of two choices 3 of 4 are right, of four 4 of 4. Layer 0 has none."""
    layers, ids = [Layer(0, 6, 2), Layer(1, 6, 2)], np.array([[0, 1], [2, 3]])
    ahead = np.array([[1, 0, 2, 3], [3, 5, 2, 0]])
    with TraceWriter(tmp_path / "x.trace", layers, ("ahead",)) as writer:
        writer.add(tokens_of(np.array([0, 1]), np.zeros(2)), [ids, ids], ahead=[np.full((2, 4), -1), ahead])
    cfg = {"guess": ["ahead", "ahead_2k", "pre_attention"]}
    findings = traces.found(tmp_path / "x.trace", specialisation, cfg)
    first, second = findings.tables["specialisation"].to_dict("records")
    assert (second["ahead"], second["ahead_2k"]) == (3 / 4, 1) and np.isnan(first["ahead"])
    assert "(its own gate, asked earlier), 75 %" in findings.sentences[0]
    assert findings.notes == ["The trace has no column pre_attention; moe-lab trace --guesses records it."]


def test_a_text_is_not_guessed_from_itself(tmp_path: Path) -> None:
    """The other text uses 1 most, and this one 0."""
    path = write(tmp_path / "x.trace", [([5, 5, 5], [0, 0, 0], [0, 0, 0]), ([5, 5, 5], [1, 1, 0], [0, 0, 0])])
    table = traces.found(path, specialisation, {"guess": ["popular", "token_id"]}).tables["specialisation"]
    assert (table["popular"][0], table["token_id"][0]) == (1 / 6, 1 / 6)


def test_information_by_hand() -> None:
    """All of it, none of it, one part."""
    assert text_information(np.array([[4, 0], [0, 4]])) == pytest.approx(1)
    assert text_information(np.array([[3, 1], [3, 1]])) == pytest.approx(0)
    assert text_information(np.array([[3, 1]])) is None


def test_what_a_trace_does_not_say_is_said(tmp_path: Path) -> None:
    """No token ids, no layer before; four texts that like different experts are told apart."""
    cfg = {"guess": ["popular", "token_id", "previous_token"]}
    findings = traces.found(traces.random(tmp_path / "x.trace", 12, 40), specialisation, cfg)
    assert "does not say the tokens' ids" in findings.notes[0]
    table = findings.tables["specialisation"]
    assert "token_id" not in table and (table["text_information"] > 0.02).all()
    assert (table["previous_token"] > 2 / 16).all()
    assert "tells" in findings.sentences[1]
