"""BSDS500, CamVid, Cityscapes, Oxford pets and Stanford dogs from small trees made here, whole and damaged."""

import zlib

import numpy as np
import pytest
import scipy.io
from PIL import Image

from jbilevel.data import IGNORED, bsds500, camvid, cityscapes, oxford_pets, stanford_dogs
from jbilevel.data.matlab import read_mat

rng = np.random.default_rng(0)
PHOTO = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
LUMA = np.array([0.299, 0.587, 0.114])


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def cells(entries):
    array = np.empty((1, len(entries)), object)
    array[0, :] = entries
    return array


def truncate(path, keep=0.5):
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])


# --- BSDS500

OUTLINES = rng.integers(0, 2, (3, 6, 8), dtype=np.uint8)


@pytest.fixture
def bsds(tmp_path):
    for split, names in (("train", ("22", "100")), ("val", ("3",)), ("test", ("4",))):
        for name in names:
            save(tmp_path / f"images/{split}/{name}.jpg", np.full((6, 8, 3), int(name), np.uint8), quality=100)
            drawn = cells([{"Boundaries": o, "Segmentation": o.astype(np.uint16)} for o in OUTLINES])
            path = tmp_path / f"groundTruth/{split}/{name}.mat"
            path.parent.mkdir(parents=True, exist_ok=True)
            scipy.io.savemat(path, {"groundTruth": drawn}, do_compression=True)
        (tmp_path / f"images/{split}/Thumbs.db").write_bytes(b"x")
    return tmp_path


def test_bsds500(bsds):
    assert [len(bsds500(bsds, split)) for split in ("train", "val", "test")] == [2, 1, 1]
    photo = bsds500(bsds, "val", boundaries=True)[0]
    np.testing.assert_allclose(photo.image, np.full((6, 8), 3 / 255), atol=1 / 255)
    assert photo.image.dtype == np.float32 and photo.name == "3.jpg"
    np.testing.assert_array_equal(photo.boundaries, OUTLINES)
    assert photo.boundaries.dtype == np.uint8
    assert [p.name for p in bsds500(bsds)] == ["100.jpg", "22.jpg"] and bsds500(bsds, limit=1)[0].name == "100.jpg"
    assert bsds500(bsds, grey=False)[0].image.shape == (3, 6, 8) and bsds500(bsds)[0].boundaries is None


@pytest.mark.parametrize("folder", ["BSDS500/data", "BSR/BSDS500/data"])
def test_bsds500_as_it_is_distributed(bsds, tmp_path_factory, folder):
    root = tmp_path_factory.mktemp("archive")
    (root / folder).parent.mkdir(parents=True)
    bsds.rename(root / folder)
    assert len(bsds500(root)) == 2


def test_outlines_that_do_not_fit_are_named(bsds):
    save(bsds / "images/val/3.jpg", PHOTO[:5])
    with pytest.raises(ValueError, match=r"3\.jpg has \(5, 8\) pixels, but .*3\.mat has \(6, 8\)"):
        bsds500(bsds, "val", boundaries=True)[0]
    (bsds / "groundTruth/train/22.mat").unlink()
    with pytest.raises(ValueError, match="no counterpart in groundTruth/train, such as 22.jpg"):
        bsds500(bsds, boundaries=True)


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.7, 0.95])
def test_damaged_matlab_files_are_named(bsds, keep):
    truncate(bsds / "groundTruth/val/3.mat", keep)
    with pytest.raises(ValueError, match=r"3\.mat is damaged, .*no MATLAB file"):
        bsds500(bsds, "val", boundaries=True)[0]


@pytest.mark.parametrize("content", [{"other": 1}, {"groundTruth": np.eye(3)}, {"groundTruth": cells([{"a": 1}])}])
def test_matlab_files_of_another_form_are_named(bsds, content):
    scipy.io.savemat(bsds / "groundTruth/val/3.mat", content)
    with pytest.raises(ValueError, match=r"3\.mat has no"):
        bsds500(bsds, "val", boundaries=True)[0]


