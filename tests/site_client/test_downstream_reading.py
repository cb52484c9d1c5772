"""Cases become tensors of the right shape, values and truth; batches depend on nothing but their number."""

import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image
from tests.site_client import published

from invcoss_common.errors import DataError, UnreadableFile
from invcoss_site.downstream.augment import augmented, coloured, elastic
from invcoss_site.downstream.reading import Reader, TaskBatches, random_window, read_case
from invcoss_site.downstream.sets import find_cases
from invcoss_site.downstream.sets.cases import Case, of_split
from invcoss_site.downstream.stored import read_nrrd, read_prepared
from invcoss_site.downstream.task import TASKS, Task
from invcoss_site.downstream.words import read_tokeniser, token_numbers, train_tokeniser, write_tokeniser

SMALL = {1: (16,), 2: (32, 32), 3: (8, 16, 16)}  # sizes for which a test need not wait
LAYOUT_IDS = [maker.__name__ for _, maker, _ in published.SETS]


def small(name):
    task = TASKS[name]
    spacing = (3.0, 1.6, 1.6) if task.spacing_mm else None
    return task.model_copy(update={"size": SMALL[task.ndim], "batch": 4, "spacing_mm": spacing})


@pytest.mark.parametrize(("name", "make", "expected"), published.SETS, ids=LAYOUT_IDS)
def test_every_case_of_a_published_set_is_read_and_batched(tmp_path, name, make, expected):
    make(tmp_path)
    task = small(name)
    cases = find_cases(task, tmp_path)
    train = of_split(cases, "train")
    tokeniser = train_tokeniser([case.text for case in train], 300) if name == "pubmed20k" else None
    for case in cases:
        example = read_case(task, case, tokeniser)
        assert torch.isfinite(example.image.float()).all()
        if task.kind == "classify":
            assert int(example.target) == case.label
            assert tuple(example.image.shape[-task.ndim :]) == task.size
        else:
            assert example.target.shape == (len(task.classes), *example.image.shape[1:])
            assert set(example.target.unique().tolist()) == {0.0, 1.0}
            assert 0.05 < float(example.target[0].mean()) < 0.5  # the box in the middle
    images, targets = TaskBatches(task, train, 0, Reader(task, tokeniser))[3]
    assert len(images) == len(targets) == 4
    assert tuple(images.shape[1:]) == (task.size if tokeniser else (task.channels, *task.size))


def test_a_lesion_is_inside_its_organ(tmp_path):
    for make in (published.lits, published.lits_prepared):
        make(tmp_path / make.__name__)
        task = TASKS["lits"].model_copy(update={"spacing_mm": (1.5, 0.8, 0.8)})
        example = read_case(task, find_cases(task, tmp_path / make.__name__)[0])
        organ, tumour = example.target
        assert int(tumour.sum()) == 1 and bool((organ >= tumour).all())
        assert example.spacing_mm == pytest.approx((1.5, 0.8, 0.8))


def test_prepared_values_stay_as_they_are(tmp_path):
    published.vs_prepared(tmp_path)
    published.la_prepared(tmp_path)
    for name in ("vs", "la"):
        case = find_cases(TASKS[name], tmp_path)[0]
        found = read_case(TASKS[name], case).image[0].numpy()
        image, mask = read_prepared(case.files[0])
        assert np.array_equal(found, image[0]) and mask.min() == 0
    assert found.shape == (10, 18, 20)  # from (18, 20, 10), the slices last


def test_intensities_are_as_published(tmp_path):
    published.ricord_resized(tmp_path)
    case = find_cases(TASKS["ricord"], tmp_path)[0]
    values = read_case(small("ricord").model_copy(update={"size": (8, 24, 24)}), case).image
    raw = np.clip(nib.load(case.files[0]).get_fdata(), -1024, 325)
    assert float(values.min()) == pytest.approx((raw.min() - 158.58) / 324.70, abs=1e-4)
    assert float(values.max()) == pytest.approx((325 - 158.58) / 324.70, abs=1e-4)
    published.glas_prepared(tmp_path)
    task = TASKS["glas"].model_copy(update={"size": (64, 64)})
    image = read_case(task, find_cases(task, tmp_path)[0]).image
    assert torch.allclose(image.mean(dim=(1, 2)), torch.zeros(3), atol=1e-4)
    assert torch.allclose(image.std(dim=(1, 2)), torch.ones(3), atol=1e-2)
    published.chestxr(tmp_path)
    image = read_case(small("chestxr"), find_cases(TASKS["chestxr"], tmp_path)[0]).image
    assert 0 <= float(image.min()) < float(image.max()) <= 1


