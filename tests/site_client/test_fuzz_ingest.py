"""Damaged and forged files: 200 of the benchmark's mutations, and those that once were not handled well."""

from random import Random

import numpy as np
import pytest
from tests.site_client.fuzzing.bombs import BOMBS, bomb
from tests.site_client.fuzzing.edits import altered, packed
from tests.site_client.fuzzing.judge import judge
from tests.site_client.fuzzing.mutations import BOMB_EVERY, Fuzzer
from tests.site_client.fuzzing.seeds import Seed, nifti_bytes, seeds, slide_bytes, volume

from invcoss_common.modality import MODALITIES
from invcoss_site.ingest.checks import looks_inverted
from invcoss_site.ingest.sample import Sample
from invcoss_site.ingest.text import MOST_REJECTED
from invcoss_site.ingest.values import model_values

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")

FUZZER = Fuzzer(seed=1)
CLAIMS = (1, 4, 7, 8, 9, 12, 17, 22, 24, 30, 39, 43, 45, 47)  # bombs that are refused for what they say


def outcome(tmp_path, seed, data):
    """The kind of the quarantine, or "read"."""
    tmp_path.mkdir(exist_ok=True)
    verdict = judge(tmp_path, seed, data)
    assert not verdict.failure, f"{verdict.failure} {verdict.trace}"
    return verdict.kind or verdict.outcome


def seed_named(name):
    return next(seed for seed in seeds() if seed.name == name)


def test_every_mutation_is_read_or_quarantined_with_a_reason(tmp_path):
    outcomes = []
    for number in FUZZER.numbers(200):
        if number >= 0 and number % BOMB_EVERY == 0:
            continue
        made = FUZZER.mutation(number)
        found = outcome(tmp_path / str(number), made.seed, made.data)
        assert found == "read" or not made.whole, f"{number}: {made.edit} of {made.seed.name} was refused: {found}"
        outcomes.append(found)
    assert outcomes.count("read") > len(seeds()) + 20
    assert len(set(outcomes)) > 8, "mutations that only ever meet one check try nothing"


def test_a_mutation_is_known_by_its_number():
    again = Fuzzer(seed=1)
    assert [again.mutation(n).data for n in (3, 5, 9)] == [FUZZER.mutation(n).data for n in (3, 5, 9)]
    made = {altered(seeds()[0], Random(n))[1] for n in range(20)}
    assert len(made) > 15 and seeds()[0].data not in made


@pytest.mark.parametrize("number", CLAIMS)
def test_a_small_file_that_claims_or_holds_gigabytes_is_refused(number, tmp_path):
    seed, data = bomb(number)
    assert outcome(tmp_path, seed, data) != "read"
    assert BOMBS[number][0] == seed.format


def test_a_deflated_dicom_file_is_not_unpacked_beyond_any_scan(tmp_path):
    number = next(n for n, one in enumerate(BOMBS) if one[0] == "DICOM")
    assert outcome(tmp_path, *bomb(number)) == "too-large"


def nifti(data, at, value):
    return data[:at] + value + data[at + len(value) :]


@pytest.mark.parametrize("unit", [5, 6, 7])
def test_a_unit_that_no_standard_knows(unit, tmp_path):
    seed = seed_named("plain.nii")
    assert outcome(tmp_path, seed, nifti(seed.data, 123, bytes([unit]))) == "spacing"


def test_axes_that_lean_more_than_a_gantry_or_grow_a_volume(tmp_path):
    values = volume((20, 24, 8))
    steep, thin = np.diag([1.5, 1.5, 2.5, 1.0]), np.diag([0.02, 1.5, 40.0, 1.0])
    steep[0, 2], thin[0, 2] = 9.0, 20.0
    for number, affine in enumerate((steep, thin)):
        seed = Seed("NIfTI", "a.nii.gz", packed(nifti_bytes(values, affine)), "ct")
        assert outcome(tmp_path / str(number), seed, seed.data) == "tilt"


def test_values_with_which_float32_can_not_calculate(tmp_path):
    values = np.linspace(-3.3e38, 3.3e38, 4096, dtype=np.float32).reshape(16, 16, 16)
    seed = Seed("NIfTI", "a.nii", nifti_bytes(values), "mri")
    assert outcome(tmp_path, seed, seed.data) == "not-finite"


def test_percentiles_of_a_volume_with_few_values_that_are_not_zero(tmp_path):
    pixels = np.zeros((1, 8, 8, 8), np.float32)
    pixels[0, 3, 3, 3:5] = 5, 9
    values = model_values(Sample(tmp_path, pixels), MODALITIES["mri"])
    assert (values.min(), values.max()) == (0, 1)


def test_a_sequence_that_ends_within_an_item(tmp_path):
    seed = seed_named("frames.dcm")
    at = seed.data.index(b"\x20\x00\x13\x91")  # a frame's position
    damaged = nifti(seed.data, at + 8, (3).to_bytes(4, "little"))
    assert outcome(tmp_path, seed, damaged) == "no-geometry"


def test_pages_of_a_tiff_in_a_circle(tmp_path):
    data = slide_bytes("zlib")
    entries = int.from_bytes(data[8:10], "little")
    circle = nifti(data, 10 + 12 * entries, (8).to_bytes(4, "little"))
    assert outcome(tmp_path, seed_named("flat.tif"), circle) == "read", "the first page is there"


def test_a_record_named_by_what_can_not_be_written(tmp_path):
    lines = (
        b'{"id": "a\\u0000", "text": "Clear."}\n{"id": "\\ud800", "text": "Clear."}\n{"id": "c", "text": "Clear."}\n'
    )
    assert outcome(tmp_path / "0", seed_named("reports.jsonl"), lines) == "read"
    rows = b"id,text\n\xff,Clear.\n"
    assert outcome(tmp_path / "1", seed_named("reports.csv"), rows) == "empty"


def test_a_file_of_bad_lines_only_is_given_up(tmp_path):
    seed = seed_named("reports.jsonl")
    assert outcome(tmp_path, seed, b"\n" * (MOST_REJECTED + 2) + seed.data) == "damaged"


def test_a_film_is_looked_at_in_reduced_size():
    small = np.full((64, 64), 60.0, np.float32)
    small[:, 28:36] = 20.0
    small[:10] = 200.0
    assert looks_inverted(small)
    assert looks_inverted(small.repeat(70, axis=0).repeat(70, axis=1))


def test_a_slice_whose_values_are_not_numbers_is_named(tmp_path):
    seed = seed_named("plain-3.dcm")
    damaged = seed.data.replace(b"\x28\x00\x53\x10DS\x04\x001.0 ", b"\x28\x00\x53\x10DS\x04\x00nan ")
    verdict = judge(tmp_path, seed, damaged)
    assert verdict.kind == "not-finite" and "plain-3.dcm" in verdict.reason


def test_a_position_that_is_not_a_number(tmp_path):
    seed = seed_named("plain.nii")
    assert outcome(tmp_path, seed, nifti(seed.data, 292, b"\0\0\xc0\x7f")) == "no-geometry"


@pytest.mark.parametrize("written", [b"US\0\0", b"US\x04\0\0\0\1\0"])
def test_a_padding_value_that_is_none_or_two(written, tmp_path):
    seed = seed_named("white.dcm")
    damaged = seed.data.replace(b"\x28\x00\x20\x01US\x02\0\0\0", b"\x28\x00\x20\x01" + written)
    assert damaged != seed.data
    assert outcome(tmp_path, seed, damaged) == "read"