def test_matlab_files_that_unpack_to_too_much_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "bomb.mat"
    scipy.io.savemat(path, {"a": np.zeros(1_000_000, np.uint8)}, do_compression=True)
    assert path.stat().st_size < 5000
    assert read_mat(path, ("a",))["a"].size == 1_000_000
    monkeypatch.setattr(scipy.io, "loadmat", lambda *a, **k: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=r"bomb\.mat .*more than 999999 bytes"):
        read_mat(path, ("a",), max_bytes=999_999)
    header = path.read_bytes()[:128]
    path.write_bytes(header + (14).to_bytes(4, "little") + (2**31).to_bytes(4, "little") + bytes(100))
    with pytest.raises(ValueError, match="ends early"):
        read_mat(path, ("a",))
    path.write_bytes(header + (15).to_bytes(4, "little") + (99).to_bytes(4, "little") + zlib.compress(bytes(9))[:-9])
    with pytest.raises(ValueError, match=r"bomb\.mat is damaged"):
        read_mat(path, ("a",))


# --- CamVid and Cityscapes


@pytest.fixture
def streets(tmp_path):
    for split, n in (("train", 3), ("val", 1), ("test", 2)):
        for k in range(n):
            save(tmp_path / split / f"0001TP_{k}.png", PHOTO)
            save(
                tmp_path / f"{split}annot" / f"0001TP_{k}.png",
                ((np.arange(48) + k) % 12).reshape(6, 8).astype(np.uint8),
            )
    return tmp_path


def test_camvid(streets):
    assert [len(camvid(streets, split)) for split in ("train", "val", "test")] == [3, 1, 2]
    sample = camvid(streets)[1]
    np.testing.assert_allclose(sample.image, np.moveaxis(PHOTO, -1, 0) / 255, atol=1e-7)
    expected = ((np.arange(48) + 1) % 12).reshape(6, 8)
    np.testing.assert_array_equal(sample.labels, np.where(expected == 11, IGNORED, expected))
    assert sample.image.dtype == np.float32 and sample.labels.dtype == np.uint8 and sample.name == "0001TP_1.png"
    assert len(camvid(streets).classes) == 11 and len(camvid(streets, limit=2)) == 2


def test_nothing_is_read_before_it_is_asked_for(streets):
    for path in streets.glob("train*/*_2.png"):
        path.write_bytes(b"")
    samples = camvid(streets)
    assert len(samples[:2][1].labels) == 6
    with pytest.raises(ValueError, match=r"0001TP_2\.png is damaged"):
        samples[2]


def test_labels_may_have_a_palette(streets):
    label = Image.open(streets / "valannot/0001TP_0.png")
    expected = np.asarray(label)
    label = label.copy()
    label.putpalette(rng.integers(0, 256, 768, dtype=np.uint8).tobytes())
    assert label.mode == "P"
    label.save(streets / "valannot/0001TP_0.png")
    np.testing.assert_array_equal(camvid(streets, "val")[0].labels, np.where(expected == 11, IGNORED, expected))


@pytest.mark.parametrize(
    "labels, message",
    [
        (np.full((6, 8), 12, np.uint8), "has the label 12"),
        (PHOTO, "kind RGB: labels are one number"),
        (np.zeros((6, 8), np.uint16), "labels are one number"),
        (np.zeros((8, 6), np.uint8), r"but .*valannot.* has \(8, 6\)"),
    ],
)
def test_wrong_labels_are_named(streets, labels, message):
    save(streets / "valannot/0001TP_0.png", labels)
    with pytest.raises(ValueError, match=rf"0001TP_0\.png.*{message}"):
        camvid(streets, "val")[0]


def test_labels_without_images_are_named(streets):
    (streets / "train/0001TP_1.png").unlink()
    with pytest.raises(ValueError, match=r"trainannot have no counterpart in train, such as 0001TP_1\.png"):
        camvid(streets)


def test_large_pictures_are_refused(streets):
    with pytest.raises(ValueError, match="max_pixels"):
        camvid(streets, max_pixels=47)[0]


@pytest.fixture
def cities(tmp_path):
    for split, names in (("train", ("aachen_000001_000019", "bochum_000000_000313")), ("val", ("frankfurt_0_1",))):
        for name in names:
            city = name.partition("_")[0]
            save(tmp_path / f"leftImg8bit/{split}/{city}/{name}_leftImg8bit.png", PHOTO)
            ids = tmp_path / f"gtFine/{split}/{city}/{name}_gtFine_labelIds.png"
            save(ids, np.resize(np.arange(34, dtype=np.uint8), (6, 8)))
            save(ids.with_name(f"{name}_gtFine_color.png"), PHOTO)
    return tmp_path