def own(**changes):
    base = {"name": "own", "kind": "segment", "input": "mri", "size": (8, 8, 8), "classes": ("front", "back")}
    return Task.model_validate({**base, **changes})


def mri(folder, mask, shape=(12, 14, 10), affine=None):
    image = published.volume(folder / "image.nii.gz", published.pixels(1, shape).astype(np.int16), np.eye(4))
    path = published.volume(folder / "mask.nii.gz", mask, np.eye(4) if affine is None else affine)
    return Case("a", "a", "test", (image,), mask=path)


def test_a_mask_that_does_not_fit_is_refused_by_name(tmp_path):
    with pytest.raises(UnreadableFile, match=r"mask\.nii\.gz: mask has shape"):
        read_case(own(), mri(tmp_path, published.blob((12, 14, 9))))
    with pytest.raises(UnreadableFile, match=r"mask\.nii\.gz: class 77 is not one of 0, 1, 2"):
        read_case(own(), mri(tmp_path, published.blob((12, 14, 10)) * np.uint8(77)))
    image = published.picture(tmp_path / "a.png", 1)
    mask = published.mask_picture(tmp_path / "b.png", (40, 47))
    with pytest.raises(UnreadableFile, match=r"b\.png: mask has shape \(47, 40\)"):
        read_case(small("qatav2"), Case("a", "a", "test", (image,), mask=mask))


def test_a_volume_and_its_mask_are_brought_to_the_wanted_spacing(tmp_path):
    task = own(spacing_mm=(2.0, 1.0, 0.5))
    mask = published.blob((12, 14, 10))
    mask[6:9, 3:11, 2:8] = 2
    example = read_case(task, mri(tmp_path, mask))
    assert example.image.shape == (1, 5, 14, 24) and example.target.shape == (2, 5, 14, 24)
    assert example.spacing_mm == (2.0, 1.0, 0.5)
    front, back = (float(part.mean()) for part in example.target)
    assert front == pytest.approx(float((mask == 1).mean()), abs=0.05)
    assert back == pytest.approx(float((mask == 2).mean()), abs=0.05)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"data": np.array([{"a": 1}], dtype=object)}, "array `data` of plain numbers"),
        ({"other": np.zeros(3)}, "array `data`"),
        ({"data": np.zeros((3, 4, 4, 4))}, r"has shape \(3, 4, 4, 4\)"),
        ({"data": np.full((2, 4, 4, 4), np.nan)}, "NaN"),
        ({"data": np.full((2, 4, 4, 4), 0.5)}, "no whole numbers"),
    ],
)
def test_a_damaged_npz_is_refused_and_never_unpickled(tmp_path, content, message):
    np.savez(tmp_path / "a.npz", **content)
    with pytest.raises(UnreadableFile, match=rf"a\.npz: .*{message}"):
        read_prepared(tmp_path / "a.npz")


def test_damaged_h5_and_nrrd_are_refused(tmp_path):
    import h5py
    import nrrd

    (tmp_path / "a.h5").write_bytes(b"no")
    with pytest.raises(UnreadableFile, match=r"a\.h5: not an HDF5 file"):
        read_prepared(tmp_path / "a.h5")
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["image"] = np.zeros((4, 5, 6))
        file["label"] = h5py.ExternalLink("elsewhere.h5", "/label")
    with pytest.raises(UnreadableFile, match=r"b\.h5: has no data set `label`"):
        read_prepared(tmp_path / "b.h5")
    with h5py.File(tmp_path / "c.h5", "w") as file:
        file["image"], file["label"] = np.zeros((4, 5, 6)), np.zeros((4, 5, 7))
    with pytest.raises(UnreadableFile, match=r"c\.h5: mask has shape"):
        read_prepared(tmp_path / "c.h5")
    (tmp_path / "a.nrrd").write_bytes(b"NRRD")
    with pytest.raises(UnreadableFile, match=r"a\.nrrd: not a 3-D NRRD file"):
        read_nrrd(tmp_path / "a.nrrd")
    nrrd.write(str(tmp_path / "b.nrrd"), np.zeros((8, 8, 8), np.uint8))
    with pytest.raises(UnreadableFile, match="no orientation"):
        read_nrrd(tmp_path / "b.nrrd")


