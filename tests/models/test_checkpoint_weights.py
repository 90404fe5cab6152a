"""models/checkpoint_weights.py, models/checkpoint_layouts.py: each tensor in its place, or what is wrong with it."""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_lab.measure import memory
from moe_lab.models import checkpoint_weights
from moe_lab.models.checkpoint_names import sources
from moe_lab.models.checkpoint_weights import SINGLE, Copy, Found, execute, files, headers, plan
from moe_lab.models.parameters import shareable
from tests.models.checkpoints import (
    KINDS,
    LAYERS,
    VOCAB,
    E,
    build,
    checkpoint,
    complaint,
    edit_config,
    kinds,
    load,
    loaded_keys,
    save,
    tensors,
    trained,
    write_tensors,
)

INDEX = checkpoint_weights.INDEX
each_tensor_in_turn = pytest.mark.parametrize(
    "kind",
    [  # by expert, stacked, and stacked with biases: the others take ten seconds
        pytest.param(kind, id=kind, marks=() if kind in ("mixtral", "granitemoe", "gpt_oss") else pytest.mark.slow)
        for kind in KINDS
    ],
)


def sharded(folder: Path) -> Path:
    """A checkpoint of more than three files."""
    save(trained("olmoe"), folder, max_shard_size="15KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


def refusal(folder: Path) -> str:
    """What is said of the checkpoint when it is loaded."""
    message = complaint(lambda: load(folder))
    assert "model.path" in message
    return message


def refusal_before_copying(folder: Path) -> str:
    """As `refusal`, of a model that is left as it was."""
    model = build(folder)
    for parameter in model.parameters():
        parameter.fill_(torch.nan)
    message = complaint(lambda: model.load_parameters(dict(model.named_parameters())))
    assert all(parameter.isnan().all() for parameter in model.parameters())
    return message


def parts(file: Path) -> tuple[dict[str, Any], bytes]:
    """(header, data) of a safetensors file."""
    content = file.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def write_parts(file: Path, header: Any, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


@kinds
def test_in_each_layout_the_sources_of_a_parameter_fill_each_element_once(kind: str, tmp_path: Path) -> None:
    """Gate and up, expert by expert or stacked; no key belongs into two places."""
    settings: dict[str, Any] = {"mlp_only_layers": [1]} if kind in ("qwen2_moe", "qwen3_moe", "qwen3_next") else {}
    model, seen = build(checkpoint(kind, tmp_path, **settings)), set()
    for name, parameter in shareable(model).items():
        layouts = sources(name, parameter.shape, model._settings.naming)
        assert layouts
        for layout in layouts:
            count = torch.zeros(parameter.shape)
            for source in layout:
                count[source.place] += 1
            assert count.eq(1).all(), name
        keys = [source.key for source in layouts[0]]
        assert len(set(keys)) == len(keys) and not seen & set(keys)
        seen |= set(keys)


@pytest.mark.parametrize("name", ["router.bias_E", "layers.0.mlp.router.other", "layers.1.mlp.other", "rope.other"])
def test_what_no_checkpoint_has_has_no_source(name: str) -> None:
    """A router's own parameters, say."""
    assert sources(name, (4, 4)) == []


def test_gate_comes_before_up_and_experts_keep_their_number(tmp_path: Path) -> None:
    """In the hub's layout, tensor by tensor."""
    folder = checkpoint("mixtral", tmp_path)
    model, there = load(folder), tensors(folder)
    for layer in range(LAYERS):
        weights, at = model.layers[layer].mlp.weights, f"model.layers.{layer}.block_sparse_moe"
        assert torch.equal(weights.gate_ED, there[f"{at}.gate.weight"])
        for expert in range(E):
            gate, up = weights.w_gate_up_E2FD[expert].chunk(2)
            assert torch.equal(gate, there[f"{at}.experts.{expert}.w1.weight"])
            assert torch.equal(up, there[f"{at}.experts.{expert}.w3.weight"])
            assert torch.equal(weights.w_down_EDF[expert], there[f"{at}.experts.{expert}.w2.weight"])


@kinds
def test_every_tensor_of_a_checkpoint_is_copied_once_in_the_order_of_the_files(kind: str, tmp_path: Path) -> None:
    """Nothing is left over, and disks are read from front to back."""
    folder = save(trained(kind), tmp_path, max_shard_size="15KB")
    model, found = build(folder), headers(files(folder))
    copies = model.plan(dict(model.named_parameters()), found)
    assert sorted(copy.key for copy in copies) == sorted(loaded_keys(found))
    places = [(copy.found.file, copy.found.start) for copy in copies]
    assert places == sorted(places)
    assert sum(copy.found.n_bytes for copy in copies) == sum(p.numel() * 4 for p in model.parameters())


@kinds
def test_headers_tell_each_tensors_shape_dtype_and_place(kind: str, tmp_path: Path) -> None:
    """The bytes at that place are the tensor's."""
    folder = checkpoint(kind, tmp_path)
    found, there = headers(files(folder)), tensors(folder)
    content = (folder / SINGLE).read_bytes()
    assert found.keys() == there.keys()
    for key, tensor in there.items():
        assert found[key][:3] == (folder / SINGLE, tuple(tensor.shape), "F32")
        assert (
            content[found[key].start : found[key].start + found[key].n_bytes] == tensor.contiguous().numpy().tobytes()
        )


def test_one_file_goes_before_an_index(tmp_path: Path) -> None:
    """As in transformers."""
    (tmp_path / SINGLE).write_bytes(b"")
    (tmp_path / INDEX).write_text("broken")
    assert files(tmp_path) == [tmp_path / SINGLE]


def test_of_an_index_each_file_is_read_once(tmp_path: Path) -> None:
    """However many tensors it has."""
    for name in "ba":
        (tmp_path / name).write_bytes(b"")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"one": "b", "two": "a", "three": "b"}}))
    assert files(tmp_path) == [tmp_path / "a", tmp_path / "b"]