def test_cityscapes(cities):
    samples = cityscapes(cities)
    assert len(samples) == 2 and samples[1].name == "bochum_000000_000313_leftImg8bit.png"
    assert len(cityscapes(cities, "val")) == 1
    labels = samples[0].labels.ravel()[:34].tolist()
    named = {samples.classes[k]: i for i, k in enumerate(labels) if k != IGNORED}
    assert len(named) == 19 and labels[:7] == [IGNORED] * 7
    some = {"road": 7, "sidewalk": 8, "building": 11, "pole": 17, "sky": 23, "person": 24, "car": 26, "bicycle": 33}
    assert some.items() <= named.items() and "caravan" not in named
    np.testing.assert_allclose(samples[0].image, np.moveaxis(PHOTO, -1, 0) / 255, atol=1e-7)


def test_ids_that_cityscapes_does_not_have_are_refused(cities):
    path = cities / "gtFine/val/frankfurt/frankfurt_0_1_gtFine_labelIds.png"
    save(path, np.full((6, 8), 34, np.uint8))
    with pytest.raises(ValueError, match="labelIds.png has the label 34"):
        cityscapes(cities, "val")[0]
    path.unlink()
    with pytest.raises(ValueError, match="frankfurt_0_1_leftImg8bit.png"):
        cityscapes(cities, "val")


# --- pets

LIST = "#Image CLASS-ID SPECIES BREED ID\nAbyssinian_100 1 1 1\nAbyssinian_101 1 1 1\nyorkshire_terrier_9 37 2 25\n"


@pytest.fixture
def pets(tmp_path):
    for name in ("Abyssinian_100", "Abyssinian_101", "yorkshire_terrier_9", "Bengal_1"):
        save(tmp_path / f"images/{name}.jpg", np.full((6, 8, 3), 128, np.uint8))
        save(tmp_path / f"annotations/trimaps/{name}.png", np.resize(np.array([1, 2, 3], np.uint8), (6, 8)))
    (tmp_path / "annotations/trainval.txt").write_text(LIST)
    (tmp_path / "annotations/test.txt").write_text("Bengal_1 6 1 5\n")
    return tmp_path


def test_oxford_pets(pets):
    samples = oxford_pets(pets)
    assert len(samples) == 3 and len(oxford_pets(pets, "test")) == 1 and len(oxford_pets(pets, limit=2)) == 2
    pet = samples[2]
    assert (pet.name, pet.label, samples.classes[36]) == ("yorkshire_terrier_9.jpg", 36, "yorkshire_terrier")
    assert samples[0].label == 0 and samples.classes[0] == "Abyssinian" and len(samples.classes) == 37
    np.testing.assert_allclose(pet.image, np.full((3, 6, 8), 128 / 255), atol=0.01)
    np.testing.assert_array_equal(pet.labels, np.resize([1, 0, IGNORED], (6, 8)))
    assert pet.labels.dtype == np.uint8 and oxford_pets(pets, "test")[0].label == 5