def test_a_nrrd_lies_as_its_nifti_twin_does(tmp_path):
    import nrrd

    values = published.hounsfield(1, (8, 10, 12))
    header = {"space": "left-posterior-superior", "space directions": np.diag([0.5, 0.5, 2.0])}
    nrrd.write(str(tmp_path / "a.nrrd"), values, header)
    published.volume(tmp_path / "a.nii.gz", values, np.diag([-0.5, -0.5, 2.0, 1.0]))
    task = own(kind="classify", classes=("a", "b"), input="ct")
    from invcoss_site.downstream.reading import read_sample

    twin = read_sample(task, Case("a", "a", "test", (tmp_path / "a.nii.gz",)))
    found = read_nrrd(tmp_path / "a.nrrd")
    assert np.array_equal(found.pixels, twin.pixels) and found.spacing_mm == twin.spacing_mm == (2.0, 0.5, 0.5)


@pytest.mark.parametrize(("name", "make"), [("nct-crc-he", published.nct), ("la", published.la_prepared)])
def test_batches_are_a_function_of_their_number_and_seed(tmp_path, name, make):
    make(tmp_path)
    task = small(name)
    cases = of_split(find_cases(task, tmp_path), "train")
    batches = TaskBatches(task, cases, 0)
    first = batches[5]
    batches[1]
    again = TaskBatches(task, cases, 0)[5]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], TaskBatches(task, cases, 1)[5][0])
    with pytest.raises(DataError, match="no training case"):
        TaskBatches(task, [], 0)


def test_every_case_comes_once_an_epoch(tmp_path):
    published.chestxr(tmp_path)
    task = small("chestxr").model_copy(update={"batch": 3, "augment": "none"})
    cases = of_split(find_cases(task, tmp_path), "train")
    batches = TaskBatches(task, cases, 0)
    drawn = torch.cat([batches[number][0] for number in range(4)])
    assert len(cases) == len(torch.unique(drawn.flatten(1), dim=0)) == 12


def test_half_of_the_windows_have_foreground_in_their_middle():
    image, target = torch.zeros(1, 40, 40, 40), torch.zeros(1, 40, 40, 40)
    target[0, 25, 12, 30] = 1
    middles = 0
    for seed in range(100):
        part, mask = random_window(image, target, (8, 8, 8), torch.Generator().manual_seed(seed))
        assert part.shape == mask.shape == (1, 8, 8, 8)
        middles += bool(mask[0, 4, 4, 4])
    assert 35 <= middles <= 65
    part, mask = random_window(image + 1, target, (48, 40, 8), torch.Generator().manual_seed(0))
    assert part.shape == (1, 48, 40, 8) and float(part[0, 0].max()) == 0 and float(part[0, 4].min()) == 1


def test_spatial_changes_keep_image_and_mask_together():
    box = torch.from_numpy(published.blob((24, 24, 24))).float()[None]
    task = own(augment="spatial", classes=("box",))
    agree, changed = [], 0
    for seed in range(12):
        image, mask = augmented(task, box, box, seed)
        assert type(image) is type(mask) is torch.Tensor
        assert image.shape == box.shape and 0 <= image.min() < image.max() <= 1
        assert set(mask.unique().tolist()) <= {0.0, 1.0}
        inside, outside = image[mask == 1].mean(), image[mask == 0].mean()
        agree.append(float(inside - outside))
        changed += not torch.equal(image, box)
    assert min(agree) > 0.5 and changed >= 6
    plain, _ = augmented(task.model_copy(update={"augment": "none"}), box, box, 0)
    assert torch.equal(plain, box)


@pytest.mark.parametrize("size", [(48, 40), (20, 32, 28)])
def test_elastic_changes_bend_image_and_mask_alike_and_smoothly(size):
    ramps = torch.stack(torch.meshgrid(*(torch.arange(float(side)) for side in size), indexing="ij"))
    marks = (ramps[:1] > size[0] / 2).float()
    bent, mask = elastic(ramps, marks, torch.Generator().manual_seed(4))
    inner = (slice(None), *(slice(6, side - 6) for side in size))
    moved = (bent - ramps)[inner]
    assert 0.5 < float(moved.std()) < 3.5 and float(moved.diff(dim=1).abs().max()) < 1
    agree = (mask[0] == (bent[0] > size[0] / 2)).float().mean()  # but for rounding at the edge
    assert float(agree) > 0.95 and not torch.equal(mask, marks)