def test_a_folder_without_weights_is_named(tmp_path: Path) -> None:
    """With the files that were looked for."""
    folder = checkpoint("olmoe", tmp_path)
    (folder / SINGLE).unlink()
    message = refusal(folder)
    assert f"model.path={folder}" in message and SINGLE in message and INDEX in message


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(["pytorch_model.bin"], id="one"),
        pytest.param(["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"], id="several"),
    ],
)
def test_a_pickle_is_never_loaded(names: list[str], tmp_path: Path) -> None:
    """The message says why, and what to do; the code in it has not run."""
    folder, mark = checkpoint("olmoe", tmp_path / "folder"), tmp_path / "mark"
    (folder / SINGLE).unlink()

    class Trap:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
            return os.mkdir, (str(mark),)

    for name in names:
        (folder / name).write_bytes(pickle.dumps(Trap()))
        (folder / name).chmod(0)
    message = refusal(folder)
    assert names[0] in message and "pickle" in message and "convert it to safetensors" in message
    assert not mark.exists()
    pickle.loads(pickle.dumps(Trap()))
    assert mark.exists()


@pytest.mark.parametrize("n_missing", [pytest.param(n, id=f"missing{n}") for n in (1, 3)])
def test_missing_shards_are_named_and_counted(n_missing: int, tmp_path: Path) -> None:
    """A download that was broken off."""
    folder = sharded(tmp_path)
    shards = sorted(folder.glob("*.safetensors"))
    for shard in shards[1 : 1 + n_missing]:
        shard.unlink()
    message = refusal(folder)
    assert f"{n_missing} of {len(shards)} files" in message and INDEX in message and "download" in message
    assert all(shard.name in message for shard in shards[1 : 1 + n_missing])
    assert shards[0].name not in message


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b'{"weight_map": {"a": ', id="cut_short"),
        pytest.param(b"[1]", id="list"),
        pytest.param(b"null", id="null"),
        pytest.param(b'{"metadata": {}}', id="no_weight_map"),
        pytest.param(b'{"weight_map": ["a"]}', id="weight_map_of_a_list"),
        pytest.param(b'{"weight_map": null}', id="weight_map_of_null"),
        pytest.param(b"\xff\xfe{}", id="no_text"),
    ],
)
def test_a_broken_index_is_to_be_fetched_again(content: bytes, tmp_path: Path) -> None:
    """The message names it."""
    folder = sharded(tmp_path)
    (folder / INDEX).write_bytes(content)
    message = refusal(folder)
    assert str(folder / INDEX) in message and "download the file again" in message