@pytest.mark.parametrize(
    "text, message",
    [
        ("Abyssinian_100 1 1\n", "line 1"),
        ("Abyssinian_100 1 1 1\nAbyssinian_101 38 1 1\n", "line 2"),
        ("Abyssinian_100 one 1 1\n", "line 1"),
        ("# nothing\n", "empty"),
        ("../../secret 1 1 1\n", "not below `root`"),
        (b"\xff\xfe\x00", "no list in UTF-8"),
    ],
)
def test_damaged_lists_of_pets_are_named(pets, text, message):
    (pets / "annotations/trainval.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=rf"trainval\.txt.*{message}"):
        oxford_pets(pets)


def test_damaged_pets_are_named(pets):
    save(pets / "annotations/trimaps/Abyssinian_100.png", np.zeros((6, 8), np.uint8))
    save(pets / "annotations/trimaps/Abyssinian_101.png", np.ones((6, 7), np.uint8))
    (pets / "images/yorkshire_terrier_9.jpg").unlink()
    samples = oxford_pets(pets)
    with pytest.raises(ValueError, match=r"Abyssinian_100\.png has values other"):
        samples[0]
    with pytest.raises(ValueError, match=r"Abyssinian_101\.jpg has \(6, 8\) pixels"):
        samples[1]
    with pytest.raises(FileNotFoundError, match="yorkshire_terrier_9.jpg"):
        samples[2]


DOGS = ("n02085620-Chihuahua/n02085620_7.jpg", "n02113978-Mexican_hairless/n02113978_1.jpg")


def dog_lists(folder, names=DOGS, labels=(1, 119)):
    folder.mkdir(exist_ok=True)
    listed = {"file_list": cells(list(names)).T, "labels": np.array(labels)[:, None]}
    for split in ("train", "test"):
        scipy.io.savemat(folder / f"{split}_list.mat", listed, do_compression=True)


@pytest.fixture
def dogs(tmp_path):
    for k, name in enumerate(DOGS):
        save(tmp_path / "Images" / name, np.full((6, 8, 3), 100 + 50 * k, np.uint8))
    dog_lists(tmp_path)
    return tmp_path


@pytest.mark.parametrize("inner", [False, True])
def test_stanford_dogs(dogs, inner):
    if inner:
        for path in list(dogs.glob("*.mat")):
            path.unlink()
        dog_lists(dogs / "lists")
    samples = stanford_dogs(dogs)
    assert len(samples) == 2 == len(stanford_dogs(dogs, "test")) and len(stanford_dogs(dogs, limit=1)) == 1
    assert [s.label for s in samples] == [0, 118] and samples[1].name == "n02113978_1.jpg"
    assert (samples.classes[0], samples.classes[118]) == ("Chihuahua", "Mexican_hairless")
    np.testing.assert_allclose(samples[1].image, np.full((3, 6, 8), 150 / 255), atol=0.01)


@pytest.mark.parametrize(
    "names, labels, message",
    [
        (DOGS, (1,), "2 names and 1 labels"),
        (DOGS, (0, 1), "expected one in 1, ..., 120"),
        (DOGS, (1, 121), "expected one in 1, ..., 120"),
        (("../../secret.jpg", DOGS[1]), (1, 2), "not below `root`"),
        (DOGS, (1, np.inf), "lists of names"),
        (DOGS, (1, np.nan), "lists of names"),
        (DOGS, (1, 2j), "lists of names"),
        (DOGS, (1, 2.5), "labels are whole numbers"),
        ((np.eye(2), DOGS[1]), (1, 2), "lists of names"),
    ],
)
def test_wrong_lists_of_dogs_are_named(dogs, names, labels, message):
    dog_lists(dogs, names, labels)
    with pytest.raises(ValueError, match=rf"train_list\.mat.*{message}"):
        stanford_dogs(dogs)


def test_a_missing_dog_or_list_is_named(dogs):
    (dogs / "Images" / DOGS[0]).unlink()
    with pytest.raises(FileNotFoundError, match="n02085620_7.jpg"):
        stanford_dogs(dogs)[0]
    (dogs / "test_list.mat").unlink()
    with pytest.raises(FileNotFoundError, match=r"test_list\.mat is missing(?s:.*)Chihuahua"):
        stanford_dogs(dogs, "test")
    truncate(dogs / "train_list.mat")
    with pytest.raises(ValueError, match=r"train_list\.mat is damaged"):
        stanford_dogs(dogs)


# --- all of them


@pytest.mark.parametrize(
    "reader, folder",
    [
        (bsds500, "images/train"),
        (camvid, "train"),
        (cityscapes, "leftImg8bit/train"),
        (oxford_pets, "images"),
        (stanford_dogs, "Images"),
    ],
)
def test_missing_folders_and_unknown_arguments(reader, folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.* is missing: `root` must be a folder with\n"):
        reader(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="is missing: `root`"):
        reader(tmp_path)
    (tmp_path / folder).mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="is missing: `root`"):
        reader(tmp_path)
    with pytest.raises(ValueError, match="`split` is 'dev': choose one of 'train"):
        reader(tmp_path, "dev")
    with pytest.raises(ValueError, match="`limit` is -1"):
        reader(tmp_path, limit=-1)


def test_empty_folders_are_named(tmp_path):
    for name in ("train", "trainannot", "leftImg8bit/train", "gtFine/train"):
        (tmp_path / name).mkdir(parents=True)
    for reader in (camvid, cityscapes):
        with pytest.raises(FileNotFoundError, match=r"\.png is missing"):
            reader(tmp_path)
