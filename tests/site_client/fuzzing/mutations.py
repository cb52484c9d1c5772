"""The mutations of files by number: bombs, harmless edits, and damage of every kind, the same for the same seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from random import Random

from tests.site_client.fuzzing.bombs import BOMBS, bomb, harmless, harmless_seeds
from tests.site_client.fuzzing.edits import altered
from tests.site_client.fuzzing.seeds import Format, Seed, seeds

BOMB_EVERY, HARMLESS_EVERY = 100, 25
SHARES: dict[Format, int] = {"DICOM": 32, "NIfTI": 20, "PNG": 12, "JPEG": 10, "TIFF": 13, "slide": 4, "text": 9}
ENDINGS: dict[str, Format] = {
    ".dcm": "DICOM", ".nii": "NIfTI", ".nii.gz": "NIfTI", ".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG",
    ".tif": "TIFF", ".tiff": "TIFF", ".svs": "slide", ".jsonl": "text", ".csv": "text", ".txt": "text",
}  # fmt: skip
_MODALITIES: dict[Format, str] = {"DICOM": "xray", "NIfTI": "ct", "slide": "pathology", "text": ""}
LARGEST_EXTRA = 4 << 20  # bytes of a file that somebody gives as a further seed


@dataclass(frozen=True)
class Mutation:
    """`data` in place of the seed's file, after `edit`; `whole` ones must be read."""

    edit: str
    seed: Seed
    data: bytes
    whole: bool = False


class Fuzzer:
    """Whole seeds have numbers below zero; `extra` are further seeds, of which then all mutations are."""

    def __init__(self, seed: int, extra: Sequence[Seed] = ()) -> None:
        self.seed, self.extra = seed, tuple(extra)

    @cached_property
    def seeds(self) -> tuple[Seed, ...]:
        return self.extra or seeds()

    @cached_property
    def formats(self) -> dict[Format, list[Seed]]:
        return {name: found for name in SHARES if (found := [one for one in self.seeds if one.format == name])}

    def numbers(self, count: int) -> range:
        return range(0 if self.extra else -len(self.seeds), count)

    def mutation(self, number: int) -> Mutation:
        if number < 0:
            return Mutation("none", self.seeds[number], self.seeds[number].data, whole=True)
        random = Random(f"{self.seed} {number}")
        if not self.extra and number % BOMB_EVERY == 0:
            return Mutation("bomb", *bomb(number // BOMB_EVERY % len(BOMBS)))
        if not self.extra and number % HARMLESS_EVERY == 1:
            seed = random.choice(harmless_seeds())
            return Mutation("harmless", seed, harmless(seed, random), whole=True)
        (name,) = random.choices(list(self.formats), [SHARES[one] for one in self.formats])
        seed = random.choice(self.formats[name])
        edit, data = altered(seed, random)
        return Mutation(edit, seed, data)


def extra_seeds(folder: Path) -> list[Seed]:
    """A seed of every small file under `folder` that ends as one of the formats; masks are taken for images."""
    found = []
    for path in sorted(folder.rglob("*")):
        ending = next((one for one in sorted(ENDINGS, key=len, reverse=True) if path.name.lower().endswith(one)), "")
        if ending and path.is_file() and path.stat().st_size <= LARGEST_EXTRA:
            name = ENDINGS[ending]
            use = "text" if name == "text" else "image"
            modality = _MODALITIES.get(name, "xray")
            found.append(Seed(name, f"a{ending}", path.read_bytes(), modality, use))  # type: ignore[arg-type]
    return found