@pytest.mark.parametrize("value", [pytest.param(v, id=str(v)) for v in (3, None, ["a"], "", "..")])
def test_an_index_that_names_no_file_is_said_to_miss_one(value: Any, tmp_path: Path) -> None:
    """Numbers, nothing, folders."""
    folder = sharded(tmp_path)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": value}}))
    assert INDEX in refusal(folder)


def test_an_index_of_nothing_is_refused(tmp_path: Path) -> None:
    """An empty weight_map."""
    folder = sharded(tmp_path)
    (folder / INDEX).write_text('{"weight_map": {}}')
    assert f"{folder / INDEX} cannot be read (no file is listed)" in refusal(folder)


def _without_header_end(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:100])


def _header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Damage that rewrites the header and leaves the data as they are."""

    def damage(file: Path) -> None:
        header, data = parts(file)
        changed = change(header)
        write_parts(file, header if changed is None else changed, data)

    return damage


def _first_key(header: dict[str, Any]) -> str:
    return next(key for key in header if key != "__metadata__")


DAMAGES: list[tuple[str, Callable[[Path], object]]] = [
    ("cut_in_the_data", lambda file: file.write_bytes(file.read_bytes()[:-1000])),
    ("cut_by_a_byte", lambda file: file.write_bytes(file.read_bytes()[:-1])),
    ("cut_in_the_header", _without_header_end),
    ("cut_after_the_header", lambda file: write_parts(file, parts(file)[0], b"")),
    ("cut_in_the_length", lambda file: file.write_bytes(file.read_bytes()[:5])),
    ("empty", lambda file: file.write_bytes(b"")),
    ("noise", lambda file: file.write_bytes(bytes(range(256)) * 40)),
    ("zeros", lambda file: file.write_bytes(bytes(5000))),
    ("git_lfs_pointer", lambda file: file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")),
    ("web_page", lambda file: file.write_text("<!DOCTYPE html>\n<html>\nnot found\n</html>\n" * 40)),
    ("pickle", lambda file: torch.save({"a": torch.zeros(2000)}, file)),
    ("more_at_the_end", lambda file: file.write_bytes(file.read_bytes() + b"more")),
    ("header_no_json", lambda file: write_parts(file, b"{" * 30, b"")),
    ("header_no_text", lambda file: write_parts(file, b"\xff\xfe" * 30, b"")),
    ("header_a_list", _header(lambda header: [1, 2])),
    ("header_of_numbers", _header(lambda header: dict.fromkeys(header, 3))),
    ("no_offsets", _header(lambda header: header[_first_key(header)].pop("data_offsets") and None)),
    ("one_offset", _header(lambda header: header[_first_key(header)].update(data_offsets=[0]))),
    ("offsets_of_text", _header(lambda header: header[_first_key(header)].update(data_offsets=["0", "8"]))),
    ("no_shape", _header(lambda header: header[_first_key(header)].pop("shape") and None)),
    ("no_dtype", _header(lambda header: header[_first_key(header)].pop("dtype") and None)),
]


@pytest.mark.parametrize("damage", [pytest.param(damage, id=name) for name, damage in DAMAGES])
def test_a_damaged_file_is_to_be_fetched_again(damage: Callable[[Path], object], tmp_path: Path) -> None:
    """The message names the file, alone or one of many, and nothing was read into the model."""
    single, shards = checkpoint("olmoe", tmp_path / "single"), sharded(tmp_path / "shards")
    for file in (single / SINGLE, sorted(shards.glob("*.safetensors"))[2]):
        damage(file)
        message = refusal_before_copying(file.parent)
        assert str(file) in message and "download the file again" in message


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda entry, other: entry.update(data_offsets=other["data_offsets"]), id="place_of_another"),
        pytest.param(lambda entry, other: entry.update(dtype="BF16"), id="dtype_of_half_the_bytes"),
        pytest.param(lambda entry, other: entry.update(dtype="F33"), id="dtype_unknown"),
    ],
)
def test_a_header_that_contradicts_itself_is_found_out(
    change: Callable[[dict[str, Any], dict[str, Any]], object], tmp_path: Path
) -> None:
    """Before a wrong number gets into the model."""
    folder = checkpoint("olmoe", tmp_path)
    header, data = parts(folder / SINGLE)
    change(header["model.layers.0.self_attn.q_proj.weight"], header["model.layers.1.self_attn.q_proj.weight"])
    write_parts(folder / SINGLE, header, data)
    message = refusal_before_copying(folder)
    assert str(folder / SINGLE) in message or "layers.0.self_attn.q_proj.weight has dtype F33" in message


def test_a_file_that_goes_while_it_is_loaded_is_named(tmp_path: Path) -> None:
    """One line there too."""
    folder = checkpoint("olmoe", tmp_path)
    model = build(folder)
    copies = plan(shareable(model), headers(files(folder)), tied=False)
    (folder / SINGLE).unlink()
    message = complaint(lambda: execute(copies))
    assert str(folder / SINGLE) in message and "download the file again" in message


def changed(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> str:
    """What is said of the checkpoint after a change of its tensors."""
    content = tensors(folder)
    change(content)
    write_tensors(folder, content)
    return refusal(folder)


one_by_one = pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, id=kind)
        for kind in KINDS
        if kind not in ("granitemoe", "gpt_oss", "mistral4", "gemma4", "gemma4_text")
    ],
)
"""Of which a file has each expert's matrices apart."""


