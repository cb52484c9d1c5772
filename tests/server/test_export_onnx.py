"""The ONNX export: onnxruntime finds our features, in 2-D and 3-D, for any number of images."""

from __future__ import annotations

import json
import re
import sys

import numpy as np
import pytest
import torch
from tests.server.exports import images_for, source_of, tokens_of

from invcoss_server.export.folder import export
from invcoss_server.export.onnx import TOLERANCE, _check, _Features
from invcoss_server.export.source import ExportError

onnxruntime = pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return source_of(tmp_path_factory.mktemp("run"), ("xray", "ct"))


@pytest.fixture(scope="module")
def exported(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "out"
    export(source, out, ("onnx",), site_names=True)
    return out


@pytest.mark.parametrize("modality", ["xray", "ct"])
def test_onnxruntime_has_our_features(source, exported, modality):
    session = onnxruntime.InferenceSession(exported / "onnx" / f"{modality}.onnx", providers=["CPUExecutionProvider"])
    geometry = source.geometry(modality)
    (images,) = session.get_inputs()
    assert (images.name, images.type) == ("images", "tensor(float)")
    assert images.shape[1:] == [geometry.channels, *geometry.size] and isinstance(images.shape[0], str)
    for count in (1, 5):
        given = images_for(source, modality, count)
        patches, cls = session.run(["patch_tokens", "class_token"], {"images": given.numpy()})
        ours = tokens_of(source, modality, given).numpy()
        assert patches.shape == (count, geometry.tokens, 128) and cls.shape == (count, 128)
        assert np.abs(patches - ours[:, 1:]).max() <= TOLERANCE and np.abs(cls - ours[:, 0]).max() <= TOLERANCE


def test_the_weights_are_in_the_file_and_its_origin_beside_it(source, exported):
    assert sorted(path.name for path in (exported / "onnx").iterdir()) == ["config.json", "ct.onnx", "xray.onnx"]
    config = json.loads((exported / "onnx" / "config.json").read_text())
    assert config["model_sha256"] == source.sha256
    assert config["modalities"]["ct"]["low"] == -1000


def test_exporting_leaves_the_model_as_it_was(source, exported):
    ours = tokens_of(source, "ct", images_for(source, "ct"))
    assert type(ours) is torch.Tensor and bool(ours.isfinite().all())  # a traced call's positions are no numbers


def test_the_snippet_of_the_card_runs(exported, monkeypatch):
    (snippet,) = re.findall(r"```python\n(.*?)```", (exported / "README.md").read_text(), re.S)
    monkeypatch.chdir(exported)
    found: dict[str, object] = {}
    exec(snippet, found)
    assert found["patch_tokens"].shape == (2, 64, 128)


def test_a_file_with_other_features_is_not_kept(source, exported):
    with torch.no_grad():
        source.model.norm.bias[0] += 1e-3
    try:
        with pytest.raises(ExportError, match=r"xray.onnx: features differ by 0.001 from the model's"):
            _check(_Features(source.model, source.geometry("xray")).eval(), exported / "onnx" / "xray.onnx")
    finally:
        with torch.no_grad():
            source.model.norm.bias[0] -= 1e-3


def test_without_the_extra_it_says_what_to_install(source, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ExportError, match=r"format onnx needs onnxscript; pip install 'invcoss\[export\]'"):
        export(source, tmp_path / "out", ("onnx",), site_names=True)
    assert not (tmp_path / "out").exists()
