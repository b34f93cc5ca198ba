"""Tars by their headers: what the standard library reads is read, and what it loses unnoticed is named."""

from __future__ import annotations

import io
import random
import tarfile

import pytest

from data_pipeline.tars import Defect, Sample, samples, scan

SIZES = {"source0.png": 3000, "source1.png": 700, "target.png": 2500, "json": 100}


def made(count: int = 12, form: int = tarfile.USTAR_FORMAT, folder: str = "") -> bytes:
    """A tar of triplets."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for i in range(count):
            for name, size in SIZES.items():
                entry = tarfile.TarInfo(f"{folder}{i:04d}.{name}")
                entry.size = size
                tar.addfile(entry, io.BytesIO(random.Random(f"{i}{name}").randbytes(size)))
    return buffer.getvalue()


def read(data: bytes) -> tuple[list[Sample], list[Defect]]:
    """Samples and defects of a tar."""
    found = list(samples(scan(io.BytesIO(data), len(data))))
    return [f for f in found if isinstance(f, Sample)], [f for f in found if isinstance(f, Defect)]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_format_of_the_standard_library_is_read_with_long_names(form: int) -> None:
    folder = "d" * 90 + "/" + "e" * 60 + "/"
    data = made(5, form, folder)
    good, defects = read(data)
    assert not defects and [sample.key for sample in good] == [f"{folder}{i:04d}" for i in range(5)]
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        expected = {entry.name: (entry.offset_data, entry.size) for entry in tar}
    assert {m.name: (m.offset, m.size) for s in good for m in s.members.values()} == expected


def mutated(data: bytes, kind: str, rng: random.Random) -> bytes:
    """The tar with one damage."""
    page = rng.randrange(0, len(data), 4096)
    match kind:
        case "truncated":
            return data[: rng.randrange(len(data))]
        case "bit":
            at = rng.randrange(len(data))
            return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
        case "zeros":
            return data[:page] + bytes(len(data[page : page + 4096])) + data[page + 4096 :]
        case "hole":
            return data[:page] + data[page + rng.randrange(1, 3000) :]
    return b"<html><body>404</body></html>" + data[: rng.randrange(2000)]


@pytest.mark.parametrize("kind", ["truncated", "bit", "zeros", "hole", "html"])
def test_no_damage_loses_a_sample_silently_or_crosses_two(kind: str) -> None:
    data = made()
    whole = {sample.key: sample for sample in read(data)[0]}
    for seed in range(60):
        damaged = mutated(data, kind, random.Random(f"{kind}{seed}"))
        good, defects = read(damaged)
        for sample in good:
            assert sample.key in whole
            assert "json" not in sample.members or set(sample.members) == set(SIZES)  # ours ends with its JSON
        complete = [sample for sample in good if set(sample.members) == set(SIZES)]
        assert len(complete) == len(whole) or defects or len(good) > len(complete)


def test_members_behind_zeros_and_behind_a_bad_header_are_found_again() -> None:
    data, sample = made(6), sum(512 + -(-size // 512) * 512 for size in SIZES.values())
    for block, reason in ((bytes(512), "zeros_inside"), (b"x" * 512, "bad_header")):
        good, defects = read(data[: 2 * sample] + block + data[2 * sample + 512 :])
        assert [d.reason for d in defects] == [reason, "damaged_sample", "damaged_sample"]
        assert [s.key for s in good] == ["0000", "0003", "0004", "0005"]


def one(name: str, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A tar of one empty member."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        entry = tarfile.TarInfo(name)
        entry.type, entry.linkname = kind, "elsewhere"
        tar.addfile(entry)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (one("../../etc/x.png"), "unsafe_name"),
        (one("/abs/x.png"), "unsafe_name"),
        (one("a\nb.png"), "unsafe_name"),
        (one("x"), "no_extension"),
        (one(".hidden"), "no_extension"),
        (one("x.png", tarfile.SYMTYPE), "not_a_file"),
        (one("x.png", tarfile.CHRTYPE), "not_a_file"),
        (one("x.png") + one("x.png"), "zeros_inside"),
        (one("x.png")[:512], "no_end"),
    ],
)
def test_what_no_sample_should_be_made_of_is_named(data: bytes, reason: str) -> None:
    assert reason in [defect.reason for defect in read(data)[1]]


def test_a_key_that_comes_again_and_a_member_that_repeats_are_no_samples() -> None:
    first, second = made(3), made(1)
    good, defects = read(first[: -2 * 512] + second)
    assert "scattered_sample" in [d.reason for d in defects] and "0000" not in [s.key for s in good]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for _ in range(2):
            tar.addfile(tarfile.TarInfo("a.png"))
    assert [d.reason for d in read(buffer.getvalue())[1]] == ["repeated_member"]


def test_a_huge_extended_header_is_not_read() -> None:
    entry = tarfile.TarInfo("././@LongLink")
    entry.type, entry.size = tarfile.GNUTYPE_LONGNAME, 1 << 31

    class Sparse(io.RawIOBase):
        """A header and two gigabytes that must not be read at once."""

        at = 0

        def seek(self, offset: int, whence: int = 0) -> int:
            self.at = offset
            return offset

        def read(self, size: int = -1) -> bytes:
            assert 0 <= size <= 1 << 21
            return (
                (entry.tobuf(tarfile.GNU_FORMAT) if self.at == 0 else bytes(512))[:512] if size == 512 else bytes(size)
            )

    first = next(iter(scan(Sparse(), (1 << 31) + 512)))
    assert isinstance(first, Defect) and first.reason == "bad_header" and "extended header" in first.detail