@one_by_one
def test_one_expert_that_is_missing_is_named(kind: str, tmp_path: Path) -> None:
    """Its three matrices, and no others."""
    folder = checkpoint(kind, tmp_path)
    keys = [key for key in tensors(folder) if "layers.1." in key and ".experts.3." in key]
    assert len(keys) == 3
    message = changed(folder, lambda content: [content.pop(key) for key in keys])
    assert "3 missing: " in message and all(key in message for key in keys)
    assert ".experts.2." not in message and "unexpected" not in message and "wrong shape" not in message


@each_tensor_in_turn
@pytest.mark.parametrize("stacked", [pytest.param(False, id="by_expert"), pytest.param(True, id="stacked")])
def test_any_one_tensor_that_is_missing_is_named(kind: str, stacked: bool, tmp_path: Path) -> None:
    """Each of them in turn."""
    folder = save(trained(kind, attention_bias=True), tmp_path, save_original_format=not stacked)
    content = tensors(folder)
    for key in loaded_keys(content):
        write_tensors(folder, {name: tensor for name, tensor in content.items() if name != key})
        message = refusal(folder)
        assert f"1 missing: {key}." in message and "unexpected" not in message


def test_of_many_missing_tensors_some_are_named(tmp_path: Path) -> None:
    """And the rest counted: the line stays readable."""
    folder = checkpoint("olmoe", tmp_path)
    message = changed(folder, lambda content: [content.pop(key) for key in list(content) if "self_attn" in key])
    assert "12 missing: " in message and "and 6 more" in message and len(message) < 700