@pytest.mark.parametrize("channels", [1, 3])
def test_colour_changes_stay_in_range_and_differ(channels):
    image = torch.rand(channels, 20, 20, generator=torch.Generator().manual_seed(0))
    results = [coloured(image, torch.Generator().manual_seed(seed)) for seed in range(20)]
    assert all(found.shape == image.shape and 0 <= found.min() <= found.max() <= 1 for found in results)
    assert len({round(float(found.mean()), 5) for found in results}) > 10
    assert all(type(found) is torch.Tensor for found in results)


def test_hue_keeps_grey_grey_and_a_full_turn_changes_nothing():
    from invcoss_site.downstream.augment import _hue_turned

    grey = torch.full((3, 4, 4), 0.4)
    assert torch.allclose(_hue_turned(grey, 0.1), grey, atol=1e-3)
    colour = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(1)) * 0.4 + 0.3
    assert torch.allclose(_hue_turned(colour, 1.0), colour, atol=1e-4)
    assert not torch.allclose(_hue_turned(colour, 0.1), colour, atol=1e-2)


TEXTS = [f"The {word} group improved after {word} ." for word in ("treated", "control", "untreated", "whole")] * 3


def test_a_tokeniser_is_made_alike_kept_and_read(tmp_path):
    tokeniser = train_tokeniser(TEXTS, 300)
    assert tokeniser.get_vocab_size() == 300
    numbers = token_numbers(tokeniser, ["The treated group", "unheard-of"], 12)
    assert numbers.shape == (2, 12) and numbers.dtype == torch.int64
    assert numbers[:, 0].tolist() == [2, 2] and int(numbers[0, -1]) == 0  # [CLS] in front, [PAD] behind
    assert int(token_numbers(tokeniser, TEXTS[:1], 4)[0, -1]) == 3  # cut, [SEP] kept
    write_tokeniser(tmp_path / "tokeniser.json", tokeniser)
    kept = (tmp_path / "tokeniser.json").read_bytes()
    write_tokeniser(tmp_path / "again.json", train_tokeniser(TEXTS, 300))
    assert kept == (tmp_path / "again.json").read_bytes()
    read = read_tokeniser(tmp_path / "tokeniser.json")
    assert torch.equal(token_numbers(read, TEXTS, 12), token_numbers(tokeniser, TEXTS, 12))


def test_a_bert_vocabulary_may_be_given_instead(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nThe\nheart\n##s\nthe\n")
    numbers = token_numbers(read_tokeniser(path), ["The hearts the brain"], 8)
    assert numbers.tolist() == [[2, 5, 6, 7, 8, 1, 3, 0]]  # cased, because the vocabulary is
    path.write_text("heart\n")
    with pytest.raises(DataError, match=r"vocab\.txt: has no \[PAD\], \[UNK\]"):
        read_tokeniser(path)
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(DataError, match=r"bad\.json: not a tokeniser"):
        read_tokeniser(tmp_path / "bad.json")


def test_grey_masks_saved_as_colour_are_read(tmp_path):
    image = published.picture(tmp_path / "a.png", 1)
    Image.fromarray(np.repeat(published.blob((40, 48))[..., None] * np.uint8(255), 3, axis=2)).save(tmp_path / "m.png")
    example = read_case(small("qatav2"), Case("a", "a", "test", (image,), mask=tmp_path / "m.png"))
    assert float(example.target.mean()) == pytest.approx(0.25, abs=0.05)


def test_no_process_makes_another_tokeniser():
    script = (
        "from invcoss_site.downstream.words import train_tokeniser; "
        f"print(train_tokeniser({TEXTS!r}, 300).to_str(), end='')"
    )
    other = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert other.stdout == train_tokeniser(TEXTS, 300).to_str()


def test_a_reader_keeps_what_fits(tmp_path):
    published.chestxr(tmp_path)
    task = small("chestxr")
    first, second = find_cases(task, tmp_path)[:2]
    reader = Reader(task, keep_mb=0.005)  # one picture of 4 kB and its label
    assert reader(first) is reader(first)
    assert reader(second) is not reader(second)
    assert torch.equal(reader(second).image, read_case(task, second).image)
