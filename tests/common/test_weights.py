"""Weights as bytes: exact there and back, and nothing but the model's own finite tensors is let in."""

import io
import json
import pickle

import pytest
import torch

from invcoss_common.errors import WeightsError
from invcoss_common.modality import Geometry, ModelShape
from invcoss_common.model import build_model
from invcoss_common.weights import (
    check_file,
    model_from_bytes,
    model_schema,
    model_to_bytes,
    read_model,
    recast_file,
    round_weights,
    schema_of,
    tensors_from_bytes,
    tensors_to_bytes,
    write_model,
    write_tensors,
)

SHAPE = ModelShape(width=32, depth=1, heads=2, decoder_width=16, decoder_depth=1, decoder_heads=2)
XRAY = Geometry(channels=1, size=(16, 16), patch=(4, 4))
CT = Geometry(channels=1, size=(4, 8, 8), patch=(2, 4, 4))
FAMILIES = (XRAY, CT)


def weights(seed=0):
    return {name: tensor.clone() for name, tensor in build_model(SHAPE, FAMILIES, seed).state_dict().items()}


def refusal(data):
    """The one line with which `data` are refused."""
    with pytest.raises(WeightsError) as caught:
        model_from_bytes(data, SHAPE, FAMILIES)
    text = str(caught.value)
    assert text and "\n" not in text and text.isprintable()
    return text