@kinds
def test_a_tensor_too_many_is_named(kind: str, tmp_path: Path) -> None:
    """A bias that config.json does not speak of, an expert too many, another layer."""
    folder = checkpoint(kind, tmp_path)
    whole = tensors(folder)
    expert = next((key for key in whole if ".experts.4." in key), "experts.4.").replace("experts.4.", "experts.6.")
    for key in ("model.layers.0.self_attn.o_proj.bias", expert, "model.layers.4.input_layernorm.weight", "extra"):
        if key in whole:
            continue
        write_tensors(folder, {**whole, key: torch.zeros(3)})
        message = refusal(folder)
        assert f"1 unexpected: {key}." in message and "missing" not in message


def test_a_checkpoint_of_fewer_layers_in_its_configuration_is_refused(tmp_path: Path) -> None:
    """It would be another model."""
    folder = checkpoint("olmoe", tmp_path)
    edit_config(folder, num_hidden_layers=1)
    message = refusal(folder)
    assert "unexpected" in message and "model.layers.1." in message and "missing" not in message


def test_dense_layers_that_the_configuration_does_not_tell_are_refused(tmp_path: Path) -> None:
    """Both what is missing and what is there instead."""
    folder = checkpoint("qwen3_moe", tmp_path, mlp_only_layers=[1])
    edit_config(folder, mlp_only_layers=[])
    message = refusal(folder)
    assert "missing: model.layers.1.mlp.gate.weight" in message
    assert "3 unexpected: " in message and "model.layers.1.mlp.up_proj.weight" in message


@pytest.mark.parametrize("key", ["model.rotary_emb.inv_freq", "model.layers.0.self_attn.rotary_emb.inv_freq"])
def test_frequencies_of_rope_on_disk_are_passed_over(key: str, tmp_path: Path) -> None:
    """Old checkpoints have them, and they are computed."""
    folder = checkpoint("mixtral", tmp_path)
    want = dict(load(folder).named_parameters())
    write_tensors(folder, {**tensors(folder), key: torch.zeros(4)})
    assert all(torch.equal(parameter, want[name]) for name, parameter in load(folder).named_parameters())


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        pytest.param("model.embed_tokens.weight", (VOCAB + 1, 32), id="embedding"),
        pytest.param("model.layers.0.mlp.experts.2.gate_proj.weight", (23, 32), id="narrow_expert"),
        pytest.param("model.layers.0.mlp.experts.2.up_proj.weight", (48, 32), id="gate_and_up_in_one"),
        pytest.param("model.layers.1.mlp.experts.2.down_proj.weight", (24, 32), id="transposed_expert"),
        pytest.param("model.layers.1.self_attn.q_norm.weight", (8,), id="norm_per_head"),
        pytest.param("model.norm.weight", (), id="scalar"),
        pytest.param("model.norm.weight", (1, 32), id="one_dimension_more"),
    ],
)
def test_a_tensor_of_another_shape_is_named_with_both_shapes(key: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    """Nothing is broadcast or cut to fit."""
    folder = checkpoint("olmoe", tmp_path)
    want = list(tensors(folder)[key].shape)
    message = changed(folder, lambda content: content.update({key: torch.zeros(shape)}))
    assert f"1 of a wrong shape or dtype: {key} has shape {list(shape)} instead of {want}." in message


def test_stacked_experts_of_another_number_are_named(tmp_path: Path) -> None:
    """One tensor holds them all."""
    folder = save(trained("qwen3_moe"), tmp_path, save_original_format=False)
    key = "model.layers.0.mlp.experts.down_proj"
    message = changed(folder, lambda content: content.update({key: content[key][:-1].clone()}))
    assert f"{key} has shape [4, 32, 24] instead of [5, 32, 24]" in message


def test_a_configuration_of_another_size_is_refused(tmp_path: Path) -> None:
    """The files of one model beside the config.json of another."""
    folder = checkpoint("mixtral", tmp_path)
    edit_config(folder, vocab_size=VOCAB + 3)
    message = refusal(folder)
    assert "model.embed_tokens.weight has shape [97, 32] instead of [100, 32]" in message and "config.json" in message


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        pytest.param(torch.int64, "I64", id="int64"),
        pytest.param(torch.int8, "I8", id="int8"),
        pytest.param(torch.float64, "F64", id="float64"),
        pytest.param(torch.float8_e4m3fn, "F8_E4M3", id="float8"),
        pytest.param(torch.bool, "BOOL", id="bool"),
    ],
)
def test_a_tensor_of_an_unsupported_dtype_is_named(dtype: torch.dtype, name: str, tmp_path: Path) -> None:
    """With those that are supported; numbers of quantised weights mean nothing without their scales."""
    folder, key = checkpoint("olmoe", tmp_path), "model.layers.0.self_attn.q_proj.weight"
    message = changed(folder, lambda content: content.update({key: torch.ones(32, 32).to(dtype)}))
    assert f"1 of a wrong shape or dtype: {key} has dtype {name}" in message and "F32, F16, BF16" in message


