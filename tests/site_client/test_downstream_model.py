"""Encoder, heads, sliding window: features are the pre-trained model's own, every size and patch can be decoded."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from monai.networks.blocks import UnetrBasicBlock, UnetrPrUpBlock, UnetrUpBlock
from monai.networks.blocks.dynunet_block import UnetOutBlock
from safetensors.torch import load_file, save_file

from invcoss_common.errors import DataError, WeightsError
from invcoss_common.modality import SIZES, Geometry, ModelShape
from invcoss_common.model import build_model
from invcoss_common.tokens import Mask
from invcoss_common.weights import write_model
from invcoss_site.downstream.encoder import from_scratch, image_encoder, pretrained, text_encoder
from invcoss_site.downstream.heads import Classifier, Segmenter
from invcoss_site.downstream.inference import segment
from invcoss_site.downstream.metrics import dice

torch.set_num_threads(1)

NANO = SIZES["nano"]
SMALL_SHAPE = ModelShape(width=32, depth=4, heads=2, decoder_width=16, decoder_depth=1, decoder_heads=2)


def family(*patch):
    return Geometry(channels=1, size=patch, patch=patch)


FLAT, DEEP = family(*NANO.patch[2]), family(*NANO.patch[3])


@pytest.fixture(scope="module")
def model():
    """A nano model whose normalisation layers are no longer those of a new one."""
    made = build_model(NANO.model, [FLAT, DEEP], seed=3)
    with torch.no_grad():
        for norm in made.encoder_norms():
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.uniform_(-0.5, 0.5)
    return made


@pytest.fixture
def file(model, tmp_path):
    write_model(tmp_path / "model.safetensors", model)
    return tmp_path / "model.safetensors"


def parameters(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


# --- encoder


@pytest.mark.parametrize("size", [(64, 64), (32, 80), (16, 32, 32), (8, 16, 48)], ids=str)
def test_features_are_those_of_the_model_with_nothing_masked(model, size):
    images = torch.rand(2, 1, *size)
    encoder = image_encoder(model, size, 1, "x").eval()
    geometry = Geometry(channels=1, size=size, patch=NANO.patch[len(size)])
    order = torch.stack([torch.randperm(geometry.tokens) for _ in range(2)])
    everything = Mask(
        keep=order, restore=order.argsort(dim=1), removed=torch.zeros(2, geometry.tokens, dtype=torch.bool)
    )
    with torch.no_grad():
        encoded = encoder(images)
        latent = model.encode(images, geometry)[:, 1:]
        shuffled, _ = model(images, geometry, everything)  # the pre-training path at mask ratio 0
    torch.testing.assert_close(encoded.tokens, latent)
    torch.testing.assert_close(encoded.pooled, latent.mean(dim=1))
    torch.testing.assert_close(encoded.pooled, shuffled[:, 1:].mean(dim=1), rtol=1e-4, atol=1e-5)


def test_hidden_states_are_those_after_a_quarter_half_and_three_quarters(model):
    for depth, expected in ((3, [0, 1, 2]), (6, [1, 2, 4]), (12, [2, 5, 8]), (24, [5, 11, 17])):
        shape = NANO.model.model_copy(update={"depth": depth, "width": 8, "heads": 1})
        assert image_encoder(build_model(shape, [FLAT], seed=0), (16, 16), 1, "x").quarters == expected
    encoder = image_encoder(model, (16, 16), 1, "x").eval()
    seen = []
    for block in encoder.blocks:
        block.register_forward_hook(lambda _block, _inputs, output: seen.append(output[:, 1:]))
    quarters = encoder(torch.rand(1, 1, 16, 16)).quarters
    assert all(torch.equal(state, seen[number]) for state, number in zip(quarters, encoder.quarters, strict=True))


def test_colour_and_grey_share_the_tokeniser(model):
    grey = torch.rand(2, 1, 16, 16)
    with torch.no_grad():
        as_grey = image_encoder(model, (16, 16), 1, "x").eval()(grey).tokens
        as_colour = image_encoder(model, (16, 16), 3, "x").eval()(grey.expand(-1, 3, -1, -1)).tokens
    torch.testing.assert_close(as_grey, as_colour)


def test_text_is_read_forwards_only(model):
    encoder = text_encoder(model, vocabulary=50, length=12).eval()
    numbers = torch.randint(50, (2, 12))
    changed = numbers.clone()
    changed[:, 8] = (changed[:, 8] + 1) % 50
    with torch.no_grad():
        before, after = encoder(numbers).tokens, encoder(changed).tokens
    assert before.shape == (2, 12, NANO.model.width)
    torch.testing.assert_close(before[:, :8], after[:, :8])
    assert all(not torch.allclose(before[:, place], after[:, place]) for place in range(8, 12))


def test_blocks_are_passed_over_in_training_only(model):
    images = torch.rand(4, 1, 16, 16)
    encoder = image_encoder(model, (16, 16), 1, "x", drop_path=0.5)
    torch.manual_seed(0)
    assert not torch.equal(encoder.train()(images).tokens, encoder(images).tokens)
    assert torch.equal(encoder.eval()(images).tokens, encoder(images).tokens)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_file_says_what_model_it_holds(model, tmp_path, dtype):
    write_model(tmp_path / "m.safetensors", model, dtype)
    read = pretrained(tmp_path / "m.safetensors")
    assert read.shape == NANO.model and read.families.keys() == model.families.keys()
    for name, weights in model.state_dict().items():
        expected = weights if dtype == "float32" else weights.bfloat16().float()
        assert torch.equal(read.state_dict()[name], expected), name


@pytest.mark.parametrize("size", ["tiny", "small"])
def test_sizes_are_told_apart(tmp_path, size):
    scale = SIZES[size]
    write_model(tmp_path / "m.safetensors", build_model(scale.model, [family(*scale.patch[2])], seed=0), "bfloat16")
    assert pretrained(tmp_path / "m.safetensors").shape == scale.model


def test_from_scratch_is_as_large_and_not_the_same(model):
    fresh = from_scratch(model, seed=1)
    assert fresh.state_dict().keys() == model.state_dict().keys()
    assert not torch.equal(fresh.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight)
    assert torch.equal(fresh.cls_token, from_scratch(model, seed=1).cls_token)


def without(name):
    return lambda tensors: tensors.pop(name)


def put(name, tensor):
    return lambda tensors: tensors.__setitem__(name, tensor)


DAMAGE = {
    "of no size of ours": (put("cls_token", torch.zeros(1, 1, 100)), "any of the sizes nano, tiny, small"),
    "block cut off": (without("blocks.2.norm1.weight"), "any of the sizes"),
    "no tokeniser": (lambda t: [t.pop(n) for n in list(t) if n.startswith("tokenisers")], "any of the sizes"),
    "tokeniser of no family": (put("tokenisers.2d_8xa.weight", torch.zeros(1)), "any of the sizes"),
    "missing": (without("blocks.1.mlp.fc1.bias"), "'blocks.1.mlp.fc1.bias' is missing"),
    "extra": (put("head.weight", torch.zeros(2)), "'head.weight'"),
    "misshapen": (put("tokenisers.2d_8x8.weight", torch.zeros(128, 191)), r"tokenisers.2d_8x8.weight' is \(128, 191\)"),
    "not a number": (put("norm.bias", torch.full((128,), math.nan)), "'norm.bias' holds NaN"),
}


@pytest.mark.parametrize(("damage", "reason"), DAMAGE.values(), ids=DAMAGE)
def test_weights_that_do_not_fit_are_refused_by_name(file, damage, reason):
    tensors = load_file(file)
    damage(tensors)
    save_file(tensors, file)
    with pytest.raises(WeightsError, match=reason) as refused:
        pretrained(file)
    assert str(refused.value).startswith(f"{file}: ")


def test_files_that_are_no_weights_are_refused_by_name(tmp_path):
    (tmp_path / "a.pth").write_bytes(b"PK\x03\x04 a pickle")
    for name in ("a.pth", "absent", "."):
        with pytest.raises(WeightsError) as refused:
            pretrained(tmp_path / name)
        assert str(refused.value).startswith(f"{tmp_path / name}: ")


def test_images_that_the_model_can_not_take(model):
    flat = build_model(NANO.model, [FLAT], seed=0)
    with pytest.raises(WeightsError, match=r"m.safetensors: this model never saw 3-D images \(it has 2d_8x8\)"):
        image_encoder(flat, (16, 32, 32), 1, "m.safetensors")
    with pytest.raises(DataError, match=r"images of 60 x 64 can't be cut into the patches of 8 x 8 of m.safetensors"):
        image_encoder(model, (60, 64), 1, "m.safetensors")
    with pytest.raises(DataError, match="multiple"):
        image_encoder(model, (4, 64), 1, "m.safetensors")


# --- heads

PATCHES = [(8, 8), (16, 16), (4, 16), (1, 1), (32, 32), (4, 8, 8), (8, 8, 8), (16, 16, 16), (2, 4, 16)]


def untrained(module):
    """Names of the parameters that no gradient reaches."""
    return [n for n, p in module.named_parameters() if p.grad is None or not 0 < p.grad.abs().sum() < math.inf]


def encoder_for(patch, channels=1, grid=2):
    trunk = build_model(SMALL_SHAPE, [family(*patch)], seed=0)
    return image_encoder(trunk, tuple(grid * p for p in patch), channels, "x", drop_path=0)


@pytest.mark.parametrize("patch", PATCHES, ids=str)
def test_segmenter_gives_masks_of_the_image_and_trains_all_of_itself(patch):
    torch.manual_seed(0)
    segmenter = Segmenter(encoder_for(patch), classes=2)
    images = torch.rand(2, 1, *segmenter.geometry.size)
    logits = segmenter(images)
    assert logits.shape == (2, 2, *segmenter.geometry.size)
    logits.square().mean().backward()
    assert not untrained(segmenter)


@pytest.mark.parametrize(("mlp", "layers"), [(False, 1), (True, 2)])
@pytest.mark.parametrize("patch", [(8, 8), (4, 8, 8)], ids=str)
def test_classifier_gives_logits_and_trains_all_of_itself(patch, mlp, layers):
    classifier = Classifier(encoder_for(patch), classes=5, mlp=mlp)
    logits = classifier(torch.rand(3, 1, *(2 * p for p in patch)))
    assert logits.shape == (3, 5)
    F.cross_entropy(logits, torch.tensor([0, 1, 4])).backward()
    assert not untrained(classifier)
    assert sum(isinstance(layer, torch.nn.Linear) for layer in classifier.head) == layers


def test_text_classifier_trains_all_of_itself():
    encoder = text_encoder(build_model(SMALL_SHAPE, [FLAT], seed=0), vocabulary=9, length=6, drop_path=0)
    classifier = Classifier(encoder, classes=5, mlp=True)
    F.cross_entropy(classifier(torch.arange(6)[None]), torch.tensor([3])).backward()
    assert not untrained(classifier)


@pytest.mark.parametrize(("ndim", "channels"), [(2, 3), (3, 1)])
def test_decoder_at_base_is_as_large_as_the_published_one(ndim, channels):
    scale = SIZES["base"]
    with torch.device("meta"):
        trunk = build_model(scale.model, [family(*scale.patch[ndim])], seed=0)
        encoder = image_encoder(trunk, scale.size[ndim], channels, "x")
        ours = parameters(Segmenter(encoder, classes=2)) - parameters(encoder)
        common = {"spatial_dims": ndim, "kernel_size": 3, "norm_name": "instance", "res_block": True}
        published = parameters(
            UnetrBasicBlock(in_channels=channels, out_channels=16, stride=1, **common),
            *(
                UnetrPrUpBlock(
                    in_channels=768,
                    out_channels=16 * 2 ** (3 - layers),
                    num_layer=layers,
                    stride=1,
                    upsample_kernel_size=2,
                    conv_block=True,
                    **common,
                )
                for layers in range(3)
            ),
            *(
                UnetrUpBlock(in_channels=i, out_channels=o, upsample_kernel_size=2, **common)
                for i, o in itertools.pairwise([768, 128, 64, 32, 16])
            ),
            UnetOutBlock(spatial_dims=ndim, in_channels=16, out_channels=2),
        )
    assert ours == published


def test_other_patches_can_not_be_decoded():
    with pytest.raises(WeightsError, match=r"m.safetensors: a patch side of 6 is no power of two"):
        Segmenter(encoder_for((6, 8)), 1, "m.safetensors")


def disks(count, size):
    """Bright disks in noise, and their masks (N, 1, *size)."""
    random = np.random.default_rng(0)
    y, x = np.indices(size)
    places = random.integers(12, 28, size=(count, 2))
    masks = np.stack([(y - top) ** 2 + (x - left) ** 2 < random.integers(6, 11) ** 2 for top, left in places])
    images = 0.3 * random.random(masks.shape) + 0.4 * masks
    return torch.tensor(images, dtype=torch.float32)[:, None], torch.tensor(masks)[:, None]


def test_nano_segmenter_learns_four_phantoms():
    torch.manual_seed(0)
    images, masks = disks(4, (40, 40))
    segmenter = Segmenter(
        image_encoder(build_model(NANO.model, [FLAT], seed=0), (40, 40), 1, "x", drop_path=0), classes=1
    )
    optimiser = torch.optim.AdamW(segmenter.parameters(), lr=2e-3)
    for _ in range(40):
        optimiser.zero_grad()
        F.binary_cross_entropy_with_logits(segmenter(images), masks.float()).backward()
        optimiser.step()
    found = segment(segmenter, images, (40, 40)) > 0.5
    scores = [dice(p.numpy(), t.numpy()) for p, t in zip(found, masks, strict=True)]
    assert min(scores) > 0.9, scores


# --- sliding window


class Itself(torch.nn.Module):
    """Logits of which the probabilities are the image; counts the windows it sees."""

    def __init__(self):
        super().__init__()
        self.device_of = torch.nn.Parameter(torch.zeros(1))
        self.seen = []

    def forward(self, x):
        self.seen.append(tuple(x.shape))
        return x.logit()


@pytest.mark.parametrize("size", [(24, 40), (16, 16), (10, 30), (8, 20, 12), (5, 16, 7)], ids=str)
def test_windows_are_put_together_where_they_were(size):
    window = (16, 16) if len(size) == 2 else (8, 8, 8)
    images = torch.rand(2, 1, *size) * 0.9 + 0.05
    for flips in (True, False):
        torch.testing.assert_close(segment(Itself(), images, window, flips=flips), images, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("window", "mirrors"), [((16, 16), 4), ((8, 8, 8), 8)], ids=str)
def test_every_mirror_image_counts(window, mirrors):
    model = Itself()
    segment(model, torch.full((1, 1, *window), 0.5), window)
    assert model.seen == [(1, 1, *window)] * mirrors

    class Uneven(Itself):
        def forward(self, x):  # sees only the first voxel; over all mirror images all corners are equal
            super().forward(x)
            where = torch.zeros_like(x)
            where[(..., *[0] * len(window))] = 1
            return where.logit(eps=1e-6)

    merged = segment(Uneven(), torch.full((1, 1, *window), 0.5), window)[0, 0]
    corners = merged[np.ix_(*[[0, -1]] * len(window))]
    torch.testing.assert_close(corners, torch.full_like(corners, 1 / mirrors), rtol=1e-3, atol=1e-5)


def test_windows_overlap_by_half_and_count_most_in_their_middle():
    class Halves(Itself):
        def forward(self, x):
            super().forward(x)
            return torch.full_like(x, 20.0 if x[0, 0, 0, 0] < 0.5 else -20.0)

    model = Halves()
    images = torch.zeros(1, 1, 16, 24)
    images[..., 8:] = 1  # windows begin at columns 0 and 8
    merged = segment(model, images, (16, 16), flips=False, batch=1)[0, 0, 8]
    assert len(model.seen) == 2
    assert merged[0] > 0.99 and merged[23] < 0.01 and merged[8] > 0.5 > merged[15]
    assert (merged[8:16].diff() < 0).all()
