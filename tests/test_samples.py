"""What the readers share: sequences that read late, splits by patient, paths that stay below the root."""

import numpy as np
import pytest

from jbilevel.data import Samples, split_by_patient
from jbilevel.data.files import inside
from jbilevel.data.samples import paired


def counting(n):
    seen = []

    def read(key):
        seen.append(key)
        return key * 10

    return Samples(tuple(range(n)), read, ("a", "b")), seen


def test_entries_are_read_when_they_are_asked_for():
    samples, seen = counting(5)
    part = samples[1:4]
    assert len(samples) == 5 and len(part) == 3 and part.classes == ("a", "b") and not seen
    assert part[-1] == 30 and seen == [3]
    assert list(samples.select([4, 0])) == [40, 0] and seen == [3, 4, 0]
    assert next(iter(samples)) == 0 and len(seen) == 4  # not the whole list
    with pytest.raises(IndexError):
        samples[5]


def test_a_reader_that_raises_an_index_error_does_not_end_the_iteration_quietly():
    def read(key):
        raise IndexError("damaged")

    with pytest.raises(IndexError, match="damaged"):
        list(Samples((1, 2), read))


@pytest.mark.parametrize("seed", range(5))
def test_parts_share_no_patient_and_nothing_is_lost(seed):
    patients = np.random.default_rng(seed).integers(0, 20, 300).tolist()
    parts = split_by_patient(patients, (0.6, 0.3, 0.1), seed)
    assert sorted(sum(parts, [])) == list(range(300)) and all(part == sorted(part) for part in parts)
    people = [{patients[i] for i in part} for part in parts]
    assert [len(p) for p in people] == [12, 6, 2]
    assert not (people[0] & people[1] or people[0] & people[2] or people[1] & people[2])
    assert parts == split_by_patient(patients, (0.6, 0.3, 0.1), np.random.default_rng(seed))


def test_small_parts_get_a_patient_and_empty_ones_none():
    parts = split_by_patient("abcd", (0.98, 0.01, 0.01, 0.0), 0)
    assert [len(part) for part in parts] == [2, 1, 1, 0]
    assert len({tuple(split_by_patient("abcdefgh", (0.5, 0.5), seed)[0]) for seed in range(10)}) > 3


@pytest.mark.parametrize("fractions", [(0.5, 0.4), (1.5, -0.5), (np.nan, 1.0), [[1.0]]])
def test_shares_that_do_not_add_up_are_refused(fractions):
    with pytest.raises(ValueError, match="fractions"):
        split_by_patient("abc", fractions, 0)


def test_more_parts_than_patients_are_refused():
    with pytest.raises(ValueError, match="2 different patients"):
        split_by_patient("aabb", (0.5, 0.25, 0.25), 0)


@pytest.mark.parametrize("name", ["../secret", "a/../../b", "/etc/passwd", "a\\..\\b", "a\0b"])
def test_lists_cannot_name_files_elsewhere(tmp_path, name):
    with pytest.raises(ValueError, match="list.txt names the file .* not below `root`"):
        inside(tmp_path, name, "list.txt")


def test_pairs_follow_the_names(tmp_path):
    images, labels = ({k: tmp_path / f"{k}.{ending}" for k in "ba"} for ending in ("jpg", "png"))
    assert [p[1].name for p in paired(images, labels, "x", "y")] == ["a.png", "b.png"]
    del labels["a"]
    with pytest.raises(ValueError, match="1 of the 2 files in x have no counterpart in y, such as a.jpg"):
        paired(images, labels, "x", "y")
    with pytest.raises(ValueError, match="1 of the 2 files in y have no counterpart in x, such as a.jpg"):
        paired(labels, images, "x", "y")