def test_all_complaints_are_in_one_line(tmp_path: Path) -> None:
    """Missing, unexpected and unfitting ones together."""

    def change(content: dict[str, Tensor]) -> None:
        del content["model.norm.weight"]
        content["extra"] = torch.zeros(1)
        content["lm_head.weight"] = torch.zeros(2, 2)

    message = changed(checkpoint("olmoe", tmp_path), change)
    assert "1 missing: model.norm.weight; 1 unexpected: extra; 1 of a wrong shape or dtype: lm_head.weight" in message


def test_an_untied_head_that_is_missing_is_named(tmp_path: Path) -> None:
    """It is not made up from the embedding."""
    folder = checkpoint("olmoe", tmp_path, tie_word_embeddings=True)
    edit_config(folder, tie_word_embeddings=False)
    assert "1 missing: lm_head.weight." in refusal(folder)


@pytest.mark.parametrize("shards", [pytest.param(False, id="one_file"), pytest.param(True, id="shards")])
@pytest.mark.parametrize("row", [pytest.param(0, id="first_row"), pytest.param(VOCAB - 1, id="last_row")])
def test_a_tied_head_that_is_another_matrix_is_refused(row: int, shards: bool, tmp_path: Path) -> None:
    """The configuration says that it is the embedding and a file has one of its own: there is no guessing."""
    peer = trained("olmoe")
    peer.lm_head.weight.copy_(peer.model.embed_tokens.weight)
    folder = save(peer, tmp_path, **({"max_shard_size": "15KB"} if shards else {}))
    edit_config(folder, tie_word_embeddings=True)
    model = load(folder)
    assert torch.equal(model.head.weight, peer.lm_head.weight)
    peer.lm_head.weight[row, -1] += 1
    save(peer, folder, **({"max_shard_size": "15KB"} if shards else {}))
    edit_config(folder, tie_word_embeddings=True)
    message = refusal_before_copying(folder)
    assert "lm_head.weight" in message and "tie_word_embeddings" in message and "set it to false" in message


def test_nothing_is_copied_if_something_is_wrong(tmp_path: Path) -> None:
    """A model is loaded whole or not at all, where the headers tell."""
    folder = checkpoint("olmoe", tmp_path)
    write_tensors(folder, {**tensors(folder), "extra": torch.zeros(1)})
    assert "unexpected" in refusal_before_copying(folder)


def test_a_tensor_in_two_files_is_taken_from_one(tmp_path: Path) -> None:
    """Both hold the same, as some converters leave it."""
    folder = sharded(tmp_path)
    want = dict(load(folder).named_parameters())
    first, last = (sorted(folder.glob("*.safetensors"))[index] for index in (0, -1))
    save_file({**load_file(first), **load_file(last)}, last)
    assert all(torch.equal(parameter, want[name]) for name, parameter in load(folder).named_parameters())


def test_a_scalar_and_an_empty_tensor_are_read_off_a_header(tmp_path: Path) -> None:
    """Sizes at the edge."""
    save_file({"scalar": torch.ones(()), "empty": torch.ones(0, 3)}, tmp_path / "one")
    found = headers([tmp_path / "one"])
    assert found["scalar"][:3] == (tmp_path / "one", (), "F32") and found["scalar"].n_bytes == 4
    assert found["empty"].shape == (0, 3) and found["empty"].n_bytes == 0