def with_header(header, body=b""):
    """A safetensors file with a header of the caller's choice."""
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def test_there_and_back():
    model = build_model(SHAPE, FAMILIES, seed=5)
    back = model_from_bytes(model_to_bytes(model), SHAPE, FAMILIES)
    assert model.state_dict().keys() == back.state_dict().keys()
    assert all(torch.equal(tensor, back.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_bfloat16_halves_the_bytes_and_comes_back_as_float32():
    model = build_model(SHAPE, FAMILIES, seed=5)
    data = model_to_bytes(model, "bfloat16")
    assert len(data) < 0.55 * len(model_to_bytes(model))
    back = model_from_bytes(data, SHAPE, FAMILIES, "bfloat16")
    for name, tensor in model.state_dict().items():
        assert back.state_dict()[name].dtype == torch.float32
        assert torch.equal(back.state_dict()[name], tensor.bfloat16().float()), name
    assert model_to_bytes(back, "bfloat16") == data, "rounding twice is rounding once"
    round_weights(model, "bfloat16")
    assert model_to_bytes(model) == model_to_bytes(back)


def test_float32_is_not_rounded():
    model = build_model(SHAPE, FAMILIES, seed=5)
    before = model_to_bytes(model)
    round_weights(model, "float32")
    assert model_to_bytes(model) == before


def test_only_the_type_that_was_agreed_on_is_read():
    model = build_model(SHAPE, FAMILIES, seed=5)
    with pytest.raises(WeightsError, match=r"torch\.bfloat16; the model needs .* torch\.float32"):
        model_from_bytes(model_to_bytes(model, "bfloat16"), SHAPE, FAMILIES)
    with pytest.raises(WeightsError, match=r"torch\.float32; the model needs .* torch\.bfloat16"):
        model_from_bytes(model_to_bytes(model), SHAPE, FAMILIES, "bfloat16")
    assert {dtype for _, dtype in model_schema(SHAPE, FAMILIES, "bfloat16").values()} == {torch.bfloat16}


@pytest.mark.parametrize("value", [torch.nan, torch.inf, torch.finfo(torch.float32).max])
def test_a_value_that_is_not_finite_in_bfloat16_is_refused(value):
    model = build_model(SHAPE, FAMILIES, seed=5)
    model.cls_token.data[0, 0, 0] = value  # the largest float32 rounds to infinity
    with pytest.raises(WeightsError, match="cls_token"):
        model_from_bytes(model_to_bytes(model, "bfloat16"), SHAPE, FAMILIES, "bfloat16")


def test_equal_weights_are_equal_bytes_whatever_their_order():
    forward = weights()
    backward = dict(reversed(forward.items()))
    assert list(forward) != list(backward)
    assert tensors_to_bytes(forward) == tensors_to_bytes(backward) == model_to_bytes(build_model(SHAPE, FAMILIES, 0))
    assert model_to_bytes(build_model(SHAPE, reversed(FAMILIES), 0)) == tensors_to_bytes(forward)
    assert tensors_to_bytes(weights(seed=1)) != tensors_to_bytes(forward)


def test_tensors_of_any_layout_are_written():
    square = torch.arange(6.0).reshape(2, 3)
    assert tensors_to_bytes({"a": square.T}) == tensors_to_bytes({"a": square.T.contiguous()})
    back = tensors_from_bytes(tensors_to_bytes({"a": square.T}), schema_of({"a": square.T}))
    assert torch.equal(back["a"], square.T)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_file_has_the_bytes_that_memory_would_have(tmp_path, dtype):
    model, file = build_model(SHAPE, FAMILIES, 3), tmp_path / "model"
    write_model(file, model, dtype)
    assert file.read_bytes() == model_to_bytes(model, dtype)
    back = read_model(file, SHAPE, FAMILIES, dtype)
    assert model_to_bytes(back) == model_to_bytes(model_from_bytes(file.read_bytes(), SHAPE, FAMILIES, dtype))
    assert all(parameter.requires_grad for parameter in back.parameters())
    recast_file(file, tmp_path / "recast", "float32")
    assert (tmp_path / "recast").read_bytes() == model_to_bytes(back)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "recast"], "drafts are gone"


def test_a_file_holds_mixed_tensors_in_the_order_that_memory_would(tmp_path):
    mixed = {"b": torch.arange(3), "a": torch.ones(2, 3).T, "c": torch.zeros((), dtype=torch.float64)}
    write_tensors(tmp_path / "mixed", mixed)
    assert (tmp_path / "mixed").read_bytes() == tensors_to_bytes(mixed)


def test_a_file_that_does_not_fit_is_refused(tmp_path):
    write_model(tmp_path / "model", build_model(SHAPE, [XRAY], 0))
    with pytest.raises(WeightsError, match="missing"):
        read_model(tmp_path / "model", SHAPE, FAMILIES)
    (tmp_path / "model").write_bytes(b"<html>502 Bad Gateway</html>" * 100)
    with pytest.raises(WeightsError, match="safetensors"):
        read_model(tmp_path / "model", SHAPE, FAMILIES)
    with pytest.raises(WeightsError, match="can't be read"):
        read_model(tmp_path / "nothing", SHAPE, FAMILIES)


def test_no_metadata_is_written():
    data = model_to_bytes(build_model(SHAPE, FAMILIES, 0))
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert set(header) == set(weights())


SPOILED = {
    "missing": ("norm.weight", lambda t: t.pop("norm.weight"), "is missing"),
    "misshapen": ("cls_token", lambda t: t.update(cls_token=torch.zeros(1, 2, 32)), "(1, 2, 32)"),
    "same size, other shape": ("cls_token", lambda t: t.update(cls_token=torch.zeros(32)), "(32,)"),
    "no values": ("cls_token", lambda t: t.update(cls_token=torch.zeros(1, 1, 0)), "(1, 1, 0)"),
    "half precision": ("norm.bias", lambda t: t.update({"norm.bias": t["norm.bias"].half()}), "torch.float16"),
    "whole numbers": ("norm.bias", lambda t: t.update({"norm.bias": t["norm.bias"].int()}), "torch.int32"),
    "NaN": ("blocks.0.mlp.fc1.bias", lambda t: t["blocks.0.mlp.fc1.bias"][3:4].fill_(torch.nan), "NaN"),
    "infinite": ("heads.2d_4x4.bias", lambda t: t["heads.2d_4x4.bias"][-1:].fill_(torch.inf), "infinite"),
    "minus infinite": ("decoder_norm.bias", lambda t: t["decoder_norm.bias"][:1].fill_(-torch.inf), "infinite"),
    "extra": ("patient-0042", lambda t: t.update({"patient-0042": torch.zeros(4)}), "does not have"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_tensors_that_do_not_fit_are_refused_by_name(case):
    name, spoil, reason = SPOILED[case]
    tensors = weights()
    spoil(tensors)
    text = refusal(tensors_to_bytes(tensors))
    assert f"'{name}'" in text and reason in text


def test_weights_of_another_family_or_shape_are_refused():
    assert "missing" in refusal(model_to_bytes(build_model(SHAPE, [XRAY], 0)))
    wider = SHAPE.model_copy(update={"decoder_width": 32})
    assert "the model needs" in refusal(model_to_bytes(build_model(wider, FAMILIES, 0)))


def test_a_hostile_name_stays_short_and_on_one_line():
    for name in ("x" * 10_000, "a\nERROR all is lost", "\x1b[2Jgone", "\u202ereversed"):
        assert len(refusal(tensors_to_bytes(weights() | {name: torch.zeros(1)}))) < 600


def truncated(keep):
    return lambda data: data[:keep]


BROKEN = {
    "empty": truncated(0),
    "cut in the length": truncated(5),
    "cut in the header": truncated(100),
    "cut in the values": truncated(-1),
    "longer than announced": lambda data: data + b"\0",
    "pickle": lambda data: pickle.dumps({"cls_token": [0.0] * 32}),
    "torch.save": lambda data: torch_saved(weights()),
    "text": lambda data: b"<html>502 Bad Gateway</html>" * 100,
    "a header without end": lambda data: b"\xff" * 8 + data[8:],
    "a header that is a list": lambda data: with_header([1, 2]),
    "an unknown type": lambda data: with_header({"a": {"dtype": "Q9", "shape": [1], "data_offsets": [0, 1]}}, b"\0"),
    "a type without torch": lambda data: with_header(
        {"a": {"dtype": "F8_E8M0", "shape": [4], "data_offsets": [0, 4]}}, bytes(4)
    ),
    "a half-byte type": lambda data: with_header(
        {"a": {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]}}, bytes(4)
    ),
    "overlapping tensors": lambda data: with_header(
        {n: {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]} for n in ("a\nb", "c")}, bytes(4)
    ),
    "no values, and a shape that no tensor has": lambda data: with_header(
        {"a": {"dtype": "F32", "shape": [0, 2**63, 2**63], "data_offsets": [0, 0]}}
    ),
    "no values, and steps that no tensor has": lambda data: with_header(
        {"a": {"dtype": "F32", "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}}
    ),
    "a shape larger than any file": lambda data: with_header(
        {"a": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 4]}}, bytes(4)
    ),
}


def torch_saved(tensors):
    file = io.BytesIO()
    torch.save(tensors, file)
    return file.getvalue()


@pytest.mark.parametrize("case", BROKEN)
def test_bytes_that_are_no_safetensors_file_are_refused(case):
    refusal(BROKEN[case](tensors_to_bytes(weights())))


def test_a_file_with_a_shape_that_no_tensor_has_is_refused(tmp_path):
    shape = {"dtype": "F32", "shape": [0, 2**63, 2**63], "data_offsets": [0, 0]}
    (tmp_path / "model").write_bytes(with_header({"cls_token": shape}))
    with pytest.raises(WeightsError, match="'cls_token' has a shape that no tensor can have"):
        check_file(tmp_path / "model", {"cls_token": ((1, 1, 32), torch.float32)})
    (tmp_path / "model").write_bytes(with_header({"a": {**shape, "dtype": "Q\n\x1b[2J"}}))
    with pytest.raises(WeightsError) as caught:
        check_file(tmp_path / "model", {})
    assert str(caught.value).isprintable()


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('a pickle was opened')",))


def test_a_pickle_is_never_opened():
    assert "safetensors" in refusal(pickle.dumps(Bomb()))
    assert "safetensors" in refusal(torch_saved({"bomb": Bomb()}))
