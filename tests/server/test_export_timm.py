"""The timm export: loads strictly into timm's own VisionTransformer, whose features are ours."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from tests.server.exports import images_for, source_of, tokens_of

from invcoss_server.export.folder import export, fitting
from invcoss_server.export.source import ExportError
from invcoss_server.export.timm import write_timm

TOLERANCE = 1e-5


class _Anything(type):
    def __getattr__(cls, name: str) -> _Anything:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {})

    def __call__(cls, *_: object, **__: object) -> _Anything:
        return cls


class _Module(ModuleType):
    def __getattr__(self, name: str) -> _Anything:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {})


class _Torchvision(MetaPathFinder, Loader):
    """Stands for torchvision, which timm imports for its data sets and transforms: no part of a VisionTransformer."""

    def find_spec(self, name, path, target=None):
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] == "torchvision" else None

    def create_module(self, spec):
        return _Module(spec.name)

    def exec_module(self, module):
        pass


@pytest.fixture(scope="module")
def vision_transformer():
    """timm's class; without torchvision of this very torch build, with a stand-in for it."""
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed; make install brings it, without torchvision")
    finder = _Torchvision()
    if importlib.util.find_spec("torchvision") is None:
        sys.meta_path.insert(0, finder)
    try:
        from timm.models.vision_transformer import VisionTransformer
    finally:
        if finder in sys.meta_path:
            sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if isinstance(sys.modules[name], _Module)]:
            del sys.modules[name]
    return VisionTransformer


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return source_of(tmp_path_factory.mktemp("run"))


def test_timm_has_our_features(tmp_path, source, vision_transformer):
    write_timm(source, tmp_path)
    (folder,) = tmp_path.iterdir()  # X-ray and pathology are of one family
    config = json.loads((folder / "config.json").read_text())
    encoder = vision_transformer(**config["arguments"]).eval()
    encoder.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    mean, std = (torch.tensor(config[name]).reshape(1, 3, 1, 1) for name in ("mean", "std"))
    for modality in ("xray", "pathology"):
        images = images_for(source, modality)
        coloured = (images.expand(-1, 3, -1, -1) - mean) / std
        ours = tokens_of(source, modality, images)
        with torch.no_grad():
            assert float((encoder.forward_features(coloured) - ours).abs().max()) <= TOLERANCE
            assert float((encoder(coloured) - ours[:, 0]).abs().max()) <= TOLERANCE
        assert float(ours.std()) > 0.5  # so that the tolerance says something


def test_the_snippet_of_the_card_runs(tmp_path, source, vision_transformer, monkeypatch):
    export(source, tmp_path / "out", ("timm",), site_names=True)
    (snippet,) = re.findall(r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), re.S)
    monkeypatch.chdir(tmp_path / "out")
    found: dict[str, object] = {}
    exec(snippet, found)
    ours = tokens_of(source, "pathology", found["images"])
    assert float((found["tokens"] - ours).abs().max()) <= TOLERANCE


def test_a_model_of_volumes_has_no_timm_export(tmp_path):
    source = source_of(tmp_path / "run", ("ct",))
    assert fitting(source) == ("onnx", "monai", "hf")
    with pytest.raises(ExportError, match="timm is for 2-D images; this is a model of ct"):
        export(source, tmp_path / "out", ("timm",), site_names=True)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