@pytest.mark.parametrize("at_once", [pytest.param(n, id=f"chunks{n}") for n in (1, 7, 48, 100)])
def test_bytes_of_tensors_are_compared_to_the_end(at_once: int, tmp_path: Path) -> None:
    """In chunks of any size; what lies beside them does not count."""
    same, last = torch.arange(12.0), torch.arange(12.0)
    last[-1] = 0
    save_file(
        {"a": same, "b": same.clone(), "c": last, "d": same.reshape(3, 4).clone(), "e": same.view(torch.int32).clone()},
        tmp_path / "one",
    )
    found = headers([tmp_path / "one"])
    equal = [checkpoint_weights._same_bytes(found["a"], found[key], at_once) for key in "abcde"]
    assert equal == [True, True, False, False, False]


def test_headers_read_no_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are known before anything large is touched."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("opened")

    folder = checkpoint("olmoe", tmp_path)
    monkeypatch.setattr(checkpoint_weights, "safe_open", refuse)
    assert all(isinstance(one, Found) for one in headers(files(folder)).values())


def test_loading_says_nothing_where_nobody_looks(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The bar is for a terminal."""
    folder = checkpoint("olmoe", tmp_path)
    capfd.readouterr()
    load(folder)
    assert capfd.readouterr() == ("", "")


# Values that are not finite


@each_tensor_in_turn
@pytest.mark.parametrize(
    ("bad", "place"),
    [
        pytest.param(torch.nan, 0, id="nan_first"),
        pytest.param(torch.nan, -1, id="nan_last", marks=pytest.mark.slow),
        pytest.param(torch.inf, 3, id="inf", marks=pytest.mark.slow),
        pytest.param(-torch.inf, -3, id="minus_inf", marks=pytest.mark.slow),
    ],
)
def test_a_value_that_is_not_finite_is_found_in_every_tensor(kind: str, bad: float, place: int, tmp_path: Path) -> None:
    """Embedding, norms, biases, gates, and each of the experts, whether a token chooses it or not."""
    folder = checkpoint(kind, tmp_path, **({"attention_bias": True} if kind in ("olmoe", "qwen3_moe") else {}))
    whole = tensors(folder)
    for key in loaded_keys(whole):
        planted = whole[key].clone()
        planted.view(-1)[place % planted.numel()] = bad
        write_tensors(folder, {**whole, key: planted})
        message = refusal(folder)
        assert f"{folder / SINGLE}: {key} has 1 values that are NaN or infinite; download" in message


@pytest.mark.parametrize("stacked", [pytest.param(False, id="by_expert"), pytest.param(True, id="stacked")])
@pytest.mark.parametrize("dtype", [pytest.param(d, id=str(d)[6:]) for d in (torch.bfloat16, torch.float16)])
def test_the_file_is_named_whatever_its_layout_and_dtype(stacked: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    """One of many, and the others are in order."""
    save(trained("qwen3_moe").to(dtype), tmp_path, max_shard_size="8KB", save_original_format=not stacked)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 3
    for shard in (shards[0], shards[-1]):
        whole = load_file(shard)
        key = sorted(whole)[-1]
        planted = whole[key].clone()
        planted.view(-1)[planted.numel() // 2] = torch.nan
        save_file({**whole, key: planted}, shard)
        assert f"{shard}: {key} has 1 values that are NaN or infinite" in refusal(tmp_path)
        save_file(whole, shard)
    load(tmp_path)


def test_a_value_that_the_models_dtype_cannot_hold_is_found(tmp_path: Path) -> None:
    """1e5 is infinite in fp16 and finite in bf16; the largest numbers of fp32 are finite."""
    folder = checkpoint("olmoe", tmp_path)
    key, whole = "model.layers.1.mlp.experts.3.down_proj.weight", tensors(folder)
    whole[key][2, 2] = 1e5
    write_tensors(folder, whole)
    message = complaint(lambda: load(folder, torch.float16))
    assert f"{folder / SINGLE}: {key} has values that are too large for float16; use another dtype." in message
    load(folder, torch.bfloat16)
    whole[key][:] = torch.finfo(torch.float32).max
    write_tensors(folder, whole)
    load(folder)


@pytest.mark.gpu
def test_a_value_that_is_not_finite_is_found_on_a_gpu(tmp_path: Path) -> None:
    """It is looked at where it lies."""
    folder, key = checkpoint("mixtral", tmp_path), "model.layers.1.block_sparse_moe.experts.4.w2.weight"
    whole = tensors(folder)
    whole[key][-1, -1] = torch.nan
    write_tensors(folder, whole)
    model = build(folder).to("cuda")
    assert key in complaint(lambda: model.load_parameters(dict(model.named_parameters())))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_looking_at_a_large_tensor_takes_no_memory(tmp_path: Path) -> None:
    """Beside the pages of the file and those of the parameter, which are there."""
    n = 1 << 24
    save_file({"large": torch.ones(n)}, tmp_path / "one")
    target = torch.zeros(n)
    copies = [Copy("large", headers([tmp_path / "one"])["large"], target)]
    execute(copies)  # the libraries' pages are there
    Path("/proc/self/clear_refs").write_text("5")
    before = memory._kilobytes(Path("/proc/self/status"), "VmRSS:")
    execute(copies)
    peak = memory.resident_peak_bytes()
    assert before is not None and peak is not None
    assert peak - before < 1.2 * 4 * n
    assert float(target.sum()) == n


# Files from somebody else


@pytest.mark.parametrize(
    "name", [pytest.param(name, id=name[:9]) for name in ("../other", "/etc/passwd", "a/b", "a" * 256)]
)
def test_an_index_names_files_of_its_own_folder(name: str, tmp_path: Path) -> None:
    """A checkpoint does not say what else is read."""
    folder = sharded(tmp_path / "shards")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    message = refusal(folder)
    assert str(folder / INDEX) in message and "is not the name of a file in this folder" in message


@pytest.mark.parametrize(
    "text",
    [
        pytest.param('{"weight_map": {"a": "b", "a": "c"}}', id="twice"),
        pytest.param('{"weight_map":' * 99_999, id="deep"),
        pytest.param('{"weight_map": NaN}', id="nan"),
        pytest.param('{"weight_map": {"a": "\\ud800"}}', id="surrogate"),
    ],
)
def test_an_index_is_read_strictly(text: str, tmp_path: Path) -> None:
    """As config.json is."""
    folder = sharded(tmp_path)
    (folder / INDEX).write_text(text)
    assert f"{folder / INDEX} cannot be read (" in refusal(folder)


def test_a_tensor_in_two_files_with_other_values_is_refused(tmp_path: Path) -> None:
    """One of the two would be dropped."""
    folder = sharded(tmp_path)
    first, last = (sorted(folder.glob("*.safetensors"))[index] for index in (0, -1))
    key, value = next(iter(load_file(first).items()))
    save_file({**load_file(last), key: value + 1}, last)
    message = refusal_before_copying(folder)
    assert str(last) in message and f"{key} has other values in {first.name}" in message


def test_a_tied_matrix_may_stand_under_the_heads_name_alone(tmp_path: Path) -> None:
    """As safetensors leaves it: of two names for one matrix the first by the alphabet. Untied it is missing."""
    folder = checkpoint("olmoe", tmp_path, tie_word_embeddings=True)
    want, whole = load(folder), tensors(folder)
    whole["lm_head.weight"] = whole.pop("model.embed_tokens.weight")
    write_tensors(folder, whole)
    model = load(folder)
    assert model.head.weight is model.embed.weight and torch.equal(model.embed.weight, want.embed.weight)
    edit_config(folder, tie_word_embeddings=False)
    assert "1 missing: model.embed_tokens.weight." in refusal(folder)
